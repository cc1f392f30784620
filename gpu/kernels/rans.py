"""Static rANS on the GPU: one warp per tile, one lane of the warp per lane of the tile.

The method and the bytes are those of :mod:`kvtc_stream.coding.rans` and of the specification. A
thread block works on tiles of one part, whose tables are in shared memory.

A task is a row of int64 for each tile. Tasks of a thread block belong to one part, and are padded
with tiles without tokens. A thread block has 32 threads for each of its tiles.
"""

from __future__ import annotations

import numpy as np

from kvtc_stream.gpu.kernels.intrinsics import (
    WARP,
    ballot,
    f16_bits,
    f32p,
    i32,
    i32p,
    i64,
    i64p,
    popc,
    round_to_int,
    shuffle,
    u8p,
    u16p,
    u32,
    u32p,
)
from kvtc_stream.gpu.runtime.compile import kernel
from kvtc_stream.gpu.runtime.dialect import cuda

#: Maximum number of tiles, and so warps, of a thread block.
MOST_TILES = 16
#: Fields of a task.
(
    PART,
    TOKENS,  # coded tokens of the block; 0 in a task that fills up
    TOKEN,  # the block's first one among all
    FIRST,  # component, among those of all parts
    COUNT,  # of components
    BLOCK,
    WORDS,  # where the tile begins in the payloads, in words; when encoding, where its room ends
    LENGTH,  # of the tile, or of the room for it, in words
    CLASSES,  # where the part's classes begin, in bytes: c in its first tile, -1 - c in others
    LEVEL,  # index into the families' ids; when encoding, the block's instead
) = range(10)
FIELDS = 10
#: Fields of a block of payloads and of a part, for :func:`tasks`.
(
    NUMBER,  # of the block, among all
    HELD,  # its coded tokens
    BEFORE,  # the first of them among all
    TILES,  # where its tiles begin, in bytes
    NIBBLES,  # where its classes begin, in bytes
    OWN_LEVEL,  # index into the families' ids
) = range(6)
BLOCK_FIELDS = 6
(
    PLACE,  # of its first task
    TILE,  # number of its first tile in a block
    COMPONENT,  # its first one
    CODED,  # how many of them
) = range(4)
PART_FIELDS = 4
#: Threads of a block of :func:`tasks`.
THREADS = 128

#: Bits of a block's faults. LARGE is not an error of the stream: a symbol exceeds binary16.
DAMAGED, LARGE, FULL = 1, 2, 4

_ESCAPE, _ZERO = 255, 127
_U32, _I32, _I64, _F32 = np.uint32, np.int32, np.int64, np.float32
_LEAST = np.uint32(1 << 16)
_WIDE = -0x8000
#: Maximum number of words of a step: one for each lane's state and escape, two for a wide value.
_STEP_WORDS = 4 * WARP


@kernel(i64p, i32, i32, i64p, i32, i64p, i64, i64p, i32)
def tasks(parts, number, size, blocks, held, lengths, stride, out, places):  # type: ignore[no-untyped-def]
    """Kernel: the tasks of tiles that are decoded, those of a part after those of another, a thread
    each.

    Parameters
    ----------
    parts, number
        int64 [number, PART_FIELDS].
    size
        Maximum number of components in a tile.
    blocks, held
        int64 [held, BLOCK_FIELDS]: those whose tiles have it.
    lengths
        int64 [all blocks, stride]: bytes of tiles.
    out, places
        int64 [places, FIELDS].
    """
    place = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    if place >= places:
        return
    part = _I32(0)
    while part + _I32(1) < number and parts[(part + _I32(1)) * PART_FIELDS + PLACE] <= place:
        part += _I32(1)
    of_part, to = part * PART_FIELDS, _I64(place) * FIELDS
    coded, index = _I32(parts[of_part + CODED]), place - _I32(parts[of_part + PLACE])
    tiles = (coded + size - _I32(1)) // size
    which, tile = index // tiles, index % tiles
    for i in range(_I32(0), _I32(FIELDS)):
        out[to + i] = 0
    out[to + PART] = part
    if which >= held:  # it fills up
        return
    own = _I64(which) * BLOCK_FIELDS
    block, tokens, begin = blocks[own + NUMBER], blocks[own + HELD], blocks[own + TILES]
    row, before = block * stride, _I32(parts[of_part + TILE]) + tile
    for i in range(_I32(0), before):
        begin += lengths[row + i]
    classes = blocks[own + NIBBLES] + (tokens + 1) // 2 * part
    if tile:
        classes = -1 - classes
    out[to + TOKENS] = tokens
    out[to + TOKEN] = blocks[own + BEFORE]
    out[to + FIRST] = parts[of_part + COMPONENT] + tile * size
    out[to + COUNT] = min(coded - tile * size, size)
    out[to + BLOCK] = block
    out[to + WORDS] = begin // 2
    out[to + LENGTH] = lengths[row + before] // 2
    out[to + CLASSES] = classes
    out[to + LEVEL] = blocks[own + OWN_LEVEL]


