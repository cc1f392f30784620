"""A calibration from the pages that a server computes while it runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kvtc_stream.calibration.calibrator import Calibrator
from kvtc_stream.calibration.split import with_heads
from kvtc_stream.integrations.vllm.scheduling import PageJob

_log = logging.getLogger(__name__)


class LearnSink:
    """Learns from pages, each once, and writes a calibration when there were enough tokens.

    Parameters
    ----------
    calibrator
        What learns.
    path
        Of the calibration.
    tokens
        How many.
    heads
        The first KV head that pages have, and how many the model has.
    """

    def __init__(
        self, calibrator: Calibrator, path: str, tokens: int, heads: tuple[int, int]
    ) -> None:
        self._calibrator, self._path, self._tokens = calibrator, path, tokens
        self._heads = heads
        self._seen: set[str] = set()
        self._read = 0
        self._lock = threading.Lock()

    def wanted(self, job: PageJob) -> bool:
        """Whether the page is new, and more are needed."""
        return self._read < self._tokens and job.key.name not in self._seen

    def take(
        self, jobs: Sequence[PageJob], k: Tensor, v: Tensor, valid: Callable[[PageJob], bool]
    ) -> None:
        """See :meth:`kvtc_stream.integrations.vllm.sink.PageSink.take`."""
        tokens = int(k.shape[2]) // len(jobs)
        k, v = k.cpu(), v.cpu()
        for i, job in enumerate(jobs):
            own, first = slice(i * tokens, (i + 1) * tokens), job.key.position
            if valid(job) and self._read < self._tokens:
                positions = list(range(first, first + tokens))
                self._calibrator.update(k[:, :, own], v[:, :, own], positions=positions)
                self._seen.add(job.key.name)
                self._read += tokens
                self._finish()

    def _finish(self) -> None:
        """Write the calibration, if there were enough tokens."""
        if self._read >= self._tokens:
            _log.info("making a calibration of %d tokens; this takes minutes", self._read)
            with_heads(self._calibrator.finish(), [self._heads]).save(self._path)
            _log.info("the calibration is in %s: serve with it", self._path)


def calibrator_of(geometry: Any, model: Any, options: Any) -> Calibrator:
    """A calibrator of what is served; ``options`` as the settings give them."""
    return Calibrator(geometry, model=model, **{"bases": ("joint",), **(options or {})})
