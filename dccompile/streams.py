"""Constants too large to be held: made piece by piece while the params file is written.

TVM sees a placeholder of the size, memory that nothing ever touches; `Streams` knows by it what
belongs there.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_MADV_NORESERVE = 0x4000  # MAP_NORESERVE of <sys/mman.h>: no memory is promised for it


@dataclass(frozen=True)
class Stream:
    """uint8[nbytes], as `pieces` gives it in order; equal `key` means equal bytes."""

    nbytes: int
    key: bytes
    pieces: Callable[[], Iterator[np.ndarray]]

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.nbytes,)

    def chunks(self) -> Iterator[memoryview]:
        """The bytes. Raises ValueError where they are not as many as promised."""
        done = 0
        for piece in self.pieces():
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            done += flat.nbytes
            yield flat.data
        if done != self.nbytes:
            raise ValueError(f"a stream of {self.nbytes} bytes gave {done}")


class Streams:
    """The placeholders of one module and what they stand for."""

    def __init__(self) -> None:
        self._known: dict[int, Stream] = {}
        self._held: list[Any] = []

    def constant(self, stream: Stream) -> Any:
        """A Relax constant of the stream's shape."""
        import tvm
        from tvm import relax

        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MADV_NORESERVE
        memory = np.frombuffer(mmap.mmap(-1, stream.nbytes, flags=flags), np.uint8)
        tensor = tvm.runtime.from_dlpack(memory)
        self._known[memory.ctypes.data] = stream
        self._held.append(memory)
        return relax.const(tensor)

    def find(self, tensor: Any) -> Stream | None:
        """What a constant of the module stands for, None for one that is what it is."""
        return self._known.get(tensor.data_ptr()) if self._known else None
