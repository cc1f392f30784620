"""Byte coders for symbols and verbatim values.

rANS, which codes symbols, and ``PLANES``, which codes verbatim values, are not of bytes: they are
in ``kvtc_stream.coding``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import lz4.block
import zstandard
from zlib_ng import zlib_ng

from kvtc_stream.errors import FormatError


class Coder(enum.IntEnum):
    """Coders; all but ``RANS`` and ``PLANES`` code bytes. The numbers are those of the stream."""

    STORED = 0
    DEFLATE = 1
    ZSTD = 2
    LZ4 = 3
    RANS = 4
    PLANES = 5


#: What can code symbols of bands with a scale per token.
BYTE_CODERS = (Coder.STORED, Coder.DEFLATE, Coder.ZSTD, Coder.LZ4)


# Packed symbols have skewed frequencies and hardly any repeats. Looking for matches at distance 1
# only is three times quicker than a full search and leaves 1-2 % fewer bytes, because the Huffman
# tables see purer statistics; memory level 9 makes Huffman blocks longer, so fewer tables.
_DEFLATE = {
    "level": 6,
    "wbits": -zlib_ng.MAX_WBITS,
    "memLevel": 9,
    "strategy": zlib_ng.Z_RLE,
}
# The library's stub calls this an instance.
_DeflateError: type[Exception] = zlib_ng.error  # type: ignore[assignment]

_ZSTD = zstandard.ZstdCompressionParameters.from_level(3)
# Values have few matches: those of 7 bytes or none. Searching for shorter ones takes twice as long
# and leaves more bytes (benchmarks/verbatim.py).
_ZSTD_OF_VALUES = zstandard.ZstdCompressionParameters.from_level(
    1, strategy=zstandard.STRATEGY_FAST, min_match=7
)
_ZSTD_MIN_WINDOW = 1 << 10
#: Bytes of values from which on DEFLATE takes too long.
LARGE = 1 << 18


def compress_beside(coder: Coder, *segments: bytes | memoryview) -> tuple[Coder, bytes]:
    """Compress bytes in a stream whose symbols are coded by ``coder``; returns as :func:`compress`.

    Beside ``RANS``, which codes no bytes, these are verbatim values: ``DEFLATE`` leaves the
    fewest; from 256 KiB on it is ``ZSTD``, which leaves one percent more, and takes less than half
    the time to write and a fifth to read (benchmarks/verbatim.py).
    """
    if coder is not Coder.RANS:
        return compress(coder, *segments)
    size = sum(map(len, segments))
    if size < LARGE:
        return compress(Coder.DEFLATE, *segments)
    coded = _zstd(_ZSTD_OF_VALUES, segments)
    return _smaller(Coder.ZSTD, coded, segments, size)


def compress(coder: Coder, *segments: bytes | memoryview) -> tuple[Coder, bytes]:
    """Compress the concatenated ``segments``, or keep them when that would not make them smaller.

    Cut the data where its statistics change: DEFLATE starts new Huffman tables there.

    Returns
    -------
    coder
        The coder to decompress with: ``coder`` or ``Coder.STORED``.
    coded
        Raw DEFLATE (RFC 1951), one Zstandard frame with its content size (RFC 8878), one LZ4
        block, or the segments.
    """
    size = sum(map(len, segments))
    if not size:
        return Coder.STORED, b""
    match coder:
        case Coder.STORED:
            coded = b"".join(segments)
        case Coder.DEFLATE:
            deflate = zlib_ng.compressobj(**_DEFLATE)
            pieces = [
                deflate.compress(s) + deflate.flush(zlib_ng.Z_BLOCK) for s in segments if len(s)
            ]
            coded = b"".join([*pieces, deflate.flush()])
        case Coder.ZSTD:
            coded = _zstd(_ZSTD, segments)
        case Coder.LZ4:
            coded = lz4.block.compress(b"".join(segments), store_size=False)
        case Coder.RANS | Coder.PLANES:
            raise ValueError(f"{coder.name} codes no bytes")
    return _smaller(coder, coded, segments, size)


def _zstd(
    parameters: zstandard.ZstdCompressionParameters, segments: Sequence[bytes | memoryview]
) -> bytes:
    data = b"".join(segments)  # quicker in one go than piece by piece
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def _smaller(
    coder: Coder, coded: bytes, segments: Sequence[bytes | memoryview], size: int
) -> tuple[Coder, bytes]:
    return (coder, coded) if len(coded) < size else (Coder.STORED, b"".join(segments))


def check_coded(coder: Coder, coded: int, size: int, what: str) -> None:
    """Raise ``ValueError`` unless ``coded`` bytes may stand for ``size`` bytes.

    Stored data have their own size, coded data are shorter than what they stand for.
    """
    if coder is Coder.RANS:
        raise ValueError(f"{what}: RANS codes symbols of uniform bands, not bytes")
    if coded != size if coder is Coder.STORED else coded >= size:
        relation = "exactly" if coder is Coder.STORED else "fewer than"
        raise ValueError(f"{what}: {coder.name} needs {relation} {size} bytes, found {coded}")


def decompress(coder: Coder, data: bytes | memoryview, size: int) -> bytes:
    """Undo :func:`compress`.

    Parameters
    ----------
    size
        Length of the result. No more memory than this is taken, whatever ``data`` says.

    Raises
    ------
    FormatError
        ``data`` are not exactly ``size`` bytes coded with ``coder``, or something follows them.
    """
    try:
        check_coded(coder, len(data), size, "coded data")
        match coder:
            case Coder.STORED:
                return bytes(data)
            case Coder.DEFLATE:
                found = _inflate(data, size)
            case Coder.ZSTD:
                found = _unzstd(data, size)
            case Coder.LZ4:
                found = lz4.block.decompress(data, uncompressed_size=size)
            case Coder.RANS | Coder.PLANES:
                raise ValueError("they are no coded bytes")
    except (ValueError, _DeflateError, zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise FormatError(f"{coder.name} data of {len(data)} bytes are corrupt: {error}") from error
    if len(found) != size:
        raise FormatError(
            f"{coder.name} data of {len(data)} bytes are corrupt: "
            f"they hold {len(found)} bytes, expected {size}"
        )
    return found


def _inflate(data: bytes | memoryview, size: int) -> bytes:
    inflate = zlib_ng.decompressobj(-zlib_ng.MAX_WBITS)
    # One byte more than allowed, so that an overlong result is seen and the end is reached.
    found: bytes = inflate.decompress(data, size + 1)
    if len(found) <= size and not inflate.eof:
        raise ValueError("the end is missing")
    if len(found) > size:
        raise ValueError(f"they hold more than {size} bytes")
    if inflate.unused_data:
        raise ValueError(f"{len(inflate.unused_data)} bytes follow the end")
    return found


def _unzstd(data: bytes | memoryview, size: int) -> bytes:
    # The library allocates what the frame claims: compare the claim first.
    claimed = zstandard.frame_content_size(data)
    if claimed != size:
        raise ValueError(f"the frame claims {claimed} bytes, expected {size}")
    window = max(_ZSTD_MIN_WINDOW, 1 << size.bit_length())
    decompressor = zstandard.ZstdDecompressor(max_window_size=window)
    return decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
