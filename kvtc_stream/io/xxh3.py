"""XXH3 with 64 bits and a seed: its numbers, and compiled code for the CPU.

For those who are compiled code, or have the bytes in a cache anyway; everybody else calls the
xxhash module, which does the same as quickly. The method is that of the reference implementation by
Y. Collet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types

#: Bytes that are added before the accumulators are mixed.
BLOCK = 1024
#: Inputs of so many bytes have the method for long ones.
LEAST = 241
#: The secret, uint64 [24].
SECRET = np.array(
    [
        0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072,
        0x78E5C0CC4EE679CB, 0x2172FFCC7DD05A82, 0x8E2443F7744608B8, 0x4C263A81E69035E0,
        0xCB00C391BB52283C, 0xA32E531B8B65D088, 0x4EF90DA297486471, 0xD8ACDEA946EF1938,
        0x3F349CE33F76FAA8, 0x1D4F0BC7C7BBDCF9, 0x3159B4CD4BE0518A, 0x647378D9C97E9FC8,
        0xC3EBD33483ACC5EA, 0xEB6313FAFFA081C5, 0x49DAF0B751DD0D17, 0x9E68D429265516D3,
        0xFCA1477D58BE162B, 0xCE31D07AD1B8F88F, 0x280416958F3ACB45, 0x7E404BBBCAFBD7AF,
    ],
    np.uint64,
)  # fmt: skip
#: Primes of 32 and of 64 bits.
PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
LONG_PRIMES = (
    0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)  # fmt: skip
#: What the accumulators begin with, uint64 [8].
INITIAL = np.array([PRIMES[2], *LONG_PRIMES[:4], PRIMES[1], LONG_PRIMES[4], PRIMES[0]], np.uint64)
#: Factors of the last step.
AVALANCHE = 0x165667919E3779F9

_U64 = np.uint64
_LOW, _HALF, _MIX = _U64(0xFFFFFFFF), _U64(32), _U64(47)
_PRIME, _LENGTH, _LAST = _U64(PRIMES[0]), _U64(LONG_PRIMES[0]), _U64(AVALANCHE)
_FOLD = _U64(37)

#: Decorators: of a compiled function, and of one that is a few instructions.
intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic
jit = numba.njit(cache=True, nogil=True, error_model="numpy")


def _load(kind: Any) -> Any:
    """What an intrinsic of an address loads from there; it may be any."""

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = ir.IntType(kind.bitwidth).as_pointer()
        found = builder.load(builder.inttoptr(arguments[0], place))
        found.align = 1
        return found

    return kind(types.int64), generate


@intrinsic
def word_at(_context: Any, address: Any) -> Any:
    """The 8 bytes at an address, as a number."""
    return _load(types.uint64)


@intrinsic
def byte_at(_context: Any, address: Any) -> Any:
    """The byte at an address."""
    return _load(types.uint8)


@jit
def begin(seed, secret, state):  # type: ignore[no-untyped-def]
    """Set uint64 [24] and [8], the secret with a seed and the accumulators, to their beginning."""
    for i in range(12):
        secret[2 * i] = SECRET[2 * i] + seed
        secret[2 * i + 1] = SECRET[2 * i + 1] - seed
    for i in range(8):
        state[i] = INITIAL[i]


@jit
def add_blocks(address, blocks, secret, state):  # type: ignore[no-untyped-def]
    """Add so many blocks of BLOCK bytes that begin at an address."""
    # One by one, so that the compiler keeps them in vectors.
    a_0, a_1, a_2, a_3 = state[0], state[1], state[2], state[3]
    a_4, a_5, a_6, a_7 = state[4], state[5], state[6], state[7]
    for _ in range(blocks):
        for i in range(BLOCK // 64):
            v_0, v_1, v_2, v_3 = (
                word_at(address), word_at(address + 8),
                word_at(address + 16), word_at(address + 24),
            )  # fmt: skip
            v_4, v_5, v_6, v_7 = (
                word_at(address + 32), word_at(address + 40),
                word_at(address + 48), word_at(address + 56),
            )  # fmt: skip
            k_0, k_1, k_2, k_3 = (
                v_0 ^ secret[i], v_1 ^ secret[i + 1], v_2 ^ secret[i + 2], v_3 ^ secret[i + 3],
            )  # fmt: skip
            k_4, k_5, k_6, k_7 = (
                v_4 ^ secret[i + 4], v_5 ^ secret[i + 5], v_6 ^ secret[i + 6], v_7 ^ secret[i + 7],
            )  # fmt: skip
            a_0 += (k_0 & _LOW) * (k_0 >> _HALF) + v_1
            a_1 += (k_1 & _LOW) * (k_1 >> _HALF) + v_0
            a_2 += (k_2 & _LOW) * (k_2 >> _HALF) + v_3
            a_3 += (k_3 & _LOW) * (k_3 >> _HALF) + v_2
            a_4 += (k_4 & _LOW) * (k_4 >> _HALF) + v_5
            a_5 += (k_5 & _LOW) * (k_5 >> _HALF) + v_4
            a_6 += (k_6 & _LOW) * (k_6 >> _HALF) + v_7
            a_7 += (k_7 & _LOW) * (k_7 >> _HALF) + v_6
            address += 64
        a_0, a_1 = _mixed(a_0, secret[16]), _mixed(a_1, secret[17])
        a_2, a_3 = _mixed(a_2, secret[18]), _mixed(a_3, secret[19])
        a_4, a_5 = _mixed(a_4, secret[20]), _mixed(a_5, secret[21])
        a_6, a_7 = _mixed(a_6, secret[22]), _mixed(a_7, secret[23])
    state[0], state[1], state[2], state[3] = a_0, a_1, a_2, a_3
    state[4], state[5], state[6], state[7] = a_4, a_5, a_6, a_7


@jit
def end(address, size, secret, state):  # type: ignore[no-untyped-def]
    """The checksum of ``size`` bytes, at least LEAST, at an address, of which all whole blocks
    before the last byte were added."""
    before = (size - 1) // BLOCK * BLOCK
    for i in range((size - 1 - before) // 64):
        _add(address + before + 64 * i, secret, i, 0, state)
    _add(address + size - 64, secret, 15, 1, state)  # the secret's bytes from 121 on
    return _found(size, secret, state, 0)


@jit
def found_in(states, sizes, seeds):  # type: ignore[no-untyped-def]
    """The checksums, uint64, of inputs of at least LEAST bytes that all were added to their eight
    accumulators, uint64 [8 · inputs]."""
    secret, state = np.empty(24, np.uint64), np.empty(8, np.uint64)
    out = np.empty(len(sizes), np.uint64)
    for i in range(len(sizes)):
        begin(seeds[i], secret, state)
        out[i] = _found(sizes[i], secret, states, 8 * i)
    return out


@jit
def _found(size, secret, state, first):  # type: ignore[no-untyped-def]
    """The checksum of so many bytes, given the accumulators from ``first`` on."""
    found = _U64(size) * _LENGTH
    for i in range(4):
        at = first + 2 * i
        # The secret's bytes from 11 on.
        a = state[at] ^ (secret[2 * i + 1] >> _U64(24) | secret[2 * i + 2] << _U64(40))
        b = state[at + 1] ^ (secret[2 * i + 2] >> _U64(24) | secret[2 * i + 3] << _U64(40))
        found += _folded(a, b)
    found = (found ^ found >> _FOLD) * _LAST
    return found ^ found >> _HALF


@jit
def short(address, size, seed):  # type: ignore[no-untyped-def]
    """The checksum of 17 to 128 bytes at an address."""
    found = _U64(size) * _LENGTH
    for i in range((size - 1) // 32 + 1):
        found += _folded_pair(address + 16 * i, 4 * i, seed)
        found += _folded_pair(address + size - 16 * (i + 1), 4 * i + 2, seed)
    found = (found ^ found >> _FOLD) * _LAST
    return found ^ found >> _HALF


@jit
def _folded_pair(address, first, seed):  # type: ignore[no-untyped-def]
    """16 bytes, with words of the secret."""
    return _folded(
        word_at(address) ^ (SECRET[first] + seed), word_at(address + 8) ^ (SECRET[first + 1] - seed)
    )


@jit
def _folded(a, b):  # type: ignore[no-untyped-def]
    """The halves of the product of 128 bits, one XOR the other."""
    a_0, a_1, b_0, b_1 = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    across = a_1 * b_0
    middle = (a_0 * b_0 >> _HALF) + (across & _LOW) + a_0 * b_1
    return (a_1 * b_1 + (across >> _HALF) + (middle >> _HALF)) ^ (a * b)


@jit
def _mixed(value, key):  # type: ignore[no-untyped-def]
    return (value ^ value >> _MIX ^ key) * _PRIME


@jit
def _add(address, secret, first, byte, state):  # type: ignore[no-untyped-def]
    """Add 64 bytes, with the secret from a word on, and ``byte`` bytes further."""
    shift = _U64(8 * byte)
    for i in range(8):
        value = word_at(address + 8 * i)
        own = secret[first + i]
        if byte:
            own = own >> shift | secret[first + i + 1] << (_U64(64) - shift)
        key = value ^ own
        state[i] += (key & _LOW) * (key >> _HALF)
        state[i ^ 1] += value
