"""Transformers of Hugging Face as networks of kdlab, and text generation with them."""
