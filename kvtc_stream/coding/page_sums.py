"""Checksums and seals of many pages, in one call that holds no lock of Python's.

A page takes a checksum (XXH3) and a seal (HMAC-SHA-256) of all its bytes. Asked for one by one,
each of them gives Python's lock away and waits to have it again, behind whatever else the process
runs: a server's main thread holds it for milliseconds at a time. Here Python's part is some fields
a page; the rest is compiled, XXH3 by Numba, and SHA-256 by the library that hashlib itself calls.
Threads take page after page: who comes late, because it waited for the lock, keeps nobody waiting.

SHA-256 is that library's because processors have instructions for it that Numba does not reach.
Where its functions cannot be found, or give something else than hashlib, hashlib is called page by
page, on threads. The results are the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import importlib
import sys
from collections.abc import Sequence
from concurrent.futures import wait
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from kvtc_stream.io import environment, xxh3
from kvtc_stream.io.assembly import add_shared
from kvtc_stream.io.threads import SHARE, spread, threads
from kvtc_stream.io.xxh3 import intrinsic, jit

#: Bytes of a seal.
SEAL = 32
#: Bytes that SHA-256 takes at a time; HMAC's keys are filled up to it.
_CHUNK = 64
#: Calls of the library for a seal, each of which returns 1.
_CALLS = 8
#: Maximum number of threads.
_MOST = 16
#: Looks at whether others are done, a few milliseconds of them: they have a page each at the most,
#: and to wait for them in Python would be to wait for its lock.
_POLLS = 1 << 17
#: Fields of a page: where it begins in memory, bytes that are sealed, where the payload begins in
#: memory, and its bytes.
_FIELDS = 4


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
    """Checksums and seals of pages: on this thread, and on others that come to it in time.

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
    if any(page.size < xxh3.LEAST for page in pages) or (key is not None and library is None):
        return _one_by_one(pages, key)
    return _together(pages, key, library)


