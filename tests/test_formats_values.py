"""Geometry, plan and header: what they refuse, and their bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from formats_samples import geometries, headers, later_header, section_plans, small_header
from hypothesis import given
from hypothesis import strategies as st

from kvtc_stream.errors import FormatError, LimitError, VersionError
from kvtc_stream.formats import (
    Band,
    BlockErrors,
    Coder,
    DType,
    Feature,
    Geometry,
    LayerErrors,
    Limits,
    Measure,
    ModelIdentity,
    PartPlan,
    Plan,
    Quantiser,
    Rope,
    Section,
    SectionPlan,
    SectionScales,
    StreamHeader,
)
from kvtc_stream.formats.block_errors import LEVELS, layer_codes, layer_means

HEADER = small_header()
BODY = HEADER.pack()


@given(headers())
def test_header_round_trip(header):
    data = header.pack()
    assert StreamHeader.unpack(data, Limits(), features=header.features) == header
    for size in range(0, len(data), 7):
        with pytest.raises(FormatError):
            StreamHeader.unpack(data[:size], Limits(), features=header.features)
    with pytest.raises(FormatError, match="no more bytes"):
        StreamHeader.unpack(data + b"\0", Limits())


@given(st.integers(0, len(BODY) - 1), st.binary(min_size=1, max_size=4))
def test_a_damaged_header_is_a_format_error_or_another_header(at, value):
    data = BODY[:at] + value + BODY[at + len(value) :]
    try:
        header = StreamHeader.unpack(data, Limits())
    except FormatError:
        return
    assert header.pack() == data


@given(geometries().flatmap(lambda g: st.tuples(*map(section_plans, g.sections))), st.text())
def test_plan_round_trip(sections, preset):
    plan = Plan(preset, sections)
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert Plan.from_bytes(plan.to_bytes()).digest == plan.digest
    assert Plan(preset + "'", sections).digest != plan.digest


def test_the_bytes_of_a_plan_do_not_change():
    section = replace(HEADER.plan.sections[0], expected_k_error=0.125)
    plan = replace(HEADER.plan, sections=(section,))
    assert (
        plan.to_bytes().hex()
        == (
            "4b565450"  # KVTP
            "0200"  # version
            "0100" + "70"  # preset
            "0100"  # sections
            "0100" + "62"  # basis
            "0000003e" + "00000000" + "00000000"  # expected errors of K and V, bits
            "0200"  # parts
            "0100" + "0000" + "0000"  # K of layer 0
            "01000000" + "01000000" + "02"  # one component as int4
            "0000" + "0100" + "0000"  # V of layer 0
            "01000000" + "02000000" + "01"  # two components as int2
        )
    )
    assert plan.digest.hex() == "8d2f2556863a603e1aef8fdd152cb42d35b71c98d05da5de1a2c030007c8c368"


def test_a_rotary_table_is_stored_once():
    table = Rope.from_theta(1e4, 64)
    other = Rope.from_theta(1e6, 64)

    def size(rope):
        geometry = Geometry.uniform(layers=6, kv_heads=1, head_dim=64, rope=rope)
        part = PartPlan(tuple(range(6)), tuple(range(6)), ())
        plan = Plan("p", (SectionPlan("b", (part,)),))
        header = replace(HEADER, geometry=geometry, plan=plan)
        assert StreamHeader.unpack(header.pack(), Limits()) == header
        return len(header.pack())

    one_table = 2 + 1 + 4 + 32 * 4
    assert size(table) == size(None) + one_table
    assert size([table, None, other] * 2) == size(None) + 2 * one_table


def test_another_order_of_rotary_tables_is_refused():
    a, b = Rope((0.5,)), Rope((0.25,))
    geometry = Geometry.uniform(layers=2, kv_heads=1, head_dim=2, rope=(a, b))
    plan = Plan("p", (SectionPlan("b", (PartPlan((0, 1), (0, 1), ()),)),))
    data = replace(HEADER, geometry=geometry, plan=plan).pack()
    first = data.index(b"\x02\x00\x01\x00\x00") + 2
    swapped = data[first + 11 : first + 22] + data[first : first + 11]
    assert swapped != data[first : first + 22]
    references = first + 22 + 2 + 14 + 8
    assert data[references : references + 4] == b"\x00\x00\x01\x00"
    data = data[:first] + swapped + data[first + 22 :]
    data = data[:references] + b"\x01\x00\x00\x00" + data[references + 4 :]
    with pytest.raises(FormatError, match="differently ordered"):
        StreamHeader.unpack(data, Limits())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks": -1}, "sinks must be from 0"),
        ({"window": 1 << 32}, "window must be from 0 to 4294967295"),
        ({"block_tokens": 0}, "block_tokens must be from 1"),
        ({"calibration": b""}, "calibration's digest must have 32 bytes, found 0"),
        ({"token_digest": b"x"}, "token digest must have 32 bytes or none, found 1"),
        ({"out_dtype": DType.FLOAT8_E5M2}, "float8_e5m2 needs a cache of that type"),
        ({"dtype": DType.FLOAT8_E5M2}, "needs 1 scales, found 0"),
        ({"scales": (SectionScales((1.0,), (1.0,)),)}, "needs 0 scales, found 1"),
        (
            {"dtype": DType.FLOAT8_E5M2, "scales": (SectionScales((1.0,), (1.0, 2.0)),)},
            r"need layers \* kv_heads = 1 entries, found 1 for K and 2 for V",
        ),
        ({"metadata": "[]"}, "must be a JSON object, found a list"),
        ({"metadata": ""}, "text of a JSON object"),
        ({"metadata": '{"a": NaN}'}, "NaN is no JSON"),
        ({"metadata": '{"a": ' + "[" * 100_000}, "text of a JSON object"),
        ({"metadata": '{"\ud800": 1}'}, "text of a JSON object"),
        ({"features": Feature.SEALED_PAGES}, "features SEALED_PAGES are reserved"),
        ({"coder": Coder.PLANES}, "PLANES codes verbatim values"),
        ({"plan": Plan("p", ())}, "the plan has 0 sections, the geometry has 1"),
    ],
)
def test_headers_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        replace(HEADER, **change)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "K of each of 1 layers once, found that of layers"),
        ([PartPlan((0,), (), ())], "V of each of 1 layers once"),
        ([PartPlan((0,), (0,), ()), PartPlan((0,), (), ())], r"once, found that of layers \[0, 0"),
        ([PartPlan((0, 1), (0,), ())], r"layers \[0, 1\]"),
        ([PartPlan((0,), (0,), ()), PartPlan((), (), ())], "cover 0 components of a part that has"),
        ([PartPlan((0,), (0,), (Band(5, Quantiser.FP8),))], "cover 5 components of a part that"),
    ],
)
def test_plans_that_do_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
        replace(HEADER, plan=Plan("p", (SectionPlan("b", tuple(parts)),)))


def test_layers_of_a_part_must_rise():
    geometry = Geometry.uniform(layers=2, kv_heads=1, head_dim=2)
    plan = Plan("p", (SectionPlan("b", (PartPlan((1, 0), (0, 1), ()),)),))
    with pytest.raises(ValueError, match=r"must rise, found \(1, 0\)"):
        plan.check(geometry)


@pytest.mark.parametrize(
    ("at", "value", "kind", "message"),
    [
        (0, b"X", FormatError, "this is no plan"),
        (4, b"\1", VersionError, "version at byte 4 is 1, this reader knows 2"),
        (6, b"\xff\xff", FormatError, "preset .*needs 65535 bytes"),
        (6 + 2, b"\xff", FormatError, "preset.*can't decode"),
        (9, b"\xff\xff", LimitError, "section count at byte .*Limits.max_sections=65535"),
        (-5, b"\0\0\0\0\1", FormatError, "a band needs at least one component, found 0"),
        (-1, b"\x09", VersionError, "quantiser at byte .* is 9"),
        (-9, b"\xff\xff\xff\xff", LimitError, "max_bands"),
    ],
)
def test_damaged_plans(at, value, kind, message):
    data = bytearray(HEADER.plan.to_bytes())
    at %= len(data)
    data[at : at + len(value)] = value
    with pytest.raises(kind, match=message):
        Plan.from_bytes(bytes(data))


def test_other_values_that_cannot_be():
    with pytest.raises(ValueError, match="at least one component"):
        Band(0, Quantiser.INT2)
    with pytest.raises(ValueError, match="k_scale must be positive and finite, found -1"):
        SectionScales((1.0, -1.0), (1.0, 1.0))
    with pytest.raises(ValueError, match="v_scale must be positive and finite, found inf"):
        SectionScales((1.0,), (1e39,))
    with pytest.raises(ValueError, match="fingerprint must have 32 bytes or none"):
        ModelIdentity(fingerprint=b"12")
    with pytest.raises(ValueError, match="65,535 bytes"):
        ModelIdentity(name="é" * 40_000)
    with pytest.raises(ValueError, match="v_mean must be finite"):
        BlockErrors(Measure.COEFFICIENTS, 0, 0, float("inf"), 0)
    with pytest.raises(ValueError, match="not measured must be 0"):
        BlockErrors(k_mean=1.0)
    with pytest.raises(ValueError, match="do not fit their fields"):
        replace(
            HEADER, geometry=replace(HEADER.geometry, sections=_beyond_u32(HEADER.geometry))
        ).pack()


def _beyond_u32(geometry):
    return (replace(geometry.sections[0], layers=(1 << 32,)),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rope(()), "at least one inverse frequency"),
        (lambda: Rope((float("nan"),)), "must be finite"),
        (lambda: Rope((1e39,)), "must be finite"),
        (lambda: Rope((1.0,), scale=0), "positive and finite, found 0"),
        (lambda: Rope.from_theta(1e4, 3), "rotary_dim even and positive"),
        (lambda: Rope((1.0, 0.5), axes=(0,)), "each of 2 pairs, found 1"),
        (lambda: Rope((1.0,), axes=(8,)), "axes must be from 0 to 7"),
        (lambda: Rope((1.0,), axes=(-1,)), "axes must be from 0 to 7"),
        (
            lambda: Section((0, 1), 1, 4, 4, tuple(Rope((1, 1), axes=(0, n)) for n in (1, 2))),
            "have 2 and 3 axes: expected one number",
        ),
        (lambda: Section((), 1, 1, 1), "rising numbers from 0"),
        (lambda: Section((1, 1), 1, 1, 1), "rising numbers from 0"),
        (lambda: Section((0,), 1, 0, 1), "must be positive, found 1, 0, 1"),
        (lambda: Section((0,), 1, 2, 2, (None, None)), "each of 1 layers, found 2"),
        (lambda: Section((0,), 1, 2, 2, (Rope((1.0, 0.5)),)), "4 exceeds the keys' 2 channels"),
        (lambda: Geometry(()), "at least one section"),
        (lambda: Geometry((Section((0,), 1, 1, 1),) * 2), "in one section only"),
    ],
)
def test_geometries_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_geometry_and_plan_count():
    section = Section((3, 5), 4, 6, 7)
    assert (section.k_width, section.v_width) == (48, 56)
    assert (section.k_shape(9), section.v_shape(9)) == ((2, 4, 9, 6), (2, 4, 9, 7))
    assert Rope.from_theta(100.0, 4).inv_freq == (1.0, Rope((0.1,)).inv_freq[0])
    bands = (Band(16, Quantiser.FP8), Band(5, Quantiser.NONE), Band(64, Quantiser.INT2))
    part = PartPlan((0, 1), (0,), bands)
    assert part.width(section) == 4 * (2 * 6 + 7)
    assert part.components == 85
    assert SectionPlan("b", (part, part)).bits == 2 * (16 * 8 + 32 + 64 * 2 + 32)


def test_axes_of_rotary_tables():
    plain, both = Rope((1.0, 0.5)), Rope((1.0, 0.5), axes=(2, 1))
    assert (plain.axis_count, both.axis_count) == (1, 3)
    assert Rope((1.0, 0.5), axes=(0, 0)) == plain
    assert Section((0, 1), 1, 4, 4, (plain, both)).axes == 3
    assert Section((0, 1), 1, 4, 4, (plain, None)).axes == 0


def test_a_header_says_what_its_geometry_needs():
    later = later_header()
    assert later.features == Feature.LAYER_ERRORS | Feature.AXES
    assert (HEADER.version, later.version) == ((1, 0), (1, 1))
    without = replace(later, geometry=HEADER.geometry)
    assert without.features == Feature.LAYER_ERRORS
    assert replace(HEADER, features=Feature.AXES).features == Feature(0)


errors = st.floats(0, allow_nan=False)


@given(st.lists(st.tuples(errors, errors, errors, errors), min_size=1, max_size=40))
def test_errors_by_layer_are_rounded_up(measured):
    ordered = [(*sorted(row[:2]), *sorted(row[2:])) for row in measured]
    k, worst_k, v, worst_v = zip(*ordered, strict=True)
    found = LayerErrors.of(k, worst_k, v, worst_v)
    assert found.layers == len(measured)
    assert len(found.codes) == 4 * len(measured)
    assert LayerErrors(found.codes) == found
    stored = (found.k_mean, found.k_worst, found.v_mean, found.v_worst)
    for exact, rounded in zip((k, worst_k, v, worst_v), stored, strict=True):
        for x, y in zip(exact, rounded, strict=True):
            assert y == 0 if x == 0 else y >= x
            if 2**-12 * 17 / 16 <= x <= 15:
                assert y <= x * 17 / 16
    # What is stored is stored again as it is.
    assert LayerErrors.of(*stored) == found


def test_errors_by_layer():
    found = LayerErrors.of([0.125, 1e-9], [0.3, 16], [0, 0.5], [0, 0.5])
    assert found.k_mean == (0.125, 2**-12 * 17 / 16)
    assert found.k_worst == (0.3125, float("inf"))
    # A mean of equal values may be rounded above them.
    assert LayerErrors.of([0.5000001], [0.5], [0], [0]).k_worst == (0.53125,)
    other = LayerErrors.of([1], [2], [3], [4])
    assert LayerErrors.gathered([(found, 1), (other, 0), (found, 0)]) == LayerErrors.of(
        [1e-9, 1, 0.125], [16, 2, 0.3], [0.5, 3, 0], [0.5, 4, 0]
    )
    for wrong, message in [
        (([-1.0], [1], [0], [0]), "must not be negative, found -1"),
        (([float("nan")], [1], [0], [0]), "must not be negative, found nan"),
        (([0, 0], [1], [0], [0]), "one length, found 2, 1, 1 and 1 layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            LayerErrors.of(*wrong)
    for codes in (b"", b"123"):
        with pytest.raises(ValueError, match="four bytes a layer"):
            LayerErrors(codes)
    with pytest.raises(ValueError, match="mean error of V of layer 1 exceeds"):
        LayerErrors(bytes([0, 0, 0, 0, 0, 2, 9, 1]))


def test_codes_are_the_least_level_that_is_not_below():
    edges = np.array(LEVELS)
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.normal(-3, 4, 5000))
    near = [np.nextafter(edges[:-1], to) for to in (0, 99)]
    own = np.concatenate([edges, *near, drawn, [1e-310]])
    for errors in (own, own.astype(np.float32)):
        codes = layer_codes(*np.broadcast_to(errors, (2, 2, 1, len(errors))))
        assert (codes[:, 0] == np.searchsorted(edges, errors)).all()


def test_errors_by_layer_of_many_blocks():
    rng = np.random.default_rng(0)
    means = np.exp(rng.normal(-3, 2, (2, 5, 7)))
    worst = (means * rng.uniform(0.99, 3, means.shape)).astype(np.float32)
    means[0, 0, 0] = worst[0, 0, 0] = 0
    means[1, 2, :5] = worst[1, 2, :5] = [15, 15.1, 2**-12, 2**-12 * 17 / 16, 1e-30]
    for i, codes in enumerate(layer_codes(means, worst)):
        own = LayerErrors.of(means[0, :, i], worst[0, :, i], means[1, :, i], worst[1, :, i])
        assert codes.tobytes() == own.codes
        assert layer_means(codes).tolist() == [list(own.k_mean), list(own.v_mean)]
    with pytest.raises(ValueError, match="must not be negative, found nan"):
        layer_codes(means * np.nan, worst)


def test_floats_are_rounded_as_they_are_stored():
    assert SectionScales((0.1,), (0.1,)).k_scale[0] != 0.1
    assert BlockErrors(Measure.RECONSTRUCTION, 0.1) == BlockErrors(
        Measure.RECONSTRUCTION, 0.10000000149011612
    )