@kernel(
    i64p, u16p, u8p, u32p, u32p, u32p, i32p, i32, u8p, i32, i32p, f32p, f32p, f32p, u16p, i64, i32p
)  # fmt: skip
def decode(  # type: ignore[no-untyped-def]
    tasks,
    words,
    packed_classes,
    buckets,
    symbols,
    entries,
    families,
    parts,
    ids,
    components,
    columns,
    block_steps,
    scales,
    down,
    out,
    stride,
    faults,
):
    """Kernel: decode tiles to symbols.

    Parameters
    ----------
    tasks
        int64 [tiles, FIELDS].
    parts
        Number of parts.
    words, packed_classes
        The payloads, as words and as bytes.
    buckets, symbols
        From :func:`kvtc_stream.gpu.coder.tables.decode_tables`, concatenated over parts. Indices
        in a part's buckets count from its first symbol.
    entries
        As for :func:`encode`.
    families
        int32 [2, parts + 1]: where each part's families begin, and where its symbols begin.
    ids
        uint8 [levels, components, 16]: the family for each component and step class. Up to 32 bytes
        after the last are read, but not used.
    columns
        int32 [tokens]: the column of ``out`` for each token.
    block_steps
        float32 [blocks, 16]: the step size of each step class.
    scales
        float32 [parts, stride]: the step size of each token is written here.
    down
        float32 [components]: powers of two that bring symbols into the range of binary16.
    out
        Bits of binary16 [components, stride]: symbols times ``down`` are written here.
    faults
        int32 [blocks], 0 before: bits of faults are set.
    """
    table = cuda.shared.array(0, u32)
    thread = _U32(cuda.threadIdx.x)
    lane = _U32(thread & _U32(WARP - 1))
    threads = _U32(cuda.blockDim.x)
    first_tile = _I64(cuda.blockIdx.x) * _I64(threads >> _U32(5))
    task = (first_tile + _I64(thread >> _U32(5))) * FIELDS
    part = tasks[first_tile * FIELDS + PART]
    first_family = _U32(families[part])
    size = _U32((_U32(families[part + 1]) - first_family) << _U32(8))
    for i in range(thread, size, threads):
        table[_U32(i)] = buckets[(first_family << _U32(8)) + _U32(i)]
    first_symbol = _U32(families[parts + 1 + part])
    number = _U32(families[parts + 1 + part + 1]) - first_symbol
    for i in range(thread, number, threads):
        table[size + _U32(i)] = symbols[first_symbol + _U32(i)]
    cuda.syncthreads()

    tokens = _U32(tasks[task + TOKENS])
    if tokens == 0:
        return
    count = _I32(tasks[task + COUNT])
    first = _I32(tasks[task + FIRST])
    begin = tasks[task + WORDS]
    length = _U32(tasks[task + LENGTH])
    of_level = tasks[task + LEVEL] * components
    classes = tasks[task + CLASSES]
    own_classes = classes
    if classes < 0:
        own_classes = -1 - classes
    block = tasks[task + BLOCK]
    lanes = _U32(min(tokens, _U32(WARP)))
    if length < _U32(2) * lanes:
        if lane == 0:
            faults[block] = DAMAGED
        return
    below = _U32((_U32(1) << lane) - _U32(1))

    state = _LEAST
    if lane < lanes:
        low, high = words[begin + 2 * lane], words[begin + 2 * lane + 1]
        state = _U32(_U32(low) | _U32(high) << _U32(16))
    fault = state < _LEAST
    position = _U32(_U32(2) * lanes)
    last = _U32(length - _U32(1))
    # The next 96 words, three in each lane: 32 from ``window`` on, and the 64 after them. A step
    # reads from the first 64; the last 32 are still being loaded.
    window = position
    near = _I32(words[begin + min(_U32(window + lane), last)])
    far = _I32(words[begin + min(_U32(window + lane + _U32(WARP)), last)])
    farther = _I32(words[begin + min(_U32(window + lane + _U32(2 * WARP)), last)])
    large = False
    for group in range(_U32(0), tokens, _U32(WARP)):
        token = _U32(_U32(group) + lane)
        active = token < tokens
        klass = _U32(0)
        column = _I64(0)
        if active:
            column = _I64(columns[tasks[task + TOKEN] + token])
            klass = _U32(packed_classes[own_classes + (token >> _U32(1))])
            klass = _U32((klass >> ((token & _U32(1)) << _U32(2))) & _U32(15))
            if classes >= 0:
                scales[part * stride + column] = block_steps[block * 16 + klass]
        target = _I64(first) * stride + column
        # Families are loaded two steps ahead: nothing else hides the latency of memory.
        source = (of_level + first) * 16 + klass
        family_1, family_2 = _U32(ids[source]), _U32(ids[source + 16])
        for i in range(_I32(0), count):
            family, family_1 = family_1, family_2
            family_2 = _U32(ids[source + 32])
            source += 16
            scale = down[first + _I32(i)]
            slot = _U32(state & _U32(0xFFF))
            bucket = _U32(table[_U32((family << _U32(8)) + (slot >> _U32(4)))])
            ones = _U32((_U32(2) << (slot & _U32(15))) - _U32(1))
            begun = _U32(bucket & ones & _U32(0xFFFF))
            entry = _U32(table[_U32(size + (bucket >> _U32(16)) + popc(begun))])
            column_found = _U32(entry >> _U32(24))
            if active:
                frequency = _U32(((entry >> _U32(12)) & _U32(0xFFF)) + _U32(1))
                state = _U32(frequency * (state >> _U32(12)) + slot - (entry & _U32(0xFFF)))
            needs = state < _LEAST
            mask = ballot(needs)
            at = _U32(position - window + popc(_U32(mask & below)))
            word = shuffle(near, _I32(at & _U32(WARP - 1)))
            other = shuffle(far, _I32(at & _U32(WARP - 1)))
            if at >= _U32(WARP):
                word = other
            if needs:
                state = _U32(state << _U32(16) | _U32(word))
            position = _U32(position + popc(mask))
            value = _I32(_I32(column_found) - _I32(_ZERO))
            escaped = active and column_found == _U32(_ESCAPE)
            mask = ballot(escaped)
            if mask:
                if escaped:
                    at = _U32(min(_U32(position + popc(_U32(mask & below))), last))
                    value = _I32(np.int16(words[begin + at]))
                    # An escape is a fault if the family has a frequency for the value.
                    if -_ZERO <= value <= _ZERO:
                        own = (first_family + family) << _U32(8)
                        fault |= entries[own + _U32(value + _I32(_ZERO))] >> _U32(31) == _U32(0)
                position = _U32(position + popc(mask))
                wide = escaped and value == _I32(_WIDE)
                mask = ballot(wide)
                if wide:
                    at = _U32(position + _U32(2) * popc(_U32(mask & below)))
                    low = _U32(words[begin + min(at, last)])
                    high = _U32(words[begin + min(_U32(at + _U32(1)), last)])
                    value = _I32(low | high << _U32(16))
                    fault |= -_I32(_WIDE) > value > _I32(_WIDE)
                position = _U32(position + _U32(2) * popc(mask))
                large |= abs(_F32(value) * scale) > _F32(65504)
                if position > length:
                    break
            while _U32(position - window) >= _U32(WARP):
                near, far = far, farther
                window = _U32(window + _U32(WARP))
                at = _U32(min(_U32(window + lane + _U32(2 * WARP)), last))
                farther = _I32(words[begin + at])
            if active:
                out[target] = f16_bits(_F32(value) * scale)
            target += stride
        if position > length:
            break
    fault |= position != length or state != _LEAST
    if ballot(fault):
        if lane == 0:
            faults[block] = DAMAGED
    elif ballot(large) and lane == 0:
        faults[block] = LARGE


