"""Distances between the outputs of two networks' layers, row by row."""
