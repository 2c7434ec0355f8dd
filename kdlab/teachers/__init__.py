"""Who a student learns from: frozen, cached, an ensemble, or its own past."""

from kdlab.teachers.cache.rows import Arrays, CachedTeacher, Manifest, check_manifest, dtype_for, write_cache
from kdlab.teachers.cache.token_files import TokenManifest, TokenWriter
from kdlab.teachers.cache.tokens import TokenCache, tail_mass, write_tokens
from kdlab.teachers.cross_tokenizer import CrossTokenizerTeacher
from kdlab.teachers.momentum import EMATeacher, MovingTeacher, SnapshotTeacher
from kdlab.teachers.teacher import EnsembleTeacher, FrozenTeacher, MultiTeacher, TasksTeacher, Teacher

__all__ = [
    "Arrays",
    "CachedTeacher",
    "CrossTokenizerTeacher",
    "EMATeacher",
    "EnsembleTeacher",
    "FrozenTeacher",
    "Manifest",
    "MovingTeacher",
    "MultiTeacher",
    "SnapshotTeacher",
    "TasksTeacher",
    "Teacher",
    "TokenCache",
    "TokenManifest",
    "TokenWriter",
    "check_manifest",
    "dtype_for",
    "tail_mass",
    "write_cache",
    "write_tokens",
]
