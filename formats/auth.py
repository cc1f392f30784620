"""Authentication with a shared key: readers with the key reject streams written without it.

The payload of an AUTH record is the SHA-256 of every record before it, and the HMAC-SHA-256 of
these, of the opening and of the index entries. So a reader checks one HMAC when it opens a stream,
and the digest of each record that it reads.
"""

from __future__ import annotations

import hashlib
import hmac

from kvtc_stream.errors import AuthenticationError

_DOMAIN = b"kvtc stream authentication 1\0"
_SIZE = 32


def digest(*pieces: bytes | memoryview) -> bytes:
    """SHA-256 of the bytes of ``pieces``."""
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def pack_auth(key: bytes, opening: bytes, entries: bytes, digests: bytes) -> bytes:
    """The payload of an AUTH record.

    Parameters
    ----------
    key
        The secret.
    opening
        :func:`digest` of preamble and header.
    entries, digests
        Index entries and digests of all records before this one.
    """
    message = b"".join((_DOMAIN, opening, digest(entries), digests))
    return digests + hmac.digest(key, message, "sha256")


def open_auth(payload: bytes, key: bytes, opening: bytes, entries: bytes) -> bytes:
    """Check the payload of an AUTH record; returns the records' digests. See :func:`pack_auth`.

    Raises
    ------
    AuthenticationError
        It was made with another key, or for something else.
    """
    expected = pack_auth(key, opening, entries, payload[:-_SIZE])
    if not hmac.compare_digest(payload, expected):
        raise AuthenticationError(
            "the stream was not made with this key, or was changed since: do not use it"
        )
    return payload[:-_SIZE]


def check_digest(digests: bytes, sequence: int, data: bytes | memoryview) -> None:
    """Raise ``AuthenticationError`` unless ``data`` is the record with this number."""
    expected = digests[_SIZE * sequence : _SIZE * (sequence + 1)]
    if not hmac.compare_digest(digest(data), expected):
        raise AuthenticationError(
            f"record {sequence} is not the one that was authenticated: do not use the stream"
        )
