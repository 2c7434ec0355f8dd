"""Terms on relations: between the examples of a batch, or the channels of a layer."""