def _one_by_one(
    pages: Sequence[PageBytes], key: bytes | None
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """:func:`page_sums` by libraries of Python's, of many bytes on threads."""
    size = sum(page.sealed for page in pages)
    found = spread(_of_one, [(page, key) for page in pages], size)
    seals = b"".join(seal for _, seal in found)
    return (
        np.array([checksum for checksum, _ in found], np.uint64),
        np.frombuffer(seals, np.uint8).reshape(len(pages), SEAL),
    )


def _of_one(page: PageBytes, key: bytes | None) -> tuple[int, bytes]:
    view = memoryview(page.data)
    payload = view[page.begin : page.begin + page.size]
    checksum = xxhash.xxh3_64_intdigest(payload, page.seed)
    if key is None:
        return checksum, bytes(SEAL)
    state = hmac.new(key, page.prefix, "sha256")
    state.update(view[: page.sealed])  # not one message: that would be a copy of the page
    return checksum, state.digest()


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
    """Functions of the library that Python's hashlib is linked to, or else of the system's;
    ``None`` if they are not to be found, or do not give what hashlib gives."""
    try:
        # What is looked for in a module is also looked for in the libraries that it needs.
        own = getattr(importlib.import_module("_hashlib"), "__file__", None)
    except ImportError:
        own = None
    # A Python with OpenSSL inside may keep its functions to itself.
    others = ["libcrypto.so.3"] if sys.platform == "linux" else []
    for path in (own, *others):
        found = _functions(path)
        if found is not None and _is_right(found):
            return found
    return None


def _functions(path: str | None) -> _Library | None:
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        # These hold the lock: they take no time, and to have it again would.
        own = ctypes.PyDLL(path)
        own.EVP_sha256.restype = own.EVP_MD_CTX_new.restype = ctypes.c_void_p
        own.EVP_MD_CTX_free.argtypes, own.EVP_MD_CTX_free.restype = [ctypes.c_void_p], None
        names = ("EVP_DigestInit_ex", "EVP_DigestUpdate", "EVP_DigestFinal_ex")
        addresses = [ctypes.cast(getattr(own, name), ctypes.c_void_p).value for name in names]
        functions = np.array([*addresses, own.EVP_sha256() or 0], np.int64)
    except (OSError, AttributeError, TypeError):
        return None
    return _Library(functions, own.EVP_MD_CTX_new, own.EVP_MD_CTX_free) if functions.all() else None


def _is_right(library: _Library) -> bool:
    example = PageBytes(bytes(range(256)) * 5, 3, 1024, 7, 1200, b"example")
    try:
        ours, theirs = _together([example], b"key", library), _one_by_one([example], b"key")
    except RuntimeError:
        return False
    return np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])


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
    # HMAC: the hash of the outer key and of the hash of the inner key and the message.
    secret = b"" if key is None else key
    short = hashlib.sha256(secret).digest() if len(secret) > _CHUNK else secret
    inner, outer = (
        (np.frombuffer(short.ljust(_CHUNK, b"\0"), np.uint8) ^ np.uint8(mask)).tobytes()
        for mask in (0x36, 0x5C)
    )
    prefixes = np.frombuffer(b"".join(inner + page.prefix for page in pages), np.uint8)
    functions = np.zeros(4, np.int64) if library is None else library.functions
    counts = np.zeros(3, np.int64)  # pages that are taken, that are done, and that went wrong

    def work(polls: int, keeps: Any) -> None:
        """``keeps`` is what ``fields`` has addresses of."""
        context = 0
        if library is not None and not (context := library.new()):
            raise MemoryError("libcrypto has no memory for a hash")
        try:
            _work(
                counts,
                fields,
                seeds,
                prefixes.reshape(len(pages), -1),
                np.frombuffer(outer, np.uint8),
                functions,
                context,
                checksums,
                seals,
                polls,
            )
        finally:
            if library is not None:
                library.free(context)

    if not pages:
        return checksums, seals
    size = int(fields[:, 1].sum())
    helping = min(size // SHARE, len(pages), _MOST, environment.threads()) - 1
    helpers = [threads().submit(work, 0, held) for _ in range(helping)]
    try:
        work(_POLLS, held)
    finally:
        # Those that have not begun have nothing to do. Those that are done may wait for the lock:
        # nobody waits for them, unless they have a page yet.
        begun = [helper for helper in helpers if not helper.cancel()]
        if counts[1] < len(pages):
            wait(begun)
    if counts[1] < len(pages) or counts[2]:
        raise RuntimeError("libcrypto could not compute a SHA-256")
    return checksums, seals


def _called(typing: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    """Call a function at an address, that takes pointers and sizes and gives an ``int``."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * 3)
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])

    return types.int32(*[types.int64] * 4), generate


_call = intrinsic(_called)


@jit
def _work(  # type: ignore[no-untyped-def]
    counts, fields, seeds, prefixes, outer, functions, context, checksums, seals, polls
):
    """Take pages until none is left, and then wait until others are done with theirs, for so many
    looks at the most; ``context`` is 0 where there is no key."""
    begin, update, end, kind = functions[0], functions[1], functions[2], functions[3]
    nothing, one = np.int64(0), np.int64(1)
    taken, done, wrong = counts[0:].ctypes.data, counts[1:].ctypes.data, counts[2:].ctypes.data
    secret, state = np.empty(24, np.uint64), np.empty(8, np.uint64)
    while True:
        i = add_shared(taken, one)
        if i >= len(fields):
            break
        if context:
            prefix, seal = prefixes[i], seals[i]
            good = np.int64(0)
            good += _call(begin, context, kind, nothing)
            good += _call(update, context, prefix.ctypes.data, np.int64(len(prefix)))
            good += _call(update, context, fields[i, 0], fields[i, 1])
            good += _call(end, context, seal.ctypes.data, nothing)
            good += _call(begin, context, kind, nothing)
            good += _call(update, context, outer.ctypes.data, np.int64(len(outer)))
            good += _call(update, context, seal.ctypes.data, np.int64(len(seal)))
            good += _call(end, context, seal.ctypes.data, nothing)
            if good != _CALLS:
                add_shared(wrong, one)
        # The page is in the processor's cache now.
        at, size = fields[i, 2], fields[i, 3]
        xxh3.begin(seeds[i], secret, state)
        xxh3.add_blocks(at, (size - 1) // xxh3.BLOCK, secret, state)
        checksums[i] = xxh3.end(at, size, secret, state)
        add_shared(done, one)
    for _ in range(polls):
        if add_shared(done, nothing) == len(fields):
            break
