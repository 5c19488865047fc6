"""Many bytes at a time: what the compiled loops see of a text as bits and numbers, the first byte the lowest.

A block is 64 bytes, named by its address; which of its bytes are letters, newlines ... is a number of 64 bits, so that
one step finds, counts or passes over all of them. LLVM makes of it what the processor has.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

ONES, HIGHS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
"""The lowest and the highest bit of eight bytes."""
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
TAIL_BYTES = 96
"""Of the scratch space for a block beyond the end of the data: 32 bytes may be read from each of its 64 on."""


@functools.cache
def digest_of_loops(sources: Path) -> str:
    """Of the texts of all files of compiled loops in a folder: any of them may be compiled into a loop of another."""
    texts = [path.read_bytes() for path in sorted(sources.glob("*.py"))]
    return hashlib.sha256(
        b"\0".join(text for text in texts if b"blocks import" in text or b"@inlined" in text)
    ).hexdigest()


def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the loop compiled at its first call, for other processes as well: numba keeps it beside its source, or in
    NUMBA_CACHE_DIR, or, where neither can be written to, among the user's caches.

    numba looks at the one file that a loop stands in, and would go on with what an older version of another file was
    compiled into. So what is kept bears the digest of all of them; that of another version is compiled anew and written
    over.
    """
    found = numba.njit(cache=True, nogil=True, no_cfunc_wrapper=True)(loop)
    if found is not loop:  # as it is with NUMBA_DISABLE_JIT
        kept = found._cache._cache_file
        kept._source_stamp = kept._source_stamp, digest_of_loops(Path(loop.__code__.co_filename).parent)
    return found


inlined = numba.njit(nogil=True, _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For what compiled loops call: of a function that is read from the cache only machine code is there, and the compiler
can make nothing better of it where it is called. So these are not cached, but compiled into each of their callers.

Arrays are only lent to them: they make none and return none. numba's runtime, which would count at every call who holds
each array, is left out (an atomic step each time: a twentieth of the time of a whole chain). So is what Python would
call them by, which took a quarter of the time to compile: a call from Python, without it, ends the process.
"""


def _place(context, builder, signature, arguments):
    """Where data[at] lies, as a pointer to eight bytes."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(64).as_pointer())


@intrinsic
def load64(typing, data, at):
    """data[at:at + 8] of contiguous bytes as one number, the first byte its lowest; the caller sees to the bounds."""

    def generate(context, builder, signature, arguments):
        return builder.load(_place(context, builder, signature, arguments), align=1)

    return numba.types.uint64(data, numba.types.int64), generate


@intrinsic
def store64(typing, data, at, value):
    """Makes data[at:at + 8] the bytes of a number, the lowest first; the caller sees to the bounds."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _place(context, builder, signature, arguments), align=1)
        return context.get_dummy_value()

    return numba.types.void(data, numba.types.int64, numba.types.uint64), generate


@intrinsic
def trailing_zeros(typing, value):
    """The number of zeros below the lowest one of a 64-bit number; 64 of 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(0))

    return numba.types.int64(numba.types.uint64), generate


@intrinsic
def num_ones(typing, value):
    """The number of ones in a 64-bit number."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return numba.types.int64(numba.types.uint64), generate


@intrinsic
def folded_product(typing, one, other):
    """Both halves of the 128-bit product of two 64-bit numbers, the upper one xor the lower one."""

    def generate(context, builder, signature, arguments):
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(value, wide) for value in arguments))
        low = builder.trunc(product, ir.IntType(64))
        return builder.xor(low, builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64)))

    return numba.types.uint64(numba.types.uint64, numba.types.uint64), generate


@intrinsic
def address_of(typing, data, at):
    """The address of data[at] of contiguous bytes, which the caller keeps alive."""

    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(_place(context, builder, signature, arguments), ir.IntType(64))

    return numba.types.int64(data, numba.types.int64), generate


@intrinsic
def eight_at(typing, address):
    """The eight bytes at an address as one number, the first byte its lowest."""

    def generate(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()), align=1)

    return numba.types.uint64(numba.types.int64), generate


@intrinsic
def between(typing, address, low, high):
    """Which of the 64 bytes at an address are from low to high: a bit each."""

    def generate(context, builder, signature, arguments):
        byte, bits = ir.IntType(8), ir.VectorType(ir.IntType(8), 64)
        spread = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)

        def everywhere(value):
            one = builder.insert_element(ir.Constant(bits, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(one, ir.Constant(bits, ir.Undefined), spread)

        place = builder.inttoptr(arguments[0], bits.as_pointer())
        low, high = (builder.trunc(value, byte) for value in arguments[1:])
        above = builder.sub(builder.load(place, align=1), everywhere(low))
        inside = builder.icmp_unsigned("<=", above, everywhere(builder.sub(high, low)))
        return builder.bitcast(inside, ir.IntType(64))

    integer = numba.types.int64
    return numba.types.uint64(integer, integer, integer), generate


@inlined
def block_at(data, at, tail):
    """The address of the 64 bytes from data[at] on; beyond the end of the data there are zeros.

    tail: scratch space of TAIL_BYTES, which the caller keeps as long as it uses the address.
    """
    rest = data.shape[0] - at
    if rest >= TAIL_BYTES:
        return address_of(data, at)
    for i in range(TAIL_BYTES):
        tail[i] = data[at + i] if i < rest else 0
    return address_of(tail, 0)


@inlined
def put_piece(out, filled, address, size):
    """Copies so many bytes, 64 at most, to where `out` is filled, and up to 32 behind them that are to be written over:
    what is copied in steps of 32 is most often copied in one, which the processor foresees.
    """
    for i in range(0, 32, 8):
        store64(out, filled + i, eight_at(address + i))
    if size > 32:
        for i in range(32, 64, 8):
            store64(out, filled + i, eight_at(address + i))


@inlined
def put_point(out, filled, point):
    """Number of bytes filled in after the UTF-8 of a code point."""
    if point < 0x80:
        out[filled] = point
        return filled + 1
    if point < 0x800:
        out[filled] = 0xC0 | point >> 6
        out[filled + 1] = 0x80 | point & 0x3F
        return filled + 2
    if point < 0x10000:
        out[filled] = 0xE0 | point >> 12
        out[filled + 1] = 0x80 | point >> 6 & 0x3F
        out[filled + 2] = 0x80 | point & 0x3F
        return filled + 3
    out[filled] = 0xF0 | point >> 18
    out[filled + 1] = 0x80 | point >> 12 & 0x3F
    out[filled + 2] = 0x80 | point >> 6 & 0x3F
    out[filled + 3] = 0x80 | point & 0x3F
    return filled + 4


@inlined
def lowest(count):
    """The lowest `count` bits, at most 64, set."""
    return ALL >> np.uint64(64 - count) if count > 0 else np.uint64(0)
