"""From a mapping to an object: what a config may build, checked against signatures. Imports no torch."""
