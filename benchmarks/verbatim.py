"""Coders of verbatim values: what they leave, and how quickly, on real caches.

    python benchmarks/verbatim.py --cache FILES... [--output benchmarks/results/verbatim.json]
    python benchmarks/verbatim.py --sample --device [--output benchmarks/results/verbatim_h200.json]

Files are plain caches, as `kvtc bench` and `benchmarks/bases.py` read and capture them; `--sample`
is the piece of a real one that the tests have. Of each, in bfloat16, the first tokens and a window
from its middle: from values to bytes and back, on one thread, the best of 50. `--device` times
the kernels on the current GPU, with the windows repeated up to a gigabyte.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from _common import environment, load_cache, write_result
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kvtc_stream.coding import verbatim
from kvtc_stream.coding.values import verbatim_arrays, verbatim_planes
from kvtc_stream.formats import Coder, DType, compress, decompress
from kvtc_stream.formats.coders import compress_beside

SAMPLE = Path(__file__).parents[1] / "tests" / "data" / "smollm2_135m.npz"
Cache = tuple[NDArray[Any], NDArray[Any]]


def _bytes(coder: Callable[..., tuple[Coder, bytes]]) -> Any:
    """Encode and decode with a byte coder."""

    def encode(k: NDArray[Any], v: NDArray[Any]) -> tuple[Coder, bytes]:
        return coder(*verbatim_planes(k, v))

    def decode(coded: tuple[Coder, bytes], k: NDArray[Any], v: NDArray[Any]) -> Cache:
        data = decompress(*coded, k.nbytes + v.nbytes)
        return verbatim_arrays(data, k.shape, v.shape, DType.BFLOAT16)

    return encode, decode


def _encode(k: NDArray[Any], v: NDArray[Any]) -> tuple[Coder, bytes]:
    return Coder.PLANES, verbatim.encode(_bits(k, v)).tobytes()


def _decode(coded: tuple[Coder, bytes], k: NDArray[Any], v: NDArray[Any]) -> Cache:
    bits = verbatim.decode(coded[1], k.size + v.size)
    return bits[: k.size].view(k.dtype).reshape(k.shape), bits[k.size :].view(v.dtype).reshape(
        v.shape
    )


def _bits(k: NDArray[Any], v: NDArray[Any]) -> NDArray[np.uint16]:
    return np.concatenate([x.reshape(-1).view(np.uint16) for x in (k, v)])


#: To bytes and back.
CODERS = {
    "PLANES": (_encode, _decode),
    "DEFLATE": _bytes(lambda *planes: compress(Coder.DEFLATE, *planes)),
    "Zstandard, level 3": _bytes(lambda *planes: compress(Coder.ZSTD, *planes)),
    "Zstandard, as for float16": _bytes(lambda *planes: compress_beside(Coder.RANS, *planes)),
    "LZ4": _bytes(lambda *planes: compress(Coder.LZ4, *planes)),
}
TOKENS = {"sinks": 4, "window": 128}
#: Bytes that kernels are timed on, and how often.
DEVICE_BYTES, DEVICE_REPEATS = 1 << 30, 20


def best(action: Callable[[], Any], repeats: int = 50) -> tuple[Any, float]:
    """Result, and seconds of the quickest run."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = action()
        times.append(time.perf_counter() - start)
    return result, min(times)


def measure(samples: list[Cache], encode: Any, decode: Any) -> dict[str, Any]:
    """Measure a coder on samples: compressed fraction, and MB/s in both directions."""
    size = sum(k.nbytes + v.nbytes for k, v in samples)
    coded, encoding = best(lambda: [encode(*x) for x in samples])
    found, decoding = best(lambda: [decode(own, *x) for own, x in zip(coded, samples, strict=True)])
    for x, y in zip(samples, found, strict=True):
        np.testing.assert_array_equal(_bits(*x), _bits(*y))
    return {
        "coder": coded[0][0].name,
        "share": sum(len(data) for _, data in coded) / size,
        "encode_mbps": size / encoding / 1e6,
        "decode_mbps": size / decoding / 1e6,
    }


