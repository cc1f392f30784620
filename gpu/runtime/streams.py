"""Runs independent calls at the same time, each on its own thread and CUDA stream."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeVar

import cupy

T = TypeVar("T")
R = TypeVar("R")

#: Calls at a time: while one waits for the host's work or a copy, another keeps the device busy.
#: Each has scratch of its own.
AT_A_TIME = 2


@cache
def _threads() -> ThreadPoolExecutor:
    """Kept, for each has a stream, and handles of libraries, of its own; and not those of bytes,
    which the calls wait for."""
    return ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="kvtc-cuda")


# A forked process has none of these threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)

_own = threading.local()


def _stream(device: int) -> Any:
    """The thread's on a device; CuPy's pool keeps what a stream freed for that stream."""
    streams = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = cupy.cuda.Stream(non_blocking=True)
    return streams[device]


def of_pointer(pointer: int) -> Any:
    """A stream of the current device that another library has made; CuPy's current one within it.

    Memory that both libraries use then follows one order.
    """
    return cupy.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, pointer)))


def side_by_side(function: Callable[[T], R], arguments: Sequence[T]) -> list[R]:
    """``function`` of each argument, all on the current device, after what is in the current
    stream; waits for them, and for the device. One alone is in the current stream itself.
    """
    if len(arguments) < 2:
        return list(map(function, arguments))
    device, ready = cupy.cuda.runtime.getDevice(), cupy.cuda.Event(disable_timing=True)
    ready.record()

    def call(argument: T) -> R:
        with cupy.cuda.Device(device):
            stream = _stream(device)
            stream.wait_event(ready)
            try:
                with stream:
                    return function(argument)
            finally:
                stream.synchronize()

    found: list[Future[R]] = []
    try:
        found += [_threads().submit(call, argument) for argument in arguments]
        wait(found, return_when=FIRST_EXCEPTION)
    finally:  # nobody writes once this has returned, or raised
        for future in found:
            future.cancel()  # those that did not begin, after a failure
        wait(found)
    return [future.result() for future in found]
