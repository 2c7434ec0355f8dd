"""Data sets: what they hold, how rows are chosen, ordered, augmented and batched.

Every data set is a function that returns :class:`ImageData` or :class:`TextData`; a new one reads its files into a
:class:`RawDataset`, or a :class:`~kdlab.data.text.RawText`.
"""

from kdlab.data.audio.speech import spoken_digits
from kdlab.data.contract import DataModule, Modality, TrainingData
from kdlab.data.datasets.cifar import cifar10, cifar100
from kdlab.data.datasets.digits import digits
from kdlab.data.datasets.image_folder import image_folder
from kdlab.data.datasets.mnist import fashion_mnist, mnist
from kdlab.data.datasets.synthetic import synthetic
from kdlab.data.datasets.table import csv
from kdlab.data.datasets.tensors import tensors
from kdlab.data.loader import Loader, StreamLoader, TensorLoader
from kdlab.data.module import CLEAN, ImageData
from kdlab.data.raw import Files, RawDataset, Rows
from kdlab.data.text.build import text_data
from kdlab.data.text.datasets.arithmetic import arithmetic
from kdlab.data.text.datasets.corpora import shakespeare, text_files, wikitext
from kdlab.data.text.datasets.pairs import pairs
from kdlab.data.text.datasets.reasoning import cqa, gsm8k, svamp
from kdlab.data.text.datasets.traces import traces
from kdlab.data.text.module import TextData

__all__ = [
    "CLEAN",
    "DataModule",
    "Files",
    "ImageData",
    "Loader",
    "Modality",
    "RawDataset",
    "Rows",
    "StreamLoader",
    "TensorLoader",
    "TextData",
    "TrainingData",
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
