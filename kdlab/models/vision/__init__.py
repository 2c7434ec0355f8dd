"""Networks for pictures and tables."""
