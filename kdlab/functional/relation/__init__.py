"""Distances between how two networks relate the examples of a batch, or the channels of a layer."""
