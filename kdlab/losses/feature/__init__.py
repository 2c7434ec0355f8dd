"""Terms on the outputs of layers inside teacher and student."""
