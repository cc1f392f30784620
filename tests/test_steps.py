"""Work in steps, and what is made of many blocks at once."""

from __future__ import annotations

import numpy as np
import pytest

from kvtc_stream.backends.base import block_errors, errors_of_alike
from kvtc_stream.formats import BlockRun, Coder, Measure
from kvtc_stream.io.steps import Steps, begun, run, together
from kvtc_stream.stream.statistics import StreamStatistics


def counting(name: str, steps: int, seen: list[str]) -> Steps[str]:
    for step in range(steps):
        seen.append(f"{name}{step}")
        yield
    return name


def test_run_begun_and_together() -> None:
    seen: list[str] = []
    assert run(counting("a", 2, seen)) == "a"
    assert seen == ["a0", "a1"]
    seen.clear()
    later = begun(counting("b", 2, seen))
    assert seen == ["b0"]
    assert run(begun(counting("c", 0, seen))) == "c"
    assert run(together([later, counting("d", 3, seen)])) == ["b", "d"]
    assert seen == ["b0", "d0", "b1", "d1", "d2"]
    assert run(together([])) == []


def test_a_step_that_fails() -> None:
    def failing() -> Steps[None]:
        yield
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        run(together([counting("a", 9, []), failing()]))


@pytest.mark.parametrize(("size", "count"), [(128, 63), (37, 1), (8, 3)])
def test_errors_of_alike_are_those_of_each(size: int, count: int) -> None:
    """To the bit."""
    rng = np.random.default_rng(size)
    errors = np.exp(rng.normal(-3, 2, (2, size * count + 5))).astype(np.float32)[:, 5:]
    for i, own in enumerate(errors_of_alike(errors, size)):
        alone = block_errors(errors[:, i * size : (i + 1) * size], np.arange(size))
        assert tuple(own.tolist()) == alone.values


@pytest.mark.parametrize("layers", [0, 5])
def test_statistics_of_a_run_are_those_of_its_blocks(layers: int) -> None:
    """To the bit, whatever was counted before."""
    rng = np.random.default_rng(layers)
    count = 40
    codes = np.sort(rng.integers(0, 256, (count, 2, 2, layers), np.uint8), axis=2)
    codes[7, 1, :, 2:3] = 255  # an infinite error
    blocks = BlockRun(
        section=0,
        start=0,
        tokens=12,
        firsts=12 * np.arange(count),
        coders=np.full(count, Coder.RANS, np.uint8),
        coded_sizes=np.full(count, 7),
        data=memoryview(bytes(100)),
        places=np.stack([np.arange(count), np.full(count, 9)], axis=1),
        measure=Measure.RECONSTRUCTION,
        errors=rng.random((count, 4), np.float32),
        layer_codes=codes.reshape(count, -1),
    )
    found, expected = StreamStatistics(), StreamStatistics()
    for _ in range(2):
        found.add(blocks, count * 100, 64)
        for block in blocks:
            expected.add(block, 100, 64)
    assert repr(found) == repr(expected)
    assert (found.k_error_mean, found.v_error_mean) == (
        expected.k_error_mean,
        expected.v_error_mean,
    )
    by_layer = found.layer_errors(), expected.layer_errors()
    assert (by_layer[0] is None) is (by_layer[1] is None) is (layers == 0)
    if by_layer[0] is not None:
        np.testing.assert_array_equal(*by_layer)
