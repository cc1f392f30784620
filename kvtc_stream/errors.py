"""What can go wrong with a stream, a calibration or a backend.

Wrong arguments are plain ``TypeError`` and ``ValueError``; a DLPack device that cannot be read is
``BufferError``. Everything else derives from :class:`KVTCError`. A message says what was found,
what was expected and what to do.
"""

from __future__ import annotations

import sys
import warnings


class KVTCError(Exception):
    """Base of every error this package raises on its own account.

    Attributes
    ----------
    index
        In a batch, which of the streams or caches it is about, from 0; ``None`` if that is not
        known, or there is no batch.
    """

    index: int | None = None


class FormatError(KVTCError, ValueError):
    """The bytes are not a stream (or calibration file) that this reader accepts."""


class VersionError(FormatError):
    """The stream needs a newer reader, or a feature that this reader does not know."""


class ChecksumError(FormatError):
    """A checksum does not match: the bytes were changed after they were written."""


class TruncatedError(FormatError, EOFError):
    """The stream ends before its trailer: the write was cut off, or bytes are missing."""


class LimitError(FormatError):
    """A size in the stream exceeds :class:`kvtc_stream.formats.Limits`."""


class CalibrationMismatchError(KVTCError):
    """Stream, calibration and model do not belong together."""


class AuthenticationError(KVTCError):
    """The stream was not made with the key, or was changed by somebody who does not have it."""


class UnsupportedError(KVTCError):
    """A valid request that this version, calibration or backend cannot serve."""


class BackendUnavailableError(KVTCError):
    """The backend asked for cannot run here."""


class StateError(KVTCError):
    """The object is finished, closed, failed, or in use by somebody else."""


class KVTCWarning(UserWarning):
    """Something that costs ratio or accuracy and that the user can change."""


def warn(text: str) -> None:
    """Give a :class:`KVTCWarning` for the line outside this package that led to it."""
    level, frame = 2, sys._getframe(1)
    package = __name__.partition(".")[0]
    while frame.f_globals.get("__name__", "").partition(".")[0] == package and frame.f_back:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, KVTCWarning, stacklevel=level)
