"""Uniform bands on the GPU: classes of tokens, sizes, rate control, kept tokens, payloads.

Coefficients are float32 [components, stride]: a component's tokens lie side by side. Components are
those of all parts, one part after the other; tokens those of all blocks of a batch. Coefficients
are divided by 2^(b/4) of their base steps b, so that a step is that of a token's class alone.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from kvtc_stream.gpu import rans
from kvtc_stream.gpu.intrinsics import (
    WARP,
    ballot,
    f16_bits,
    f32,
    f32_bits,
    f32p,
    f64,
    f64p,
    i32,
    i32p,
    i64,
    i64p,
    popc,
    round_to_int,
    shuffle_down,
    u8p,
    u16p,
)
from kvtc_stream.gpu.kernel import kernel

THREADS = 256
#: Offsets to the step, from the batch's, at which sizes are measured, in quarter octaves.
OFFSETS = (-8.0, -4.0, 0.0, 4.0, 8.0)
SIZES = len(OFFSETS)
#: Components that sizes are measured on: one of so many. Neighbours take almost the same bits.
SAMPLED = 4
#: Fields of a stream's state: tokens so far, bytes of them, mean offset, slope.
STATE = 4
#: Components that a thread quantises for a reconstruction.
TOGETHER = 32

_CORRIDOR, _CLIP_COEFFICIENT, _CLIP_FEATURE, _LEAST_ENERGY = 0.015, 6.0, 8.0, 1e-6
_MIDDLE, _MOST_SYMBOL = 8, float(1 << 24)
_I32, _I64, _U32, _F32, _F64 = np.int32, np.int64, np.uint32, np.float32, np.float64


@kernel(f32p, i64, i32, i32p, f32p, f32p, i32p, f32, u8p, f32p)
def classify(  # type: ignore[no-untyped-def]
    coefficients, stride, tokens, parts, scale, weights, groups, per_class, classes, peaks
):
    """The class of each token in each part, and its largest coefficient; blocks [tokens, parts].

    Parameters
    ----------
    parts
        int32 [parts, 6]: first component, components, those read by the predictor (-1 without
        one), leading ones, groups of energy, where ``weights`` begin.
    scale
        float32 [components]: one over the deviation.
    weights
        float32, a part: constant, then weight, centre and spread of each feature: leading
        coefficients, their magnitudes, energies (see ``kvtc_stream.importance``).
    groups
        int32 [parts, 8]: borders of the groups.
    per_class
        Classes for a unit of the logarithm of importance.
    classes, peaks
        uint8, float32 [parts, stride]. A peak is not finite where a coefficient is not.
    """
    token = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    if token >= tokens:
        return
    part = _I32(cuda.blockIdx.y)
    first, count, read = parts[part * 6], parts[part * 6 + 1], parts[part * 6 + 2]
    leading, number, at = parts[part * 6 + 3], parts[part * 6 + 4], parts[part * 6 + 5]
    features = _I32(2) * leading + number
    peak = _F32(0)
    sound = True
    total = _F32(0)
    if read >= 0:
        total = weights[at]
    energy = _F32(0)
    group, begin = _I32(0), _I32(0)
    for i in range(_I32(0), count):
        x = coefficients[_I64(first + i) * stride + token]
        sound &= math.isfinite(x)
        peak = max(peak, abs(x))
        if i < read:
            z = x * scale[first + i]
            if i < leading:
                clipped = min(max(z, _F32(-_CLIP_COEFFICIENT)), _F32(_CLIP_COEFFICIENT))
                for j in range(2):
                    k = at + _I32(1) + _I32(j) * leading + i
                    value = (clipped - weights[k + features]) / weights[k + _I32(2) * features]
                    value = min(max(value, _F32(-_CLIP_FEATURE)), _F32(_CLIP_FEATURE))
                    total += weights[k] * value
                    clipped = abs(clipped)
            energy += z * z
            end = min(groups[part * 8 + group + 1], count)
            if i + 1 == end:
                mean = energy / _F32(end - begin)
                mean = min(max(mean, _F32(_LEAST_ENERGY)), _F32(1 / _LEAST_ENERGY))
                k = at + _I32(1) + _I32(2) * leading + group
                value = (_F32(math.log(mean)) - weights[k + features]) / weights[
                    k + _I32(2) * features
                ]
                total += weights[k] * min(max(value, _F32(-_CLIP_FEATURE)), _F32(_CLIP_FEATURE))
                energy, begin = _F32(0), end
                group = min(group + _I32(1), number - _I32(1))
    klass = _I32(_MIDDLE)
    if read >= 0:
        klass = min(max(klass + round_to_int(total * per_class), _I32(0)), _I32(15))
    to = _I64(part) * stride + token
    classes[to] = np.uint8(klass)
    peaks[to] = peak if sound else _F32(math.inf)


@kernel(i32p, i32, f64p, f64p, f64, i32, i32, f32p, i32p, i32p)
def offset_factors(  # type: ignore[no-untyped-def]
    streams, blocks, states, offsets, unit, lowest, highest, factors, levels, indices
):
    """What coefficients are multiplied by at every offset that sizes are measured at.

    ``streams`` int32 [blocks]; ``factors`` float32 [blocks, SIZES, 16], ``levels`` and ``indices``
    int32 [blocks, SIZES]: of the mean offset of the block's stream, rounded, plus ``offsets``; an
    index counts levels from ``lowest`` to ``highest``.
    """
    i = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    if i >= blocks * _I32(SIZES * 16):
        return
    row, klass = i // _I32(16), i % _I32(16)
    block, which = row // _I32(SIZES), row % _I32(SIZES)
    level = math.floor(states[streams[block] * _I32(STATE) + 2] + 0.5) + offsets[which]
    factors[i] = _F32(math.pow(2.0, -0.25 * (level + klass)) / unit)
    if klass == 0:
        levels[row] = _I32(level)
        indices[row] = min(max(_I32(level), lowest), highest) - lowest


@cuda.jit(device=True)
def _cost(x, factor, family, table):  # type: ignore[no-untyped-def]
    place = min(_U32(round_to_int(x * factor) + _I32(127)), _U32(255))
    return table[(_U32(family) << _U32(8)) + place]


@kernel(f32p, i64, i32p, u8p, i32, u8p, f32p, i32p, f32p, i32p, f32p, i32p)
def sizes(  # type: ignore[no-untyped-def]
    coefficients,
    stride,
    parts,
    ids,
    components,
    classes,
    factors,
    indices,
    bits,
    families,
    out,
    starts,
):
    """Bits of a block's tokens in a part at each offset; blocks of threads [blocks, parts].

    ``bits`` float32 [families, 256]; ``out`` float32 [blocks, parts, SIZES]; ``starts`` int32
    [blocks + 1]: first tokens.
    """
    table = cuda.shared.array(0, f32)
    block, part = _I32(cuda.blockIdx.x), _I32(cuda.blockIdx.y)
    thread = _I32(cuda.threadIdx.x)
    first_family = _U32(families[part])
    size = (_U32(families[part + 1]) - first_family) << _U32(8)
    for i in range(_U32(thread), size, _U32(THREADS)):
        table[_U32(i)] = bits[(first_family << _U32(8)) + _U32(i)]
    cuda.syncthreads()
    first, count = parts[part * 6], parts[part * 6 + 1]
    begin, end = starts[block], starts[block + 1]
    # A warp's lanes are tokens of one component.
    across = min((end - begin + _I32(WARP - 1)) & ~_I32(WARP - 1), _I32(THREADS))
    together = _I32(THREADS) // across
    sum_0, sum_1, sum_2, sum_3, sum_4 = _F32(0), _F32(0), _F32(0), _F32(0), _F32(0)
    at = block * _I32(SIZES)
    level_0 = _I64(indices[at]) * components * 16
    level_1 = _I64(indices[at + 1]) * components * 16
    level_2 = _I64(indices[at + 2]) * components * 16
    level_3 = _I64(indices[at + 3]) * components * 16
    level_4 = _I64(indices[at + 4]) * components * 16
    taken = (count + _I32(SAMPLED - 1)) // _I32(SAMPLED)
    if thread < together * across:
        for t in range(begin + thread % across, end, across):
            klass = _I32(classes[_I64(part) * stride + t])
            f = at * _I32(16) + klass
            f_0, f_1, f_2 = factors[f], factors[f + 16], factors[f + 32]
            f_3, f_4 = factors[f + 48], factors[f + 64]
            for i in range(thread // across, taken, together):
                c = first + min(_I32(i) * _I32(SAMPLED) + _I32(SAMPLED // 2), count - _I32(1))
                x = coefficients[_I64(c) * stride + t]
                own = c * _I32(16) + klass
                sum_0 += _cost(x, f_0, ids[level_0 + own], table)
                sum_1 += _cost(x, f_1, ids[level_1 + own], table)
                sum_2 += _cost(x, f_2, ids[level_2 + own], table)
                sum_3 += _cost(x, f_3, ids[level_3 + own], table)
                sum_4 += _cost(x, f_4, ids[level_4 + own], table)
    for by in (16, 8, 4, 2, 1):
        sum_0 += shuffle_down(sum_0, _I32(by))
        sum_1 += shuffle_down(sum_1, _I32(by))
        sum_2 += shuffle_down(sum_2, _I32(by))
        sum_3 += shuffle_down(sum_3, _I32(by))
        sum_4 += shuffle_down(sum_4, _I32(by))
    cuda.syncthreads()
    if thread % _I32(WARP) == 0:
        to = _U32(thread // _I32(WARP)) * _U32(SIZES)
        table[to] = sum_0
        table[to + _U32(1)] = sum_1
        table[to + _U32(2)] = sum_2
        table[to + _U32(3)] = sum_3
        table[to + _U32(4)] = sum_4
    cuda.syncthreads()
    if thread < _I32(SIZES):
        total = _F32(0)
        for i in range(THREADS // WARP):
            total += table[_U32(i * SIZES + thread)]
        scale = _F32(count) / _F32(max(taken, _I32(1)))
        to = (block * _I32(cuda.gridDim.y) + part) * _I32(SIZES) + thread
        out[to] = total * scale


@cuda.jit(device=True)
def _size_at(x, centre, logarithms):  # type: ignore[no-untyped-def]
    """A block's size at an offset: its logarithm is linear between those that were measured."""
    place = (x - centre) / 4.0 + 2.0
    i = min(max(_I32(math.floor(place)), _I32(0)), _I32(SIZES - 2))
    low, high = logarithms[i], logarithms[i + 1]
    return math.exp(low + (place - i) * (high - low))


