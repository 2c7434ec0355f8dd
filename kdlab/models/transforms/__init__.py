"""Changes to a network: layers taken, heads replaced, adapters, auxiliary networks."""
