"""Predictions and text from a finished run."""
