"""Terms without a trained teacher: peers that train together, exits of one network, its own last steps."""
