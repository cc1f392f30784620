"""``kvtc verify``."""

from __future__ import annotations

import io
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

import kvtc_stream as kvtc
from kvtc_stream.cli import paths, terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.coding.rope import squared_errors
from kvtc_stream.coding.values import convert, to_float32, verbatim_values
from kvtc_stream.errors import FormatError, KVTCError
from kvtc_stream.formats import (
    Block,
    Coder,
    Measure,
    StreamFile,
    StreamHeader,
    StreamParser,
    decompress,
)
from kvtc_stream.io import plain
from kvtc_stream.io.dlpack import numpy_dtype, to_host
from kvtc_stream.stream.decoder import BlockDecoder

_READ_SIZE = 1 << 20

#: How far measured errors may exceed recorded ones, relative: another machine sums in another
#: order, and errors of coefficients tell those of the reconstruction only nearly.
_TOLERANCE = {Measure.NONE: 0.0, Measure.COEFFICIENTS: 1e-2, Measure.RECONSTRUCTION: 1e-3}


def run(args: Namespace) -> int:
    """Tell whether a stream is whole; see ``kvtc verify --help``."""
    if args.against and not args.calibration:
        raise UsageError("--against needs -c CAL: it compares what the stream decodes to")
    calibration = paths.load_calibration(args.calibration) if args.calibration else None
    result: dict[str, Any] = {"file": args.input, "whole": True}
    with (
        terminal.progress() as bars,
        paths.open_input(args.input, seekable=True) as file,
        paths.about(args.input),
    ):
        original = None
        if args.against:
            original = plain.read(paths.plain_input(args.against), args.format)
        try:
            stream = check_bytes(file, bars)
            result["blocks"] = len(stream.index)
            result["tokens"] = sum(entry.tokens for entry in stream.index)
            if calibration is not None:
                comparison = _check_values(stream, calibration, args, original, bars)
                result["decoded"] = True
                if comparison is not None:
                    result["comparison"] = comparison.json()
        except KVTCError as error:
            if not args.json:
                raise
            result.update(whole=False, error=type(error).__name__, reason=str(error))
    if args.json:
        terminal.print_json(result)
    else:
        terminal.show([terminal.facts(_describe(result))])
    return 0 if result["whole"] else 1


def _describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (result["file"], "whole"),
        ("checked", f"{result['blocks']} blocks, {result['tokens']:,} tokens"),
        ("decoded", "all of them" if "decoded" in result else ""),
    ]
    if c := result.get("comparison"):
        rows += [
            ("verbatim", f"{c['verbatim_tokens']:,} tokens, equal bit for bit"),
            (
                "coded",
                f"{c['coded_tokens']:,} tokens, relative error within what is recorded: "
                f"K {c['k_mean']:.4f} mean, {c['k_worst']:.4f} worst; "
                f"V {c['v_mean']:.4f} mean, {c['v_worst']:.4f} worst",
            ),
        ]
    return rows


def check_bytes(file: BinaryIO, bars: Progress) -> StreamFile:
    """Every checksum, coded piece and rule that holds without the calibration."""
    task = bars.add_task("Checking", total=file.seek(0, io.SEEK_END))
    file.seek(0)
    parser = StreamParser()
    header: StreamHeader | None = None
    while data := file.read(_READ_SIZE):
        for item in parser.feed(data):
            if isinstance(item, StreamHeader):
                header = item
            else:
                assert header is not None
                _check_coded(item, header)
        bars.advance(task, len(data))
    parser.close()
    # The other way in: from the trailer, which also finds what follows it.
    return StreamFile(file)


def _check_coded(block: Block, header: StreamHeader) -> None:
    try:
        if block.coder is not Coder.RANS:  # its tables are in the calibration
            decompress(block.coder, block.coded, block.coded_size)
        verbatim_values(block, header)
    except FormatError as error:
        raise FormatError(f"{_place(block)}: {error}") from error


def _check_values(
    stream: StreamFile,
    calibration: kvtc.Calibration,
    args: Namespace,
    original: tuple[plain.PlainSection, ...] | None,
    bars: Progress,
) -> _Comparison | None:
    """Decode every block, and compare it with the original if there is one."""
    decoder = BlockDecoder(stream.header, calibration, args.backend)
    comparison = None if original is None else _Comparison(stream, original, args.against)
    task = bars.add_task("Decoding", total=len(stream.index))
    for entry in stream.index:
        block = stream.read_block(entry)
        try:
            decoded = decoder.decode(block)
        except FormatError as error:
            raise FormatError(f"{_place(block)}: {error}") from error
        if comparison is not None:
            comparison.add(block, decoded)
        bars.advance(task)
    return comparison


def _place(block: Block) -> str:
    return f"section {block.section}, tokens {block.start} to {block.start + block.tokens - 1}"


