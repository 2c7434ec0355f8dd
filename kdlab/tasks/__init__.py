"""Floor 2: what a task is; how a network reads a batch and what is measured."""

from kdlab.tasks.classification import Classification, ClassMeasures
from kdlab.tasks.task import Measures, Task

__all__ = ["ClassMeasures", "Classification", "Measures", "Task"]
