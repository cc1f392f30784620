"""Checksums and seals of many pages at once, against the libraries that compute one."""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtc_stream.coding import page_sums as own
from kvtc_stream.coding.page_sums import PageBytes, page_sums


def drawn(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def expected(page: PageBytes, key: bytes | None) -> tuple[int, bytes]:
    payload = page.data[page.begin : page.begin + page.size]
    seal = bytes(32)
    if key is not None:
        seal = hmac.digest(key, page.prefix + bytes(page.data[: page.sealed]), "sha256")
    return xxhash.xxh3_64_intdigest(payload, page.seed), seal


def check(pages: list[PageBytes], key: bytes | None) -> None:
    checksums, seals = page_sums(pages, key)
    for i, page in enumerate(pages):
        assert (int(checksums[i]), seals[i].tobytes()) == expected(page, key)


@pytest.fixture(params=["together", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With libcrypto, and where it cannot be found."""
    if request.param == "one by one":
        monkeypatch.setattr(own, "_library", lambda: None)
    return str(request.param)


@given(st.data())
def test_sums_are_those_of_the_libraries(data: st.DataObject) -> None:
    """Of payloads of any size from any place on, under keys that are shorter and longer than what
    SHA-256 takes at a time."""
    key = data.draw(st.none() | st.binary(max_size=200), "key")
    whole = drawn(8192, data.draw(st.integers(0, 9)))
    prefix = data.draw(st.integers(0, 130), "prefix")
    pages = []
    for _ in range(data.draw(st.integers(0, 4), "pages")):
        begin = data.draw(st.integers(0, 100))
        size = data.draw(st.integers(1, len(whole) - begin))
        seed = data.draw(st.integers(0, 2**64 - 1))
        sealed = data.draw(st.integers(0, len(whole)))
        pages.append(PageBytes(whole, begin, size, seed, sealed, whole[:prefix]))
    check(pages, key)


@pytest.mark.parametrize("size", [1, 240, 241, 1024, 1025, 1088, 2048, 2049, 100_003])
def test_every_length_has_its_own_end(way: str, size: int) -> None:
    data = memoryview(drawn(size + 9))
    pages = [PageBytes(data, at, size, 2**64 - at - 1, size, b"prefix") for at in range(9)]
    check(pages, b"key")
    check(pages, None)


@pytest.mark.parametrize("key", [b"key", None])
def test_threads_take_pages_that_are_left(
    monkeypatch: pytest.MonkeyPatch, key: bytes | None
) -> None:
    """However many come, and however late; what fails on one of them is done by others."""
    whole = memoryview(drawn(3 << 20))
    pages = [PageBytes(whole, i, (3 << 20) - 40, i, 3 << 20, b"prefix") for i in range(9)]
    with ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(own, "threads", lambda: pool)
        monkeypatch.setattr(own.environment, "threads", lambda: 4)
        check(pages, key)
        monkeypatch.setattr(own, "_POLLS", 0)  # nobody is done when this thread is
        check(pages, key)
        go = threading.Event()
        for _ in range(3):
            pool.submit(go.wait, 60)
        check(pages, key)  # nobody comes
        go.set()


def test_the_library_that_hashlib_has_is_found() -> None:
    """On the systems that are tested: else pages would be checked one by one, and nobody knew."""
    assert own._library() is not None


@pytest.mark.parametrize(
    "fault", ["no module", "no function", "null", "another digest", "it fails"]
)
def test_another_library_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    own._library.cache_clear()
    together = own._together
    monkeypatch.setattr(own.sys, "platform", "another")  # it has no libcrypto of its own
    if fault == "no module":
        monkeypatch.setattr(own.importlib, "import_module", missing)
        monkeypatch.setattr(own.ctypes, "PyDLL", lambda path: ctypes.CDLL("/nowhere"))
    elif fault == "no function":
        monkeypatch.setattr(own.ctypes, "PyDLL", lambda path: types.SimpleNamespace())
    elif fault == "null":
        library = ctypes.PyDLL(None)
        monkeypatch.setattr(own.ctypes, "PyDLL", lambda path: Null(library))
    elif fault == "another digest":

        def wrong(*given: object) -> object:
            checksums, seals = together(*given)  # type: ignore[arg-type]
            return checksums, seals ^ np.uint8(1)

        monkeypatch.setattr(own, "_together", wrong)
    else:
        work = own._work

        def failing(counts: Any, *given: Any) -> None:
            work(counts, *given)
            counts[2] += 1

        monkeypatch.setattr(own, "_work", failing)
    try:
        assert own._library() is None
        page = PageBytes(drawn(500), 0, 500, 0, 500, b"")
        _, seals = page_sums([page], b"key")
        assert seals[0].tobytes() == hmac.new(b"key", page.data, hashlib.sha256).digest()
    finally:
        own._library.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for a library of Linux")
def test_a_python_that_keeps_its_library_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    own._library.cache_clear()
    functions = own._functions
    asked: list[str | None] = []

    def only_the_systems(path: str | None) -> Any:
        asked.append(path)
        return None if len(asked) == 1 else functions(path)

    monkeypatch.setattr(own, "_functions", only_the_systems)
    try:
        found = own._library()
        assert asked[1:] == ["libcrypto.so.3"]
        assert (found is None) == (functions("libcrypto.so.3") is None)
    finally:
        own._library.cache_clear()


def missing(name: str) -> None:
    raise ImportError(f"there is no {name}")


class Null:
    """A library of which one function gives nothing."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        self.EVP_DigestInit_ex = library.printf
        self.EVP_DigestUpdate = self.EVP_DigestFinal_ex = library.printf
        self.EVP_MD_CTX_new = self.EVP_MD_CTX_free = types.SimpleNamespace()

    class EVP_sha256:  # noqa: N801
        restype: object = None

        def __new__(cls) -> int:  # type: ignore[misc]
            return 0
