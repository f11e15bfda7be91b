"""Calls of a compiled function with sets of arguments in turns, timed by a loop outside Python.

In a model every layer reads its own weights, which the layers before it have pushed out of the
cache of the core. A kernel that is called over and over with the same W finds it there: calls
take copies in turns instead. A loop in Python would add two microseconds to each.

The clock is that of the thread's own time: what other processes take of the core does not count.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import linker
from ..runtime import ffi

# int64 dcc_turns(call, function, sets, number of sets, arguments, first set, calls): nanoseconds
# of the calls, after one untimed call; -1 where one fails. A set is `arguments` TVMFFIAny of 16
# bytes; `call` is TVMFFIFunctionCall.
_SOURCE = r"""
target triple = "x86_64-unknown-linux-gnu"

%any = type { i32, i32, i64 }
%time = type { i64, i64 }

declare i32 @clock_gettime(i32, ptr)

define internal i64 @now() {
  %place = alloca %time
  %r = call i32 @clock_gettime(i32 3, ptr %place)  ; CLOCK_THREAD_CPUTIME_ID
  %s = load i64, ptr %place
  %field = getelementptr %time, ptr %place, i64 0, i32 1
  %ns = load i64, ptr %field
  %whole = mul i64 %s, 1000000000
  %sum = add i64 %whole, %ns
  ret i64 %sum
}

define i64 @dcc_turns(ptr %call, ptr %function, ptr %sets, i64 %count, i32 %args, i64 %first,
                      i64 %calls) {
entry:
  %result = alloca %any
  %wide = zext i32 %args to i64
  br label %next
next:
  %done = phi i64 [ -1, %entry ], [ %after, %again ]
  %turn = phi i64 [ %first, %entry ], [ %follow, %again ]
  %start = phi i64 [ 0, %entry ], [ %since, %again ]
  %offset = mul i64 %turn, %wide
  %set = getelementptr %any, ptr %sets, i64 %offset
  store %any zeroinitializer, ptr %result
  %status = call i32 %call(ptr %function, ptr %set, i32 %args, ptr %result)
  %good = icmp eq i32 %status, 0
  br i1 %good, label %step, label %failed
step:
  %after = add i64 %done, 1
  %up = add i64 %turn, 1
  %over = icmp uge i64 %up, %count
  %follow = select i1 %over, i64 0, i64 %up
  %warm = icmp eq i64 %after, 0
  br i1 %warm, label %begin, label %more
begin:
  %begun = call i64 @now()
  br label %more
more:
  %since = phi i64 [ %begun, %begin ], [ %start, %step ]
  %left = icmp slt i64 %after, %calls
  br i1 %left, label %again, label %end
again:
  br label %next
end:
  %last = call i64 @now()
  %spent = sub i64 %last, %since
  ret i64 %spent
failed:
  ret i64 -1
}
"""

_TENSOR = 70  # kTVMFFITensor


@lru_cache(maxsize=1)
def _loop() -> tuple[Any, int]:
    """The loop, and the address of TVMFFIFunctionCall."""
    import tvm  # noqa: F401 (registers the loader of LLVM's language)
    import tvm_ffi

    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        source, code = Path(folder) / "turns.ll", Path(folder) / "turns.o"
        library = Path(folder) / "turns.so"
        source.write_text(_SOURCE)
        tvm_ffi.load_module(source).write_to_file(str(code), "o")
        linker.link([code], library)
        loop = ctypes.CDLL(str(library)).dcc_turns
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    loop.argtypes = [pointer, pointer, pointer, long, ctypes.c_int32, long, long]
    loop.restype = long
    call = ctypes.cast(ctypes.CDLL(None).TVMFFIFunctionCall, pointer).value
    assert call is not None
    return loop, call


def prepare() -> None:
    """Builds the loop, which processes forked later then have."""
    ffi.import_tvm_ffi()
    _loop()


class Turns:
    """A function and its sets of arguments, tensors all of them.

    `places` are copies of the function, whose speed differs by a percent with where they lie.
    """

    def __init__(self, places: Sequence[Any], sets: Sequence[tuple[Any, ...]]) -> None:
        self._places, self._sets = places, sets
        self._table = np.zeros((len(sets), len(sets[0]), 2), np.int64)
        self._table[:, :, 0] = _TENSOR
        self._table[:, :, 1] = [[tensor.__chandle__() for tensor in s] for s in sets]
        self._next = 0

    def run(self, calls: int, place: int = 0) -> int:
        """Nanoseconds for so many calls, each with the next set; one more comes before them."""
        loop, call = _loop()
        count, arguments, _ = self._table.shape
        function = self._places[place % len(self._places)]
        handle, table = function.__chandle__(), self._table.ctypes.data
        spent: int = loop(call, handle, table, count, arguments, self._next, calls)
        self._next = (self._next + calls + 1) % count
        if spent < 0:
            function(*self._sets[0])  # raises what the call did
            raise RuntimeError("a timed call failed")
        return spent
