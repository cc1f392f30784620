"""Pages: single blocks for key-value stores, each readable by itself."""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

from kvtc_stream.errors import (
    AuthenticationError,
    CalibrationMismatchError,
    FormatError,
    TruncatedError,
    VersionError,
)
from kvtc_stream.formats.block import Block, Role
from kvtc_stream.formats.checksum import Checksum, checksum, verify
from kvtc_stream.formats.features import PAGE_FEATURES, Feature, read_features, version_for
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.preamble import check_version
from kvtc_stream.formats.wire import ByteReader

PAGE_MAGIC = b"\x8bKVP\r\n\x1a\n"
_FIELDS = struct.Struct("<8sHHI32sHHIQ")
_CHECKSUM = struct.Struct("<Q")
_HEADER_SIZE = _FIELDS.size + _CHECKSUM.size
#: Bytes of a page beside its block.
PAGE_OVERHEAD = _HEADER_SIZE + _CHECKSUM.size
#: Bytes more of a sealed one.
SEAL_SIZE = 32
_SEALED = int(Feature.SEALED_PAGES)
_SEAL_DOMAIN = b"kvtc page seal 1\0"


def pack_page(
    block: Block, header: StreamHeader, *, key: bytes | None = None, identity: bytes = b""
) -> bytes:
    """Pack one block as a page; its required features are those that the block uses.

    With ``key`` the page is sealed, as the one that ``identity`` names.
    """
    block.check(header)
    features = _features(block, header, sealed=key is not None)
    payload = block.pack()
    size = sum(map(len, payload))
    fields = _FIELDS.pack(
        PAGE_MAGIC,
        *version_for(features),
        features,
        header.digest,
        block.section,
        0,
        Checksum.XXH3_64,
        size,
    )
    own = checksum(fields)
    end = checksum(*payload, seed=own)
    page = b"".join((fields, _CHECKSUM.pack(own), *payload, _CHECKSUM.pack(end)))
    return page if key is None else page + _seal(page, key, identity)


def unpack_page(
    data: bytes | bytearray | memoryview,
    header: StreamHeader,
    limits: Limits | None = None,
    *,
    key: bytes | None = None,
    identity: bytes = b"",
    proven: bool = False,
) -> Block:
    """Read the block of a page; bytes after the page, as in a slot of fixed size, are ignored.

    With ``key`` only a page is taken that was sealed with it as the one that ``identity`` names.
    Where these bytes are ``proven``, by :func:`outline`, that and the payload's checksum are known
    to be right.

    Raises
    ------
    FormatError
        These bytes are no page, or were changed.
    CalibrationMismatchError
        The page belongs under another header.
    AuthenticationError
        With ``key``: the page is not sealed, or with another key or as another page.
    """
    limits = limits or Limits()
    view = memoryview(data)
    if bytes(view[: len(PAGE_MAGIC)]) != PAGE_MAGIC[: len(view)]:
        raise FormatError(
            f"page, byte 0: expected {PAGE_MAGIC!r}, found {bytes(view[:8])!r}: this is no page"
        )
    if len(view) < _HEADER_SIZE:
        raise TruncatedError(f"page: {len(view)} bytes, its header has {_HEADER_SIZE}")
    _magic, major, minor, must, context, section, reserved, algorithm, size = _FIELDS.unpack_from(
        view
    )
    check_version(major, minor, "page")
    features = read_features(must, (major, minor), PAGE_FEATURES, "page")
    if algorithm != Checksum.XXH3_64:
        raise VersionError(
            f"page: checksum algorithm {algorithm}, this reader knows {Checksum.XXH3_64.value}; "
            "read with a newer kvtc-stream"
        )
    (own,) = _CHECKSUM.unpack_from(view, _FIELDS.size)
    verify(own, view[: _FIELDS.size], 0, "page, header")
    if reserved or section >= len(header.geometry.sections):
        raise FormatError(
            f"page: section {section} of {len(header.geometry.sections)}, reserved {reserved}: "
            "the writer is at fault"
        )
    expected = header.digest
    if context != expected:
        raise CalibrationMismatchError(
            f"the page was made under header {context.hex()}, found {expected.hex()}: calibration, "
            "plan, geometry, element types or block size differ; use the codec that made it"
        )
    limits.check("max_record_bytes", size, "page, payload length at byte 56")
    # What nobody can change after it was checked is not copied.
    if not isinstance(data, bytes):
        view = memoryview(bytes(view[: PAGE_OVERHEAD + size + SEAL_SIZE]))
    if proven:
        payload = view[_HEADER_SIZE : _HEADER_SIZE + size]
    else:
        payload = _open_payload(view, size, Feature.SEALED_PAGES in features, own, key, identity)
    reader = ByteReader(payload, "page", _HEADER_SIZE)
    block = Block.unpack(reader, section, header, limits, features)
    needed = _features(block, header, sealed=Feature.SEALED_PAGES in features)
    if features != needed:
        raise FormatError(
            f"page: required features are {features:#x}, its block needs {needed:#x}: the writer "
            "is at fault"
        )
    if block.role is not Role.DATA or block.start or any(block.cut):
        raise FormatError(
            f"page: the block has role {block.role.name}, starts at {block.start} and lacks "
            f"{block.cut} tokens, expected DATA, 0, (0, 0): the writer is at fault"
        )
    return block


