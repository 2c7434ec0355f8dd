"""What replaces the batches of training: attacks, synthesised inputs, strong augmentation, the student's own text."""

from kdlab.batch_transforms.attack import AttackedRows
from kdlab.batch_transforms.base import BatchTransform
from kdlab.batch_transforms.data_free import GeneratedRows, InvertedRows
from kdlab.batch_transforms.on_policy import GeneratedText
from kdlab.batch_transforms.strong_view import StrongViews

__all__ = ["AttackedRows", "BatchTransform", "GeneratedRows", "GeneratedText", "InvertedRows", "StrongViews"]
