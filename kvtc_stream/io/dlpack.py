"""Tensors in and out: any framework's host tensors become numpy arrays, and back, without a copy.

Everything that knows DLPack (https://dmlc.github.io/dlpack) is here. numpy neither imports nor
exports bfloat16 and fp8 through it, so their dtype code is rewritten inside the capsule: to an
unsigned integer of the same width on the way in, from one on the way out. The capsule's own
manager keeps the memory alive; nothing is copied unless the caller asks.

All functions are pure and may be called from any thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvtc_stream.formats.geometry import DType

#: The backend that codes: ``"auto"`` is CUDA for tensors on a CUDA device, else the CPU.
BackendName = Literal["auto", "cpu", "cuda"]

_NUMPY_DTYPES: Final[dict[DType, np.dtype[Any]]] = {
    DType.FLOAT32: np.dtype(np.float32),
    DType.FLOAT16: np.dtype(np.float16),
    DType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    DType.FLOAT8_E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    DType.FLOAT8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPES: Final = {dtype: key for key, dtype in _NUMPY_DTYPES.items()}

# DLDataTypeCode of types that numpy cannot import or export; 1 is kDLUInt.
_DL_CODES: Final = {
    _NUMPY_DTYPES[DType.BFLOAT16]: 4,
    _NUMPY_DTYPES[DType.FLOAT8_E4M3FN]: 10,
    _NUMPY_DTYPES[DType.FLOAT8_E5M2]: 12,
}
_FROM_DL_CODE: Final = {(code, 8 * d.itemsize): d for d, code in _DL_CODES.items()}
_DL_UINT: Final = 1
_UINT: Final = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}

# DLDeviceType: CPU, and pinned host memory of CUDA and ROCm.
_HOST_DEVICES: Final = frozenset({1, 3, 11})
# Memory of a CUDA device, and managed.
_CUDA_DEVICES: Final = frozenset({2, 13})
_DEVICE_NAMES: Final = {2: "CUDA", 8: "Metal", 10: "ROCm", 13: "CUDA managed", 14: "oneAPI"}

_INT64_MAX: Final = 2**63 - 1


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy (or ml_dtypes) dtype of a cache dtype."""
    return _NUMPY_DTYPES[dtype]


def dtype_of(array_dtype: npt.DTypeLike, name: str = "array") -> DType:
    """The cache dtype of a numpy (or ml_dtypes) dtype.

    Raises
    ------
    TypeError
        For any other dtype, foreign byte order included. ``name`` is what the message calls it.
    """
    found = np.dtype(array_dtype)
    try:
        return _DTYPES[found]
    except KeyError:
        accepted = ", ".join(d.label for d in DType)
        raise TypeError(
            f"{name} has dtype {found}; expected one of {accepted}: convert it first"
        ) from None


class _DLDevice(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", _DLTensor),
    )


# Prototypes of our own: attributes of ctypes.pythonapi's functions are shared by the whole process.
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _dl_tensor(capsule: object) -> _DLTensor:
    """The tensor inside an unconsumed capsule; valid while the capsule is neither used nor freed.

    Raises ``BufferError`` for a capsule that was consumed, or of an unknown kind or version.
    """
    try:
        kind = _capsule_name(capsule)
    except ValueError:
        raise BufferError(
            f"__dlpack__ returned {type(capsule).__name__}; expected a DLPack capsule"
        ) from None
    if kind == b"dltensor":  # DLManagedTensor begins with its DLTensor
        return _DLTensor.from_address(_capsule_pointer(capsule, kind))
    if kind == b"dltensor_versioned":
        managed = _DLManagedTensorVersioned.from_address(_capsule_pointer(capsule, kind))
        if managed.major != 1:
            raise BufferError(f"found DLPack {managed.major}.{managed.minor}; expected 1.x")
        tensor: _DLTensor = managed.dl_tensor
        return tensor
    label = "an unnamed capsule" if kind is None else f"capsule {kind.decode(errors='replace')!r}"
    raise BufferError(f"found {label}; expected a DLPack capsule that nobody has consumed")


