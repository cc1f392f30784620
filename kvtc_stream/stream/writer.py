"""Writing a stream to a file while the cache grows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, Unpack

from kvtc_stream.errors import (
    StateError,
)
from kvtc_stream.formats import (
    StreamFile,
)
from kvtc_stream.io.storage import (
    File,
    append_to,
    atomic_write,
    claimed,
    put_back_on_failure,
    write_all,
)
from kvtc_stream.stream.codec import Codec
from kvtc_stream.stream.encoder import Encoder
from kvtc_stream.stream.options import EncoderOptions, SourceOptions
from kvtc_stream.stream.statistics import StreamStatistics


class Writer:
    """Writes a stream while the cache grows; a context manager. Make one with :func:`open`.

    One thread at a time. Leaving the block by an exception discards a path's partial file; a file
    object then holds a stream without an end, which readers refuse.
    """

    def __init__(
        self,
        file: File,
        codec: Codec,
        *,
        append: SourceOptions | None = None,
        **options: Unpack[EncoderOptions],
    ) -> None:
        self._state = "open"
        self._unchanged = False
        with ExitStack() as cleanup:
            if append is None:
                self._encoder = Encoder(codec, **options)
            if isinstance(file, str | os.PathLike):
                claim = atomic_write(file) if append is None else append_to(file)
            else:
                claim = claimed(file)
            self._file = cleanup.enter_context(claim)
            if append is not None:
                before = StreamFile(self._file, **append)
                self._encoder = Encoder(codec, continues=before, **options)
                self._unchanged = before.fault is None
                begin = self._encoder.begins_at
                if before.fault is not None:
                    self._file.truncate(before.end)
                self._file.seek(begin)
                kept = self._file.read(before.end - begin)
                self._file.seek(begin)
                cleanup.enter_context(put_back_on_failure(self._file, begin, kept))
            self._cleanup = cleanup.pop_all()

    @property
    def statistics(self) -> StreamStatistics:
        """Sizes, ratios and errors so far."""
        return self._encoder.statistics

    def write(self, k: Any, v: Any, *, positions: Any = None, section: int = 0) -> int:
        """Take a chunk, as :meth:`kvtc_stream.Encoder.encode`; return the bytes written now."""
        if self._state != "open":
            raise StateError(f"cannot write: the writer is {self._state}")
        if self._unchanged:
            self._unchanged = False
            self._file.truncate()
        return self._put(self._encoder.encode_pieces(k, v, positions=positions, section=section))

    def close(self) -> None:
        """End the stream; a path takes its final name. Closing again does nothing.

        Raises
        ------
        StateError
            An earlier write failed: the stream cannot be ended, and a path is left as it was.
        """
        if self._state == "closed":
            return
        try:
            if self._state != "open":
                raise StateError(f"cannot close: the writer is {self._state}")
            if not self._unchanged:  # a stream to which nothing was appended has its end
                self._put(self._encoder.finish_pieces())
            self._file.flush()
        except BaseException:
            self._release(*sys.exc_info())
            raise
        self._release(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._state != "closed":
            self._release(kind, error, trace)

    def _put(self, pieces: Iterable[bytes | memoryview]) -> int:
        written = 0
        try:
            for piece in pieces:
                write_all(self._file, piece)
                written += len(piece)
        except BaseException:
            self._state = "failed by an earlier exception"
            raise
        return written

    def _release(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._state = "closed"
        # The context that removes what was written raises the same error again.
        try:
            self._cleanup.__exit__(kind, error, trace)
        except BaseException as raised:
            if raised is not error:
                raise
