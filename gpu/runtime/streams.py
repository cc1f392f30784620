"""Runs independent tasks at the same time, each in a CUDA stream of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from types import SimpleNamespace
from typing import Any, ParamSpec

import cupy

from kvtc_stream.io.steps import Steps

#: Tasks that one thread takes in turn: one begins, one is at work, one comes to its end.
IN_FLIGHT = 3
#: Numbers of streams for what is done beside: tasks have those from 0 on.
CHECKING, UPLOADING, APART, TURNS, SENDING = -1, -2, -3, -4, -5

P = ParamSpec("P")

_own = threading.local()


def stream(number: int) -> Any:
    """The thread's on the current device; CuPy's pool keeps what a stream freed for that stream."""
    device, streams = cupy.cuda.runtime.getDevice(), _own.__dict__.setdefault("streams", {})
    if (device, number) not in streams:
        # The host waits for what is checked, others for what is uploaded.
        priority = -1 if number in (CHECKING, UPLOADING) else 0
        streams[device, number] = cupy.cuda.Stream(non_blocking=True, priority=priority)
    return streams[device, number]


@contextmanager
def beside(event: Any, number: int = CHECKING) -> Iterator[None]:
    """Work of a stream beside the current one, after an event.

    Who uses its results waits for them, before memory that it reads is given back.
    """
    own = stream(number)
    own.wait_event(event)
    with own:
        yield


def apart(function: Callable[P, Steps[None]]) -> Callable[P, Steps[None]]:
    """Steps that are taken, on whatever thread asks for them, in a stream of their own, after what
    is in the current stream at the first. When they end, or nobody wants them any more, the device
    is done."""

    @wraps(function)
    def started(*args: P.args, **options: P.kwargs) -> Steps[None]:
        return _apart(function(*args, **options))

    return started


def _apart(task: Steps[None]) -> Steps[None]:
    device, ready = cupy.cuda.runtime.getDevice(), cupy.cuda.Event(disable_timing=True)
    ready.record()
    own = stream(APART)
    own.wait_event(ready)
    try:
        while True:
            with cupy.cuda.Device(device), own:
                if next(task, own) is own:
                    return
            yield
    finally:
        own.synchronize()
        task.close()


def interleaving(tasks: Iterable[Iterator[None]]) -> Steps[None]:
    """Take tasks to their ends from this thread, a few at a time, each in a stream of its own,
    after what is in the current stream when its turn comes; at the end all of them are over, and
    the device is done. Of a sequence of one that one is in the current stream itself.

    A new task makes its first step before older ones make their next: what it begins is done while
    the host waits for them. Yields when each under way has made a step.
    """
    if isinstance(tasks, Sequence) and len(tasks) < 2:
        yield from chain.from_iterable(tasks)
        return
    ready = cupy.cuda.Event(disable_timing=True)
    free = [stream(i) for i in range(IN_FLIGHT)]
    streams, waiting = list(free), iter(tasks)
    running: deque[tuple[Any, Iterator[None]]] = deque()
    try:
        while True:
            if free and (new := next(waiting, None)) is not None:
                ready.record()
                free[0].wait_event(ready)
                running.appendleft((free.pop(0), new))
            if not running:
                break
            for own, task in list(running):
                with own:
                    ended = next(task, running) is running
                if ended:
                    running.remove((own, task))
                    free.append(own)
            yield
    finally:  # nobody writes once this has returned, or raised
        for own in streams:
            own.synchronize()


def on_device(device: int) -> None:
    """Make a device CuPy's current one, in this thread from now on.

    CuPy has a CUDA runtime of its own. What another library made current in its runtime CuPy's need
    not know; and going back to what it believes to be current would take the other's away.
    """
    cupy.cuda.Device(device).use()


def of_pointer(pointer: int, device: int) -> Any:
    """A stream of a device that another library has made; CuPy's current one within it.

    Memory that both libraries use then follows one order. The device stays current: see
    :func:`on_device`.
    """
    on_device(device)
    return cupy.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, pointer)))
