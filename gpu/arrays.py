"""Calibration on a CUDA device, with CuPy arrays.

Work goes to CuPy's current device and stream. There are no custom kernels here: matrix products use
cuBLAS, decompositions cuSOLVER, and the rest CuPy's element-wise operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.arrays import Array, HostArrays
from kvtc_stream.calibration.families import SymbolCounter
from kvtc_stream.coding.rans import ESCAPE, ZERO
from kvtc_stream.coding.rope import Rotations
from kvtc_stream.errors import BackendUnavailableError
from kvtc_stream.formats import Section
from kvtc_stream.formats.geometry import DType
from kvtc_stream.io.dlpack import dtype_of, layer_list, numpy_dtype, on_cuda, to_numpy

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ONE = np.uint64(1)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
#: Columns of the largest matrix that can be solved for all its eigenvectors.
_WIDEST = 16_384
#: A float32 basis is orthonormal if its products differ from the identity by less than this.
_ORTHONORMAL = 1e-6
#: Components whose symbols are counted together: 1.2 GB with 56 steps and 16 step classes.
_COUNTED = 1024


def require_cupy() -> Any:
    """Import CuPy; raise ``BackendUnavailableError`` if it is missing or has no usable device."""
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend='cuda' needs CuPy, which cannot be imported ({error}): "
            f"pip install 'kvtc-stream[cuda]', or use backend='cpu'"
        ) from None
    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except (RuntimeError, ImportError) as error:
        raise BackendUnavailableError(
            f"backend='cuda' needs a CUDA device, and CuPy finds none ({error}): run where "
            f"nvidia-smi shows one, or use backend='cpu'"
        ) from None
    if found == 0:
        raise BackendUnavailableError(
            "backend='cuda' needs a CUDA device, and CuPy finds none: run where nvidia-smi shows "
            "one (is CUDA_VISIBLE_DEVICES empty?), or use backend='cpu'"
        )
    return cupy


class DeviceArrays(HostArrays):
    """CuPy arrays on the current device. Used by one thread at a time.

    ``xp`` is an array module like CuPy; CuPy itself by default.
    """

    name = "cuda"
    leading = True
    widest = _WIDEST

    def __init__(self, xp: Any = None) -> None:
        self.xp = require_cupy() if xp is None else xp
        self.counter = DeviceSymbolCounter(self.xp)
        self._keys: dict[int, Array] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return DeviceArrays, ()  # a module is not pickled: CuPy is found where this arrives

    def layers(self, x: Any, name: str, layers: int, kv_heads: int, dim: int) -> list[Array]:
        """K or V as arrays [kv_heads, tokens, dim] of each layer, on the device.

        Like :func:`layer_list`; host tensors are copied to the device. fp8 becomes float16, which
        represents its values exactly.
        """
        return list(layer_list(x, name, layers, kv_heads, dim, convert=self._array)[0])

    def _array(self, x: Any, name: str) -> Array:
        """Convert a tensor to a bfloat16, float16 or float32 array on the device."""
        xp = self.xp
        if isinstance(x, xp.ndarray):
            array = x
        elif on_cuda(x):
            array = self._from_dlpack(x, name)
        else:
            # As integers: not every array module can copy these types.
            host = to_numpy(x, name)
            dtype = dtype_of(host.dtype, name)
            bits = xp.asarray(host.view(_UNSIGNED[host.itemsize]))
            return self._fp8_values(bits, dtype) if dtype.is_fp8 else bits.view(host.dtype)
        dtype = dtype_of(array.dtype, name)
        return self._fp8_values(array.view(np.uint8), dtype) if dtype.is_fp8 else array

    def _fp8_values(self, bits: Array, dtype: DType) -> Array:
        """Values of fp8 bytes, float16."""
        values = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float16)
        return self.put(values)[bits]

    def _from_dlpack(self, x: Any, name: str) -> Array:
        found = int(x.__dlpack_device__()[1])
        current = int(self.xp.cuda.Device().id)
        if found != current:
            raise BufferError(
                f"{name} is on CUDA device {found}, calibration on {current}: move it there, or "
                f"make its device current before the calibrator is made"
            )
        try:
            return self.xp.from_dlpack(x)
        except (BufferError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise BufferError(
                f"{name}: CuPy cannot read this {type(x).__name__} ({error}); pass a dense, "
                f"detached tensor, fp8 in host memory"
            ) from error

    def rows(
        self,
        section: Section,
        held: tuple[Sequence[Array], Sequence[Array]],
        positions: NDArray[np.int64],
        scales: Sequence[NDArray[np.float32] | None],
    ) -> Array:
        """See :meth:`HostArrays.rows`; values are bit-identical."""
        k, v = (self._float32(x, scale) for x, scale in zip(held, scales, strict=True))
        self.rotate(k, Rotations.of(section, positions, inverse=True))
        return self.xp.concatenate(
            [x.transpose(2, 0, 1, 3).reshape(len(positions), -1) for x in (k, v)], axis=1
        )

    def _float32(self, layers: Sequence[Array], scale: NDArray[np.float32] | None) -> Array:
        """A float32 copy, [layers, heads, tokens, dim]."""
        xp = self.xp
        if layers[0].dtype == _BFLOAT16:
            bits = xp.stack([x.view(np.uint16) for x in layers])
            values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            values = xp.stack(layers).astype(np.float32)
        if scale is not None:
            values *= self.put(scale)[:, :, None, None]
        return values

    def rotate(self, k: Array, rotations: Rotations) -> None:
        """Rotate ``k`` [layers, heads, tokens, dim] in place, all layers of a table at once."""
        tables = enumerate(rotations.table.tolist())
        for table, run in groupby(tables, key=itemgetter(1)):
            if table < 0:
                continue
            layers = [layer for layer, _ in run]
            x = k[layers[0] : layers[-1] + 1]
            pairs = int(rotations.pairs[table])
            if rotations.interleaved[table]:
                a, b = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
            else:
                a, b = x[..., :pairs], x[..., pairs : 2 * pairs]
            cos = self.put(rotations.cos[table, :, :pairs])
            sin = self.put(rotations.sin[table, :, :pairs])
            first = a * cos - b * sin
            b[...] = b * cos + a * sin
            a[...] = first

    def hashes(self, rows: Array) -> NDArray[np.uint64]:
        """Hash of each row's values, uint64 [rows], in host memory.

        The words of a row are multiplied by odd random numbers and summed modulo 2⁶⁴
        (multiplicative hashing, M. Dietzfelbinger and others, J. Algorithms 25(1), 1997), then
        mixed. Integer sums do not depend on order: a row's hash is the same on every device.
        """
        width = rows.shape[1]
        if width not in self._keys:
            self._keys[width] = self.put(_mixed(np.arange(1, width + 1, dtype=np.uint64)) | _ONE)
        words = rows.view(_UNSIGNED[rows.dtype.itemsize]).astype(np.uint64)
        words *= self._keys[width]
        return _mixed(self.get(words.sum(axis=1)))

    def orthonormal(self, x: Array) -> Array:
        """An orthonormal basis, float32 [n, m ≤ n], of the space that the columns of ``x`` span.

        Cholesky QR in float64, which is mostly matrix products, repeated if the first pass is not
        accurate enough (Y. Yamamoto and others, Electronic Transactions on Numerical Analysis 44,
        2015). If it fails, Householder QR.
        """
        xp = self.xp
        basis = x
        for attempt in range(3):
            wide = basis.astype(np.float64)
            products = wide.T @ wide
            if attempt:
                error = float(xp.abs(products - xp.eye(len(products))).max())
                if error < _ORTHONORMAL:
                    return basis
                if not error < 0.5:
                    break
            try:
                inverse = xp.linalg.inv(xp.linalg.cholesky(products))
            except np.linalg.LinAlgError:
                break
            basis = (wide @ inverse.T).astype(np.float32)
        return xp.linalg.qr(x)[0]

    def put(self, x: NDArray[Any]) -> Array:
        """See :meth:`HostArrays.put`."""
        return self.xp.asarray(x)

    def get(self, x: Array) -> NDArray[Any]:
        """See :meth:`HostArrays.get`."""
        return self.xp.asnumpy(x)  # type: ignore[no-any-return]

    def check_memory(self, size: int) -> None:
        """See :meth:`HostArrays.check_memory`."""
        total = int(self.xp.cuda.runtime.memGetInfo()[1])
        if size > total:
            raise ValueError(
                f"calibration needs about {size / 1e9:.0f} GB on the device, which has "
                f"{total / 1e9:.0f}: choose more layer_groups, one of the bases, or backend='cpu'"
            )

    def settle(self) -> None:
        """See :meth:`HostArrays.settle`."""
        self.xp.cuda.get_current_stream().synchronize()


class DeviceSymbolCounter(SymbolCounter):
    """Counts symbols on the device. Counts equal those of the CPU; sums agree to rounding."""

    components = _COUNTED
    workers = 1

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def __call__(
        self,
        x: NDArray[np.float32],
        weights: NDArray[np.float64],
        deltas: NDArray[np.float64],
        present: NDArray[np.intp],
        bounds: NDArray[np.intp],
        steps: int,
    ) -> tuple[Array, NDArray[np.float64]]:
        """See :class:`SymbolCounter`."""
        xp = self.xp
        values = xp.ascontiguousarray(xp.asarray(x).T.astype(np.float64))
        components, classes = len(values), np.repeat(np.arange(present.size), np.diff(bounds))
        counts = xp.zeros((components, deltas.size, present.size, 256), np.float32)
        flat, one = counts.reshape(-1), xp.ones((), np.float32)
        # Index at which the histogram of step 0 begins, for each value.
        begins = xp.arange(components)[:, None] * (deltas.size * present.size * 256)
        begins = begins + xp.asarray(classes * 256)
        member = classes[:, None] == np.arange(present.size)
        every, weighted = (
            xp.asarray(member.astype(np.float64)),
            xp.asarray(member * weights[:, None]),
        )
        error, product, wide = (xp.zeros((components, steps)) for _ in range(3))
        for s, delta in enumerate(deltas.tolist()):
            symbols = xp.rint(xp.clip(values / delta, -2147483647.0, 2147483647.0))
            size = xp.abs(symbols)
            columns = xp.where(size <= ZERO, symbols + ZERO, ESCAPE).astype(np.int64)
            columns += begins
            columns += s * present.size * 256
            xp.add.at(flat, columns.reshape(-1), one)
            decoded = symbols * delta
            sums = (
                (error, xp.square(values - decoded) @ weighted),
                (product, (values * decoded) @ weighted),
                (wide, (size > 32767).astype(np.float64) @ every),
            )
            for i, k in enumerate(present.tolist()):
                if 0 <= s - k < steps:
                    for total, of_classes in sums:
                        total[:, s - k] += of_classes[:, i]
        return counts, self.get(xp.stack([error, product, wide], axis=-1))

    def get(self, x: Array) -> NDArray[Any]:
        """See :class:`SymbolCounter`."""
        return self.xp.asnumpy(x)  # type: ignore[no-any-return]


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of each number: the finaliser of SplitMix64 (G. L. Steele Jr., D. Lea and
    C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