class _Once:
    """Hands a capsule that already exists to a DLPack consumer."""

    def __init__(self, capsule: object, device: tuple[int, ...] = (1, 0)) -> None:
        self._capsule, self._device = capsule, device

    def __dlpack__(self, **_: object) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, ...]:
        return self._device


def as_bits(x: Any, name: str, stream: int) -> tuple[Any, DType]:
    """Reinterpret a CUDA tensor as unsigned integers, which every DLPack consumer can hold.

    Parameters
    ----------
    x
        Anything with ``__dlpack__``.
    stream
        The consumer's stream, by DLPack's numbers: work submitted there later sees the data; -1
        for one that waits for it already.

    Returns
    -------
    tensor, dtype
        A tensor of the same memory, whose ``__dlpack__`` can be called once; and its element type.
    """
    device = tuple(map(int, x.__dlpack_device__()))
    capsule = _capsule_of(x, name, stream)
    tensor = _dl_tensor(capsule)
    code, bits, lanes = tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes
    floats = {(2, 32): DType.FLOAT32, (2, 16): DType.FLOAT16}
    narrow = _FROM_DL_CODE.get((code, bits))
    dtype = floats.get((code, bits)) if narrow is None else _DTYPES[narrow]
    if dtype is None or lanes != 1:
        accepted = ", ".join(d.label for d in DType)
        raise TypeError(
            f"{name} has DLPack dtype code {code}, {bits} bits, {lanes} lanes; expected one of "
            f"{accepted}: convert it first"
        )
    tensor.dtype.code = _DL_UINT
    return _Once(capsule, device), dtype


def _check_device(device_type: int, name: str) -> None:
    if device_type in _HOST_DEVICES:
        return
    found = _DEVICE_NAMES.get(device_type, f"DLPack type {device_type}")
    raise BufferError(
        f"{name}: found {found} device tensor; the CPU backend reads host memory: "
        "move it there with .cpu() or .get()"
    )


def _export(x: Any, name: str) -> object:
    """Ask a host tensor for its DLPack capsule."""
    try:
        device_type = int(x.__dlpack_device__()[0])
    except Exception as error:
        raise BufferError(
            f"{name}: {type(x).__name__} has no device that DLPack knows ({error}); "
            "pass a dense tensor in host memory"
        ) from error
    _check_device(device_type, name)
    return _capsule_of(x, name, None)


def _capsule_of(x: Any, name: str, stream: int | None) -> object:
    """Ask for a capsule that will be read on a stream of a device, or on the host (``None``)."""
    try:
        try:
            capsule = x.__dlpack__(stream=stream, max_version=(1, 0))
        except TypeError:  # a producer from before DLPack 1.0
            capsule = x.__dlpack__(stream=stream)
    except Exception as error:
        where = "in host memory" if stream is None else "on the device"
        raise BufferError(
            f"{name}: {type(x).__name__} refuses to be exported ({error}); "
            f"pass a dense, detached tensor {where}"
        ) from error
    # PyTorch exports a lazily negated view (the .imag of a conjugate) with the wrong sign.
    is_neg = getattr(x, "is_neg", None)
    if callable(is_neg) and is_neg():
        raise BufferError(f"{name}: found a lazily negated tensor; call .resolve_neg() on it")
    return capsule


