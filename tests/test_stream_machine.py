"""A stream through anything: appended to, cut, joined, compacted, cut off, repaired; as a machine.

Each token's position is its number in one long drawn cache, so that whatever comes back can be
compared with what it must be.
"""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvtc_stream as kvtc

TOKENS = 1000


@functools.cache
def long_cache() -> tuple[kvtc.Calibration, np.ndarray, np.ndarray]:
    calibration = kvtc.testing.tiny_calibration()
    return calibration, *kvtc.testing.drawn_cache(calibration.geometry, TOKENS, seed=3)


class Machine(RuleBasedStateMachine):
    """One stream, and the positions that it must hold."""

    @initialize(
        preset=st.sampled_from(["default", "paper"]),
        window=st.sampled_from([0, 5, 20]),
        sinks=st.sampled_from([0, 3, 40]),
    )
    def begin(self, preset: str, window: int, sinks: int) -> None:
        self.calibration, self.k, self.v = long_cache()
        self.codec = kvtc.Codec(
            *(self.calibration, preset),
            ratio=3,
            window=window,
            sinks=sinks,
            block_tokens=8,
            error_bound=0.4,
        )
        self.file = io.BytesIO(kvtc.encode(self.k[:, :, :1], self.v[:, :, :1], self.codec))
        self.positions = [0]

    @property
    def next(self) -> int:
        return self.positions[-1] + 1 if self.positions else 0

    @rule(count=st.integers(0, 40), gap=st.integers(0, 3), key=st.booleans())
    def append(self, count: int, gap: int, key: bool) -> None:
        chosen = np.arange(self.next + gap, self.next + gap + count)
        if self.next + gap + count > TOKENS:
            return
        before = self.file.getvalue()
        with kvtc.open(self.file, "ab", codec=self.codec) as writer:
            for piece in np.array_split(chosen, 2 if key else 1):
                writer.write(self.k[:, :, piece], self.v[:, :, piece], positions=piece)
        # A stream without tokens begins anew, in whatever dtype comes.
        assert not self.positions or self.file.getvalue().startswith(before)
        self.positions += chosen.tolist()

    @precondition(lambda self: self.positions)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        a = data.draw(st.integers(0, len(self.positions) - 1))
        b = data.draw(st.integers(a, len(self.positions)))
        out = io.BytesIO()
        if data.draw(st.booleans()):
            kvtc.cut(self.file, out, tokens=slice(a, b))
        else:
            first = self.positions[a]
            last = self.positions[b] if b < len(self.positions) else TOKENS
            kvtc.cut(self.file, out, positions=slice(first, last))
        self.file, self.positions = out, self.positions[a:b]

    @rule()
    def compact(self) -> None:
        out = io.BytesIO()
        kvtc.concat([self.file], out)
        assert len(out.getvalue()) <= len(self.file.getvalue())
        self.file = out

    @rule(count=st.integers(1, 30))
    def join(self, count: int) -> None:
        chosen = np.arange(self.next, self.next + count)
        if self.next + count > TOKENS:
            return
        other = kvtc.encode(
            self.k[:, :, chosen], self.v[:, :, chosen], self.codec, positions=chosen
        )
        out = io.BytesIO()
        kvtc.concat([self.file, other], out)
        self.file = out
        self.positions += chosen.tolist()

    @rule(count=st.integers(0, 30), share=st.floats(0, 1), repair=st.booleans())
    def crash(self, count: int, share: float, repair: bool) -> None:
        """Cut off while something is appended: what was there before is there still."""
        before, old = len(self.file.getvalue()), len(self.positions)
        self.append(count, 0, False)
        data = self.file.getvalue()
        self.file = io.BytesIO(data[: before + int(share * (len(data) - before))])
        with kvtc.open(self.file, calibration=self.calibration, recover=True) as reader:
            found = reader.tokens()
        assert old <= found <= len(self.positions)
        self.positions = self.positions[:found]
        if repair:
            out = io.BytesIO()
            kvtc.concat([self.file], out, recover=True)
            self.file = out
        else:
            with kvtc.open(self.file, "ab", codec=self.codec, recover=True):
                pass

    @invariant()
    def every_token_is_the_right_one(self) -> None:
        if not hasattr(self, "file"):
            return
        with kvtc.open(self.file, calibration=self.calibration) as reader:
            found = [p for block in reader for p in block.positions.tolist()]
            assert found == self.positions
            k, v = map(np.asarray, reader.read())
        for x, y in ((k, self.k), (v, self.v)):
            exact = y[:, :, self.positions]
            error = np.square(x - exact).sum(axis=(0, 1, 3))
            assert (error <= 0.2 * np.square(exact).sum(axis=(0, 1, 3))).all()


TestMachine = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")(Machine.TestCase)
TestMachine.settings = settings(
    max_examples=max(8, settings.default.max_examples // 4), stateful_step_count=10
)
