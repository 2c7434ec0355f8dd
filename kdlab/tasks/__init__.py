"""Floor 2: what a task is; how a network reads a batch and what is measured."""

from kdlab.tasks.classification import Classification, Measures

__all__ = ["Classification", "Measures"]
