"""Which examples a student gets wrong, and which its teacher got right."""
