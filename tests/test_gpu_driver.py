"""Calls of CUDA's libraries from compiled code, with functions of Python in their place."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from kvtc_stream.gpu.runtime import driver

_INT, _LONG = ctypes.c_int32, ctypes.c_int64
_KINDS = {
    "copy": (_LONG, _LONG, _LONG, _LONG),
    "copies": (_LONG,) * 8,
    "stream": (_LONG, _LONG),
    "launch": (_LONG, *[_INT] * 7, _LONG, _LONG, _LONG),
    "gemm": (_LONG, *[_INT] * 5, _LONG, _LONG, _INT, _INT, _LONG, _INT, _INT, _LONG, _LONG,
             *[_INT] * 4),
}  # fmt: skip


class Library:
    """C functions that note what they are called with, and fail at the call with a number."""

    def __init__(self, fails_at: int = -1, error: int = 7) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self._fails_at, self._error = fails_at, error
        self._made = {
            name: ctypes.CFUNCTYPE(_INT, *kinds)(lambda *own, name=name: self._note(name, own))
            for name, kinds in _KINDS.items()
        }

    def _note(self, name: str, arguments: tuple[int, ...]) -> int:
        self.calls.append((name, arguments))
        return self._error if len(self.calls) - 1 == self._fails_at else 0

    def address(self, name: str) -> int:
        return ctypes.cast(self._made[name], ctypes.c_void_p).value or 0


def test_copies_what_has_bytes() -> None:
    library = Library()
    to, sources, sizes = (np.array(x, np.int64) for x in ([1 << 40, 2, 3], [4, 5, 6], [7, 0, 9]))
    assert driver._copy(library.address("copy"), to, sources, sizes, 11) == 0
    assert library.calls == [("copy", (1 << 40, 4, 7, 11)), ("copy", (3, 6, 9, 11))]


def test_a_copy_that_fails_is_the_last_one() -> None:
    library = Library(fails_at=1)
    columns = np.ones((3, 5), np.int64)
    assert driver._copy(library.address("copy"), *columns, 11) == 7
    assert len(library.calls) == 2


def test_copies_all_at_once() -> None:
    library = Library()
    columns, attributes = np.ones((3, 5), np.int64), (driver._ATTRIBUTES, driver._OF_ALL)
    assert driver._copy_all(library.address("copies"), *columns, *attributes, 11) == 0
    places = [x.ctypes.data for x in (*columns, *attributes)]
    assert library.calls == [("copies", (*places[:3], 5, *places[3:], 1, 11))]
    assert driver._copy_all(library.address("copies"), *columns[:, :0], *attributes, 11) == 0
    assert len(library.calls) == 1


def _in_turn(library: Library, *, kernel_first: bool = False) -> Any:
    products = np.arange(3 * len(driver.PRODUCT)).reshape(3, -1) + 100
    products[:, 13] += 1 << 40
    products[1, 3] = 0  # no elements
    places = np.arange(3 * 4).reshape(3, 4)
    grids = np.array([[5, 6], [7, 8], [0, 9]])
    found = driver._in_turn(
        library.address("gemm"), library.address("stream"), 21, products,
        library.address("launch"), 22, grids, 128, np.array([23, 24]), places, kernel_first,
    )  # fmt: skip
    return found, products, places


@pytest.mark.parametrize("kernel_first", [False, True])
def test_products_and_kernels_in_turn(kernel_first: bool) -> None:
    library = Library()
    found, products, places = _in_turn(library, kernel_first=kernel_first)
    assert found == 0
    # The second pair is in the other stream, and has no product.
    gemms = [[("stream", (21, 23)), ("gemm", (21, *products[i].tolist()))] for i in (0, 2)]
    first = places.ctypes.data
    launches = [
        ("launch", (22, x, y, 1, 128, 1, 1, 0, 23 + i, first + 8 * 4 * i, 0))
        for i, (x, y) in enumerate([(5, 6), (7, 8)])
    ]
    if kernel_first:
        assert library.calls == [launches[0], *gemms[0], launches[1], *gemms[1]]
    else:
        assert library.calls == [*gemms[0], launches[0], launches[1], *gemms[1]]


@pytest.mark.parametrize(("fails_at", "error"), [(0, -7), (1, -7), (2, 7)])
def test_errors_say_whose_they_are(fails_at: int, error: int) -> None:
    library = Library(fails_at)
    assert _in_turn(library)[0] == error
    assert len(library.calls) == fails_at + 1
