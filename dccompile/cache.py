"""Compiled functions on disk, shared by all models and processes of a user.

An entry is one file named by its key, the SHA-256 of everything its bytes depend on. It begins
with the SHA-256 of key and data, so that a damaged or renamed file is taken for absent. Files are
written under another name and renamed; what cannot be read or written is as if it were not there.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "DCCOMPILE_CACHE_DIR"
LIMIT = 1 << 30  # bytes of all entries; the least recently used go first
_SUFFIX = ".object"
_ENTRY = re.compile(r"[0-9a-f]{64}" + re.escape(_SUFFIX))
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.\w+")  # being written, or left by a process that died
_STALE = 3600.0  # seconds after which nobody writes it any more


def folder() -> Path | None:
    """Where entries lie: DCCOMPILE_CACHE_DIR, else below XDG_CACHE_HOME or ~/.cache.

    None where the variable is empty or ``off``, or there is no home.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        given = given.strip()
        return None if given in ("", "off") else Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification ignores others
        base = os.path.expanduser("~/.cache")
    return Path(base) / "dccompile" if os.path.isabs(base) else None


@dataclass(frozen=True)
class Usage:
    entries: int
    nbytes: int


class Cache:
    """Bytes by key. No method raises OSError; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit

    def get(self, key: str) -> bytes | None:
        """What was put under this key, None if that is not there or not whole."""
        if self.folder is None:
            return None
        path = self._path(self.folder, key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        digest, data = raw[:32], raw[32:]
        if digest != _digest(key, data):
            _remove(path)
            return None
        try:
            os.utime(path)
        except OSError:
            pass  # not ours: it is used all the same
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keeps the data, if that is possible."""
        if self.folder is None:
            return
        partial = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, partial = tempfile.mkstemp(prefix=f".{key}.", dir=self.folder)
            with os.fdopen(number, "wb") as file:
                file.write(_digest(key, data) + data)
            os.replace(partial, self._path(self.folder, key))
        except OSError:
            if partial is not None:
                _remove(Path(partial))

    def trim(self) -> None:
        """Removes the least recently used entries, where they exceed the limit, to 9/10 of it."""
        now = time.time()
        found = []
        for entry, stat in self._files():
            if _ENTRY.fullmatch(entry.name):
                found.append((stat.st_mtime, stat.st_size, entry.path))
            elif _PARTIAL.fullmatch(entry.name) and now - stat.st_mtime > _STALE:
                _remove(Path(entry.path))
        total = sum(size for _, size, _ in found)
        if total <= self.limit:
            return
        for _, size, path in sorted(found):
            _remove(Path(path))
            total -= size
            if total <= self.limit * 9 // 10:
                return

    def usage(self) -> Usage:
        sizes = [s.st_size for e, s in self._files() if _ENTRY.fullmatch(e.name)]
        return Usage(len(sizes), sum(sizes))

    def _files(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        if self.folder is None:
            return
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    try:
                        yield entry, entry.stat(follow_symlinks=False)
                    except OSError:
                        pass  # another process removed it
        except OSError:
            return

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{key}{_SUFFIX}"


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + data).digest()


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass
