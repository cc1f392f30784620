"""Layers cut out of streams and joined again, without decoding them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_reader

import kvtc_stream as kvtc
from kvtc_stream.formats import (
    DType,
    Feature,
    LayerErrors,
    Limits,
    StreamFile,
    StreamParser,
    StreamWriter,
)
from kvtc_stream.io.dlpack import to_numpy

pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")

GEOMETRY = kvtc.Geometry.uniform(
    layers=6, kv_heads=2, head_dim=8, rope=kvtc.Rope.from_theta(1e4, 8)
)


def calibrated(geometry: kvtc.Geometry, groups: int) -> kvtc.Calibration:
    calibrator = kvtc.Calibrator(geometry, layer_groups=groups)
    for i in range(len(geometry.sections)):
        calibrator.update(*kvtc.testing.drawn_cache(geometry, 900, seed=1, section=i), section=i)
    return calibrator.finish()


@pytest.fixture(scope="module")
def calibration() -> kvtc.Calibration:
    """A calibration of three groups of two layers."""
    return calibrated(GEOMETRY, 3)


def cache(tokens: int = 210, **options: Any) -> tuple[Any, Any]:
    k, v = kvtc.testing.drawn_cache(GEOMETRY, tokens, seed=3, **options)
    k[1, 0, 60, 0] = np.nan  # a token that is verbatim
    return k, v


def cut(data: bytes, layers: slice) -> bytes:
    out = io.BytesIO()
    kvtc.split_layers(data, out, layers)
    return out.getvalue()


def shortened(data: bytes, tokens: slice) -> bytes:
    out = io.BytesIO()
    kvtc.cut(data, out, tokens=tokens)
    return out.getvalue()


def join(*parts: bytes) -> bytes:
    out = io.BytesIO()
    kvtc.merge_layers(parts, out)
    return out.getvalue()


def close(a: Any, b: Any) -> bool:
    """Products of other shapes sum in another order."""
    return np.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.fixture(params=["default", "paper", "stored"])
def stream(request: pytest.FixtureRequest, calibration: kvtc.Calibration) -> bytes:
    preset = "default" if request.param == "default" else "paper"
    codec = kvtc.Codec(calibration, preset, ratio=4, window=24, block_tokens=32)
    if request.param == "stored":
        codec = replace(codec, coder="stored")
    return kvtc.encode(*cache(), codec, token_digest=bytes(range(32)))


def test_the_second_reader_finds_the_parts(
    calibration: kvtc.Calibration, stream: bytes, tmp_path: Path
) -> None:
    calibration.save(tmp_path / "calibration.safetensors")
    theirs = second_reader.read_calibration(tmp_path / "calibration.safetensors")
    part = cut(stream, layers=slice(2, None))
    opened = second_reader.read_stream(part)
    decoder = second_reader.Decoder(opened.header, theirs)
    both = [decoder.values(block) for block in opened.blocks]
    for kind, expected in enumerate(kvtc.decode(part, calibration)):
        assert close(np.concatenate([x[kind] for x in both], axis=2), expected)


@pytest.mark.parametrize("layers", [slice(2, 4), slice(None, 2), slice(2, None), slice(-2, None)])
def test_cut_layers_decode_to_the_layers(
    calibration: kvtc.Calibration, stream: bytes, layers: slice
) -> None:
    part = cut(stream, layers=layers)
    assert len(part) < len(stream)
    for found, expected in zip(
        kvtc.decode(part, calibration), kvtc.decode(stream, calibration), strict=True
    ):
        assert close(found, expected[layers])
    with kvtc.open(part, calibration=calibration) as reader:
        assert reader.header.geometry.sections[0].layers == tuple(range(6))[layers]
        assert reader.header.token_digest == bytes(range(32))
        some = reader.read(tokens=slice(50, 90), layers=slice(1, 2))
    for found, expected in zip(some, kvtc.decode(stream, calibration), strict=True):
        assert close(found, expected[layers][1:2, :, 50:90])


def test_what_was_taken_apart_is_joined_to_the_same_blocks(stream: bytes) -> None:
    parts = [cut(stream, layers=slice(i, i + 2)) for i in (0, 2, 4)]
    for order in (parts, parts[::-1], [join(parts[2], parts[0]), parts[1]]):
        whole = join(*order)
        blocks = [StreamParser(Limits()).feed(x)[1:] for x in (whole, stream)]
        for found, expected in zip(*blocks, strict=True):
            # Errors of parts are not known, so neither are those of the whole.
            assert found == replace(expected, errors=found.errors)
    assert StreamFile(io.BytesIO(whole)).header.geometry == GEOMETRY


def test_errors_by_layer_go_along(stream: bytes) -> None:
    """Those over all layers are not known of some, those of each layer are."""
    file = StreamFile(io.BytesIO(stream))
    writer = StreamWriter(replace(file.header, features=Feature.LAYER_ERRORS))
    data, expected = writer.start(), []
    for i, block in enumerate(map(file.read_block, file.index)):
        if block.coded_tokens:
            rows = [[(i + 1) * 2.0 ** (layer - 8)] * 2 for layer in range(6)]
            mean, worst = zip(*rows, strict=True)
            block = replace(block, layer_errors=LayerErrors.of(mean, worst, worst, worst))
        expected.append(block.layer_errors)
        data += writer.block(block)
    data += writer.finish()
    parts = [cut(data, layers=slice(i, i + 2)) for i in (0, 2, 4)]
    blocks = [StreamParser(Limits()).feed(part)[1:] for part in parts]
    for i, part in enumerate(blocks):
        for block, errors in zip(part, expected, strict=True):
            found = block.layer_errors
            assert (found is None) is (errors is None)
            assert found is None or found.k_mean == errors.k_mean[2 * i : 2 * i + 2]
    whole = StreamParser(Limits()).feed(join(parts[1], parts[2], parts[0]))[1:]
    assert [block.layer_errors for block in whole] == expected
    # Without those of one part, those of the whole are not known.
    writer = StreamWriter(replace(file.header, features=Feature(0)))
    plain = writer.start()
    for block in map(file.read_block, file.index):
        plain += writer.block(replace(block, layer_errors=None))
    plain = cut(plain + writer.finish(), layers=slice(2, 4))
    whole = StreamParser(Limits()).feed(join(parts[0], plain, parts[2]))[1:]
    assert not any(block.layer_errors for block in whole)


def test_streams_with_and_without_features_are_joined(stream: bytes) -> None:
    header = StreamFile(io.BytesIO(stream)).header
    writer = StreamWriter(replace(header, features=Feature.LAYER_ERRORS))
    empty = writer.start() + writer.finish()
    for pieces in ((empty, stream), (stream, empty)):
        out = io.BytesIO()
        kvtc.concat(pieces, out)
        assert StreamFile(io.BytesIO(out.getvalue())).header.features == Feature.LAYER_ERRORS


def test_layers_and_tokens(calibration: kvtc.Calibration, stream: bytes) -> None:
    part = shortened(cut(stream, slice(2, 4)), slice(37, 111))
    for found, expected in zip(
        kvtc.decode(part, calibration), kvtc.decode(stream, calibration), strict=True
    ):
        assert close(found, expected[2:4, :, 37:111])


def test_groups_are_not_cut(stream: bytes) -> None:
    with pytest.raises(kvtc.UnsupportedError, match=r"groups \(0 to 1, 2 to 3, 4 to 5\)"):
        cut(stream, layers=slice(1, 4))
    with pytest.raises(ValueError, match="no layer of the stream"):
        cut(stream, layers=slice(6, 9))


def test_one_basis_is_not_cut() -> None:
    whole = calibrated(GEOMETRY, 1)
    data = kvtc.encode(*cache(), kvtc.Codec(whole, ratio=4, window=0))
    with pytest.raises(kvtc.UnsupportedError, match="layer_groups"):
        cut(data, layers=slice(0, 2))
    assert StreamFile(io.BytesIO(cut(data, layers=slice(None)))).header.geometry == GEOMETRY


def test_what_does_not_go_together_is_not_joined(calibration: kvtc.Calibration) -> None:
    codec = kvtc.Codec(calibration, ratio=4, window=0, block_tokens=32)
    k, v = cache()
    a, b = (kvtc.encode(x * k, v, codec) for x in (1, 1.5))
    first = cut(a, layers=slice(0, 2))
    for others, reason in (
        ([cut(b, layers=slice(2, 6))], "other steps"),
        ([first], "every layer once"),
        ([shortened(cut(a, layers=slice(2, 6)), slice(0, 100))], "blocks"),
        ([shortened(cut(a, layers=slice(2, 6)), slice(2, None))], "differ in"),
    ):
        with pytest.raises(kvtc.UnsupportedError, match=reason):
            join(first, *others)
    other = kvtc.encode(k, v, replace(codec, ratio=8))
    with pytest.raises(kvtc.UnsupportedError, match=r"steps|differ"):
        join(first, cut(other, layers=slice(2, 6)))


def test_sections(calibration: kvtc.Calibration) -> None:
    """Whole sections may go, too."""
    sections = tuple(
        kvtc.Section(layers, 1, 8, 8, (kvtc.Rope.from_theta(1e4, 8),) * 4)
        for layers in ((0, 2, 4, 6), (1, 3, 5, 7))
    )
    geometry = kvtc.Geometry(sections)
    calibration = calibrated(geometry, 2)
    codec = kvtc.Codec(calibration, ratio=4, window=8, block_tokens=16)
    caches = [kvtc.testing.drawn_cache(geometry, 100, seed=2, section=i) for i in (0, 1)]
    encoder = kvtc.Encoder(codec)
    data = b"".join(encoder.encode(*x, section=i) for i, x in enumerate(caches))
    data += encoder.finish()
    part = cut(data, layers=slice(4, None))
    with (
        kvtc.open(part, calibration=calibration) as reader,
        kvtc.open(data, calibration=calibration) as whole,
    ):
        assert [s.layers for s in reader.header.geometry.sections] == [(4, 6), (5, 7)]
        for i in (0, 1):
            for found, expected in zip(reader.read(section=i), whole.read(section=i), strict=True):
                assert close(found, expected[2:])
    assert len(join(cut(data, layers=slice(0, 4)), part)) > len(part)


def test_fp8_scales_go_along(calibration: kvtc.Calibration) -> None:
    k, v = cache(dtype=DType.FLOAT8_E4M3FN)
    k_scale, v_scale = (np.linspace(a, b, 12, dtype=np.float32).reshape(6, 2) for a, b in
                        ((0.5, 2), (3, 0.25)))  # fmt: skip
    codec = kvtc.Codec(calibration, ratio=4, window=24, block_tokens=32, out_dtype="float32")
    data = kvtc.encode(k, v, codec, k_scale=k_scale, v_scale=v_scale)
    part = cut(data, layers=slice(2, 4))
    whole = kvtc.decode(data, calibration)
    for found, expected in zip(kvtc.decode(part, calibration), whole, strict=True):
        assert close(found, expected[2:4])
    again = join(part, cut(data, layers=slice(0, 2)), cut(data, layers=slice(4, 6)))
    assert StreamFile(io.BytesIO(again)).header.scales == StreamFile(io.BytesIO(data)).header.scales


def test_a_part_is_not_continued(calibration: kvtc.Calibration, stream: bytes) -> None:
    header = StreamFile(io.BytesIO(stream)).header
    codec = kvtc.Codec(calibration, header.plan.preset, ratio=4, window=24, block_tokens=32)
    codec = replace(codec, coder=header.coder.name.lower())
    file = io.BytesIO(cut(stream, layers=slice(0, 2)))
    with pytest.raises(ValueError, match="another plan"):
        kvtc.open(file, "ab", codec=codec)


def test_another_calibration_is_refused(calibration: kvtc.Calibration, stream: bytes) -> None:
    with pytest.raises(kvtc.CalibrationMismatchError):
        kvtc.decode(cut(stream, layers=slice(0, 2)), calibrated(GEOMETRY, 2))


def test_values_are_the_caches(calibration: kvtc.Calibration) -> None:
    """Sinks and window are exact."""
    k, v = cache()
    codec = kvtc.Codec(calibration, ratio=4, window=24, block_tokens=32)
    part = cut(kvtc.encode(k, v, codec), layers=slice(4, 6))
    for found, exact in zip(kvtc.decode(part, calibration), (k, v), strict=True):
        x = to_numpy(found)
        np.testing.assert_array_equal(x[:, :, :4], exact[4:, :, :4])
        np.testing.assert_array_equal(x[:, :, -24:], exact[4:, :, -24:])


def test_views_of_a_calibration_are_few(calibration: kvtc.Calibration) -> None:
    """Streams with any number of plans do not fill the memory."""
    k, v = cache(70)
    whole = kvtc.encode(k, v, kvtc.Codec(calibration, ratio=4, window=0, block_tokens=32))
    header, *_ = StreamParser(Limits()).feed(cut(whole, layers=slice(0, 2)))
    for i in range(30):
        [section] = header.plan.sections
        plan = replace(header.plan, sections=(replace(section, expected_bits=float(i)),))
        assert calibration.for_stream(header.geometry, plan).geometry == header.geometry
    kept = [key for key in calibration._memo if key[:1] == ("layers",)]
    assert len(kept) == 8