def to_numpy(x: Any, name: str = "k") -> npt.NDArray[Any]:
    """View a host tensor as a numpy array.

    Parameters
    ----------
    x
        A numpy array, or anything with ``__dlpack__`` in host memory (PyTorch, JAX, ...), of any
        shape and strides, and of a dtype that numpy or ml_dtypes has.
    name
        Name of ``x`` in error messages.

    Returns
    -------
    numpy.ndarray
        Shares ``x``'s memory and keeps it alive. May be read-only, strided, or both.

    Raises
    ------
    TypeError
        ``x`` is not a tensor, or its dtype has no numpy counterpart.
    BufferError
        The host cannot read the memory, or the producer refuses (tensors that require grad,
        sparse, quantised or meta tensors).
    """
    if isinstance(x, np.ndarray):
        return x.view(np.ndarray)
    if not (hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")):
        raise TypeError(
            f"{name} is {type(x).__name__}; expected a numpy array or a tensor with __dlpack__"
        )
    capsule = _export(x, name)
    try:
        tensor = _dl_tensor(capsule)
    except BufferError as error:
        raise BufferError(f"{name}: {type(x).__name__} exported badly: {error}") from None
    _check_device(tensor.device.device_type, name)
    code, bits, lanes = tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes
    dtype = _FROM_DL_CODE.get((code, bits)) if lanes == 1 else None
    if dtype is not None:
        tensor.dtype.code = _DL_UINT
    try:
        array = np.from_dlpack(_Once(capsule))
    except (BufferError, RuntimeError, ValueError) as error:
        raise TypeError(
            f"{name}: numpy cannot hold this {type(x).__name__} "
            f"(DLPack dtype code {code}, {bits} bits, {lanes} lanes): {error}"
        ) from error
    return array if dtype is None else array.view(dtype)


class KVArray(np.ndarray[Any, np.dtype[Any]]):
    """A numpy array that can export bfloat16 and fp8 through DLPack.

    ``torch.from_dlpack(a)``, ``jax.dlpack.from_dlpack(a)`` and ``np.asarray(a)`` share its
    memory. Slices and views are again ``KVArray``.
    """

    __slots__ = ()

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[Any, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export a DLPack capsule; the arguments are those of ``ndarray.__dlpack__``.

        Raises
        ------
        BufferError
            DLPack cannot carry the dtype or device; or the array is read-only, is not to be
            copied, and ``max_version`` is below (1, 0), where capsules cannot say so.
        """
        versioned = max_version is not None and max_version[0] >= 1
        if not (self.flags.writeable or versioned or copy):
            raise BufferError(
                "found a read-only array and a consumer from before DLPack 1.0, which cannot be "
                "told so: export a copy, array.copy()"
            )
        code = _DL_CODES.get(self.dtype)
        array = self.view(np.ndarray)
        if code is not None:
            array = array.view(_UINT[self.itemsize])
        capsule = array.__dlpack__(
            stream=stream, max_version=max_version, dl_device=dl_device, copy=copy
        )
        if code is not None:
            _dl_tensor(capsule).dtype.code = code
        return capsule


def as_kv_array(a: Any) -> Any:
    """View a numpy array as a :class:`KVArray`; return a device's array unchanged."""
    return a.view(KVArray) if isinstance(a, np.ndarray) else a


def to_host(x: Any) -> npt.NDArray[Any]:
    """A decoded array as a numpy array: a copy, if it is CuPy's."""
    if isinstance(x, np.ndarray):
        return x
    bits: npt.NDArray[Any] = x.view(f"u{x.itemsize}").get()
    return bits.view(x.dtype)


def on_cuda(x: Any) -> bool:
    """Whether a tensor, or the first tensor of a list, is in CUDA memory."""
    if isinstance(x, list | tuple):
        return bool(x) and on_cuda(x[0])
    if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack_device__"):
        return False
    try:
        return int(x.__dlpack_device__()[0]) in _CUDA_DEVICES
    except Exception:
        return False  # reading it will raise, and say what is wrong


def check_memory(x: Any, name: str, backend: str) -> None:
    """Raise ``BufferError`` unless an output tensor is where the backend writes to."""
    if on_cuda(x) != (backend == "cuda"):
        raise BufferError(
            f"{name}: found {'a CUDA device' if on_cuda(x) else 'host memory'}, the backend is "
            f"{backend!r}: choose the other, or give tensors where it decodes to"
        )


def check_writable(arrays: Sequence[Any], name: str, found: DType, expected: DType) -> None:
    """Raise unless values of a type can be written to arrays, each to a place of its own."""
    if found is not expected:
        raise TypeError(
            f"{name}: found {found.label}, decoding gives {expected.label}: give buffers of that, "
            "or choose another out_dtype when encoding"
        )
    if any(isinstance(x, np.ndarray) and not x.flags.writeable for x in arrays):
        raise BufferError(f"{name} cannot be written: exported for reading only")
    for strides, shape in {(x.strides, x.shape) for x in arrays}:
        if any(not step and n > 1 for step, n in zip(strides, shape, strict=True)):
            raise BufferError(f"{name} has values that share memory (a stride of 0): copy it first")


def check_apart(arrays: Sequence[Any], name: str) -> None:
    """Raise ``BufferError`` if two of some arrays, CuPy's or NumPy's, begin at one place."""
    if not arrays[0].size:
        return
    places = {x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr for x in arrays}
    if len(places) < len(arrays):
        raise BufferError(f"{name}: two layers, or K and V, are the same memory: give each its own")


def layer_list(
    x: Any,
    name: str,
    layers: int,
    kv_heads: int,
    head_dim: int,
    *,
    convert: Callable[[Any, str], Any] = to_numpy,
    kind: Callable[[Any, str], DType] = lambda array, name: dtype_of(array.dtype, name),
) -> tuple[list[Any], DType]:
    """Check K or V of one section, and split it into an array per layer.

    Parameters
    ----------
    x
        One tensor [layers, kv_heads, tokens, head_dim] or [layers, 1, kv_heads, tokens, head_dim];
        or a list or tuple of a tensor per layer, each [kv_heads, tokens, head_dim] or
        [1, kv_heads, tokens, head_dim], or of fewer tensors, of several layers each. Tensors as for
        :func:`to_numpy`. ``tokens`` may be 0.
    name
        Name of ``x`` in error messages.
    layers, kv_heads, head_dim
        The expected shape.
    convert
        Makes an array from a tensor and its name: :func:`to_numpy`, or another function for arrays
        on a device.
    kind
        Returns the cache dtype of an array, given the array and its name.

    Returns
    -------
    arrays : list of numpy.ndarray
        ``layers`` views [kv_heads, tokens, head_dim] of the memory of ``x``.
    dtype : DType
        Their common dtype.

    Raises
    ------
    ValueError
        The shape is wrong, or layers have different numbers of tokens.
    TypeError, BufferError
        The dtype is wrong or differs between layers, or :func:`to_numpy` raises it.
    """
    several: list[Any] = []
    if isinstance(x, list | tuple):
        found = [convert(t, f"{name}[{i}]") for i, t in enumerate(x)]
        if len(x) != layers and sum(a.shape[0] if a.ndim == 4 else 1 for a in found) == layers:
            several = [a if a.ndim == 4 else a[None] for a in found]
            found = [a[0] for a in several if len(a)]  # layers of one tensor are alike
        elif len(found) != layers:
            raise ValueError(
                f"{name} is a list of {len(x)} tensors; expected one for each of {layers} layers"
            )
        expected = {"kv_heads": kv_heads, "tokens": None, "head_dim": head_dim}
        arrays = [_drop_batch(found[0], f"{name}[0]", expected, axis=0)]
        shape = tuple(arrays[0].shape)
        for i, array in enumerate(found[1:], 1):
            same = array.shape == shape  # as a rule
            arrays.append(array if same else _drop_batch(array, f"{name}[{i}]", expected, axis=0))
    else:
        whole = convert(x, name)
        expected = {"layers": layers, "kv_heads": kv_heads, "tokens": None, "head_dim": head_dim}
        arrays = list(_drop_batch(whole, name, expected, axis=1))
    dtype = kind(arrays[0], name)
    for i, array in enumerate(arrays):
        if array.dtype != arrays[0].dtype:
            raise TypeError(
                f"{name}[{i}] has dtype {array.dtype}, {name}[0] has {arrays[0].dtype}; "
                "expected one dtype for all layers: convert them first"
            )
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"{name}[{i}] has {array.shape[1]} tokens, {name}[0] has {arrays[0].shape[1]}; "
                "layers that hold different tokens belong to different sections"
            )
    if several:
        arrays = [own for a in several for own in a]
    return arrays, dtype


def _drop_batch(array: Any, name: str, expected: dict[str, int | None], axis: int) -> Any:
    """Check the shape against ``expected`` (``None``: any), and remove a batch axis of size 1."""
    sizes = list(expected.values())
    shape = list(array.shape)
    batch = shape.pop(axis) if len(shape) == len(sizes) + 1 else 1
    fits = len(shape) == len(sizes) and all(
        s is None or s == n for s, n in zip(sizes, shape, strict=True)
    )
    if fits and batch == 1:
        return array if array.ndim == len(sizes) else array.squeeze(axis)
    names = [n if size is None else f"{n}={size}" for n, size in expected.items()]
    batched = [*names[:axis], "1", *names[axis:]]
    if fits:
        hint = f"found a batch of {batch}: a stream holds one sequence, so encode each on its own"
    elif len(shape) == len(sizes) and _fits_swapped(shape, sizes):
        hint = "tokens come after heads: transpose those two axes"
    elif len(shape) != len(sizes):
        hint = (
            "one tensor has a layer axis; tensors of single layers go into a list"
            if "layers" in expected
            else "a list holds one tensor per layer"
        )
    else:
        hint = "the sizes are those of the calibration's geometry: is this its model?"
    raise ValueError(
        f"{name} has shape {list(array.shape)}; expected [{', '.join(names)}] or "
        f"[{', '.join(batched)}]: {hint}"
    )


def _fits_swapped(shape: Sequence[int], sizes: Sequence[int | None]) -> bool:
    swapped = [*shape[:-3], shape[-2], shape[-3], shape[-1]]
    return all(s is None or s == n for s, n in zip(sizes, swapped, strict=True))


def check_positions(positions: Any, tokens: int, after: int) -> npt.NDArray[np.int64]:
    """Check the positions of a chunk's tokens.

    Parameters
    ----------
    positions
        ``None`` (contiguous from ``after + 1``), or ``tokens`` strictly ascending integers above
        ``after``: a sequence, a numpy array or a host tensor.
    tokens
        Number of tokens in the chunk.
    after
        The last position so far; -1 at the beginning.

    Returns
    -------
    numpy.ndarray
        int64 [tokens], always a copy.

    Raises
    ------
    ValueError
        The positions are not as above.
    BufferError
        The positions are not in host memory.
    """
    if positions is None:
        if after > _INT64_MAX - tokens:
            raise ValueError(f"positions after {after} do not fit int64; pass them explicitly")
        return np.arange(after + 1, after + 1 + tokens, dtype=np.int64)
    is_tensor = isinstance(positions, np.ndarray) or hasattr(positions, "__dlpack__")
    found = to_numpy(positions, "positions") if is_tensor else np.asarray(positions)
    if found.shape != (tokens,):
        raise ValueError(
            f"positions have shape {list(found.shape)}; expected [{tokens}], one for each token"
        )
    if tokens == 0:
        return np.empty(0, np.int64)
    if found.dtype.kind not in "iu":
        raise ValueError(f"positions have dtype {found.dtype}; expected integers within int64")
    if int(found.max()) > _INT64_MAX:
        raise ValueError(f"position {found.max()} does not fit int64")
    result = found.astype(np.int64)
    if result[0] <= after:
        raise ValueError(
            f"positions start at {result[0]}; expected more than {after}, "
            "the last one so far: tokens go in once and in rising order"
            if after >= 0
            else f"positions start at {result[0]}; expected 0 or more"
        )
    falls = np.flatnonzero(result[1:] <= result[:-1])
    if falls.size:
        i = int(falls[0])
        raise ValueError(
            f"position {result[i]} of token {i} is followed by {result[i + 1]}; "
            "expected strictly rising positions: sort the tokens, drop duplicates"
        )
    return result