@kernel(i64p, u32p, i32p, u8p, i32, i32p, f32p, f32p, i64, i32p, u8p, i32p, u16p, i32p, i32p)
def encode(  # type: ignore[no-untyped-def]
    tasks,
    entries,
    families,
    ids,
    components,
    columns,
    factors,
    coefficients,
    stride,
    levels,
    classes,
    kept,
    words,
    lengths,
    faults,
):
    """Kernel: encode coefficients to tiles, each at the end of the space for it.

    Parameters
    ----------
    tasks, families, ids, columns
        As for :func:`decode`.
    entries
        uint32 [families, 256]: ``start | frequency << 12 | escaped << 31``; columns without a
        frequency have the entry of the escape.
    factors
        float32 [blocks, 16]: factor of coefficients for each step class.
    coefficients
        float32 [components, stride].
    levels
        int32 [blocks]: indices into ``ids``.
    classes
        uint8 [parts, stride].
    kept
        int32 [blocks]: number of tokens of ``columns`` to code, instead of the task's.
    words
        Space for the tiles.
    lengths
        int32 [tiles]: the length of each tile in words is written here.
    faults
        int32 [blocks], 0 before: becomes FULL if a tile does not fit.
    """
    table = cuda.shared.array(0, u32)
    thread = _U32(cuda.threadIdx.x)
    lane = _U32(thread & _U32(WARP - 1))
    threads = _U32(cuda.blockDim.x)
    first_tile = _I64(cuda.blockIdx.x) * _I64(threads >> _U32(5))
    tile = first_tile + _I64(thread >> _U32(5))
    task = tile * FIELDS
    part = tasks[first_tile * FIELDS + PART]
    first_family = _U32(families[part])
    size = _U32((_U32(families[part + 1]) - first_family) << _U32(8))
    for i in range(thread, size, threads):
        table[_U32(i)] = entries[(first_family << _U32(8)) + _U32(i)]
    cuda.syncthreads()

    if tasks[task + TOKENS] == 0:
        return
    block = tasks[task + BLOCK]
    tokens = _U32(kept[block])
    if tokens == 0:
        return
    count = _I32(tasks[task + COUNT])
    final = _I64(_I32(tasks[task + FIRST]) + count - _I32(1))
    of_level = _I64(levels[block]) * components
    length = _I32(tasks[task + LENGTH])
    begin = tasks[task + WORDS] - length
    below = _U32((_U32(1) << lane) - _U32(1))
    state = _LEAST
    position = length
    for g in range(_U32(0), (tokens + _U32(WARP - 1)) >> _U32(5)):
        last_group = (tokens - _U32(1)) & _U32(0xFFFFFFE0)
        token = _U32(last_group - _U32(g) * _U32(WARP) + lane)
        active = token < tokens
        klass = _I32(0)
        column = _I64(0)
        factor = _F32(0)
        if active:
            column = _I64(columns[tasks[task + TOKEN] + token])
            klass = _I32(classes[part * stride + column])
            factor = factors[block * 16 + klass]
        source = final * stride + column
        of_family = (of_level + final) * 16 + klass
        x_1, family_1 = coefficients[source], _U32(ids[of_family])
        source = max(source - stride, column)
        of_family = max(of_family - 16, _I64(0))
        x_2, family_2 = coefficients[source], _U32(ids[of_family])
        for _ in range(count):
            # Two steps ahead: nothing else hides the latency of memory.
            x, x_1 = x_1, x_2
            family, family_1 = family_1, family_2
            source = max(source - stride, column)
            of_family = max(of_family - 16, _I64(0))
            x_2, family_2 = coefficients[source], _U32(ids[of_family])
            value = round_to_int(x * factor)
            # Not min(): numba-cuda-mlir compares unsigned numbers as if they were signed there.
            place = _U32(value + _I32(_ZERO))
            place = place if place < _U32(_ESCAPE) else _U32(_ESCAPE)
            entry = _U32(table[_U32((family << _U32(8)) + place)])
            escaped = active and (entry >> _U32(31)) != _U32(0)
            mask = ballot(escaped)
            if position < _I32(_STEP_WORDS + 2 * WARP):
                if lane == 0:
                    faults[block] = FULL
                return
            if mask:
                wide = escaped and not -_I32(_WIDE) > value > _I32(_WIDE)
                wides = ballot(wide)
                position = _I32(position - _I32(2) * _I32(popc(wides)))
                if wide:
                    at = begin + position + _I32(2) * _I32(popc(_U32(wides & below)))
                    words[at] = np.uint16(value & _I32(0xFFFF))
                    words[at + 1] = np.uint16((value >> _I32(16)) & _I32(0xFFFF))
                position = _I32(position - _I32(popc(mask)))
                if escaped:
                    short = _I32(_WIDE) if wide else value
                    at = begin + position + _I32(popc(_U32(mask & below)))
                    words[at] = np.uint16(short & _I32(0xFFFF))
            frequency = _U32((entry >> _U32(12)) & _U32(0x1FFF))
            spills = active and (state >> _U32(20)) >= frequency
            mask = ballot(spills)
            position = _I32(position - _I32(popc(mask)))
            if spills:
                at = begin + position + _I32(popc(_U32(mask & below)))
                words[at] = np.uint16(state & _U32(0xFFFF))
                state = _U32(state >> _U32(16))
            if active:
                # Off by one at most: the quotient is below 2²⁰.
                quotient = _U32(_F32(state) * (_F32(1) / _F32(frequency)))
                rest = _I32(_U32(state - quotient * frequency))
                if rest < 0:
                    quotient = _U32(quotient - _U32(1))
                    rest = _I32(rest + _I32(frequency))
                elif rest >= _I32(frequency):
                    quotient = _U32(quotient + _U32(1))
                    rest = _I32(rest - _I32(frequency))
                state = _U32((quotient << _U32(12)) + _U32(rest) + (entry & _U32(0xFFF)))
    lanes = _I32(min(tokens, _U32(WARP)))
    position -= _I32(2) * lanes
    if _I32(lane) < lanes:
        words[begin + position + 2 * lane] = np.uint16(state & _U32(0xFFFF))
        words[begin + position + 2 * lane + 1] = np.uint16(state >> _U32(16))
    if lane == 0:
        lengths[tile] = length - position
