"""Streams in files, pipes and memory: ``open``, writer and reader, and the one-shots."""

from __future__ import annotations

import os
from collections.abc import Mapping
from mmap import mmap as MappedMemory  # noqa: N812
from typing import Any, Literal, Unpack, overload

from kvtc_stream.backends.select import get_backend
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.formats import (
    Limits,
)
from kvtc_stream.io.dlpack import BackendName
from kvtc_stream.io.sources import Source
from kvtc_stream.io.steps import Steps, run
from kvtc_stream.io.storage import File
from kvtc_stream.stream.codec import Codec
from kvtc_stream.stream.encoder import Encoder
from kvtc_stream.stream.options import EncoderOptions, ReaderOptions, SourceOptions
from kvtc_stream.stream.reader import Reader
from kvtc_stream.stream.writer import Writer


@overload
def open(
    file: Source,
    mode: Literal["rb"] = "rb",
    *,
    calibration: Calibration,
    **options: Unpack[ReaderOptions],
) -> Reader: ...
@overload
def open(
    file: File,
    mode: Literal["ab"],
    *,
    codec: Codec,
    limits: Limits | None = None,
    recover: bool = False,
    **options: Unpack[EncoderOptions],
) -> Writer: ...
@overload
def open(
    file: File, mode: Literal["wb"], *, codec: Codec, **options: Unpack[EncoderOptions]
) -> Writer: ...
def open(
    file: Source,
    mode: str = "rb",
    *,
    calibration: Calibration | None = None,
    codec: Codec | None = None,
    **options: Any,
) -> Reader | Writer:
    """Open a stream for reading (``"rb"``, with ``calibration``) or writing (``codec``).

    ``file`` is a path or a binary file object; pipes work both ways. File objects are left open.
    Reading takes memory too (``bytes``, ``memoryview``, ``mmap``), and URLs that fsspec knows, as
    ``s3://bucket/prompt.kvtc``: opening one takes three requests, and neighbouring blocks one more
    for each 8 MiB of them. ``bytes`` and read-only views are read where they are, and may not
    change meanwhile; other memory is copied first.

    Reading with ``mmap=True`` maps a path into memory; nobody may shorten the file meanwhile. With
    ``follow``, a stream that is still being written is read from the front as it grows, until its
    end, or until nothing came for so many seconds, which is a ``TruncatedError``.

    ``"wb"`` writes a new stream. A path is written atomically: it appears when the writer closes
    without an exception; what a writer that was killed had written is in ``.NAME.partial`` beside
    it. ``"ab"`` continues a stream with the codec that it was written with, or
    writes a new one to a path where none is: the blocks are those of one uninterrupted run. The
    bytes that are there stay as they are, so that readers which are open go on; an exception cuts
    off what was added. Until the new end is whole, opening the stream is a ``TruncatedError``,
    and ``recover=True`` reads its whole blocks, at least those of the old end. A file object must
    be one to read, write and seek in.

    ``recover`` reads or continues what a stream that was cut off still holds, up to its last whole
    block. With a ``key``, a reader of a file refuses what was not written with it
    (``AuthenticationError``). The other arguments are those of :class:`kvtc_stream.Encoder`.
    """
    if mode not in ("rb", "wb", "ab"):
        raise ValueError(f"mode must be 'rb', 'wb' or 'ab', found {mode!r}")
    if mode == "rb":
        if codec is not None and calibration is None:
            calibration = codec.calibration
        _refuse(options, _FOR_WRITING, "writing")
        if calibration is None:
            raise TypeError("reading takes calibration=kvtc_stream.Calibration.load(...)")
        return Reader(file, calibration, **options)
    if codec is None:
        raise TypeError("writing takes codec=kvtc_stream.Codec(calibration, ...)")
    if calibration is not None:
        raise TypeError("calibration= is for reading: the codec has its own")
    if isinstance(file, bytes | bytearray | memoryview | MappedMemory):
        raise TypeError(f"writing takes a path or a file object, found {type(file).__name__}")
    _refuse(options, {"backend", "mmap", "follow"}, "reading")
    if mode == "wb":
        _refuse(options, {"limits", "recover"}, "reading and appending")
        return Writer(file, codec, **options)
    how: SourceOptions = {
        "limits": options.pop("limits", None),
        "recover": options.pop("recover", False),
        "key": options.get("key", b""),
    }
    there = not isinstance(file, str | os.PathLike) or os.path.exists(file)
    return Writer(file, codec, append=how if there else None, **options)


_FOR_WRITING = set(EncoderOptions.__annotations__) - {"key"}


def _refuse(options: Mapping[str, Any], names: set[str], purpose: str) -> None:
    if wrong := sorted(names & options.keys()):
        raise TypeError(f"{', '.join(f'{name}=' for name in wrong)}: only for {purpose}")


def encode(
    k: Any,
    v: Any,
    codec: Codec,
    *,
    positions: Any = None,
    **options: Unpack[EncoderOptions],
) -> bytes:
    """A whole cache to a whole stream.

    Equivalent to one :meth:`Encoder.encode` and :meth:`Encoder.finish` of
    ``Encoder(codec, **options)``.
    """
    return run(encoding(k, v, codec, positions=positions, **options))


def encoding(
    k: Any,
    v: Any,
    codec: Codec,
    *,
    positions: Any = None,
    **options: Unpack[EncoderOptions],
) -> Steps[bytes]:
    """:func:`encode`, for those who do something else while a device works."""
    chunk = {"k": k, "v": v, "positions": positions, "last": True}
    return (yield from Encoder(codec, **options).whole([chunk]))


def decode(
    data: bytes | bytearray | memoryview,
    calibration: Calibration,
    *,
    out: tuple[Any, Any] | None = None,
    section: int = 0,
    backend: BackendName = "auto",
    limits: Limits | None = None,
) -> tuple[Any, Any]:
    """A whole stream to a whole cache, K and V [layers, kv_heads, tokens, head_dim].

    Equivalent to :meth:`Reader.read` of everything; ``"auto"`` is CUDA where ``out`` is on a CUDA
    device.
    """
    coding = get_backend(backend, *(() if out is None else out))
    with (
        coding.sending([data]),
        open(data, calibration=calibration, backend=coding.name, limits=limits) as reader,
    ):
        return reader.read(section=section, out=out)
