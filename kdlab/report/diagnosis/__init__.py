"""Diagnosis of which examples a student gets wrong, and which of them its teacher got right."""
