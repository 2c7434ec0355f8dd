"""Floor 2: who a student learns from: frozen, cached, an ensemble, or its own past."""

from kdlab.teachers.cache import Arrays, CachedTeacher, Manifest, check_manifest, dtype_for, write_cache
from kdlab.teachers.moving import EMATeacher, MovingTeacher, SnapshotTeacher
from kdlab.teachers.teacher import EnsembleTeacher, FrozenTeacher, Several, TasksTeacher, Teacher
from kdlab.teachers.token_files import TokenManifest, TokenWriter
from kdlab.teachers.tokens import TokenCache, tail_mass, write_tokens
from kdlab.teachers.unlike import UnlikeTeacher

__all__ = [
    "Arrays",
    "CachedTeacher",
    "EMATeacher",
    "EnsembleTeacher",
    "FrozenTeacher",
    "Manifest",
    "MovingTeacher",
    "Several",
    "SnapshotTeacher",
    "TasksTeacher",
    "Teacher",
    "TokenCache",
    "TokenManifest",
    "TokenWriter",
    "UnlikeTeacher",
    "check_manifest",
    "dtype_for",
    "tail_mass",
    "write_cache",
    "write_tokens",
]
