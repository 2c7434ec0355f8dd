"""How a network reads a batch, and what is measured of it."""

from kdlab.tasks.class_measures import ClassMeasures, TaskMeasures
from kdlab.tasks.classification import Classification
from kdlab.tasks.generation import pass_at_k, tokens_per_second
from kdlab.tasks.language import LanguageModeling, TokenMeasures
from kdlab.tasks.task import Measures, Task
from kdlab.tasks.text_to_text import TextToText

__all__ = [
    "ClassMeasures",
    "Classification",
    "LanguageModeling",
    "Measures",
    "Task",
    "TaskMeasures",
    "TextToText",
    "TokenMeasures",
    "pass_at_k",
    "tokens_per_second",
]
