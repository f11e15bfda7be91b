"""Every byte of a ``.dcm`` file that is not an entry's data.

The file is a zip whose entries are stored, not compressed, and page-aligned, so that they can be
mapped. Names, sizes and checksums of the entries determine all these bytes: the reader rebuilds
them and compares. Sizes and offsets are always zip64: one layout, for 1 MB as for 100 GB.
"""

from __future__ import annotations

import re
import stat
import struct
from dataclasses import dataclass

from .manifest import FORMAT

PAGE = 4096
MANIFEST = "manifest.json"
COMMENT = b"dccompile %d sha256 %s"
NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*(/[A-Za-z0-9_+-][A-Za-z0-9._+-]*)*", re.ASCII)

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
END = struct.Struct("<4s4H2LH")
_BIG = 0xFFFFFFFF  # "look in the zip64 record"
_VERSION, _UTF8, _DATE = 45, 0x800, 0x21  # zip64; names are UTF-8; 1980-01-01
_MODE = (stat.S_IFREG | 0o644) << 16


@dataclass(frozen=True)
class Entry:
    """One file inside an artifact: `offset` and `size` in bytes, `crc` as zip counts it."""

    name: str
    offset: int
    size: int
    crc: int


def local_header(name: str, at: int, size: int, crc: int) -> bytes:
    """The header in front of an entry, long enough that the entry's data begins on a page."""
    raw = name.encode()
    zip64 = struct.pack("<2H2Q", 1, 16, size, size)
    gap = -(at + LOCAL.size + len(raw) + len(zip64) + 6) % PAGE
    padding = struct.pack("<3H", 0xD935, 2 + gap, PAGE) + bytes(gap)  # zipalign's extra field
    extra = zip64 + padding
    head = LOCAL.pack(
        b"PK\x03\x04", _VERSION, _UTF8, 0, 0, _DATE, crc, _BIG, _BIG, len(raw), len(extra)
    )
    return head + raw + extra


def directory(entries: list[Entry], at: int, digest: str) -> bytes:
    """Everything after the last entry's data, which ends at `at`."""
    rows = []
    start = 0
    for e in entries:
        raw = e.name.encode()
        extra = struct.pack("<2H3Q", 1, 24, e.size, e.size, start)
        rows.append(
            CENTRAL.pack(
                b"PK\x01\x02", 3 << 8 | _VERSION, _VERSION, _UTF8, 0, 0, _DATE, e.crc, _BIG, _BIG,
                len(raw), len(extra), 0, 0, 0, _MODE, _BIG,
            )
            + raw
            + extra
        )  # fmt: skip
        start = e.offset + e.size
    table = b"".join(rows)
    count = len(entries)
    after = at + len(table)
    comment = COMMENT % (FORMAT, digest.encode())
    return b"".join(
        (
            table,
            END64.pack(b"PK\x06\x06", 44, _VERSION, _VERSION, 0, 0, count, count, len(table), at),
            LOCATOR.pack(b"PK\x06\x07", 0, after, 1),
            END.pack(b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _BIG, _BIG, len(comment)),
            comment,
        )
    )
