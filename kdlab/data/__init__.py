"""Data sets: what they hold, how rows are chosen, ordered, augmented and batched.

Every data set is a function that returns :class:`ImageData` or :class:`TextData`; a new one reads its files into a
:class:`Source`, or a :class:`~kdlab.data.text.TextSource`.
"""

from kdlab.data.loader import Loader, StreamLoader, TensorLoader
from kdlab.data.module import CLEAN, ImageData
from kdlab.data.source import Files, Rows, Source
from kdlab.data.sources.cifar import cifar10, cifar100
from kdlab.data.sources.digits import digits
from kdlab.data.sources.folder import image_folder
from kdlab.data.sources.idx import fashion_mnist, mnist
from kdlab.data.sources.synthetic import synthetic
from kdlab.data.sources.table import csv
from kdlab.data.sources.tensors import tensors
from kdlab.data.text.arithmetic import arithmetic
from kdlab.data.text.combine import text_data
from kdlab.data.text.corpora import shakespeare, text_files, wikitext
from kdlab.data.text.module import TextData
from kdlab.data.text.pairs import pairs
from kdlab.data.text.reasoning import cqa, gsm8k, svamp
from kdlab.data.text.speech import spoken_digits
from kdlab.data.text.traces import traces

__all__ = [
    "CLEAN",
    "Files",
    "ImageData",
    "Loader",
    "Rows",
    "Source",
    "StreamLoader",
    "TensorLoader",
    "TextData",
    "arithmetic",
    "cifar10",
    "cifar100",
    "cqa",
    "csv",
    "digits",
    "fashion_mnist",
    "gsm8k",
    "image_folder",
    "mnist",
    "pairs",
    "shakespeare",
    "spoken_digits",
    "svamp",
    "synthetic",
    "tensors",
    "text_data",
    "text_files",
    "traces",
    "wikitext",
]
