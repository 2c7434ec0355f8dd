"""Data sets of sound."""

from kdlab.data.audio.speech import spoken_digits

__all__ = ["spoken_digits"]
