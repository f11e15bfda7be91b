"""Constants too large to be held: made piece by piece while the params file is written.

TVM sees a placeholder of the size, memory that nothing ever touches; `Streams` knows by it what
belongs there.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from .runtime.params import Stream

_MADV_NORESERVE = 0x4000  # MAP_NORESERVE of <sys/mman.h>: no memory is promised for it


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
