"""NumPy in CuPy's place, for what has to work with device arrays but runs where no device is.

Like CuPy's, its arrays do not mix with NumPy's: to compute with both, to index one with the other,
or to have NumPy read one, is a ``TypeError``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class DeviceArray:
    """An array that only the functions of a :class:`NumpyDevice` read."""

    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # NumPy's own ways to read an array
            raise AttributeError(name)
        return _wrapped(getattr(self.values, name))

    def __getitem__(self, index: Any) -> Any:
        return _wrapped(self.values[_unwrapped(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.values[_unwrapped(index)] = _unwrapped(value)

    def __iter__(self) -> Iterator[Any]:
        return iter([_wrapped(x) for x in self.values])

    def __len__(self) -> int:
        return len(self.values)

    def __float__(self) -> float:
        return float(self.values)

    def __int__(self) -> int:
        return int(self.values)


def _operator(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    def apply(self: DeviceArray, *others: Any) -> Any:
        operands = [self.values, *map(_unwrapped, others)]
        result = function(*(operands[::-1] if swapped else operands))
        return self if result is self.values else _wrapped(result)

    return apply


_BINARY = ("add", "sub", "mul", "truediv", "mod", "pow", "matmul", "and", "or", "xor")
for _name in (*_BINARY, "lshift", "rshift"):
    _function = getattr(operator, f"__{_name}__")
    setattr(DeviceArray, f"__{_name}__", _operator(_function))
    setattr(DeviceArray, f"__r{_name}__", _operator(_function, swapped=True))
    setattr(DeviceArray, f"__i{_name}__", _operator(getattr(operator, f"__i{_name}__")))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert"):
    setattr(DeviceArray, f"__{_name}__", _operator(getattr(operator, f"__{_name}__")))


class NumpyDevice:
    """A device module with ``memory`` bytes."""

    ndarray = DeviceArray

    def __init__(self, memory: int = 80 * 10**9) -> None:
        stream = SimpleNamespace(ptr=0, synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            get_current_stream=lambda: stream,
            runtime=SimpleNamespace(memGetInfo=lambda: (memory, memory)),
        )

    def asarray(self, x: Any) -> DeviceArray:
        return x if isinstance(x, DeviceArray) else DeviceArray(np.array(x))

    def asnumpy(self, x: DeviceArray) -> np.ndarray:
        return x.values.copy()

    def __getattr__(self, name: str) -> Any:
        return _wrapped(getattr(np, name))


class _Functions:
    """A function, module or generator of NumPy that takes and gives device arrays."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return _wrapped(getattr(self._of, name))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        named = {name: _unwrapped(x) for name, x in named.items()}
        return _wrapped(self._of(*_unwrapped(arguments), **named))


def _wrapped(x: Any) -> Any:
    if isinstance(x, np.ndarray | np.generic):
        return DeviceArray(np.asarray(x))
    if isinstance(x, tuple) and any(isinstance(i, np.ndarray) for i in x):
        return tuple(map(_wrapped, x))
    plain = isinstance(x, type | np.dtype) and x is not np.float32
    if not plain and (callable(x) or isinstance(x, ModuleType | np.random.Generator)):
        return _Functions(x)
    return x


def _unwrapped(x: Any) -> Any:
    if isinstance(x, DeviceArray):
        return x.values
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError("found a NumPy array where one of the device is expected")
    if isinstance(x, tuple | list):
        return type(x)(map(_unwrapped, x))
    return x
