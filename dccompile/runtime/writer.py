"""Writing a ``.dcm`` file: whole or not at all, and the same bytes for the same arguments."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .layout import MANIFEST, NAME, Entry, directory, local_header
from .manifest import check_manifest
from .params import Packed

_CHUNK = 1 << 20
_TMP = ".dcm-tmp"

Source = bytes | bytearray | memoryview | Path | Packed


def _pieces(source: Source) -> Iterator[bytes | memoryview]:
    if isinstance(source, Packed):
        yield from source.chunks()
    elif isinstance(source, Path):
        with source.open("rb") as file:
            while piece := file.read(_CHUNK):
                yield piece
    else:
        yield memoryview(source).cast("B")


def write(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], entries: Mapping[str, Source]
) -> None:
    """Writes an artifact: same arguments, same bytes.

    Each entry is read once and hashed on its way; ``manifest["entries"]`` is filled in here.
    The file appears under its name whole or not at all, also if the machine loses power, and
    what a killed writer left in that folder is removed. Raises UsageError where the folder
    cannot be written, ValueError where manifest and entries do not belong together.
    """
    target = Path(path)
    if MANIFEST in entries:
        raise ValueError(f"{MANIFEST} is written from `manifest`")
    try:
        with _Rename(target) as file:
            table: dict[str, dict[str, Any]] = {}
            rows = [_append(file, name, source, table) for name, source in entries.items()]
            text = json.dumps({**manifest, "entries": table}, sort_keys=True, indent=1).encode()
            check_manifest(json.loads(text), lambda found: ValueError(f"manifest: {found}"))
            rows.append(_append(file, MANIFEST, text, {}))
            digest = hashlib.sha256(text).hexdigest()
            file.write(directory(rows, file.tell(), digest))
    except OSError as error:
        raise UsageError(
            f"'{target}': cannot be written: {error.strerror or error}. "
            "Fix: name a file in a folder that has room and may be written",
            "DC2020",
        ) from None


def _append(file: Any, name: str, source: Source, table: dict[str, dict[str, Any]]) -> Entry:
    if not NAME.fullmatch(name):
        raise ValueError(f"entry name {name!r}")
    at = file.tell()
    blank = local_header(name, at, 0, 0)
    file.write(blank)
    size, crc, sha = 0, 0, hashlib.sha256()
    for piece in _pieces(source):
        file.write(piece)
        size += len(piece)
        crc = zlib.crc32(piece, crc)
        sha.update(piece)
    end = file.tell()
    file.seek(at)
    file.write(local_header(name, at, size, crc))
    file.seek(end)
    table[name] = {"sha256": sha.hexdigest(), "size": size, "crc32": crc}
    return Entry(name, at + len(blank), size, crc)


class _Rename:
    """A file beside `target` that takes its name when the block ends well, else disappears.

    A living writer holds a lock on it: an unlocked one is a dead writer's.
    """

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Any:
        import fcntl

        folder = self.target.parent
        if self.target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        for left in folder.glob(f".*{_TMP}"):
            with suppress(OSError), left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        while True:
            name = f".{self.target.name[:128]}.{secrets.token_hex(8)}{_TMP}"
            self.name = folder / name
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.file = os.fdopen(os.open(self.name, flags, 0o666), "w+b", buffering=_CHUNK)
            fcntl.flock(self.file, fcntl.LOCK_EX)
            if os.fstat(self.file.fileno()).st_nlink:
                return self.file
            self.file.close()  # swept by another writer between open and lock

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.name, self.target)
                folder = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        finally:
            with suppress(OSError):
                self.name.unlink(missing_ok=True)
            with suppress(OSError):  # closing flushes what is left, and fails again on a full disk
                self.file.close()
