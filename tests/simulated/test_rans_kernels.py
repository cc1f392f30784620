"""The rANS kernels against the CPU's coder: tiles of two parts and some blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from launch import simulate
from test_rans import EDGES, FAMILIES, _family, _one_lane

from kvtc_stream.coding import rans as cpu
from kvtc_stream.errors import FormatError
from kvtc_stream.gpu.coder import tables
from kvtc_stream.gpu.kernels import rans

Array = npt.NDArray[Any]

#: What is not to be written has this.
CANARY = 0xAAAA

#: Families of each part.
FAMILIES_OF = (
    FAMILIES,
    cpu.Families(np.stack([_family({-1: 600, 1: 600, 128: 1}), _family({3: 9, 128: 40})])),
)
ENTRIES = np.concatenate([tables.encode_entries(f.frequencies) for f in FAMILIES_OF])
#: Components of a part, and of a tile.
COMPONENTS, PER_TILE = (4, 5), 3
#: How many levels there are.
LEVELS = 4
TOTAL = sum(COMPONENTS)

#: Tiles of a block of threads.
TOGETHER = 8


@dataclass
class Tile:
    """A tile: the part, the block, and the components among those of all parts."""

    part: int
    block: int
    first: int
    count: int


@dataclass
class Case:
    """Blocks of some tokens each, of which other tokens lie between."""

    tokens: tuple[int, ...]
    levels: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        kept = sum(self.tokens)
        self.stride = kept + 5
        self.columns = np.sort(rng.permutation(self.stride)[:kept]).astype(np.int32)
        self.starts = np.cumsum([0, *self.tokens])[:-1]
        self.symbols = rng.laplace(scale=1.5, size=(TOTAL, kept)).round().astype(np.int32)
        self.symbols[rng.random(self.symbols.shape) < 0.05] = 900
        self.classes = rng.integers(0, 16, (2, kept), dtype=np.uint8)
        of_part = [
            rng.integers(0, len(f.frequencies), (LEVELS, n, 16), dtype=np.uint8)
            for f, n in zip(FAMILIES_OF, COMPONENTS, strict=True)
        ]
        self.ids = np.concatenate(of_part, axis=1)
        self.tiles = [
            Tile(part, block, first, min(PER_TILE, begin + size - first))
            for part, (begin, size) in enumerate(zip((0, COMPONENTS[0]), COMPONENTS, strict=True))
            for block in range(len(self.tokens))
            for first in range(begin, begin + size, PER_TILE)
        ]

    def of(self, tile: Tile) -> tuple[Array, Array, Array, cpu.Families]:
        """Arguments of the CPU's encoder."""
        start = self.starts[tile.block]
        tokens = slice(start, start + self.tokens[tile.block])
        components = slice(tile.first, tile.first + tile.count)
        ids = self.ids[self.levels[tile.block], components].T
        symbols = np.ascontiguousarray(self.symbols[components, tokens].T)
        return (
            symbols,
            self.classes[tile.part, tokens],
            np.ascontiguousarray(ids),
            (FAMILIES_OF[tile.part]),
        )

    @property
    def padded_ids(self) -> Array:
        """What a kernel may read."""
        return np.append(self.ids.ravel(), np.full(32, 255, np.uint8))

    def tasks(self, places: list[tuple[int, int]], classes: list[int]) -> Array:
        """A task for each tile, those of a part filled up to whole blocks of threads.

        ``places`` are words: where each begins or ends, and its length.
        """
        rows: list[list[int]] = []
        for part in range(2):
            for tile, place, own in zip(self.tiles, places, classes, strict=True):
                if tile.part == part:
                    block = tile.block
                    sizes = [part, self.tokens[block], self.starts[block], tile.first, tile.count]
                    rows.append([*sizes, block, *place, own, self.levels[block]])
            rows += [[part, *[0] * (rans.FIELDS - 1)]] * (-len(rows) % TOGETHER)
        return np.array(rows, np.int64)


def _run(kernel: Any, tasks: Array, arguments: list[Any], shared: int) -> None:
    blocks = len(tasks) // TOGETHER
    simulate(kernel, blocks, TOGETHER * rans.WARP, [tasks, *arguments], shared)


