"""Files that grow by a line at a time and survive a process that is killed while it writes."""

from __future__ import annotations

import os


def append(number: int, line: bytes) -> None:
    """One write at the end of an open file; a torn line there is ended before it.

    On the disk when this returns. Raises OSError, also where the disk is full.
    """
    size = os.fstat(number).st_size
    if size and os.pread(number, 1, size - 1) != b"\n":
        line = b"\n" + line
    if os.write(number, line) != len(line):
        raise OSError("the disk is full")
    os.fsync(number)
