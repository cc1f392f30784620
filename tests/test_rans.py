"""The rANS coder against a decoder in plain Python, and against damage."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtc_stream.coding.rans import Families, decode, encode
from kvtc_stream.errors import FormatError

Symbols = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Tile = tuple[Symbols, Bytes, Bytes, Families]


def _reference(data: bytes, classes: Bytes, ids: Bytes, families: Families) -> list[list[int]]:
    """The format as it is described, one lane, one bit of arithmetic at a time."""
    tokens = len(classes)
    lanes = min(32, tokens)
    x = [int.from_bytes(data[4 * j : 4 * j + 4], "little") for j in range(lanes)]
    tail = data[4 * lanes :]
    words = iter([int.from_bytes(tail[i : i + 2], "little") for i in range(0, len(tail), 2)])
    symbols = [[0] * ids.shape[1] for _ in range(tokens)]

    def columns(frequencies: list[list[int]]) -> list[int]:
        found = []
        for j, of_lane in enumerate(frequencies):
            slot, column = x[j] % 4096, 0
            while slot >= of_lane[column]:
                slot -= of_lane[column]
                column += 1
            x[j] = of_lane[column] * (x[j] // 4096) + slot
            found.append(column)
        for j in range(len(frequencies)):
            if x[j] < 65536:
                x[j] = 65536 * x[j] + next(words)
        return found

    def signed(value: int, bits: int) -> int:
        return value - (value >> (bits - 1) << bits)

    for first in range(0, tokens, 32):
        group = range(first, min(first + 32, tokens))
        for component in range(ids.shape[1]):
            of_group = [families.frequencies[ids[classes[t], component]].tolist() for t in group]
            values = [column - 127 for column in columns(of_group)]
            values = [signed(next(words), 16) if v == 128 else v for v in values]
            for t, value in zip(group, values, strict=True):
                if value == -32768:
                    low = next(words)
                    value = signed(low + 65536 * next(words), 32)
                symbols[t][component] = value
    assert x == [65536] * lanes
    assert next(words, None) is None
    return symbols


def _one_lane(steps: list[tuple[int, int, list[int]]]) -> bytes:
    """A tile of one token: start, frequency and further words of each step."""
    x = 65536
    words: list[int] = []
    for start, frequency, more in reversed(steps):
        words = more + words
        if x >= frequency << 20:
            words.insert(0, x % 65536)
            x //= 65536
        x = x // frequency * 4096 + x % frequency + start
    return np.array([x], "<u4").tobytes() + np.array(words, "<u2").tobytes()


def _family(frequencies: dict[int, int]) -> npt.NDArray[np.uint16]:
    """A family from values (128: the escape); 0 takes what they leave."""
    family = np.zeros(256, np.uint16)
    for value, frequency in frequencies.items():
        family[value + 127] = frequency
    family[127] += 4096 - family.sum()
    return family


#: One value of everything; escapes only; nothing is certain but almost; a usual one.
FAMILIES = Families(
    np.stack(
        [
            np.full(256, 16, np.uint16),
            _family({128: 4096}),
            _family({128: 1}),
            _family({-127: 1, -2: 200, -1: 900, 1: 900, 2: 200, 127: 1, 128: 5}),
        ]
    ),
)
EDGES = [0, 1, -1, 126, 127, 128, -127, -128, 32767, 32768, -32767, -32768, -32769, 65536]


@st.composite
def tiles(draw: st.DrawFn) -> Tile:
    """Lanes and chunks that are full, or not; all kinds of values and families."""
    tokens = draw(st.sampled_from([0, 1, 2, 31, 32, 33, 64, 70]))
    components = draw(st.sampled_from([0, 1, 15, 16, 17, 40]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (tokens, components)
    extremes = np.array([*EDGES, 2**31 - 1, -(2**31)], np.int32)
    symbols = {
        "small": lambda: rng.laplace(scale=1.5, size=shape).round().astype(np.int32),
        "zero": lambda: np.zeros(shape, np.int32),
        "extreme": lambda: rng.choice(extremes, shape),
        "any": lambda: rng.integers(-(2**31), 2**31, shape, dtype=np.int32),
    }[draw(st.sampled_from(["small", "zero", "extreme", "any"]))]()
    families = FAMILIES
    if draw(st.booleans()):
        drawn = rng.multinomial(4095, rng.dirichlet(np.full(256, 0.02), 256))
        drawn[:, 255] += 1
        families = Families(drawn.astype(np.uint16))
    classes = rng.integers(0, draw(st.integers(1, 16)), tokens, dtype=np.uint8)
    ids = rng.integers(0, len(families.frequencies), (16, components), dtype=np.uint8)
    return symbols, classes, ids, families


@given(tiles())
def test_every_tile_comes_back_here_and_from_the_definition(tile: Tile) -> None:
    symbols, classes, ids, families = tile
    data = encode(*tile)
    np.testing.assert_array_equal(decode(data, classes, ids, families), symbols)
    assert _reference(data, classes, ids, families) == symbols.tolist()


def test_known_bytes() -> None:
    symbols = np.array([[0, -1, 5], [2, 40_000, -300], [-2, 127, 0]], np.int32)
    classes = np.array([0, 15, 1], np.uint8)
    ids = np.full((16, 3), 3, np.uint8)
    data = bytes.fromhex("cd94941fc1efd10037c00200fabffc3f0080409c00000500d4fe")
    assert _reference(data, classes, ids, FAMILIES) == symbols.tolist()
    assert encode(symbols, classes, ids, FAMILIES) == data
    np.testing.assert_array_equal(decode(data, classes, ids, FAMILIES), symbols)


def test_most_tokens() -> None:
    rng = np.random.default_rng(1)
    symbols = rng.integers(-2, 3, (65_536, 1), dtype=np.int32)
    classes = rng.integers(0, 16, 65_536, dtype=np.uint8)
    ids = np.full((16, 1), 3, np.uint8)
    data = encode(symbols, classes, ids, FAMILIES)
    np.testing.assert_array_equal(decode(data, classes, ids, FAMILIES), symbols)


def test_decodes_into_a_part_of_an_array() -> None:
    symbols = np.arange(12, dtype=np.int32).reshape(3, 4)
    ids = np.zeros((16, 4), np.uint8)
    whole = np.full((5, 7), 9, np.int32)
    expected = whole.copy()
    expected[1:4, 2:6] = symbols
    classes = np.zeros(3, np.uint8)
    data = encode(symbols, classes, ids, FAMILIES)
    decode(memoryview(data), classes, ids, FAMILIES, out=whole[1:4, 2:6])
    np.testing.assert_array_equal(whole, expected)


def test_size_is_within_a_hundredth_of_the_ideal() -> None:
    rng = np.random.default_rng(2)
    drawn = rng.choice(256, p=FAMILIES.frequencies[3] / 4096, size=(128, 2000))
    symbols = np.where(drawn == 255, 1000, drawn - 127).astype(np.int32)
    tile = symbols, np.zeros(128, np.uint8), np.full((16, 2000), 3, np.uint8), FAMILIES
    ideal = 16 * (drawn == 255).sum() - np.log2(FAMILIES.frequencies[3, drawn] / 4096).sum()
    assert ideal <= 8 * len(encode(*tile)) <= 1.01 * ideal


@given(tiles(), st.data())
def test_damage_is_found_or_gives_the_tile_of_these_bytes(tile: Tile, data: st.DataObject) -> None:
    _, classes, ids, families = tile
    whole = encode(*tile)
    kind = data.draw(st.sampled_from(["flip", "cut", "more", "random"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    if kind == "flip":
        spoilt = np.frombuffer(whole, np.uint8).copy()
        for place in rng.integers(0, max(spoilt.size, 1), rng.integers(1, 4)):
            spoilt[place : place + 1] ^= np.uint8(1 << rng.integers(8))
    elif kind == "cut":
        spoilt = np.frombuffer(whole[: rng.integers(len(whole) + 1)], np.uint8)
    elif kind == "more":
        spoilt = np.frombuffer(whole + rng.bytes(rng.integers(1, 9)), np.uint8)
    else:
        spoilt = np.frombuffer(rng.bytes(len(whole)), np.uint8)
    try:
        found = decode(spoilt, classes, ids, families)
    except FormatError:
        assert spoilt.tobytes() != whole
    else:
        assert encode(found, classes, ids, families) == spoilt.tobytes()


ONE = np.zeros(1, np.uint8)


@pytest.mark.parametrize(
    ("escape", "value"),
    [
        ([128], 128),
        ([3], 3),
        ([0x8001], -32767),
        ([0x8000, 0x8000, 0], 32768),
        ([0x8000, 0x8000, 0xFFFF], -32768),
        ([0x8000, 0, 0x8000], -(2**31)),
    ],
)
def test_escapes_as_short_as_they_can_be(escape: list[int], value: int) -> None:
    ids = np.full((16, 1), 3, np.uint8)
    data = _one_lane([(4091, 5, escape)])
    assert decode(data, ONE, ids, FAMILIES) == [[value]]


@pytest.mark.parametrize(
    "escape",
    [
        [0],
        [2],
        [0x10000 - 127],
        [0x8000, 0, 0],
        [0x8000, 3, 0],
        [0x8000, 0x7FFF, 0],
        [0x8000, 0x8001, 0xFFFF],
    ],
)
def test_longer_escapes_are_refused(escape: list[int]) -> None:
    ids = np.full((16, 1), 3, np.uint8)
    with pytest.raises(FormatError, match="escaped"):
        decode(_one_lane([(4091, 5, escape)]), ONE, ids, FAMILIES)


@pytest.mark.parametrize(
    "data",
    ["", "000001", "0000010000", "000001000000", "ffff0000", "01000100", "00000000"],
)
def test_bytes_that_no_tile_has(data: str) -> None:
    with pytest.raises(FormatError):
        decode(bytes.fromhex(data), ONE, np.zeros((16, 0), np.uint8), FAMILIES)


def test_no_tokens_have_no_bytes() -> None:
    ids = np.zeros((16, 3), np.uint8)
    none = np.zeros(0, np.uint8)
    assert encode(np.zeros((0, 3), np.int32), none, ids, FAMILIES) == b""
    assert decode(b"", none, ids, FAMILIES).shape == (0, 3)
    with pytest.raises(FormatError):
        decode(b"\0\0", none, ids, FAMILIES)


def test_no_components_have_states_alone() -> None:
    ids = np.zeros((16, 0), np.uint8)
    assert encode(np.zeros((1, 0), np.int32), ONE, ids, FAMILIES).hex() == "00000100"
    assert decode(bytes.fromhex("00000100"), ONE, ids, FAMILIES).shape == (1, 0)


@pytest.mark.parametrize(
    "frequencies",
    [
        np.full((1, 256), 16, np.int64),
        np.full((0, 256), 16, np.uint16),
        np.full((257, 256), 16, np.uint16),
        np.full((1, 255), 16, np.uint16),
        np.full((1, 256), 17, np.uint16),
        _family({})[None],
    ],
)
def test_families_that_cannot_be(frequencies: npt.NDArray[np.uint16]) -> None:
    with pytest.raises(ValueError, match="must"):
        Families(frequencies)


def test_families_do_not_follow_the_arrays_that_they_were_made_of() -> None:
    frequencies = _family({128: 1})[None]
    families = Families(frequencies)
    frequencies[:] = 0
    assert families.frequencies.sum() == 4096


@pytest.mark.parametrize(
    "wrong",
    [
        {"symbols": np.zeros((2, 3), np.int64)},
        {"symbols": np.zeros((2, 4), np.int32)},
        {"symbols": np.zeros((65_537, 3), np.int32)},
        {"classes": np.zeros(3, np.uint8)},
        {"classes": np.full(2, 16, np.uint8)},
        {"ids": np.zeros((15, 3), np.uint8)},
        {"ids": np.full((16, 3), 4, np.uint8)},
    ],
)
def test_arguments_that_do_not_fit(wrong: dict[str, npt.NDArray[np.generic]]) -> None:
    arguments = {
        "symbols": np.zeros((2, 3), np.int32),
        "classes": np.zeros(2, np.uint8),
        "ids": np.zeros((16, 3), np.uint8),
    } | wrong
    with pytest.raises(ValueError, match="found"):
        encode(**arguments, families=FAMILIES)


@pytest.mark.parametrize(
    ("classes", "out"),
    [
        (np.zeros(65_537, np.uint8), None),
        (np.full(1, 16, np.uint8), None),
        (ONE, np.zeros((1, 3), np.int64)),
    ],
)
def test_arguments_of_decode_that_do_not_fit(
    classes: Bytes, out: npt.NDArray[np.int32] | None
) -> None:
    with pytest.raises(ValueError, match="found") as error:
        decode(b"", classes, np.zeros((16, 3), np.uint8), FAMILIES, out)
    assert not isinstance(error.value, FormatError)