def on_device(samples: list[Cache]) -> dict[str, Any]:
    """Time the kernels: GB/s of values, in pieces of 4 MiB, which streams have."""
    import cupy

    from kvtc_stream.gpu.coder import verbatim as coder
    from kvtc_stream.gpu.kernels import verbatim as kernels
    from kvtc_stream.gpu.runtime.staging import Staging

    bits = np.concatenate([_bits(*x) for x in samples])
    piece = np.resize(bits, 2 << 20)
    count = DEVICE_BYTES // piece.nbytes
    rows = [np.roll(piece, 1009 * i) for i in range(count)]
    values = cupy.asarray(np.concatenate(rows))
    own = [(x[: len(piece) // 2], x[len(piece) // 2 :]) for x in cupy.split(values, count)]
    payloads = coder.encode(own)
    assert payloads[0].tobytes() == verbatim.encode(rows[0]).tobytes()
    sizes, begins = [len(piece)] * count, coder.starts([len(x) for x in payloads])
    host = np.zeros(int(begins[-1]), np.uint8)
    for x, begin in zip(payloads, begins.tolist(), strict=False):
        host[begin : begin + len(x)] = x
    data = cupy.asarray(host)
    places = verbatim.places(
        np.concatenate([verbatim.split(x, len(piece))[1] for x in payloads]), sizes
    )
    firsts = np.arange(count) * len(piece)
    tasks = cupy.asarray(coder.tasks_of(sizes, firsts, places, begins))
    heads, written = cupy.empty((len(tasks), verbatim.HEAD), np.uint8), cupy.empty_like(data)
    out, faults = cupy.empty_like(values), cupy.zeros(count, np.int32)
    tiles, threads = len(tasks), kernels.THREADS

    def decode() -> None:
        kernels.decode(tiles, threads, (tasks, data, data, out.data.ptr, faults))

    def survey() -> None:
        kernels.survey(tiles, threads, (tasks, values, heads))

    def encode() -> None:
        survey()
        kernels.encode(tiles, threads, (tasks, values, heads, written, written))

    def copy() -> None:
        out[...] = values

    result: dict[str, Any] = {
        "device": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        "bytes": int(values.nbytes),
        "share": sum(map(len, payloads)) / values.nbytes,
    }
    actions = {"copy": copy, "survey": survey, "encode": encode, "decode": decode}
    for name, action in actions.items():
        times = []
        for _ in range(DEVICE_REPEATS):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            action()
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
        result[f"{name}_gbps"] = values.nbytes / min(times) / 1e9
        result[f"{name}_median_gbps"] = values.nbytes / float(np.median(times)) / 1e9
    # As a reader and a writer see it: from and to ordinary memory of the host, copies included.
    some, staging, stream = payloads[:32], Staging(), cupy.cuda.get_current_stream()

    def restore() -> None:
        coder.decode(some, sizes[:32], *staging.upload(some))
        stream.synchronize()

    of_some = 32 * piece.nbytes / 1e9
    result["restore_host_gbps"] = of_some / best(restore)[1]
    result["store_host_gbps"] = of_some / best(lambda: coder.encode(own[:32]))[1]
    assert not faults.any()
    assert (out == values).all()
    for x, begin in zip(payloads, begins.tolist(), strict=False):
        assert (written[begin : begin + len(x)] == cupy.asarray(x)).all()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    caches_of = parser.add_mutually_exclusive_group(required=True)
    caches_of.add_argument("--cache", nargs="+", metavar="FILE")
    caches_of.add_argument("--sample", action="store_true")
    parser.add_argument("--device", action="store_true")
    parser.add_argument("--layers", type=int, help="the first ones only, for a busy machine")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    console = Console(highlight=False)
    if args.sample:
        with np.load(SAMPLE) as file:
            caches = [[file[name].view(ml_dtypes.bfloat16) for name in ("k", "v")]]
    else:
        caches = [[x.astype(ml_dtypes.bfloat16) for x in load_cache(path)] for path in args.cache]
    caches = [[x[: args.layers] for x in kv] for kv in caches]
    result: dict[str, Any] = environment() | {"caches": len(caches), "samples": {}}
    for name, count in TOKENS.items():
        firsts = [0 if name == "sinks" else k.shape[2] // 2 for k, _ in caches]
        samples: list[Cache] = [
            (kv[0][:, :, at : at + count].copy(), kv[1][:, :, at : at + count].copy())
            for kv, at in zip(caches, firsts, strict=True)
        ]
        if args.device:
            continue  # the last are windows
        found = {own: measure(samples, *coder) for own, coder in CODERS.items()}
        size = sum(x.nbytes for x in samples[0])
        result["samples"][name] = {"bytes": size, "coders": found}
        table = Table(f"{name}, {size:,} bytes", "left", "encode, MB/s", "decode, MB/s")
        for own, row in found.items():
            speeds = (f"{row[key]:.0f}" for key in ("encode_mbps", "decode_mbps"))
            table.add_row(own, f"{row['share']:.2%}", *speeds)
        console.print(table)
    if args.device:
        result["kernels"] = on_device(samples)
        console.print(result["kernels"])
    if args.output:
        write_result(args.output, result, console)


if __name__ == "__main__":
    main()