@cuda.jit(device=True)
def _offset_of(size, centre, logarithms):  # type: ignore[no-untyped-def]
    """The offset at which a block has a size."""
    wanted = math.log(size)
    i = _I32(0)
    while i < SIZES - 2 and logarithms[i + 1] > wanted:
        i += _I32(1)
    low, high = logarithms[i], logarithms[i + 1]
    place = (wanted - low) / min(high - low, -1e-9)
    return centre + 4.0 * (i + place - 2.0)


@kernel(i32p, i32p, f32p, i32p, i32, i32, f64, f64, f64, f64p, f64p)
def control(  # type: ignore[no-untyped-def]
    first_blocks, starts, sizes, levels, parts, tiles, fixed, target, least, states, offsets
):
    """The offset of every block, as :class:`kvtc_stream.control.RateControl`; a warp a stream.

    Parameters
    ----------
    first_blocks
        int32 [streams + 1]: the first block of each stream.
    sizes, levels
        From :func:`sizes` and :func:`offset_factors`.
    fixed
        Bytes of a block besides tiles and classes.
    target
        Bytes a token.
    least
        The finest offset.
    states
        float64 [streams, STATE]; :func:`record` changes it, but for the slope.
    offsets
        float64 [blocks].
    """
    stream = _I32(cuda.blockIdx.x)
    lane = _I32(cuda.threadIdx.x)
    logarithms = cuda.shared.array(SIZES, f64)
    state = stream * _I32(STATE)
    tokens, bytes_so_far = states[state], states[state + 1]
    mean, slope = states[state + 2], states[state + 3]
    for b in range(first_blocks[stream], first_blocks[stream + 1]):
        n = starts[b + 1] - starts[b]
        overhead = fixed + tiles * (4 + 2 * min(n, _I32(32))) + parts * ((n + 1) // 2)
        for m in range(SIZES):
            total = _F32(0)
            for p in range(lane, parts, _I32(WARP)):
                total += sizes[(_I32(b) * parts + _I32(p)) * _I32(SIZES) + _I32(m)]
            for by in (16, 8, 4, 2, 1):
                total += shuffle_down(total, _I32(by))
            if lane == 0:
                logarithms[m] = math.log(_F64(total) / 8 + overhead)
        if lane == 0:
            centre = _F64(levels[b * SIZES + 2])
            x = 0.0
            if tokens > 0:
                x = mean - math.log(max(bytes_so_far, 1e-300) / (target * tokens)) / slope
                x = min(max(x, least), 100.0)
            goal = target * (tokens + n)
            size = _size_at(x, centre, logarithms)
            excess = math.log((bytes_so_far + size) / goal)
            if abs(excess) > _CORRIDOR:
                wanted = goal * math.exp(math.copysign(0.75 * _CORRIDOR, excess)) - bytes_so_far
                x = min(max(_offset_of(max(wanted, 1.0), centre, logarithms), least), 100.0)
                size = _size_at(x, centre, logarithms)
            measured = (logarithms[SIZES - 1] - logarithms[0]) / 16.0
            if measured < 0:
                slope += 0.25 * (measured - slope)
            offsets[b] = x
            bytes_so_far += size
            tokens += n
            mean += (x - mean) * n / tokens
    if lane == 0:
        states[state + 3] = slope


@kernel(i32, f64p, f64, i32, i32, f32p, f32p, i32p, i32p, f32p)
def steps(  # type: ignore[no-untyped-def]
    blocks, offsets, unit, lowest, highest, block_steps, factors, levels, indices, heads
):
    """Steps of the classes of each block, float32 [blocks, 16], and one over them.

    ``heads`` float32 and ``levels`` int32 [blocks] are what payloads say; ``indices`` int32
    [blocks] count levels from ``lowest`` to ``highest``.
    """
    i = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    if i >= blocks * _I32(16):
        return
    block, klass = i // _I32(16), i % _I32(16)
    step = _F32(unit * math.pow(2.0, offsets[block] * 0.25))
    quarter = klass % _I32(4)
    power = 1.0
    if quarter == 1:
        power = 1.189207115002721
    elif quarter == 2:
        power = 1.4142135623730951
    elif quarter == 3:
        power = 1.681792830507429
    delta = _F32(math.ldexp(_F64(step) * power, int(klass // _I32(4))))
    factors[i] = _F32(1) / delta
    block_steps[i] = delta
    if klass == 0:
        heads[block] = step
        level = _I32(min(max(math.floor(offsets[block] + 0.5), -128.0), 127.0))
        levels[block] = level
        indices[block] = min(max(level, lowest), highest) - lowest


@kernel(f32p, i64, i32, i32p, i32p, u8p, f32p, f32p, u16p, f32p)
def quantise(  # type: ignore[no-untyped-def]
    coefficients, stride, tokens, parts, blocks, classes, factors, block_steps, symbols, scales
):
    """Symbols as binary16 [components, stride] and steps [parts, stride], to reconstruct from.

    Blocks of threads [tokens, TOGETHER components, parts]. ``blocks`` int32 [tokens]: the block of
    a token.
    """
    token = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    if token >= tokens:
        return
    part = _I32(cuda.blockIdx.z)
    begin = _I32(cuda.blockIdx.y) * _I32(TOGETHER)
    klass = _I32(classes[_I64(part) * stride + token])
    own = blocks[token] * _I32(16) + klass
    factor = factors[own]
    at = _I64(parts[part * 6] + begin) * stride + token
    for _ in range(begin, min(begin + _I32(TOGETHER), parts[part * 6 + 1])):
        symbols[at] = f16_bits(_F32(round_to_int(coefficients[at] * factor)))
        at += stride
    if begin == 0:
        scales[_I64(part) * stride + token] = block_steps[own]


@kernel(i32p, i32, i64, u8p, f32p, f32p, f32p, f32, i32p, i32p, u8p)
def keep(starts, parts, stride, classes, peaks, factors, errors, bound, columns, kept, verbatim):  # type: ignore[no-untyped-def]
    """Which tokens of a block are coded: a warp a block.

    ``errors`` float32 [2, stride] of K and V; ``bound`` negative: not measured. ``columns`` int32
    [tokens]: from a block's first token on, those kept, ``kept`` int32 [blocks]: how many.
    ``verbatim`` uint8 [tokens]: 1 for the others.
    """
    block = _I32(cuda.blockIdx.x)
    lane = _U32(cuda.threadIdx.x)
    begin, end = starts[block], starts[block + 1]
    count = _I32(0)
    below = (_U32(1) << lane) - _U32(1)
    for first in range(begin, end, _I32(WARP)):
        token = _I32(first) + _I32(lane)
        good = token < end
        if good:
            for part in range(parts):
                at = _I64(part) * stride + token
                klass = _I32(classes[at])
                largest = peaks[at] * factors[block * _I32(16) + klass]
                good &= largest < _F32(0.999 * _MOST_SYMBOL)
            if bound >= 0:
                good &= errors[token] <= bound and errors[stride + token] <= bound
            verbatim[token] = np.uint8(0) if good else np.uint8(1)
        mask = ballot(good)
        if good:
            columns[begin + count + _I32(popc(mask & below))] = token
        count += _I32(popc(mask))
    if lane == 0:
        kept[block] = count


@kernel(i32, i32, i32, i32p, i32p, i32p, i64p, i64)
def lay_out(blocks, tiles, parts, kept, lengths, tasks_of_blocks, places, first):  # type: ignore[no-untyped-def]
    """Where each block's payload goes: int64 [blocks, 2], begin and bytes; one thread.

    ``tasks_of_blocks`` int32 [blocks, tiles]: where a tile's length lies. Payloads begin at
    multiples of 16 from ``first`` on.
    """
    place = first
    for b in range(blocks):
        size = _I64(0)
        if kept[b] > 0:
            size = _I64(8 + 4 * tiles + parts * ((kept[b] + 1) // 2))
            for t in range(tiles):
                size += 2 * _I64(lengths[tasks_of_blocks[b * tiles + t]])
        places[2 * b] = place
        places[2 * b + 1] = size
        place = (place + size + 15) & ~_I64(15)


@kernel(
    i32p,
    i32p,
    i32p,
    i32p,
    f32p,
    i64p,
    i64p,
    i32p,
    i32p,
    i64,
    u8p,
    u16p,
    i32,
    i32,
    i32,
    i64,
    u8p,
    u16p,
)
def assemble(  # type: ignore[no-untyped-def]
    starts,
    kept,
    levels,
    lengths,
    heads,
    places,
    tasks,
    tasks_of_blocks,
    columns,
    stride,
    classes,
    words,
    tiles,
    parts,
    tile_components,
    capacity,
    out,
    out_words,
):
    """Payloads from tiles; blocks of threads [blocks, tiles + 1], the last writes all else."""
    block, tile = _I32(cuda.blockIdx.x), _I32(cuda.blockIdx.y)
    thread = _I32(cuda.threadIdx.x)
    begin, size = places[2 * block], places[2 * block + 1]
    if size == 0 or begin + size > capacity:
        return
    own = tasks_of_blocks[block * tiles + min(tile, tiles - _I32(1))]
    if tile < tiles:
        to = (begin + 8 + 4 * tiles) >> 1
        for t in range(tile):
            to += lengths[tasks_of_blocks[block * tiles + t]]
        length = lengths[own]
        source = tasks[_I64(own) * rans.FIELDS + rans.WORDS] - length
        for i in range(thread, length, _I32(THREADS)):
            out_words[to + i] = words[source + i]
        return
    if thread == 0:
        head = f32_bits(heads[block])
        at = begin >> 1
        out_words[at] = np.uint16(head & _U32(0xFFFF))
        out_words[at + 1] = np.uint16(head >> _U32(16))
        out_words[at + 2] = np.uint16(levels[block] & _I32(0xFF))
        out_words[at + 3] = np.uint16(tile_components)
    for t in range(thread, tiles, _I32(THREADS)):
        bytes_of = _U32(2 * lengths[tasks_of_blocks[block * tiles + t]])
        at = (begin >> 1) + 4 + 2 * t
        out_words[at] = np.uint16(bytes_of & _U32(0xFFFF))
        out_words[at + 1] = np.uint16(bytes_of >> _U32(16))
    n = kept[block]
    halves = (n + _I32(1)) // _I32(2)
    to = begin + size - _I64(parts) * halves
    for i in range(thread, parts * halves, _I32(THREADS)):
        part, j = _I32(i) // halves, _I32(i) % halves
        at = starts[block] + _I32(2) * j
        row = _I64(part) * stride
        pair = _U32(classes[row + columns[at]])
        if _I32(2) * j + _I32(1) < n:
            pair |= _U32(classes[row + columns[at + 1]]) << _U32(4)
        out[to + i] = np.uint8(pair)


@kernel(i32p, i32p, i64p, f64p, f64, f64p)
def record(first_blocks, kept, places, offsets, fixed, states):  # type: ignore[no-untyped-def]
    """Take what blocks took in the end into the streams' states; a thread a stream.

    ``fixed`` bytes of a block besides its payload.
    """
    stream = _I32(cuda.threadIdx.x)
    state = stream * _I32(STATE)
    for b in range(first_blocks[stream], first_blocks[stream + 1]):
        n = _F64(kept[b])
        if n > 0:
            states[state] += n
            states[state + 1] += _F64(places[2 * b + 1]) + fixed
            states[state + 2] += (offsets[b] - states[state + 2]) * n / states[state]
