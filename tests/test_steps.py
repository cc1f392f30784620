"""Work in steps, and what is made of many blocks at once."""

from __future__ import annotations

import numpy as np
import pytest

from kvtc_stream.backends.base import block_errors, errors_of_blocks
from kvtc_stream.io.steps import Steps, begun, run, together


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


@pytest.mark.parametrize("starts", [[0, 128, 256, 384, 400], [0, 37], [0, 8, 16, 24]])
def test_errors_of_blocks_are_those_of_each(starts: list[int]) -> None:
    """To the bit; tokens that are not coded may have any."""
    rng = np.random.default_rng(len(starts))
    errors = np.exp(rng.normal(-3, 2, (2, starts[-1]))).astype(np.float32)
    verbatim = np.zeros(starts[-1], np.bool_)
    for trial in range(3):
        if trial:
            verbatim[rng.integers(starts[-1], size=3)] = True
        if trial == 2:
            verbatim[starts[0] : starts[1]] = True
        errors[:, verbatim] = np.nan
        found = errors_of_blocks(errors, verbatim, np.array(starts))
        for own, begin, end in zip(found, starts, starts[1:], strict=False):
            kept = np.flatnonzero(~verbatim[begin:end])
            assert own == block_errors(errors[:, begin:end], kept)
