"""Hydra: composing configs, sweeps and their jobs."""
