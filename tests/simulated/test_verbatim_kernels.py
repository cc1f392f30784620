"""Kernels of verbatim values against the CPU's coder."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from launch import simulate
from test_verbatim import damaged, drawn

import kvtc_stream as kvtc
from kvtc_stream.coding import verbatim as cpu
from kvtc_stream.errors import FormatError
from kvtc_stream.formats import Coder, StreamFile, StreamWriter
from kvtc_stream.gpu.coder.verbatim import tasks_of
from kvtc_stream.gpu.kernels import verbatim

Array = npt.NDArray[Any]


def _survey(tasks: Array, values: Array) -> Array:
    heads = np.full((len(tasks), cpu.HEAD), 0xAA, np.uint8)
    simulate(verbatim.survey, len(tasks), verbatim.THREADS, [tasks, values, heads])
    return heads


def _encode(pieces: list[Array]) -> list[bytes]:
    """Payloads, by the kernels; pieces begin at multiples of 8 values."""
    sizes = [len(x) for x in pieces]
    room = [-(-n // 8) * 8 for n in sizes]
    values = np.zeros(sum(room), np.uint16)
    firsts = np.cumsum([0, *room])[:-1]
    for first, x in zip(firsts, pieces, strict=True):
        values[first : first + len(x)] = x
    tasks = tasks_of(sizes, firsts)
    heads = _survey(tasks, values)
    places = cpu.places(heads, sizes)
    begins = np.cumsum([0, *(-(-places.lengths // 16) * 16)])
    tasks = tasks_of(sizes, firsts, places, begins[:-1])
    data = np.full(begins[-1], 0xAA, np.uint8)
    simulate(verbatim.encode, len(tasks), verbatim.THREADS, [tasks, values, heads, data, data])
    found = []
    for begin, end, length in zip(begins, begins[1:], places.lengths, strict=False):
        found.append(data[begin : begin + length].tobytes())
        assert (data[begin + length : end] == 0xAA).all()
    return found


def _decode(payloads: list[bytes], sizes: list[int]) -> tuple[list[Array], Array]:
    """Values and faults, by the kernel; payloads end where memory does."""
    heads = [cpu.split(x, n)[1] for x, n in zip(payloads, sizes, strict=True)]
    places = cpu.places(np.concatenate(heads), sizes)
    room = [-(-n // 8) * 8 for n in sizes]
    firsts = np.cumsum([0, *room])
    begins = np.cumsum([0, *[-(-len(x) // 16) * 16 for x in payloads]])[:-1]
    size = int(begins[-1]) + len(payloads[-1])
    data = np.zeros(size, np.uint8)
    for begin, x in zip(begins, payloads, strict=True):
        data[begin : begin + len(x)] = np.frombuffer(x, np.uint8)
    tasks = tasks_of(sizes, firsts[:-1], places, begins)
    out = np.full(int(firsts[-1]) + 8, 0xAAAA, np.uint16)
    faults = np.zeros(len(sizes), np.int32)
    where = out.ctypes.data
    assert where % 16 == 0
    simulate(verbatim.decode, len(tasks), verbatim.THREADS, [tasks, data, data, where, faults])
    found = []
    for first, end, n in zip(firsts, [*firsts[1:], len(out)], sizes, strict=False):
        found.append(out[first : first + n])
        assert (out[first + n : end] == 0xAAAA).all()
    return found, faults


def test_bytes_and_values_are_the_cpus() -> None:
    pieces = [drawn(n, seed=n) for n in (1, 9, 333, cpu.TILE + 70)]
    payloads = [cpu.encode(x).tobytes() for x in pieces]
    assert _encode(pieces) == payloads
    found, faults = _decode(payloads, [len(x) for x in pieces])
    assert not faults.any()
    for x, y in zip(pieces, found, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("seed", range(2))
def test_damage_is_a_fault_where_the_cpu_refuses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [drawn(n, seed=n) for n in (40, 333, 1000, 2100)]
    payloads, expected = [], []
    while len(payloads) < len(values):
        x = values[len(payloads)]
        payload = damaged(cpu.encode(x), rng)
        try:
            cpu.split(payload, len(x))
        except FormatError:
            continue  # the host finds that before
        payloads.append(payload.tobytes())
        try:
            cpu.decode(payload, len(x))
            expected.append(0)
        except FormatError:
            expected.append(1)
    assert any(expected)
    _, faults = _decode(payloads, [len(x) for x in values])
    assert faults.tolist() == expected


# --- in streams ---------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbatim values of any size are coded so."""
    monkeypatch.setattr("kvtc_stream.coding.values.PLANES_FROM", 1)


def _tails(data: bytes) -> list[Any]:
    file = StreamFile(io.BytesIO(data))
    return [file.read_block(entry) for entry in file.index]


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
def test_streams_have_the_bytes_and_values_of_the_cpu() -> None:
    calibration = kvtc.testing.tiny_calibration()
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 14, seed=2, dtype=kvtc.DType.BFLOAT16)
    k[0, 0, 7, 3] = np.nan
    codec = kvtc.Codec(calibration, ratio=8, sinks=2, window=100)
    expected = kvtc.encode(k, v, codec)
    data = kvtc.encode(k, v, replace(codec, backend="cuda"))
    assert data == expected
    assert [block.verbatim_coder for block in _tails(data)] == [Coder.PLANES, Coder.PLANES]
    for x, y in zip((k, v), kvtc.decode(data, calibration, backend="cuda"), strict=True):
        np.testing.assert_array_equal(x.view(np.uint16), np.asarray(y).view(np.uint16))


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
def test_damage_is_an_error() -> None:
    """Under right checksums, where only the device can see it; and nothing of it stays."""
    calibration = kvtc.testing.tiny_calibration()
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 12, seed=2, dtype=kvtc.DType.BFLOAT16)
    whole = kvtc.encode(k, v, kvtc.Codec(calibration, ratio=8, sinks=0, window=100))
    header = StreamFile(io.BytesIO(whole)).header
    [tail] = _tails(whole)
    payload = bytearray(tail.verbatim)
    payload[cpu.HEAD : cpu.HEAD + 8] = b"\xff" * 8  # everything goes on
    writer = StreamWriter(header)
    bad = writer.start() + writer.block(replace(tail, verbatim=bytes(payload))) + writer.finish()
    decoders: list[Callable[[bytes], Any]] = [
        lambda data: kvtc.decode(data, calibration, backend="cuda"),
        lambda data: list(kvtc.decode_layers(data, calibration, backend="cuda")),
    ]
    for decode in decoders:
        with pytest.raises(FormatError, match="verbatim values"):
            decode(bad)
        found = decode(whole)
    for layer, pair in enumerate(found):
        for x, y in zip((k, v), pair, strict=True):
            np.testing.assert_array_equal(x[layer].view(np.uint16), np.asarray(y).view(np.uint16))
