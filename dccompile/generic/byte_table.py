"""Look-ups of bytes in tables of 256, a vector of codes at a time.

A code has 8 bits, so that a table is 4 registers of 512 bits, or 16 rows of 16 bytes. Measured on
zen4, a thread, 64 KB: 0.044 ns a byte with AVX-512, 0.13 ns with AVX2. Loads lane by lane take
0.27 ns, a sigmoid between the conversions in float 0.5 and 1.4 ns.

AVX-512 16 operations on 64 bytes. Pairs of bytes are permuted as words, vpermi2w picks one of 64
        by 6 bits: words k = code / 2 of both halves of the table, the code's top bit chooses
        between these, its last bit between the bytes of the word. Even and odd codes take turns.
AVX2    47 operations on 32 bytes. vpshufb picks one byte of 16 by the low 4 bits and gives 0 where
        the top bit is set. Code - 16 * k, saturated, has it set for rows after the code's own. With
        rows that hold the difference (xor) from the row before, the xor of all is the entry.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .fastmath import lanes

_NAME = "dcc.look_up"
_SIZE = 256

Bind = Callable[[Any], Any]


def entry(load: Any) -> Any:
    """The look-up that a load is, as a call (code, table); None if it is another load.

    It is one where 256 bytes are indexed by a u8 value, which cannot lead outside of them.
    """
    kind = load.ty.dtype
    shape = load.source.ty.shape
    if len(shape) != 1 or kind.bits != 8 or kind.startswith("bool"):
        return None
    if not isinstance(shape[0], tirx.IntImm) or int(shape[0].value) != _SIZE:
        return None
    (index,) = load.indices
    while isinstance(index, tirx.Cast):
        index = index.value
        if str(index.ty) == "uint8":
            return tirx.call_pure_extern(str(kind), _NAME, index, load.source)
    return None


def operands(call: Any) -> tuple[Any, Any] | None:
    """Code and table of a look-up; None of another call."""
    args = list(call.args)
    name = args[0].value if args and type(args[0]).__name__ == "StringImm" else ""
    return (args[1], args[2]) if name == _NAME else None


def look_up(table: Any, codes: Any, width: int, bind: Bind) -> Any:
    """table[codes] of u8 codes on any number of lanes; vectors have `width` bits."""
    n = lanes(codes)
    dtype = str(table.ty.dtype)
    if n == 1:
        return table[tirx.Cast("int64", codes)]
    step = width // 8
    block = _words if width == 512 else _rows
    parts = []
    for start in range(0, n, step):
        lane = [min(start + i, n - 1) for i in range(step)]  # the last one fills what is left
        whole = codes if n == step else tirx.Shuffle([codes] * -(-step // n), lane)
        parts.append(_bits(block(table, bind(whole), bind), f"{dtype}x{step}"))
    if n == step:
        return parts[0]
    return bind(tirx.Shuffle([bind(p) for p in parts], list(range(n))))


def _bits(value: Any, dtype: str) -> Any:
    """The bits of a vector as another type, also of other lanes."""
    return tirx.reinterpret(dtype, value)


def _words(table: Any, codes: Any, bind: Bind) -> Any:
    """64 codes by permutations of words, AVX-512BW."""
    kind = "uint16x32"
    rows = [bind(_bits(table[T.ramp(64 * i, 1, 64)], kind)) for i in range(4)]
    pair = bind(_bits(codes, kind))

    def number(value: int) -> Any:
        return tirx.Broadcast(tirx.const(value, "uint16"), 32)

    def chosen(shift: int) -> Any:
        """The words that hold the entries of the codes at this bit of every pair."""
        index = bind(pair >> number(shift + 1))
        low, high = (
            bind(tirx.call_llvm_pure_intrin(kind, _PERMUTE, rows[i], index, rows[i + 1]))
            for i in (0, 2)
        )
        top = (pair & number(0x80 << shift)) != number(0)
        return bind(tirx.Select(top, high, low))

    even, odd = chosen(0), chosen(8)
    even = tirx.Select((pair & number(1)) != number(0), even >> number(8), even)
    odd = tirx.Select((pair & number(0x100)) != number(0), odd, odd << number(8))
    return bind((bind(even) & number(0xFF)) | (bind(odd) & number(0xFF00)))


_PERMUTE = "llvm.x86.avx512.vpermi2var.hi.512"


def _rows(table: Any, codes: Any, bind: Bind) -> Any:
    """32 codes by 16 shuffles, AVX2."""
    both = [*range(16)] * 2
    rows = [bind(_bits(table[T.ramp(16 * i, 1, 16)], "int8x16")) for i in range(16)]
    changes = [rows[0], *(bind(a ^ b) for a, b in pairwise(rows))]

    def number(value: int) -> Any:
        return tirx.Broadcast(tirx.const(value, "int8"), 32)

    signed = bind(_bits(codes, "int8x32"))
    total: Any = None
    # Codes from 128 on are negative in the first half, those below in the second: all zeros there.
    for half in (0, 8):
        at = bind(signed ^ number(-128)) if half else signed
        for i in range(half, half + 8):
            row = changes[i] if i != 8 else rows[8]
            wide = tirx.Shuffle([row, row], both)
            found = bind(tirx.call_llvm_pure_intrin("int8x32", _SHUFFLE, wide, at))
            total = found if total is None else bind(total ^ found)
            if i % 8 < 7:
                at = bind(tirx.call_llvm_pure_intrin("int8x32", _MINUS, at, number(16)))
    return total


_SHUFFLE, _MINUS = "llvm.x86.avx2.pshuf.b", "llvm.ssub.sat"
