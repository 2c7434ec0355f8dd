"""Runs side by side: table, pictures and page."""
