"""Terms on answers: logits of the student against logits, labels, or targets made of them."""
