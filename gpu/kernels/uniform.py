"""Uniform bands on the GPU: grids and steps of tokens, sizes, kept tokens, payloads.

Coefficients are float32 [components, stride]: a component's tokens lie side by side. Components are
those of all parts, one part after the other; tokens those of all blocks of a batch. Coefficients
are divided by 2^(b/4) of their base steps b, so that a step is that of a token's class alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvtc_stream.coding import lattice
from kvtc_stream.coding.rans import CLASSES, MIDDLE
from kvtc_stream.gpu.kernels import rans
from kvtc_stream.gpu.kernels.intrinsics import (
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
from kvtc_stream.gpu.runtime.compile import kernel
from kvtc_stream.gpu.runtime.dialect import cuda

THREADS = 256
#: Of blocks whose warps share out what is looked at of a warp of tokens.
CLASSIFY_THREADS = 512
#: Components that :func:`recognise` looks at before a first guess.
GLANCE = 16
#: Added and taken away again, it leaves the nearest integer of binary32 up to 2²².
_ROUNDS = 1.5 * 2**23
#: What a thread of :func:`classify` finds: a peak, features of leading ones, up to 7 energies.
_FOUND = 9 * CLASSIFY_THREADS
#: Offsets at which sizes of a block are measured.
SIZES = 3
#: Components that sizes are measured on, of a part with ``MANY``: one of so many. Neighbours take
#: almost the same bits.
SAMPLED, MANY = 4, 1024
#: Sampled components that a block of threads measures sizes on.
SIZED = 256
#: Components that a thread quantises for a reconstruction.
TOGETHER = 32

#: Symbols of a token that is coded are smaller.
CODED = 0.999 * (1 << 24)

_CLIP_COEFFICIENT, _CLIP_FEATURE, _LEAST_ENERGY = 6.0, 8.0, 1e-6
_I32, _I64, _U32, _F32, _F64 = np.int32, np.int64, np.uint32, np.float32, np.float64


@kernel(f32p, i64, i32, i32p, f32p, f32p, i32p, f32, i64p, f32p, f32p)
def classify(  # type: ignore[no-untyped-def]
    coefficients, stride, tokens, parts, scale, weights, groups, per_class, positions, wishes, peaks
):
    """The exponent that each token should have in each part, and its largest coefficient.

    Blocks of threads [tokens / WARP, parts] of CLASSIFY_THREADS: a warp's lanes are tokens, and a
    token's components are shared out to the warps.

    Parameters
    ----------
    parts
        int32 [parts, 6]: first component, components, those read by the predictor (-1 without
        one), leading ones, groups of energy, where ``weights`` begin.
    scale
        float32 [components]: one over the deviation.
    weights
        float32, a part: constant, then weight, centre and spread of each feature: leading
        coefficients, their magnitudes, energies (see ``kvtc_stream.calibration.importance``).
    groups
        int32 [parts, 8]: borders of the groups.
    per_class
        Classes for a unit of the logarithm of importance.
    positions
        int64 [tokens].
    wishes, peaks
        float32 [parts, stride]; see :class:`kvtc_stream.coding.lattice.TokenGrids`. A peak is not
        finite where a coefficient is not.
    """
    # What each warp finds of each token: largest coefficient, leading features, energies.
    found = cuda.shared.array(_FOUND, f32)
    thread = _I32(cuda.threadIdx.x)
    lane, warp = thread % _I32(WARP), thread // _I32(WARP)
    warps = _I32(CLASSIFY_THREADS // WARP)
    token = _I32(cuda.blockIdx.x) * _I32(WARP) + lane
    part = _I32(cuda.blockIdx.y)
    first, count, read = parts[part * 6], parts[part * 6 + 1], parts[part * 6 + 2]
    leading, number, at = parts[part * 6 + 3], parts[part * 6 + 4], parts[part * 6 + 5]
    features = _I32(2) * leading + number
    column = _I64(first) * stride + min(token, tokens - _I32(1))
    hop = _I64(CLASSIFY_THREADS // WARP) * stride

    peak, total = _F32(0), _F32(0)
    source = column + warp * stride
    for _ in range(warp, count, warps):
        x = abs(coefficients[source])
        peak = max(peak, x if x < _F32(math.inf) else _F32(math.inf))
        source += hop
    for i in range(warp, min(leading, read), warps):
        z = coefficients[column + i * stride] * scale[first + i]
        value = min(max(z, _F32(-_CLIP_COEFFICIENT)), _F32(_CLIP_COEFFICIENT))
        k = at + _I32(1) + _I32(i)
        total += _feature(value, weights, k, features)
        total += _feature(abs(value), weights, k + leading, features)
    found[thread] = peak
    found[_I32(CLASSIFY_THREADS) + thread] = total
    for group in range(number):
        energy = _F32(0)
        begin, end = groups[part * 8 + group], min(groups[part * 8 + group + 1], read)
        for i in range(begin + warp, end, warps):
            z = coefficients[column + i * stride] * scale[first + i]
            energy += z * z
        found[_I32(CLASSIFY_THREADS) * _I32(2 + group) + thread] = energy
    cuda.syncthreads()

    if warp > 0 or token >= tokens:
        return
    for w in range(_I32(1), warps):
        peak = max(peak, found[w * _I32(WARP) + lane])
    turns = _I32(_U32(_U32(positions[token]) * _U32(0x9E3779B9)))  # see lattice.spread
    wish = _F32(_F64(turns) * 2.0**-32)
    if read >= 0:
        total = weights[at]
        for w in range(warps):
            total += found[_I32(CLASSIFY_THREADS + w * WARP) + lane]
        for group in range(number):
            begin, end = groups[part * 8 + group], min(groups[part * 8 + group + 1], read)
            if begin < end:
                energy = _F32(0)
                for w in range(warps):
                    own = _I32(CLASSIFY_THREADS) * _I32(2 + group) + _I32(w * WARP)
                    energy += found[own + lane]
                mean = energy / _F32(end - begin)
                mean = min(max(mean, _F32(_LEAST_ENERGY)), _F32(1 / _LEAST_ENERGY))
                k = at + _I32(1) + _I32(2) * leading + _I32(group)
                total += _feature(_F32(math.log(mean)), weights, k, features)
        total *= per_class
        wish = _F32(0)
        if total == total:  # no NaN
            wish = min(max(total, _F32(-MIDDLE)), _F32(CLASSES - 1 - MIDDLE))
    to = _I64(part) * stride + token
    wishes[to] = _F32(MIDDLE) + wish
    peaks[to] = peak


@kernel(f32p, i64, i32p, i32p, f64, f32p, f32p, i32p)
def recognise(coefficients, stride, starts, parts, unit, wishes, peaks, grids):  # type: ignore[no-untyped-def]
    """The grid that each token lies on already in each part, if any.

    As :func:`kvtc_stream.coding.lattice.recognise`; but where none of WARP neighbours in a block is
    seen to lie on one at a glance, there is no second look. Blocks of threads [tokens of the
    longest block / WARP, parts, blocks] of CLASSIFY_THREADS: a warp's lanes are tokens, and the
    exponents are shared out to the warps.

    Parameters
    ----------
    starts
        int32 [blocks + 1]: first tokens of blocks. What is found in a block shall not depend on
        those beside it.
    parts, wishes, peaks
        As for :func:`classify`.
    unit
        The step of exponent 0.
    grids
        int32 [parts, stride]: become exponents, or ``lattice.NO_GRID``.
    """
    ratios = cuda.shared.array(CLASSIFY_THREADS, f32)
    exponents = cuda.shared.array(CLASSIFY_THREADS, i32)
    thread = _I32(cuda.threadIdx.x)
    lane, warp = thread % _I32(WARP), thread // _I32(WARP)
    begin, end = starts[_I32(cuda.blockIdx.z)], starts[_I32(cuda.blockIdx.z) + _I32(1)]
    begin = _I32(begin + _I32(cuda.blockIdx.x) * _I32(WARP))
    if begin >= end:
        return
    token = begin + lane
    part = _I32(cuda.blockIdx.y)
    count = min(parts[part * 6 + 1], _I32(lattice.LEADING))
    own = min(token, end - _I32(1))
    column = _I64(parts[part * 6]) * stride + own
    row = _I64(part) * stride + own
    wish, peak = wishes[row], _F32(_F64(peaks[row]) / unit)
    best, grid = _F32(math.inf), _I32(lattice.NO_GRID)
    empty = peak <= _F32(lattice.EMPTY) * _F32(math.pow(2.0, _F64(wish) * 0.25))
    if empty:
        grid = _I32(math.floor(wish + _F32(0.5)))
    sound = peak < _F32(1e30) and not empty
    # From the coarsest grid on where the largest coefficient is not 0.
    first, factor = _I32(0), _F32(0)
    if sound:
        first = _I32(math.floor(4.0 * math.log2(2.0 * _F64(peak)))) - warp
        factor = _F32(_quarters(-first) / unit)
        best, grid = _searched(
            coefficients, column, stride, count, factor, first, wish, _I32(GLANCE), _F32(0.5)
        )
    seen = _I32(1) if sound and best < _F32(math.inf) else _I32(0)
    if cuda.syncthreads_or(seen) != 0 and sound:
        best, grid = _searched(
            coefficients,
            column,
            stride,
            count,
            factor,
            first,
            wish,
            _I32(lattice.AT_ONCE),
            _F32(lattice.GIVE_UP),
        )
    ratios[thread] = best
    exponents[thread] = grid
    cuda.syncthreads()
    if warp > 0 or token >= end:
        return
    for w in range(_I32(1), _I32(CLASSIFY_THREADS // WARP)):
        other = w * _I32(WARP) + lane
        ratio, e = ratios[other], exponents[other]
        if ratio < best or (ratio == best and e > grid):
            best, grid = ratio, e
    grids[row] = grid


@kernel(i32, i32, i64, f64, f32p, f32p, i32p, u8p)
def judge(tokens, parts, stride, unit, wishes, peaks, grids, flags):  # type: ignore[no-untyped-def]
    """What the rate control asks first of each token; a thread a token.

    ``unit``, ``wishes``, ``peaks`` and ``grids`` are those of :func:`recognise`. ``flags`` uint8
    [tokens]: 1 if the plan's steps can code it, and 2 more if it lies on a grid in every part too.
    """
    token = _I32(cuda.blockIdx.x) * _I32(cuda.blockDim.x) + _I32(cuda.threadIdx.x)
    if token >= tokens:
        return
    fits, known = True, True
    for part in range(parts):
        row = _I64(part) * stride + _I64(token)
        step = unit * _quarters(_exponent(wishes, grids, row, _F32(0.5)))
        fits &= _F64(peaks[row]) < _F64(CODED) * step
        known &= grids[row] != _I32(lattice.NO_GRID)
    flag = _I32(0)
    if fits:
        flag = _I32(3) if known else _I32(1)
    flags[token] = np.uint8(flag)


@cuda.jit(device=True)
def _searched(coefficients, column, stride, count, factor, e, wish, at_once, give_up):  # type: ignore[no-untyped-def]
    """The least ratio of an accepted grid, and its exponent, among every 16th from ``e`` on down;
    ``factor`` is one over the step of the first."""
    best, grid = _F32(math.inf), _I32(lattice.NO_GRID)
    sweeps = max(count // at_once, _I32(1))
    hop, ahead = sweeps * stride, _I32(7) * sweeps
    for _ in range(_I32(lattice.RANGE // (CLASSIFY_THREADS // WARP))):
        distance, usual = _F32(0), _F32(0)
        begin = _I32(0)
        while begin < sweeps:
            source, i = column + begin * stride, begin
            while i + ahead < count:
                # Several at a time, whose loads do not wait for one another.
                z_0 = coefficients[source] * factor
                z_1 = coefficients[source + hop] * factor
                z_2 = coefficients[source + _I64(2) * hop] * factor
                z_3 = coefficients[source + _I64(3) * hop] * factor
                z_4 = coefficients[source + _I64(4) * hop] * factor
                z_5 = coefficients[source + _I64(5) * hop] * factor
                z_6 = coefficients[source + _I64(6) * hop] * factor
                z_7 = coefficients[source + _I64(7) * hop] * factor
                distance += _squared_distance(z_0)
                distance += _squared_distance(z_1)
                distance += _squared_distance(z_2)
                distance += _squared_distance(z_3)
                distance += _squared_distance(z_4)
                distance += _squared_distance(z_5)
                distance += _squared_distance(z_6)
                distance += _squared_distance(z_7)
                usual += min(z_0 * z_0, _F32(1 / 12))
                usual += min(z_1 * z_1, _F32(1 / 12))
                usual += min(z_2 * z_2, _F32(1 / 12))
                usual += min(z_3 * z_3, _F32(1 / 12))
                usual += min(z_4 * z_4, _F32(1 / 12))
                usual += min(z_5 * z_5, _F32(1 / 12))
                usual += min(z_6 * z_6, _F32(1 / 12))
                usual += min(z_7 * z_7, _F32(1 / 12))
                source += _I64(8) * hop
                i = _I32(i + _I32(8) * sweeps)
            while i < count:
                z = coefficients[source] * factor
                distance += _squared_distance(z)
                usual += min(z * z, _F32(1 / 12))
                source += hop
                i = _I32(i + sweeps)
            begin = _I32(begin + _I32(1))
            if usual > _F32(1 / 12) and distance > give_up * usual:
                break
        if distance < best * usual and _accepted(distance, usual, _F32(e) - wish):
            best = distance / usual
            grid = e
        e = _I32(e - _I32(CLASSIFY_THREADS // WARP))
        factor *= _F32(2.0 ** (CLASSIFY_THREADS // WARP / 4))
    return best, grid


@cuda.jit(device=True)
def _squared_distance(z):  # type: ignore[no-untyped-def]
    """From the nearest integer: quicker than by conversions, and exact so far."""
    r = z - ((z + _F32(_ROUNDS)) - _F32(_ROUNDS))
    return r * r


@cuda.jit(device=True)
def _accepted(distance, usual, coarser):  # type: ignore[no-untyped-def]
    """See :func:`kvtc_stream.coding.lattice.accepted`."""
    distance = max(distance, _F32(1e-12) * usual)
    if not distance <= _F32(lattice.MOST_RATIO) * usual:
        return False
    part = distance / usual
    likelier = _F32(math.log(usual / distance))
    evidence = _F32(6) * usual * likelier
    if evidence < _F32(lattice.LEAST_EVIDENCE) + _F32(lattice.PER_SQUARE) * part * part:
        return False
    if coarser < _F32(0):
        away = _F32(1) - part
        chance = max(likelier - _F32(lattice.UNIFORM), _F32(1.25) * away * away)
        least = min(_F32(lattice.BY_CHANCE), _F32(-lattice.BY_STEP) * coarser)
        if coarser < _F32(-lattice.FINEST):
            least = _F32(2 * lattice.BY_CHANCE)
        return _F32(6) * usual * chance >= least
    finer = likelier - _F32(lattice.LOG_LOSS) < coarser * _F32(lattice.LOG_HALF_OCTAVE)
    return not finer or evidence >= _F32(lattice.CERTAIN)


@cuda.jit(device=True)
def _feature(value, weights, k, features):  # type: ignore[no-untyped-def]
    """What a feature adds to the logarithm of importance."""
    value = (value - weights[k + features]) / weights[k + _I32(2) * features]
    return weights[k] * min(max(value, _F32(-_CLIP_FEATURE)), _F32(_CLIP_FEATURE))


@cuda.jit(device=True)
def _cost(x, factor, family, table):  # type: ignore[no-untyped-def]
    # Not min(): numba-cuda-mlir compares unsigned numbers as if they were signed there.
    place = _U32(round_to_int(x * factor) + _I32(127))
    place = place if place < _U32(255) else _U32(255)
    return table[(_U32(family) << _U32(8)) + place]


@kernel(f32p, i64, i32p, u8p, i32, u8p, f32p, f32p, i32p, f32p, i32p, f32p, i32p)
def sizes(  # type: ignore[no-untyped-def]
    coefficients,
    stride,
    parts,
    ids,
    components,
    classes,
    peaks,
    factors,
    indices,
    bits,
    families,
    out,
    starts,
):
    """Bits of a block's tokens in a part at each offset; blocks of threads [blocks, parts, chunks],
    see :func:`chunks`.

    Tokens that will be verbatim, see :func:`keep`, take none. ``classes``, ``factors`` and
    ``indices`` are those of :func:`settle` for SIZES offsets. ``bits`` float32
    [families, 256]; ``out`` float32 [blocks, parts, chunks, SIZES];
    ``starts`` int32 [blocks + 1]: first tokens.
    """
    table = cuda.shared.array(0, f32)
    block, part = _I32(cuda.blockIdx.x), _I32(cuda.blockIdx.y)
    chunk, thread = _I32(cuda.blockIdx.z), _I32(cuda.threadIdx.x)
    to = (block * _I32(cuda.gridDim.y) + part) * _I32(cuda.gridDim.z) + chunk
    first, count = parts[part * 6], parts[part * 6 + 1]
    every = _I32(SAMPLED) if count >= _I32(MANY) else _I32(1)
    taken = (count + every - _I32(1)) // every
    sized = min(taken, chunk * _I32(SIZED) + _I32(SIZED))
    if sized <= chunk * _I32(SIZED):
        if thread < _I32(SIZES):
            out[to * _I32(SIZES) + thread] = _F32(0)
        return
    first_family = _U32(families[part])
    size = (_U32(families[part + 1]) - first_family) << _U32(8)
    for i in range(_U32(thread), size, _U32(THREADS)):
        table[_U32(i)] = bits[(first_family << _U32(8)) + _U32(i)]
    cuda.syncthreads()
    begin, end = starts[block], starts[block + 1]
    # A warp's lanes are tokens of one component.
    across = min((end - begin + _I32(WARP - 1)) & ~_I32(WARP - 1), _I32(THREADS))
    together = _I32(THREADS) // across
    sum_0, sum_1, sum_2 = _F32(0), _F32(0), _F32(0)
    at = block * _I32(SIZES)
    level_0 = _I64(indices[at]) * components * 16
    level_1 = _I64(indices[at + 1]) * components * 16
    level_2 = _I64(indices[at + 2]) * components * 16
    plane = _I64(cuda.gridDim.y) * stride
    if thread < together * across:
        for t in range(begin + thread % across, end, across):
            row = _I64(part) * stride + t
            class_0 = _I32(classes[row])
            class_1 = _I32(classes[row + plane])
            class_2 = _I32(classes[row + 2 * plane])
            f_0 = factors[at * _I32(16) + class_0]
            f_1 = factors[at * _I32(16) + _I32(16) + class_1]
            f_2 = factors[at * _I32(16) + _I32(32) + class_2]
            if not peaks[row] * f_1 < _F32(CODED):
                continue  # see keep
            for i in range(chunk * _I32(SIZED) + thread // across, sized, together):
                c = first + min(_I32(i) * every + every // _I32(2), count - _I32(1))
                x = coefficients[_I64(c) * stride + t]
                own = c * _I32(16)
                sum_0 += _cost(x, f_0, ids[level_0 + (own + class_0)], table)
                sum_1 += _cost(x, f_1, ids[level_1 + (own + class_1)], table)
                sum_2 += _cost(x, f_2, ids[level_2 + (own + class_2)], table)
    for by in (16, 8, 4, 2, 1):
        sum_0 += shuffle_down(sum_0, _I32(by))
        sum_1 += shuffle_down(sum_1, _I32(by))
        sum_2 += shuffle_down(sum_2, _I32(by))
    cuda.syncthreads()
    if thread % _I32(WARP) == 0:
        own_sums = _U32(thread // _I32(WARP)) * _U32(SIZES)
        table[own_sums] = sum_0
        table[own_sums + _U32(1)] = sum_1
        table[own_sums + _U32(2)] = sum_2
    cuda.syncthreads()
    if thread < _I32(SIZES):
        total = _F32(0)
        for i in range(THREADS // WARP):
            total += table[_U32(i * SIZES + thread)]
        out[to * _I32(SIZES) + thread] = total * (_F32(count) / _F32(taken))


def chunks(coded: Sequence[int]) -> int:
    """Blocks of threads that sizes of each part are measured by, of so many components each."""
    taken = (-(-count // SAMPLED) if count >= MANY else count for count in coded)
    return max([1, *(-(-count // SIZED) for count in taken)])


@kernel(
    i32p, i32, i64, f32p, i32p, f64p, f64, i32, i32, u8p, f32p, f32p, i32p, i32p, f32p
)  # fmt: skip
def settle(  # type: ignore[no-untyped-def]
    starts,
    parts,
    stride,
    wishes,
    grids,
    offsets,
    unit,
    lowest,
    highest,
    classes,
    block_steps,
    factors,
    levels,
    indices,
    heads,
):
    """Levels of blocks, classes of their tokens, and what their steps are, at some offsets.

    As :func:`kvtc_stream.coding.lattice.settle`. Blocks of threads [blocks, offsets].

    Parameters
    ----------
    starts
        int32 [blocks + 1]: first tokens.
    wishes, grids
        Of :func:`classify` and :func:`recognise`.
    offsets
        float64 [blocks, offsets]: to the plan's step, in quarter octaves.
    unit
        The step of exponent 0.
    lowest, highest
        Of the levels that have families.
    classes
        uint8 [offsets, parts, stride].
    block_steps, factors
        float32 [blocks, offsets, 16]: the steps of classes, and one over them.
    levels, heads
        int32, float32 [blocks, offsets]: what payloads say.
    indices
        int32 [blocks, offsets]: levels, counted from ``lowest`` to ``highest``.
    """
    bounds = cuda.shared.array(2, i32)
    block, thread = _I32(cuda.blockIdx.x), _I32(cuda.threadIdx.x)
    begin, end = starts[block], starts[block + 1]
    at = block * _I32(cuda.gridDim.y) + _I32(cuda.blockIdx.y)
    rounded = _F32(offsets[at] + 0.5)
    level = _I32(math.floor(offsets[at] + 0.5))
    if thread == 0:
        bounds[0], bounds[1] = _I32(1 << 30), _I32(-(1 << 30))
    cuda.syncthreads()
    for part in range(parts):
        for t in range(begin + thread, end, _I32(THREADS)):
            e = _exponent(wishes, grids, _I64(part) * stride + t, rounded)
            cuda.atomic.min(bounds, 0, e)
            cuda.atomic.max(bounds, 1, e)
    cuda.syncthreads()
    level = max(level, bounds[1] - _I32(CLASSES - 1))
    level = min(min(level, bounds[0]), _I32(lattice.HIGHEST_LEVEL))
    step = _F32(unit * _quarters(level))
    for part in range(parts):
        for t in range(begin + thread, end, _I32(THREADS)):
            row = _I64(part) * stride + t
            klass = _exponent(wishes, grids, row, rounded) - level
            over = max((klass - _I32(CLASSES - 1) + _I32(3)) // _I32(4), _I32(0))
            to = (_I64(cuda.blockIdx.y) * parts) * stride + row
            classes[to] = np.uint8(klass - _I32(4) * over)
    if thread < _I32(CLASSES):
        delta = _F32(_F64(step) * _quarters(thread))
        factors[at * _I32(CLASSES) + thread] = _F32(1) / delta
        block_steps[at * _I32(CLASSES) + thread] = delta
    if thread == 0:
        heads[at] = step
        levels[at] = level
        indices[at] = min(max(level, lowest), highest) - lowest


@cuda.jit(device=True)
def _exponent(wishes, grids, row, offset):  # type: ignore[no-untyped-def]
    """See :meth:`kvtc_stream.coding.lattice.TokenGrids.exponents`."""
    grid = grids[row]
    if grid == _I32(lattice.NO_GRID):
        grid = _I32(math.floor(wishes[row] + offset))
    return grid


@cuda.jit(device=True)
def _quarters(exponent):  # type: ignore[no-untyped-def]
    """2^(exponent / 4), binary64."""
    quarter = exponent & _I32(3)
    power = 1.0
    if quarter == 1:
        power = 1.189207115002721
    elif quarter == 2:
        power = 1.4142135623730951
    elif quarter == 3:
        power = 1.681792830507429
    return math.ldexp(power, int(exponent >> _I32(2)))


@kernel(f32p, i64, i32, i32p, i32p, u8p, f32p, f32p, f32p, u16p, f32p)
def quantise(  # type: ignore[no-untyped-def]
    coefficients,
    stride,
    tokens,
    parts,
    blocks,
    classes,
    factors,
    block_steps,
    down,
    symbols,
    scales,
):
    """What :func:`kvtc_stream.gpu.kernels.rans.decode` gives: symbols times ``down``, and steps.

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
    for i in range(begin, min(begin + _I32(TOGETHER), parts[part * 6 + 1])):
        value = _F32(round_to_int(coefficients[at] * factor))
        symbols[at] = f16_bits(value * down[parts[part * 6] + _I32(i)])
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
                good &= largest < _F32(CODED)
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