@dataclass
class _Errors:
    """Relative errors of coded tokens, so far."""

    total: float = 0.0
    worst: float = 0.0


class _Comparison:
    """Decoded blocks beside the original; the first that differs too much is a ``FormatError``."""

    def __init__(
        self, stream: StreamFile, original: tuple[plain.PlainSection, ...], name: str
    ) -> None:
        header = stream.header
        sections = header.geometry.sections
        if len(original) != len(sections):
            raise FormatError(f"{name} has {len(original)} sections, the stream {len(sections)}")
        for i, (found, section) in enumerate(zip(original, sections, strict=True)):
            tokens = sum(entry.tokens for entry in stream.index if entry.section == i)
            expected = (header.dtype, section.k_shape(tokens), section.v_shape(tokens))
            if (found.dtype, found.k.shape, found.v.shape) != expected:
                raise FormatError(
                    f"{name} has k {list(found.k.shape)} and v {list(found.v.shape)} of "
                    f"{found.dtype.label}, the stream {list(expected[1])} and "
                    f"{list(expected[2])} of {header.dtype.label}: it is not what was encoded"
                )
        self._header, self._original, self._name = header, original, name
        self._verbatim_tokens = self._coded_tokens = 0
        self._errors = {"K": _Errors(), "V": _Errors()}

    def json(self) -> dict[str, Any]:
        k, v = self._errors["K"], self._errors["V"]
        coded = max(self._coded_tokens, 1)
        return {
            "verbatim_tokens": self._verbatim_tokens,
            "coded_tokens": self._coded_tokens,
            "k_mean": k.total / coded,
            "k_worst": k.worst,
            "v_mean": v.total / coded,
            "v_worst": v.worst,
        }

    def add(self, block: Block, decoded: kvtc.KVBlock) -> None:
        """Compare one block."""
        original = self._original[block.section]
        tokens = slice(block.start, block.start + block.tokens)
        positions = np.arange(tokens.start, tokens.stop)
        if original.positions is not None:
            positions = original.positions[tokens]
        if not np.array_equal(positions, decoded.positions):
            raise FormatError(f"{_place(block)}: the positions differ from those in {self._name}")
        verbatim = np.array(block.verbatim_tokens, np.int64)
        coded = np.setdiff1d(np.arange(block.tokens), verbatim)
        self._verbatim_tokens += len(verbatim)
        self._coded_tokens += len(coded)
        for kind, whole, scale, found, recorded in (
            ("K", original.k, original.k_scale, to_host(decoded.k), block.errors.k_worst),
            ("V", original.v, original.v_scale, to_host(decoded.v), block.errors.v_worst),
        ):
            if self._header.dtype.is_fp8 and scale is None:
                scale = np.ones(whole.shape[:2], np.float32)
            expected = whole[:, :, tokens]
            kept = convert(expected[:, :, verbatim], self._header.out_dtype, scale)
            if found[:, :, verbatim].tobytes() != kept.tobytes():
                raise FormatError(
                    f"{_place(block)}: {kind} of verbatim tokens differs from {self._name}, "
                    f"expected it to be equal bit for bit"
                )
            out_scale = scale if self._header.out_dtype.is_fp8 else None
            errors = _relative_errors(
                to_float32(expected[:, :, coded], scale),
                to_float32(np.asarray(found)[:, :, coded], out_scale),
            )
            self._judge(kind, errors, recorded, block, coded)

    def _judge(
        self,
        kind: str,
        errors: NDArray[np.float64],
        recorded: float,
        block: Block,
        tokens: NDArray[np.int64],
    ) -> None:
        if not len(errors):
            return
        allowed = recorded * (1 + _TOLERANCE[block.errors.measure])
        if block.errors.measure is Measure.COEFFICIENTS:  # before the last rounding
            out_dtype = numpy_dtype(self._header.out_dtype)
            allowed += float(ml_dtypes.finfo(out_dtype).eps)  # type: ignore[no-untyped-call]
        worst = int(errors.argmax())
        if not errors[worst] <= allowed + np.finfo(np.float32).eps:
            raise FormatError(
                f"{_place(block)}: {kind} of token {block.start + int(tokens[worst])} differs from "
                f"{self._name} by {errors[worst]:.4g} relative, the stream records at most "
                f"{recorded:.4g}"
            )
        self._errors[kind].total += float(errors.sum())
        self._errors[kind].worst = max(self._errors[kind].worst, float(errors[worst]))


def _relative_errors(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """‖y−x‖/‖x‖ per token, 0 where nothing was lost."""
    error, energy = (sums.sum(axis=0) for sums in squared_errors(x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: NDArray[np.float64] = np.where(error == 0, 0.0, np.sqrt(error / energy))
    return ratio
