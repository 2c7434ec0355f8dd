"""Run folders: claimed, written, read, and their curves."""
