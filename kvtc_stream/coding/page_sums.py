"""Checksums and seals of many pages, in one call that holds no lock of Python's.

A page takes a checksum (XXH3) and a seal (HMAC-SHA-256) of all its bytes. Asked for one by one,
each of them gives Python's lock away and waits to have it again, behind whatever else the process
runs: a server's main thread holds it for milliseconds at a time. Here Python's part is some fields
a page; the rest is compiled, XXH3 by Numba, and SHA-256 by the library that hashlib itself calls.

SHA-256 is that library's because processors have instructions for it that Numba does not reach.
Where its functions cannot be found, or give something else than hashlib, hashlib is called page by
page. The results are the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import xxhash
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

#: Bytes of a seal.
SEAL = 32
#: Bytes that SHA-256 takes at a time; HMAC's keys are filled up to it.
_CHUNK = 64
#: Bytes of payload from which on XXH3 is one method; shorter ones have others.
_LONG = 241
#: Calls of the library for a seal, each of which returns 1.
_CALLS = 8
#: Fields of a page: where it begins in memory, bytes that are sealed, where the payload begins in
#: memory, and its bytes.
_FIELDS = 4

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")
_U64 = np.uint64
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

#: XXH3's secret.
_SECRET = np.array(
    [
        0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072,
        0x78E5C0CC4EE679CB, 0x2172FFCC7DD05A82, 0x8E2443F7744608B8, 0x4C263A81E69035E0,
        0xCB00C391BB52283C, 0xA32E531B8B65D088, 0x4EF90DA297486471, 0xD8ACDEA946EF1938,
        0x3F349CE33F76FAA8, 0x1D4F0BC7C7BBDCF9, 0x3159B4CD4BE0518A, 0x647378D9C97E9FC8,
        0xC3EBD33483ACC5EA, 0xEB6313FAFFA081C5, 0x49DAF0B751DD0D17, 0x9E68D429265516D3,
        0xFCA1477D58BE162B, 0xCE31D07AD1B8F88F, 0x280416958F3ACB45, 0x7E404BBBCAFBD7AF,
    ],
    np.uint64,
)  # fmt: skip
_PRIME, _PRIME_LONG = 0x9E3779B1, 0x9E3779B185EBCA87
#: What the accumulators begin with.
_INITIAL = np.array(
    [
        0xC2B2AE3D, _PRIME_LONG, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
        0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, _PRIME,
    ],
    np.uint64,
)  # fmt: skip


class PageBytes(NamedTuple):
    """A page whose sums are asked for.

    Attributes
    ----------
    data
        The page, and perhaps more. It must not change meanwhile.
    begin, size
        Where its payload is.
    seed
        Of the payload's checksum.
    sealed
        How many bytes, from the first one on, the seal is over.
    prefix
        What the seal is over before them; as long for all pages of a call.
    """

    data: bytes | memoryview
    begin: int
    size: int
    seed: int
    sealed: int
    prefix: bytes


def page_sums(
    pages: Sequence[PageBytes], key: bytes | None
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Checksums and seals of pages; of one thread, which other threads of Python do not wait for.

    Parameters
    ----------
    pages
        Their bytes are there: whoever calls has compared sizes.
    key
        Of the seals; without it none are computed.

    Returns
    -------
    checksums
        uint64 [pages].
    seals
        uint8 [pages, 32]; 0 without a key.
    """
    library = _library() if key is not None else None
    if any(page.size < _LONG for page in pages) or (key is not None and library is None):
        return _one_by_one(pages, key)
    return _together(pages, key, library)