class Outline(NamedTuple):
    """What the payload's checksum and the seal of a page are over, and what they should be.

    Attributes
    ----------
    begin, size, seed
        The payload, and the seed of its checksum.
    checksum
        The one that is stored.
    sealed
        Bytes that the seal is over, from the page's first on.
    seal
        The one that is stored; empty if none is asked for.
    """

    begin: int
    size: int
    seed: int
    checksum: int
    sealed: int
    seal: memoryview


def outline(data: bytes, *, sealed: bool) -> Outline | None:
    """The outline of a page, with the bytes that it speaks of; ``None`` if they are not all there.

    Nothing else is looked at: who finds both sums right says so to :func:`unpack_page`, which
    checks the rest. With ``sealed`` a page without a seal has no outline.
    """
    if len(data) < _HEADER_SIZE:
        return None
    _, _, _, must, _, _, _, _, size = _FIELDS.unpack_from(data)
    has_seal = must & _SEALED != 0
    end = _HEADER_SIZE + size
    covered = end + _CHECKSUM.size
    if len(data) < covered + SEAL_SIZE * has_seal or (sealed and not has_seal):
        return None
    (seed,) = _CHECKSUM.unpack_from(data, _FIELDS.size)
    (found,) = _CHECKSUM.unpack_from(data, end)
    seal = memoryview(data)[covered : covered + SEAL_SIZE] if sealed else memoryview(b"")
    return Outline(_HEADER_SIZE, size, seed, found, covered, seal)


def seal_prefix(identity: bytes) -> bytes:
    """What a seal is over before the page's bytes."""
    return _SEAL_DOMAIN + hashlib.sha256(identity).digest()


def own_bytes(data: bytes | bytearray | memoryview) -> bytes:
    """A page in memory that does not change: a copy, of no more than the page, if it may."""
    if isinstance(data, bytes):
        return data
    view = memoryview(data)
    size = int.from_bytes(view[_FIELDS.size - 8 : _FIELDS.size], "little")
    return bytes(view[: PAGE_OVERHEAD + size + SEAL_SIZE])


def _open_payload(
    view: memoryview, size: int, sealed: bool, seed: int, key: bytes | None, identity: bytes
) -> memoryview:
    """The payload of a page, once its checksum and, with ``key``, its seal are right."""
    end = _HEADER_SIZE + size
    whole = end + _CHECKSUM.size + (SEAL_SIZE if sealed else 0)
    if len(view) < whole:
        raise TruncatedError(f"page: {len(view)} bytes, expected {whole}: fetch it again")
    if key is not None and not sealed:
        raise AuthenticationError("page: it is not sealed, and a key was given: do not use it")
    payload = view[_HEADER_SIZE:end]
    (found,) = _CHECKSUM.unpack_from(view, end)
    verify(found, payload, seed, "page, payload")
    if key is not None:
        own_seal = _seal(view[: whole - SEAL_SIZE], key, identity)
        if not hmac.compare_digest(own_seal, view[whole - SEAL_SIZE : whole]):
            raise AuthenticationError(
                "page: it was sealed with another key or as another page: do not use it"
            )
    return payload


def _features(block: Block, header: StreamHeader, *, sealed: bool) -> Feature:
    own = block.features | header.features & Feature.AXES
    return own | Feature.SEALED_PAGES if sealed else own


def _seal(page: bytes | memoryview, key: bytes, identity: bytes) -> bytes:
    seal = hmac.new(key, seal_prefix(identity), "sha256")
    seal.update(page)  # not one message: that would be a copy of the page
    return seal.digest()
