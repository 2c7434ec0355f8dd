"""Data sets: what they hold, how rows are chosen, ordered, augmented and batched.

Every data set is a function that returns :class:`ImageData`; a new one reads its files into a :class:`Source`.
"""

from kdlab.data.loader import Loader, StreamLoader, TensorLoader
from kdlab.data.module import CLEAN, ImageData
from kdlab.data.source import Files, Rows, Source
from kdlab.data.sources.cifar import cifar10, cifar100
from kdlab.data.sources.digits import digits
from kdlab.data.sources.folder import image_folder
from kdlab.data.sources.idx import fashion_mnist, mnist
from kdlab.data.sources.tabular import csv, synthetic, tensors

__all__ = [
    "CLEAN",
    "Files",
    "ImageData",
    "Loader",
    "Rows",
    "Source",
    "StreamLoader",
    "TensorLoader",
    "cifar10",
    "cifar100",
    "csv",
    "digits",
    "fashion_mnist",
    "image_folder",
    "mnist",
    "synthetic",
    "tensors",
]
