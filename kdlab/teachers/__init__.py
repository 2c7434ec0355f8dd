"""Floor 2: who a student learns from: frozen, cached, an ensemble, or its own past."""

from kdlab.teachers.cache import CachedTeacher, Manifest, check_manifest, dtype_for, write_cache
from kdlab.teachers.moving import EMATeacher, MovingTeacher, SnapshotTeacher
from kdlab.teachers.teacher import EnsembleTeacher, FrozenTeacher, Teacher
from kdlab.teachers.token_files import TokenManifest, TokenWriter
from kdlab.teachers.tokens import TokenCache, tail_mass, write_tokens
from kdlab.teachers.unlike import UnlikeTeacher

__all__ = [
    "CachedTeacher",
    "EMATeacher",
    "EnsembleTeacher",
    "FrozenTeacher",
    "Manifest",
    "MovingTeacher",
    "SnapshotTeacher",
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
