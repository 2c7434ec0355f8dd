"""Weight files: read, checked against a network, and written."""
