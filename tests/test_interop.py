from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.dlpack import from_dlpack

from kvtc_stream.backends.select import get_backend
from kvtc_stream.formats.geometry import DType
from kvtc_stream.io.dlpack import (
    KVArray,
    as_bits,
    as_kv_array,
    check_positions,
    dtype_of,
    layer_list,
    numpy_dtype,
    to_numpy,
)

TORCH = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT8_E4M3FN: torch.float8_e4m3fn,
    DType.FLOAT8_E5M2: torch.float8_e5m2,
}
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32}
dtypes = pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.label)


def bits(a: np.ndarray[Any, Any]) -> list[Any]:
    """The bit patterns, so that NaN equals itself and -0 differs from 0."""
    values: list[Any] = np.ascontiguousarray(a).view(UINT[a.itemsize]).tolist()
    return values


def numbers(dtype: DType, *shape: int) -> np.ndarray[Any, Any]:
    """Every bit pattern in turn, NaN and Inf too."""
    uint = UINT[dtype.itemsize]
    step = 0x01010101 if dtype.itemsize == 4 else 1
    raw = np.arange(int(np.prod(shape)), dtype=np.uint64) * step
    return raw.astype(uint).view(numpy_dtype(dtype)).reshape(shape)


def torch_tensor(a: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor with a copy of the bits of ``a``, made without DLPack."""
    raw = torch.from_numpy(np.ascontiguousarray(a).view(f"i{a.itemsize}").copy())
    return raw.view(TORCH[dtype_of(a.dtype)])


# Byte offsets from dlpack.h: the DLTensor is at 0 of DLManagedTensor and at 32 of
# DLManagedTensorVersioned; in it data 8, device type 4, device id 4, ndim 4, code 1, bits 1.
KINDS = {"legacy": (b"dltensor", 0), "versioned": (b"dltensor_versioned", 32)}
DEVICE, CODE = 8, 20
pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def field(capsule: object, kind: str, offset: int) -> ctypes.c_uint8:
    name, start = KINDS[kind]
    return ctypes.c_uint8.from_address(pointer(capsule, name) + start + offset)


class Producer:
    """A foreign host tensor around an array of unsigned integers.

    ``patch`` sets bytes inside the capsule, ``device`` is what ``__dlpack_device__`` says.
    """

    def __init__(
        self,
        array: np.ndarray[Any, Any],
        *,
        kind: str = "versioned",
        device: int = 1,
        patch: dict[int, int] | None = None,
    ) -> None:
        self.array, self.kind, self.device, self.patch = array, kind, device, patch or {}
        self.exports = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.device, 0)

    def export(self, max_version: tuple[int, int] | None) -> object:
        self.exports += 1
        capsule = self.array.__dlpack__(max_version=max_version)
        for offset, value in self.patch.items():
            field(capsule, self.kind, offset).value = value
        return capsule

    def __dlpack__(
        self, *, stream: int | None = -1, max_version: tuple[int, int] | None = None
    ) -> object:
        assert stream is None, "a host tensor has no stream"
        return self.export(max_version if self.kind == "versioned" else None)


class OldProducer(Producer):
    """A producer that does not know ``max_version``."""

    def __dlpack__(self, *, stream: int | None = -1) -> object:  # type: ignore[override]
        assert stream is None
        return self.export(None)


class TestDTypes:
    @dtypes
    def test_round_trip(self, dtype: DType) -> None:
        assert numpy_dtype(dtype).name == dtype.label
        assert numpy_dtype(dtype).itemsize == dtype.itemsize
        assert dtype_of(numpy_dtype(dtype)) is dtype

    @pytest.mark.parametrize("other", ["float64", "int8", ">f4", ml_dtypes.float8_e4m3, "bool"])
    def test_others_are_named(self, other: Any) -> None:
        found = re.escape(str(np.dtype(other)))
        with pytest.raises(TypeError, match=rf"v has dtype {found}; expected .*bfloat16.*e5m2"):
            dtype_of(other, "v")


class TestToNumpy:
    @dtypes
    @pytest.mark.parametrize(
        "index", [np.s_[:], np.s_[::-1, 1:, ::2], np.s_[:0], np.s_[0, 0, 0, ...]]
    )
    def test_numpy_arrays_are_viewed(self, dtype: DType, index: Any) -> None:
        a = numbers(dtype, 3, 4, 5)[index]
        a.flags.writeable = False
        b = to_numpy(a)
        assert type(b) is np.ndarray
        assert b.__array_interface__ == a.__array_interface__

    @dtypes
    def test_torch_shares_memory(self, dtype: DType) -> None:
        a = numbers(dtype, 3, 4, 50)
        t = torch_tensor(a)
        b = to_numpy(t)
        assert b.dtype == a.dtype
        assert bits(b) == bits(a)
        t[1, 2, 3] = 1.5
        assert b[1, 2, 3] == 1.5
        b[0, 0, 0] = -2
        assert t[0, 0, 0].float() == -2

    @dtypes
    @pytest.mark.parametrize(
        "view",
        [
            lambda t: t.transpose(0, 2),
            lambda t: t[1:, ::2, 3:4],
            lambda t: t[:1].expand(5, -1, -1),
            lambda t: t.permute(2, 0, 1)[::3],
            lambda t: t[:, :0],
            lambda t: t[0, 0, 0],
        ],
        ids=["transposed", "sliced", "expanded", "permuted", "empty", "scalar"],
    )
    def test_torch_views(self, dtype: DType, view: Any) -> None:
        a = numbers(dtype, 3, 4, 50)
        expected = view(torch_tensor(a).view(getattr(torch, f"int{8 * dtype.itemsize}"))).numpy()
        t = view(torch_tensor(a))
        b = to_numpy(t)
        assert b.shape == tuple(t.shape)
        assert bits(b) == bits(expected)
        if b.size:
            assert b.ctypes.data == t.data_ptr()
            assert b.strides == tuple(s * dtype.itemsize for s in t.stride())

    @dtypes
    def test_memory_outlives_the_tensor(self, dtype: DType) -> None:
        a = numbers(dtype, 64)
        t = torch_tensor(a)
        alive = weakref.ref(t)
        b = to_numpy(t)[8:]
        del t
        gc.collect()
        spray = [torch.full((64,), 1.0).to(TORCH[dtype]) for _ in range(50)]
        assert bits(b) == bits(a[8:])
        del b, spray
        gc.collect()
        assert alive() is None

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("code", "dtype"),
        [(4, DType.BFLOAT16), (10, DType.FLOAT8_E4M3FN), (12, DType.FLOAT8_E5M2)],
    )
    def test_both_kinds_of_capsule_and_their_lifetime(
        self, kind: str, code: int, dtype: DType
    ) -> None:
        a = np.arange(24, dtype=UINT[dtype.itemsize]).reshape(2, 3, 4)
        alive = weakref.ref(a)
        producer = Producer(a, kind=kind, patch={CODE: code})
        b = to_numpy(producer)
        assert producer.exports == 1
        assert b.dtype == numpy_dtype(dtype)
        assert bits(b) == a.tolist()
        c = b[1]
        del a, b, producer
        gc.collect()
        assert alive() is not None
        del c
        gc.collect()
        assert alive() is None

    def test_producer_without_max_version(self) -> None:
        producer = OldProducer(np.arange(6, dtype=np.uint16), kind="legacy", patch={CODE: 4})
        assert bits(to_numpy(producer)) == list(range(6))
        assert producer.exports == 1

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("device", [3, 11])
    def test_pinned_memory_is_host_memory(self, kind: str, device: int) -> None:
        a = np.arange(6, dtype=np.uint16)
        producer = Producer(a, kind=kind, device=device, patch={CODE: 4, DEVICE: device})
        assert to_numpy(producer).ctypes.data == a.ctypes.data

    @pytest.mark.parametrize(("device", "label"), [(2, "CUDA"), (13, "CUDA managed"), (99, "99")])
    def test_device_memory_is_refused_before_export(self, device: int, label: str) -> None:
        producer = Producer(np.zeros(4, np.uint16), device=device)
        with pytest.raises(BufferError, match=rf"v: found .*{label} device.*\.cpu\(\) or"):
            to_numpy(producer, "v")
        assert producer.exports == 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_capsule_that_contradicts_its_device_is_refused_and_freed(self, kind: str) -> None:
        a = np.zeros(4, np.uint16)
        alive = weakref.ref(a)
        producer = Producer(a, kind=kind, patch={DEVICE: 2})
        with pytest.raises(BufferError, match=r"found CUDA device tensor; .*\.cpu\(\) or"):
            to_numpy(producer)
        del a, producer
        gc.collect()
        assert alive() is None

    def test_a_capsule_is_consumed_once(self) -> None:
        class Hoarder(Producer):
            capsule: object = None

            def __dlpack__(self, **_: Any) -> object:
                self.capsule = self.capsule or self.export((1, 0))
                return self.capsule

        hoarder = Hoarder(np.arange(3, dtype=np.uint16), patch={CODE: 4})
        first = to_numpy(hoarder)
        with pytest.raises(BufferError, match=r"'used_dltensor_versioned'.*nobody has consumed"):
            to_numpy(hoarder)
        assert bits(first) == [0, 1, 2]

    def test_not_a_capsule(self) -> None:
        class Liar(Producer):
            def __dlpack__(self, **_: Any) -> object:
                return 7

        with pytest.raises(BufferError, match=r"k: Liar exported badly: .*returned int"):
            to_numpy(Liar(np.zeros(1, np.uint8)))

    def test_a_later_major_version_is_refused(self) -> None:
        producer = Producer(np.zeros(3, np.uint16), patch={-32: 2})
        with pytest.raises(BufferError, match=r"found DLPack 2\.\d; expected 1\.x"):
            to_numpy(producer)

    @pytest.mark.parametrize("code", [8, 14, 17, 3])
    def test_dtypes_without_a_numpy_counterpart(self, code: int) -> None:
        producer = Producer(np.zeros(4, np.uint8), patch={CODE: code})
        with pytest.raises(TypeError, match=rf"v: numpy cannot hold .* code {code}, 8 bits"):
            to_numpy(producer, "v")

    def test_vector_lanes_are_refused(self) -> None:
        producer = Producer(np.zeros(4, np.uint16), patch={CODE: 4, CODE + 2: 2})
        with pytest.raises(TypeError, match="2 lanes"):
            to_numpy(producer)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: torch.zeros(2, 3, requires_grad=True), r"Tensor refuses .*detach\(\)"),
            (lambda: torch.nn.Parameter(torch.zeros(2, 3)), r"Parameter refuses .*detach\(\)"),
            (lambda: torch.zeros(2, 3, device="meta"), "no device that DLPack knows.*meta.*dense"),
            (lambda: torch.zeros(2, 3).to_sparse(), "layout.*dense"),
            (lambda: torch.zeros(2).to_mkldnn(), "dense"),
            (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, r"\.resolve_neg\(\)"),
        ],
        ids=["requires_grad", "parameter", "meta", "sparse", "mkldnn", "negated"],
    )
    def test_torch_tensors_that_hold_no_plain_values(self, make: Any, message: str) -> None:
        with pytest.raises(BufferError, match=f"^v: .*{message}"):
            to_numpy(make(), "v")

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_quantised_torch_tensors(self) -> None:
        with pytest.raises(BufferError, match="refuses to be exported"):
            to_numpy(torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8))

    @pytest.mark.parametrize("other", [None, 3.0, [1.0], "k", b"k"])
    def test_other_objects(self, other: Any) -> None:
        with pytest.raises(TypeError, match=f"v is {type(other).__name__}; expected a numpy array"):
            to_numpy(other, "v")

    def test_jax(self) -> None:
        jax = pytest.importorskip("jax")
        with jax.default_device(jax.devices("cpu")[0]):
            for dtype in DType:
                x = jax.numpy.asarray(numbers(dtype, 2, 3, 4))
                assert bits(to_numpy(x)) == bits(numbers(dtype, 2, 3, 4))
                y = jax.dlpack.from_dlpack(as_kv_array(numbers(dtype, 2, 3, 4)))
                assert bits(np.asarray(y)) == bits(numbers(dtype, 2, 3, 4))

    def test_importing_does_not_import_frameworks(self) -> None:
        script = (
            "import sys, kvtc_stream.io.dlpack; print({'torch', 'cupy', 'jax'} & {*sys.modules})"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.strip() == "set()"


@st.composite
def strided(draw: st.DrawFn) -> tuple[DType, np.ndarray[Any, Any], list[slice], list[int]]:
    """An array, and how to look at it: slices and an order of its axes."""
    dtype = draw(st.sampled_from(list(DType)))
    shape = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    index = []
    for n in shape:
        start = draw(st.integers(0, n))
        index.append(slice(start, draw(st.integers(start, n)), draw(st.integers(1, 3))))
    return dtype, numbers(dtype, *shape), index, draw(st.permutations(range(len(shape))))


@given(strided())
@settings(max_examples=150, deadline=None)
def test_any_strides_equal_numpy(
    case: tuple[DType, np.ndarray[Any, Any], list[slice], list[int]],
) -> None:
    dtype, a, index, axes = case
    expected = a[tuple(index)].transpose(axes)
    tensor = torch_tensor(a)[tuple(index)].permute(axes)
    there = to_numpy(tensor)
    back = from_dlpack(as_kv_array(there))
    again = to_numpy(back)
    assert there.shape == again.shape == expected.shape
    assert there.dtype == again.dtype == expected.dtype
    assert back.dtype == TORCH[dtype]
    assert bits(there) == bits(again) == bits(expected)
    if expected.size:
        assert there.ctypes.data == again.ctypes.data == tensor.data_ptr()


class TestKVArray:
    @dtypes
    @pytest.mark.parametrize("index", [np.s_[:], np.s_[1:, ::2], np.s_[:, :, 1]])
    def test_numpy_to_torch_to_numpy_shares_memory(self, dtype: DType, index: Any) -> None:
        base = numbers(dtype, 3, 4, 50)
        a = as_kv_array(base)[index]
        assert type(a) is KVArray
        t = from_dlpack(a)
        assert t.dtype == TORCH[dtype]
        b = to_numpy(t)
        assert bits(b) == bits(a) == bits(base[index])
        b[1, 1] = 1.25
        assert np.all(base[index][1, 1] == 1.25)
        t[0, 1] = -3
        assert np.all(base[index][0, 1] == -3)
        plain = np.asarray(a)
        assert type(plain) is np.ndarray
        assert np.shares_memory(plain, base)

    @dtypes
    def test_memory_outlives_the_array(self, dtype: DType) -> None:
        base = numbers(dtype, 64).copy()
        alive = weakref.ref(base)
        t = from_dlpack(as_kv_array(base))
        del base
        gc.collect()
        assert alive() is not None
        assert bits(to_numpy(t)) == bits(numbers(dtype, 64))
        del t
        gc.collect()
        assert alive() is None

    @dtypes
    @pytest.mark.parametrize("kind", KINDS)
    def test_capsules_carry_the_dtype_code(self, dtype: DType, kind: str) -> None:
        code = {3: 4, 4: 10, 5: 12}.get(dtype, 2)
        version = (1, 0) if kind == "versioned" else None
        capsule = as_kv_array(numbers(dtype, 4)).__dlpack__(max_version=version)
        assert field(capsule, kind, CODE).value == code
        assert field(capsule, kind, CODE + 1).value == 8 * dtype.itemsize

    @dtypes
    def test_copy_and_device_are_honoured(self, dtype: DType) -> None:
        a = as_kv_array(numbers(dtype, 4))
        t = from_dlpack(a, copy=True)
        assert t.data_ptr() != a.ctypes.data
        assert bits(to_numpy(t)) == bits(a)
        assert a.__dlpack_device__() == (1, 0)
        with pytest.raises(BufferError):
            a.__dlpack__(dl_device=(2, 0))

    @dtypes
    def test_read_only_needs_a_versioned_capsule(self, dtype: DType) -> None:
        a = as_kv_array(numbers(dtype, 4))
        a.flags.writeable = False
        with pytest.raises(BufferError, match=r"read-only array.*array\.copy\(\)"):
            a.__dlpack__()
        b = to_numpy(Producer(a))
        assert bits(b) == bits(a)
        assert not b.flags.writeable

    def test_results_of_other_dtypes_export_as_numpy_does(self) -> None:
        a = as_kv_array(numbers(DType.FLOAT16, 4))
        assert from_dlpack(a == a).tolist() == [True] * 4


LAYERS, HEADS, TOKENS, DIM = 3, 2, 5, 4
GEOMETRY = (LAYERS, HEADS, DIM)


def cache(dtype: DType = DType.BFLOAT16, tokens: int = TOKENS) -> np.ndarray[Any, Any]:
    return numbers(dtype, LAYERS, HEADS, tokens, DIM)


class TestLayerList:
    @dtypes
    @pytest.mark.parametrize("wrap", [torch_tensor, lambda a: a], ids=["torch", "numpy"])
    @pytest.mark.parametrize(
        "form",
        [
            lambda x: x,
            lambda x: x[:, None],
            lambda x: list(x),
            lambda x: tuple(layer[None] for layer in x),
            lambda x: [x[0][None], *x[1:]],
        ],
        ids=["whole", "whole-batch", "list", "tuple-batch", "mixed-batch"],
    )
    @pytest.mark.parametrize("tokens", [0, 1, TOKENS])
    def test_every_form(self, dtype: DType, wrap: Any, form: Any, tokens: int) -> None:
        a = cache(dtype, tokens)
        x = wrap(a)
        arrays, found = layer_list(form(x), "k", *GEOMETRY)
        assert found is dtype
        assert len(arrays) == LAYERS
        for i, array in enumerate(arrays):
            assert array.shape == (HEADS, tokens, DIM)
            assert bits(array) == bits(a[i])
            if tokens:
                pointer = x[i].data_ptr() if isinstance(x, torch.Tensor) else x[i].ctypes.data
                assert array.ctypes.data == pointer

    def test_strided_input_stays_a_view(self) -> None:
        a = numbers(DType.FLOAT16, TOKENS, LAYERS, HEADS, DIM)
        arrays, _ = layer_list(a.transpose(1, 2, 0, 3), "k", *GEOMETRY)
        assert all(np.shares_memory(array, a) for array in arrays)

    @pytest.mark.parametrize(
        ("form", "message"),
        [
            (lambda a: a[:2], r"shape \[2, 2, 5, 4\]; expected \[layers=3, kv_heads=2, tokens, he"),
            (lambda a: a[:, :1], r"\[3, 1, 5, 4\].*geometry"),
            (lambda a: a[..., :3], r"\[3, 2, 5, 3\].*head_dim=4\].*geometry"),
            (lambda a: a.swapaxes(1, 2), r"\[3, 5, 2, 4\].*transpose"),
            (lambda a: np.stack([a, a], 1), r"\[3, 2, 2, 5, 4\].*batch of 2.*one sequence"),
            (lambda a: np.stack([a, a], 1)[:, :0], "batch of 0"),
            (lambda a: a[0], r"shape \[2, 5, 4\].*go into a list"),
            (lambda a: a[None, None], r"shape \[1, 1, 3, 2, 5, 4\]"),
            (lambda a: list(a[:2]), "list of 2 tensors; expected one for each of 3 layers"),
            (lambda a: [], "list of 0 tensors"),
            (lambda a: [a[0], a[1], a[2, :1]], r"v\[2\] has shape \[1, 5, 4\]; expected \[kv_head"),
            (lambda a: list(np.stack([a, a], 1)), r"v\[0\] has shape \[2, 2, 5, 4\].*batch of 2"),
            (lambda a: list(a.swapaxes(1, 2)), r"v\[0\] has shape \[5, 2, 4\].*transpose"),
            (lambda a: [a[0, 0], a[1], a[2]], r"v\[0\] has shape \[5, 4\].*one tensor per layer"),
            (lambda a: [a[0], a[1, :, :4], a[2]], r"v\[1\] has 4 tokens, v\[0\] has 5"),
        ],
    )
    def test_wrong_shapes(self, form: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            layer_list(form(cache()), "v", *GEOMETRY)

    @pytest.mark.parametrize(
        ("form", "message"),
        [
            (lambda a: a.astype(np.float64), "v has dtype float64; expected one of float32"),
            (lambda a: [a[0], a[1], a[2].astype(np.float16)], r"v\[2\] has dtype float16, v\[0\]"),
            (lambda a: "abc", "v is str"),
            (lambda a: [a[0], None, a[2]], r"v\[1\] is NoneType"),
        ],
    )
    def test_wrong_types(self, form: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            layer_list(form(cache()), "v", *GEOMETRY)

    def test_device_errors_name_the_layer(self) -> None:
        class OnDevice(Producer):
            def __init__(self) -> None:
                super().__init__(np.zeros(1, np.uint8), device=2)

        a = cache()
        with pytest.raises(BufferError, match=r"v\[1\]: found CUDA device tensor"):
            layer_list([a[0], OnDevice(), a[2]], "v", *GEOMETRY)


class TestPositions:
    @pytest.mark.parametrize(("after", "tokens"), [(-1, 3), (41, 2), (7, 0)])
    def test_contiguous_by_default(self, after: int, tokens: int) -> None:
        found = check_positions(None, tokens, after)
        assert found.dtype == np.int64
        assert found.tolist() == [after + 1 + i for i in range(tokens)]

    @pytest.mark.parametrize(
        "wrap",
        [
            list,
            tuple,
            np.array,
            torch.tensor,
            lambda p: np.array(p, np.uint8),
            lambda p: np.array(p, np.uint64),
            lambda p: torch.tensor(p, dtype=torch.int32),
            lambda p: np.array(p[::-1])[::-1],
        ],
    )
    def test_accepted(self, wrap: Any) -> None:
        found = check_positions(wrap([3, 4, 9]), 3, 2)
        assert found.dtype == np.int64
        assert found.tolist() == [3, 4, 9]

    def test_result_is_a_copy(self) -> None:
        mine = np.array([0, 1], np.int64)
        found = check_positions(mine, 2, -1)
        mine[0] = 7
        assert found.tolist() == [0, 1]

    @pytest.mark.parametrize("empty", [[], (), np.empty(0, np.int64), torch.empty(0)])
    def test_empty(self, empty: Any) -> None:
        found = check_positions(empty, 0, 5)
        assert found.dtype == np.int64
        assert found.shape == (0,)

    @pytest.mark.parametrize(
        ("positions", "tokens", "after", "message"),
        [
            ([[0, 1]], 2, -1, r"shape \[1, 2\]; expected \[2\]"),
            ([0, 1], 3, -1, r"shape \[2\]; expected \[3\]"),
            (4, 1, -1, r"shape \[\]"),
            ([0.0, 1.0], 2, -1, "dtype float64; expected integers"),
            ([False, True], 2, -1, "dtype bool"),
            (["0", "1"], 2, -1, "expected integers"),
            (torch.zeros(2), 2, -1, "dtype float32"),
            ([0, 2**64], 2, -1, "expected integers within int64"),
            (np.array([0, 2**63], np.uint64), 2, -1, "9223372036854775808 does not fit int64"),
            ([-1, 0], 2, -1, "start at -1; expected 0 or more"),
            ([7, 8], 2, 7, "start at 7; expected more than 7"),
            ([0, 5, 5], 3, -1, "position 5 of token 1 is followed by 5; expected strictly rising"),
            ([0, 5, 4], 3, -1, "position 5 of token 1 is followed by 4"),
            ([0, 2**63 - 1, -(2**63)], 3, -1, "followed by -9223372036854775808"),
            (None, 2, 2**63 - 2, "do not fit int64"),
        ],
    )
    def test_refused(self, positions: Any, tokens: int, after: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_positions(positions, tokens, after)

    def test_device_positions_are_refused(self) -> None:
        with pytest.raises(BufferError, match="positions: found CUDA"):
            check_positions(Producer(np.zeros(2, np.int64), device=2), 2, -1)


def test_lazily_negated_tensors_of_a_device_are_refused() -> None:
    class Negated:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self, **_: object) -> object:
            return np.zeros(3, np.float32).__dlpack__()

        def is_neg(self) -> bool:
            return True

    with pytest.raises(BufferError, match="lazily negated"):
        as_bits(Negated(), "k", 1)


def test_lists_of_several_layers() -> None:
    """Tensors of a list may hold several layers each; a batch is none."""
    x = np.arange(5 * 2 * 3 * 4, dtype=np.float16).reshape(5, 2, 3, 4)
    arrays, dtype = layer_list([x[:2], x[2], x[3:]], "k", 5, 2, 4)
    assert dtype is DType.FLOAT16
    assert all(np.shares_memory(a, b) for a, b in zip(arrays, x, strict=True))
    with pytest.raises(ValueError, match="list of 2 tensors"):
        layer_list([x[:2], x[2:]], "k", 4, 2, 4)
    with pytest.raises(ValueError, match="batch of 2"):
        layer_list([x[:2], x[2:4]], "k", 2, 2, 4)
    with pytest.raises(ValueError, match=r"k\[1\] has 2 tokens, k\[0\] has 3"):
        layer_list([x[:2], x[2:4, :, :2], x[4]], "k", 5, 2, 4)
    with pytest.raises(ValueError, match=r"k\[1\]"):
        layer_list([x[:3], x[3:, :0]], "k", 5, 2, 4)
    with pytest.raises(TypeError, match=r"k\[1\] has dtype float32, k\[0\] has float16"):
        layer_list([x[:3], x[3:].astype(np.float32)], "k", 5, 2, 4)
    arrays, _ = layer_list([x[:3], x[:0], x[3:]], "k", 5, 2, 4)
    assert all(np.shares_memory(a, b) for a, b in zip(arrays, x, strict=True))
    found = get_backend("cpu").layers_in([x[:2], x[2:]])
    assert all(np.shares_memory(a, b) for a, b in zip(found, x, strict=True))
