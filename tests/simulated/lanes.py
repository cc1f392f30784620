"""Blocks of threads in Numba's simulator as greenlets, of which one runs at a time.

Numba's own are threads of Python that poll each other: hundreds of them wait for one lock, and a
test takes minutes on a machine with few cores. Greenlets run until they wait for others; where
none can go on, that is known at once. Their order is drawn, the same each time: a barrier that is
missing shows as a wrong result.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import greenlet
import numpy as np
from numba.cuda.simulator import kernel, kernelapi

from kvtc_stream.gpu.runtime import simulator

_WARP = 32


def install() -> None:
    """Numba's simulator runs blocks of these lanes from now on."""
    kernel.BlockManager = Block
    kernelapi.threading = SimpleNamespace(current_thread=greenlet.getcurrent)
    simulator.exchange = lambda value: cast(Lane, greenlet.getcurrent()).exchange(value)


class Lane(greenlet.greenlet):
    """One CUDA thread; its attributes are those that Numba's simulator asks a thread for."""

    def __init__(self, block: Block, number: int, run: Callable[[], None]) -> None:
        super().__init__(run)
        self.block = block
        self.thread_id = number
        x, y = block.shape[:2]
        self.threadIdx = kernelapi.Dim3(number % x, number // x % y, number // (x * y))
        self.blockIdx = block.place
        self.warp = number // _WARP
        self.at_barrier = False

    def syncthreads(self) -> None:
        """Go on when all lanes of the block that have not returned are here."""
        self.at_barrier = True
        self.block.scheduler.switch()
        self.at_barrier = False

    def syncthreads_or(self, value: Any) -> int:
        """Whether any lane of the block brings something true."""
        said = self.block.said
        said.append(bool(value))
        self.syncthreads()
        return int(any(said))

    def exchange(self, value: Any) -> tuple[int, list[Any]]:
        """The lane's place in its warp, and the values of all lanes, once all have brought one."""
        values = self.block.brought[self.warp]
        lane = self.thread_id % _WARP
        values[lane] = value
        lanes = self.block.lanes[self.warp * _WARP :][:_WARP]
        if len(values) == len(lanes):
            self.block.brought[self.warp] = {}
            self.block.ready.extend(x for x in lanes if x is not self)
        else:
            self.block.scheduler.switch()
        return lane, [values[i] for i in range(len(lanes))]


class Block:
    """The lanes of a block, run in turn; called as Numba calls its own ``BlockManager``."""

    def __init__(
        self, function: Callable[..., None], grid: Any, shape: tuple[int, ...], debug: bool
    ) -> None:
        self.function, self.shape = function, shape

    def run(self, place: tuple[int, ...], *arguments: Any) -> None:
        """Run all lanes to their end; raises what one raises, and RuntimeError for a deadlock."""
        self.place = kernelapi.Dim3(*place)
        self.scheduler = greenlet.getcurrent()
        self.said: list[bool] = []
        count = int(np.prod(self.shape))
        self.lanes = [Lane(self, i, lambda: self.function(*arguments)) for i in range(count)]
        self.brought: list[dict[int, Any]] = [{} for _ in range(0, count, _WARP)]
        draw = random.Random(count)
        self.ready = deque(draw.sample(self.lanes, count))
        try:
            while self.ready:
                lane = self.ready.popleft()
                lane.switch()
                if not self.ready:
                    waiting = [lane for lane in self.lanes if not lane.dead]
                    if not all(lane.at_barrier for lane in waiting):
                        raise RuntimeError(self._deadlock())
                    self.said = []
                    self.ready.extend(draw.sample(waiting, len(waiting)))
        except Exception as error:
            error.add_note(f"in lane {lane.thread_id} of block {place}")
            raise
        finally:
            for lane in self.lanes:
                lane.throw()

    def _deadlock(self) -> str:
        warp, brought = next((i, x) for i, x in enumerate(self.brought) if x)
        lanes = len(self.lanes[warp * _WARP :][:_WARP])
        return (
            f"lanes of warp {warp} wait for {lanes - len(brought)} of {lanes} that do not come;"
            " all lanes of a warp must come to every exchange"
        )