def _decode(case: Case, encoded: list[bytes]) -> tuple[Array, Array, Array]:
    """Values as binary16 [components, stride], the tokens' steps, the blocks' faults."""
    words = np.frombuffer(b"".join(encoded), np.uint16).copy()
    lengths = [len(data) // 2 for data in encoded]
    places = list(zip(np.cumsum([0, *lengths])[:-1].tolist(), lengths, strict=True))
    packed: dict[tuple[int, int], int] = {}
    classes, own = bytearray(), []
    for tile in case.tiles:
        key = tile.part, tile.block
        new = key not in packed
        if new:
            packed[key] = len(classes)
            padded = np.append(case.of(tile)[1], np.uint8(0))[: (case.tokens[tile.block] + 1) & ~1]
            classes += (padded[::2] | padded[1::2] << 4).tobytes()
        own.append(packed[key] if new else -1 - packed[key])
    blocks = len(case.tokens)
    block_steps = np.arange(16 * blocks, dtype=np.float32).reshape(blocks, 16) + 1
    scales = np.full((2, case.stride), -1, np.float32)
    out = np.full((TOTAL, case.stride), CANARY, np.uint16)
    faults = np.zeros(blocks, np.int32)
    of_parts = [tables.decode_tables(f.frequencies) for f in FAMILIES_OF]
    counts = [[len(f.frequencies) for f in FAMILIES_OF], [len(s) for _, s in of_parts]]
    arguments = [
        words,
        np.frombuffer(bytes(classes), np.uint8).copy(),
        np.concatenate([buckets for buckets, _ in of_parts]),
        np.concatenate([symbols for _, symbols in of_parts]),
        ENTRIES,
        np.array([[0, *np.cumsum(c)] for c in counts], np.int32),
        2,
        case.padded_ids,
        TOTAL,
        case.columns,
        block_steps,
        scales,
        np.ones(TOTAL, np.float32),
        out,
        case.stride,
        faults,
    ]
    shared = 4 * max(256 * families + symbols for families, symbols in zip(*counts, strict=True))
    _run(rans.decode, case.tasks(places, own), arguments, shared)
    return out, scales, faults


def test_tasks_of_payloads() -> None:
    """Those of some blocks, the others have tiles of another size."""
    case = Case(tokens=(40, 1, 33), levels=(0, 3, 2))
    chosen, counts = [0, 2], [-(-n // PER_TILE) for n in COMPONENTS]
    lengths = 2 * np.random.default_rng(1).integers(1, 90, (3, sum(counts)))
    begins, classes = np.array([20, 5000, 9000]), np.array([3001, 7777, 12_345])
    places, of_tiles = [], []
    for tile in case.tiles:
        local = (tile.first - (0, COMPONENTS[0])[tile.part]) // PER_TILE
        number = (0, counts[0])[tile.part] + local
        length = lengths[tile.block, number]
        begin = begins[tile.block] + lengths[tile.block, :number].sum()
        places.append((int(begin) // 2, int(length) // 2))
        own = int(classes[tile.block]) + (case.tokens[tile.block] + 1) // 2 * tile.part
        of_tiles.append(own if local == 0 else -1 - own)
    held = [tile.block in chosen for tile in case.tiles]
    case.tiles, places, of_tiles = (list(compress(x, held)) for x in (case.tiles, places, of_tiles))
    expected = case.tasks(places, of_tiles)
    filled = [-(-len(chosen) * n // TOGETHER) * TOGETHER for n in counts]
    parts = np.array([[0, 0, 0, COMPONENTS[0]], [filled[0], counts[0], *COMPONENTS]])
    columns = [range(3), case.tokens, case.starts, begins, classes, case.levels]
    blocks = np.array(columns, np.int64).T[chosen].copy()
    found = np.full((sum(filled), rans.FIELDS), -1, np.int64)
    arguments = [parts, 2, PER_TILE, blocks, len(blocks), lengths, lengths.shape[1], found]
    simulate(rans.tasks, 1, rans.THREADS, [*arguments, len(found)])
    np.testing.assert_array_equal(found, expected)


def test_decoder_finds_the_symbols_of_the_cpu() -> None:
    case = Case(tokens=(40, 1, 33), levels=(0, 3, 2))
    extremes = [v for v in EDGES if abs(v) <= 65504]
    case.symbols[1, : len(extremes)] = extremes
    out, scales, faults = _decode(case, [cpu.encode(*case.of(tile)) for tile in case.tiles])
    assert not faults.any()
    found = out[:, case.columns].view(np.float16)
    np.testing.assert_array_equal(found, case.symbols.astype(np.float16))
    of_token = np.repeat(np.arange(3), case.tokens) * 16 + 1
    np.testing.assert_array_equal(scales[:, case.columns], of_token + case.classes)
    between = np.setdiff1d(np.arange(case.stride), case.columns)
    assert (out[:, between] == CANARY).all()
    assert (scales[:, between] == -1).all()


def test_symbols_without_binary16_are_a_fault_of_their_own() -> None:
    case = Case(tokens=(3, 3), levels=(0, 0))
    case.symbols[6, 4] = -65505
    _, _, faults = _decode(case, [cpu.encode(*case.of(tile)) for tile in case.tiles])
    assert faults.tolist() == [0, rans.LARGE]


def _damaged(case: Case, seed: int) -> list[bytes]:
    """One tile of each block other than it was."""
    rng = np.random.default_rng(seed)
    encoded = [cpu.encode(*case.of(tile)) for tile in case.tiles]
    for block in range(len(case.tokens)):
        [*mine] = [i for i, tile in enumerate(case.tiles) if tile.block == block]
        i = int(rng.choice(mine))
        data = bytearray(encoded[i])
        kind = rng.integers(4)
        if kind == 0:
            data = data[:-2]
        elif kind == 1:
            data += b"\0\1"
        elif kind == 2:
            data[4 * int(rng.integers(min(32, case.tokens[block]))) + 2 :][:2] = b"\0\0"
        if kind != 1:
            bit = int(rng.integers(8 * len(data)))
            data[bit // 8] ^= 1 << bit % 8
        encoded[i] = bytes(data)
    return encoded


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_a_fault_where_the_cpu_refuses(seed: int) -> None:
    case = Case(tokens=(33, 2, 5, 32, 1), levels=(0, 1, 2, 3, 0), seed=seed)
    encoded = _damaged(case, seed)
    expected = np.zeros(len(case.tokens), bool)
    for tile, data in zip(case.tiles, encoded, strict=True):
        _, *rest = case.of(tile)
        try:
            cpu.decode(data, *rest)
        except FormatError:
            expected[tile.block] = True
    assert expected.any()
    out, _, faults = _decode(case, encoded)
    np.testing.assert_array_equal((faults & rans.DAMAGED) != 0, expected)
    between = np.setdiff1d(np.arange(case.stride), case.columns)
    assert (out[:, between] == CANARY).all()


def test_a_tile_shorter_than_its_states_is_a_fault() -> None:
    case = Case(tokens=(3, 2), levels=(0, 0))
    encoded = [cpu.encode(*case.of(tile)) for tile in case.tiles]
    encoded[-1] = b""  # the payloads end here
    _, _, faults = _decode(case, encoded)
    assert faults.tolist() == [0, rans.DAMAGED]


def test_escapes_longer_than_needed_are_faults() -> None:
    case = Case(tokens=(1, 1, 1, 1), levels=(0, 0, 0, 0))
    case.ids[:] = 0
    plain = [(127 * 16, 16, [])]
    wide = [0x8000, 0x1234, 0]
    for block, words in enumerate(([5], [0x8000, 300, 0], wide, [300])):
        tile = next(t for t in case.tiles if t.block == block and t.part == 0)
        escaped = _one_lane([(255 * 16, 16, words), *plain * (tile.count - 1)])
        encoded = [cpu.encode(*case.of(t)) if t is not tile else escaped for t in case.tiles]
        _, _, faults = _decode(case, encoded)
        _, *rest = case.of(tile)
        if block < 3:
            with pytest.raises(FormatError):
                cpu.decode(escaped, *rest)
        assert faults.tolist() == [rans.DAMAGED * (b == block < 3) for b in range(4)]


def _encode(
    case: Case, coefficients: Array, factors: Array, room: int
) -> tuple[list[bytes], Array]:
    words = np.full(len(case.tiles) * room, CANARY, np.uint16)
    places = [((i + 1) * room, room) for i in range(len(case.tiles))]
    tasks = case.tasks(places, [-1] * len(case.tiles))
    lengths = np.zeros(len(tasks), np.int32)
    faults = np.zeros(len(case.tokens), np.int32)
    classes = np.zeros((2, case.stride), np.uint8)
    classes[:, case.columns] = case.classes
    arguments = [
        ENTRIES,
        np.cumsum([0, *[len(f.frequencies) for f in FAMILIES_OF]]).astype(np.int32),
        case.padded_ids,
        TOTAL,
        case.columns,
        factors,
        coefficients,
        case.stride,
        np.array(case.levels, np.int32),
        classes,
        np.array(case.tokens, np.int32),
        words,
        lengths,
        faults,
    ]
    _run(rans.encode, tasks, arguments, 1024 * max(len(f.frequencies) for f in FAMILIES_OF))
    used = tasks[:, rans.TOKENS] > 0
    ends, taken = tasks[used, rans.WORDS], lengths[used]
    encoded = [words[e - n : e].tobytes() for e, n in zip(ends, taken, strict=True)]
    for end, length in zip(ends, taken, strict=True):
        assert faults.any() or (words[end - room : end - length] == CANARY).all()
    return encoded, faults


def test_encoder_makes_the_bytes_of_the_cpu() -> None:
    case = Case(tokens=(35, 2, 32), levels=(0, 3, 2), seed=1)
    rng = np.random.default_rng(1)
    factors = 2 ** (-rng.integers(0, 30, (3, 16)) / 4).astype(np.float32)
    coefficients = np.full((TOTAL, case.stride), np.nan, np.float32)
    drawn = rng.laplace(scale=4, size=(TOTAL, len(case.columns))).astype(np.float32)
    drawn[0, :20] *= 1e3
    drawn[1, :20] *= 1e6
    coefficients[:, case.columns] = drawn
    block = np.repeat(np.arange(3), case.tokens)
    part = np.repeat([0, 1], COMPONENTS)
    case.symbols = np.rint(drawn * factors[block, case.classes[part]]).astype(np.int32)
    encoded, faults = _encode(case, coefficients, factors, room=900)
    assert not faults.any()
    assert encoded == [cpu.encode(*case.of(tile)) for tile in case.tiles]


def test_encoder_says_that_the_room_is_full() -> None:
    case = Case(tokens=(33, 1), levels=(0, 0))
    coefficients = np.full((TOTAL, case.stride), 1e4, np.float32)
    _, faults = _encode(case, coefficients, np.ones((2, 16), np.float32), room=230)
    assert faults.tolist() == [rans.FULL, 0]
