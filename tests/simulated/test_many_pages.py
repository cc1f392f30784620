"""Many pages at once into a host's blocks, as the adapter for vLLM has them: against the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import kvtc_stream as kvtc
from kvtc_stream.gpu.runtime.staging import Staging

pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")

PAGE, BLOCK, BLOCKS = 16, 4, 16
#: Slots from a block to the next: V lies between K.
STEP = 2 * BLOCK


def test_pages_go_into_the_gaps_between_others() -> None:
    calibration = kvtc.testing.tiny_calibration()
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 3 * PAGE, dtype=kvtc.DType.FLOAT16)
    k[0, 0, 5, 0] = np.nan  # a token that is verbatim
    codec = kvtc.Codec(calibration, ratio=4, block_tokens=PAGE, backend="cpu")
    ours = kvtc.PageCodec(codec, dtype="float16", key=b"secret")
    pages = [
        ours.encode(k[:, :, i : i + PAGE], v[:, :, i : i + PAGE], positions=i, identity=b"a")
        for i in range(0, 3 * PAGE, PAGE)
    ]
    expected = [ours.decode(page, identity=b"a") for page in pages]
    on_device = kvtc.Codec(calibration, ratio=4, block_tokens=PAGE, backend="cuda")
    device = kvtc.PageCodec(on_device, dtype="float16", key=b"secret")

    layers, heads, _, dim = k.shape
    memory = cupy.zeros((layers, BLOCKS, 2, BLOCK, heads, dim), np.uint16)
    shape, item = (heads, (BLOCKS - 1) * STEP + BLOCK, dim), 2
    strides = (dim * item, heads * dim * item, item)
    k_out, v_out = (
        [as_strided(layer[0, i], shape, strides, subok=True) for layer in memory] for i in range(2)
    )
    blocks = np.random.default_rng(0).permutation(BLOCKS)[:12]
    slots = (blocks[:, None] * STEP + np.arange(BLOCK)).reshape(3, PAGE)
    slots[1, :8] = -1  # the host has the beginning of this page
    checked = [device.checked(page, identity=b"a") for page in pages]
    device.decode_into(checked, list(slots), k_out, v_out)

    found = np.array(memory).view(np.float16)
    own = np.zeros_like(found)
    for page, (k_page, v_page) in enumerate(expected):
        for half, x in enumerate((k_page, v_page)):
            values = np.array(x, np.float16).transpose(0, 2, 1, 3)
            for i in range(8 if page == 1 else 0, PAGE):
                block = blocks[page * PAGE // BLOCK + i // BLOCK]
                own[:, block, half, i % BLOCK] = values[:, i]
    assert np.isnan(own).sum() == 1
    np.testing.assert_allclose(found, own, atol=2e-3 * np.nanmax(np.abs(own)))


def test_many_pages_are_coded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At positions of their own, each sealed as itself, and as near as a page by itself; though
    payloads come late."""
    begin_large = Staging.begin_large

    def begin_late(self: Staging, data: Any) -> tuple[memoryview, Callable[[], Any]]:
        memory, ready = begin_large(self, data)
        there = bytes(memory)
        memory[:] = bytes(len(memory))

        def come() -> None:
            ready()
            memory[:] = there

        return memory, come

    monkeypatch.setattr(Staging, "begin_large", begin_late)
    calibration = kvtc.testing.tiny_calibration()
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 8, dtype=kvtc.DType.FLOAT16)
    codec = kvtc.Codec(calibration, ratio=4, block_tokens=4, measure=False, backend="cuda")
    pages = kvtc.PageCodec(codec, dtype="float16", key=b"secret")
    found = pages.encode_many(k, v, positions=[96, 0], identities=[b"a", b"b"])
    on_host = kvtc.Codec(calibration, ratio=4, block_tokens=4, measure=False, backend="cpu")
    host = kvtc.PageCodec(on_host, dtype="float16", key=b"secret")
    for i, (page, first, name) in enumerate(zip(found, (96, 0), (b"a", b"b"), strict=True)):
        own = slice(4 * i, 4 * i + 4)
        alone = host.encode(k[:, :, own], v[:, :, own], positions=first, identity=name)
        ours, theirs = (host.block(x, identity=name) for x in (page, alone))
        assert ours.positions.tolist() == list(range(first, first + 4))
        for a, b in zip((ours.k, ours.v), (theirs.k, theirs.v), strict=True):
            expected = np.array(b, np.float32)
            np.testing.assert_allclose(np.array(a), expected, atol=0.05 * np.abs(expected).max())