def _one_by_one(
    pages: Sequence[PageBytes], key: bytes | None
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """:func:`page_sums` by libraries of Python's."""
    checksums = np.zeros(len(pages), np.uint64)
    seals = np.zeros((len(pages), SEAL), np.uint8)
    for i, page in enumerate(pages):
        view = memoryview(page.data)
        payload = view[page.begin : page.begin + page.size]
        checksums[i] = xxhash.xxh3_64_intdigest(payload, page.seed)
        if key is not None:
            state = hmac.new(key, page.prefix, "sha256")
            state.update(view[: page.sealed])  # not one message: that would be a copy of the page
            seals[i] = np.frombuffer(state.digest(), np.uint8)
    return checksums, seals


class _Library(NamedTuple):
    """libcrypto, in this process.

    Attributes
    ----------
    functions
        int64 [4]: addresses of EVP_DigestInit_ex, EVP_DigestUpdate and EVP_DigestFinal_ex, and of
        what says SHA-256.
    new, free
        EVP_MD_CTX_new and EVP_MD_CTX_free.
    """

    functions: NDArray[np.int64]
    new: Any
    free: Any


@cache
def _library() -> _Library | None:
    """Functions of the library that Python's hashlib is linked to; ``None`` if they are not to be
    found, or do not give what hashlib gives."""
    try:
        # What is looked for in a module is also looked for in the libraries that it needs.
        path = getattr(importlib.import_module("_hashlib"), "__file__", None)
        # These hold the lock: they take no time, and to have it again would.
        own = ctypes.PyDLL(path)
        own.EVP_sha256.restype = own.EVP_MD_CTX_new.restype = ctypes.c_void_p
        own.EVP_MD_CTX_free.argtypes, own.EVP_MD_CTX_free.restype = [ctypes.c_void_p], None
        names = ("EVP_DigestInit_ex", "EVP_DigestUpdate", "EVP_DigestFinal_ex")
        addresses = [ctypes.cast(getattr(own, name), ctypes.c_void_p).value for name in names]
        functions = np.array([*addresses, own.EVP_sha256() or 0], np.int64)
        found = _Library(functions, own.EVP_MD_CTX_new, own.EVP_MD_CTX_free)
    except (ImportError, OSError, AttributeError, TypeError):
        return None
    if ctypes.sizeof(ctypes.c_void_p) != 8 or not functions.all():
        return None
    example = PageBytes(bytes(range(256)) * 5, 3, 1024, 7, 1200, b"example")
    try:
        ours, theirs = _together([example], b"key", found), _one_by_one([example], b"key")
    except RuntimeError:
        return None
    alike = np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
    return found if alike else None


def _together(
    pages: Sequence[PageBytes], key: bytes | None, library: _Library | None
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """:func:`page_sums` of payloads that are long, compiled."""
    held = [np.frombuffer(page.data, np.uint8) for page in pages]
    begins = [x.__array_interface__["data"][0] for x in held]
    fields = np.array(
        [
            (begin, page.sealed, begin + page.begin, page.size)
            for begin, page in zip(begins, pages, strict=True)
        ],
        np.int64,
    ).reshape(-1, _FIELDS)
    seeds = np.array([page.seed for page in pages], np.uint64)
    checksums = np.zeros(len(pages), np.uint64)
    seals = np.zeros((len(pages), SEAL), np.uint8)
    if key is None or library is None or not pages:
        _checksums(fields, seeds, checksums)
        return checksums, seals
    # HMAC: the hash of the outer key and of the hash of the inner key and the message.
    short = hashlib.sha256(key).digest() if len(key) > _CHUNK else key
    inner, outer = (
        (np.frombuffer(short.ljust(_CHUNK, b"\0"), np.uint8) ^ np.uint8(mask)).tobytes()
        for mask in (0x36, 0x5C)
    )
    prefixes = np.frombuffer(b"".join(inner + page.prefix for page in pages), np.uint8)
    context = library.new()
    if not context:
        raise MemoryError("libcrypto has no memory for a hash")
    try:
        done = _checksums_and_seals(
            fields,
            seeds,
            prefixes.reshape(len(pages), -1),
            np.frombuffer(outer, np.uint8),
            library.functions,
            context,
            checksums,
            seals,
        )
    finally:
        library.free(context)
    if done != _CALLS * len(pages):
        raise RuntimeError("libcrypto could not compute a SHA-256")
    return checksums, seals


def _read(typing: Any, address: Any) -> Any:
    """The 8 bytes at an address, little-endian, wherever it is."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(types.int64), generate


def _called(typing: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    """Call a function at an address, that takes pointers and sizes and gives an ``int``."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * 3)
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])

    return types.int32(*[types.int64] * 4), generate


# Whoever calls these gives no type system: that is not what a type checker would see.
_word: Any = intrinsic(_read)
_call: Any = intrinsic(_called)


@_jit
def _checksums(fields, seeds, checksums):  # type: ignore[no-untyped-def]
    for i in range(len(fields)):
        checksums[i] = _xxh3(fields[i, 2], fields[i, 3], seeds[i])


