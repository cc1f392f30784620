"""What the backend uses of CuPy, on NumPy's arrays; host memory is the device's."""

from __future__ import annotations

import ctypes
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np


class ndarray(np.ndarray):  # noqa: N801
    """An array with an address."""

    def __new__(cls, shape: Any, dtype: Any, memory: _Pointer) -> Any:
        own = np.ndarray(shape, dtype, memory.owner, memory.offset)
        return own.view(cls)

    @property
    def data(self) -> Any:
        return _Pointer(self.ctypes.data, self, 0)

    @property
    def device(self) -> Any:
        return SimpleNamespace(id=0)

    def get(self) -> Any:
        return np.array(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **names: Any) -> Any:
        """CuPy takes no arrays of the host."""
        _check_there(ufunc.__name__, *inputs, *names.get("out", ()))
        plain = [x.view(np.ndarray) if isinstance(x, ndarray) else x for x in inputs]
        if "out" in names:
            names["out"] = tuple(x.view(np.ndarray) for x in names["out"])
        found = getattr(ufunc, method)(*plain, **names)
        return found.view(ndarray) if isinstance(found, np.ndarray) else found

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} of an array on the device")

    def __setitem__(self, index: Any, value: Any) -> None:
        _check_there("an assignment", value)
        super().__setitem__(index, value)


class _Pointer(NamedTuple):
    """An address, of a byte of an array's memory."""

    ptr: int
    owner: np.ndarray
    offset: int

    def __add__(self, count: int) -> _Pointer:  # type: ignore[override]
        return _Pointer(self.ptr + count, self.owner, self.offset + count)


class _Pinned(bytearray):
    """Host memory that knows where it is."""

    places: ClassVar[dict[int, int]] = {}

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._begin = ctypes.addressof(ctypes.c_char.from_buffer(self)) if size else 0
        self.places[self._begin] = self._begin + size

    def __del__(self) -> None:
        self.places.pop(self._begin, None)

    @classmethod
    def attributes(cls, address: int) -> Any:
        """As cudaPointerGetAttributes; cudaMemoryTypeHost is 1."""
        found = any(begin <= address < end for begin, end in list(cls.places.items()))
        return SimpleNamespace(type=int(found))


def _check_there(what: str, *values: Any) -> None:
    for value in values:
        if isinstance(value, np.ndarray) and not isinstance(value, ndarray):
            raise TypeError(f"{what} takes an array of the host: CuPy does not")


class _Event:
    done = True

    def __init__(self, *, disable_timing: bool) -> None:
        self.record = self.synchronize = lambda: None


class _Stream:
    """Everything is done when a call returns; counts how often somebody waits."""

    waits = 0

    def __init__(self, *, non_blocking: bool, priority: int = 0) -> None:
        self.ptr = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None:
        type(self).waits += 1


def _made(make: Any) -> Any:
    return lambda *arguments, **names: make(*arguments, **names).view(ndarray)


def _of_arrays(function: Any) -> Any:
    """A function of arrays on the device, some of them in lists."""

    def call(*arguments: Any, **names: Any) -> Any:
        plain = []
        for x in arguments:
            several = list(x) if isinstance(x, list | tuple) else [x]
            _check_there(function.__name__, *several)
            several = [y.view(np.ndarray) if isinstance(y, ndarray) else y for y in several]
            plain.append(several if isinstance(x, list | tuple) else several[0])
        return function(*plain, **names).view(ndarray)

    return call


def _empty(*arguments: Any, **names: Any) -> Any:
    """Filled with what is nowhere right."""
    array = np.empty(*arguments, **names)
    array.view(np.uint8).reshape(-1)[:] = 0xA5
    return array


def _matrix(address: int, rows: int, columns: int, stride: int, kind: int) -> Any:
    """Column-major; kinds are those of cuBLAS."""
    dtype = np.dtype({2: np.float16, 0: np.float32}[kind])
    size = ((columns - 1) * stride + rows) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    strides = (dtype.itemsize, stride * dtype.itemsize)
    return np.ndarray((rows, columns), dtype, memory, 0, strides)


def _gemm_ex(
    _handle: Any, a_op: int, b_op: int, m: int, n: int, k: int, alpha: int, a: int, a_kind: int,
    a_stride: int, b: int, b_kind: int, b_stride: int, beta: int, c: int, c_kind: int,
    c_stride: int, _compute: int, _algorithm: int,
) -> None:  # fmt: skip
    left = _matrix(a, *((k, m) if a_op else (m, k)), a_stride, a_kind)
    right = _matrix(b, *((n, k) if b_op else (k, n)), b_stride, b_kind)
    left, right = (x.T if op else x for x, op in ((left, a_op), (right, b_op)))
    scale = np.float32(ctypes.c_float.from_address(alpha).value)
    keep = np.float32(ctypes.c_float.from_address(beta).value)
    out = _matrix(c, m, n, c_stride, c_kind)
    with np.errstate(over="ignore", invalid="ignore"):
        product = scale * (left.astype(np.float32) @ right.astype(np.float32))
        out[:] = product + keep * out if keep else product


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module
    return module


def install() -> None:
    """Be ``cupy`` for whoever imports it from now on."""

    def copy(destination: int, source: int, size: int, _kind: int, _stream: int) -> None:
        ctypes.memmove(destination, source, size)

    runtime = SimpleNamespace(
        getDevice=lambda: 0,
        getDeviceCount=lambda: 1,
        deviceGetAttribute=lambda *_: 2,
        memcpyAsync=copy,
        memcpyHostToDevice=1,
        memcpyDeviceToHost=2,
        pointerGetAttributes=_Pinned.attributes,
    )
    device = _module("cupy.cuda.device", get_cublas_handle=lambda: 0)
    cuda = _module(
        "cupy.cuda",
        runtime=runtime,
        device=device,
        alloc_pinned_memory=_Pinned,
        Event=_Event,
        Stream=_Stream,
        Device=lambda _: nullcontext(),
        get_current_stream=lambda: _Stream(non_blocking=True),
    )
    _module(
        "cupy",
        cuda=cuda,
        ndarray=ndarray,
        asarray=_made(np.array),
        empty_like=_of_arrays(np.empty_like),
        ascontiguousarray=_of_arrays(lambda x: np.array(x, order="C")),
        asnumpy=lambda x: np.array(x),
        concatenate=_of_arrays(np.concatenate),
        empty=_made(_empty),
        full=_made(np.full),
        maximum=_of_arrays(np.maximum),
        ones=_made(np.ones),
        sqrt=_of_arrays(np.sqrt),
        stack=_of_arrays(np.stack),
        take=_of_arrays(np.take),
        where=_of_arrays(np.where),
        zeros=_made(np.zeros),
    )
    _module("cupy_backends")
    _module("cupy_backends.cuda")
    cublas = _module("cupy_backends.cuda.libs.cublas", gemmEx=_gemm_ex)
    _module("cupy_backends.cuda.libs", cublas=cublas)
