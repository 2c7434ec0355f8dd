"""Floor 2: who a student learns from: frozen, cached, an ensemble, or its own past."""

from kdlab.teachers.cache import CachedTeacher, Manifest, check_manifest, dtype_for, write_cache
from kdlab.teachers.moving import EMATeacher, MovingTeacher, SnapshotTeacher
from kdlab.teachers.teacher import EnsembleTeacher, FrozenTeacher, Teacher

__all__ = [
    "CachedTeacher",
    "EMATeacher",
    "EnsembleTeacher",
    "FrozenTeacher",
    "Manifest",
    "MovingTeacher",
    "SnapshotTeacher",
    "Teacher",
    "check_manifest",
    "dtype_for",
    "write_cache",
]