@_jit
def _checksums_and_seals(  # type: ignore[no-untyped-def]
    fields, seeds, prefixes, outer, functions, context, checksums, seals
):
    """Returns how many calls of the library went well."""
    begin, update, end, kind = functions[0], functions[1], functions[2], functions[3]
    done = np.int64(0)
    nothing = np.int64(0)
    for i in range(len(fields)):
        prefix, seal = prefixes[i], seals[i]
        size, whole = np.int64(len(prefix)), np.int64(len(seal))
        done += _call(begin, context, kind, nothing)
        done += _call(update, context, prefix.ctypes.data, size)
        done += _call(update, context, fields[i, 0], fields[i, 1])
        done += _call(end, context, seal.ctypes.data, nothing)
        done += _call(begin, context, kind, nothing)
        done += _call(update, context, outer.ctypes.data, np.int64(len(outer)))
        done += _call(update, context, seal.ctypes.data, whole)
        done += _call(end, context, seal.ctypes.data, nothing)
        # The page is in the processor's cache now.
        checksums[i] = _xxh3(fields[i, 2], fields[i, 3], seeds[i])
    return done


@_jit
def _xxh3(at, size, seed):  # type: ignore[no-untyped-def]
    """XXH3-64 of at least 241 bytes at an address; the method of the reference implementation."""
    secret = np.empty(24, np.uint64)
    for i in range(0, 24, 2):
        secret[i] = _SECRET[i] + seed
        secret[i + 1] = _SECRET[i + 1] - seed
    sums = _INITIAL.copy()
    blocks = (size - 1) >> 10
    for block in range(blocks):
        _add(sums, at + (block << 10), 16, secret)
        for i in range(8):
            value = sums[i]
            sums[i] = (value ^ (value >> _U64(47)) ^ secret[16 + i]) * _U64(_PRIME)
    _add(sums, at + (blocks << 10), (size - 1 - (blocks << 10)) >> 6, secret)
    # The last 64 bytes, wherever they begin; the secret's bytes from 121 on.
    last = np.empty(8, np.uint64)
    for i in range(8):
        last[i] = (secret[15 + i] >> _U64(8)) | (secret[16 + i] << _U64(56))
    _add(sums, at + size - 64, 1, last)
    found = _U64(size) * _U64(_PRIME_LONG)
    for i in range(4):  # the secret's bytes from 11 on
        low, middle, high = secret[1 + 2 * i], secret[2 + 2 * i], secret[3 + 2 * i]
        a = (low >> _U64(24)) | (middle << _U64(40))
        b = (middle >> _U64(24)) | (high << _U64(40))
        found += _folded(sums[2 * i] ^ a, sums[2 * i + 1] ^ b)
    found = (found ^ (found >> _U64(37))) * _U64(0x165667919E3779F9)
    return found ^ (found >> _HALF)


@_jit
def _add(sums, at, stripes, secret):  # type: ignore[no-untyped-def]
    """Add stripes of 64 bytes, each with the secret from another word on."""
    a, b, c, d = sums[0], sums[1], sums[2], sums[3]
    e, f, g, h = sums[4], sums[5], sums[6], sums[7]
    for i in range(stripes):
        s, t, u, v = _word(at), _word(at + 8), _word(at + 16), _word(at + 24)
        w, x, y, z = _word(at + 32), _word(at + 40), _word(at + 48), _word(at + 56)
        a += _product(s ^ secret[i]) + t
        b += _product(t ^ secret[i + 1]) + s
        c += _product(u ^ secret[i + 2]) + v
        d += _product(v ^ secret[i + 3]) + u
        e += _product(w ^ secret[i + 4]) + x
        f += _product(x ^ secret[i + 5]) + w
        g += _product(y ^ secret[i + 6]) + z
        h += _product(z ^ secret[i + 7]) + y
        at += 64
    sums[0], sums[1], sums[2], sums[3] = a, b, c, d
    sums[4], sums[5], sums[6], sums[7] = e, f, g, h


@_jit
def _product(value):  # type: ignore[no-untyped-def]
    """Of the two halves."""
    return (value & _LOW) * (value >> _HALF)


@_jit
def _folded(a, b):  # type: ignore[no-untyped-def]
    """The halves of a product of 128 bits, exclusive or."""
    a_low, a_high, b_low, b_high = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    low, high = a_low * b_low, a_high * b_high
    across = a_high * b_low
    middle = (low >> _HALF) + (across & _LOW) + a_low * b_high
    high += (across >> _HALF) + (middle >> _HALF)
    return ((middle << _HALF) | (low & _LOW)) ^ high
