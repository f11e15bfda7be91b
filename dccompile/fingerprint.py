"""Which version of a schedule: digests of its file and of those beside it that it imports."""

from __future__ import annotations

import hashlib
import inspect
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .kernel import Kernel

# Strings are matched to be left alone, for they may hold a #; a docstring is one that begins the
# file or follows a colon at the end of a line.
_COMMENT = re.compile(
    r'''(?P<string>""".*?"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|[ \t]*\#[^\n]*''', re.DOTALL
)
_DOCSTRING = re.compile(r'(?P<before>\A|:[ \t]*\n)\s*""".*?"""', re.DOTALL)
# `ast` would take 50 ms for the kernels of a model. Names after "as" are no files.
_IMPORT = re.compile(r"^\s*from \.(?!\.)(\w*)[\w.]* import (?:\(([^)]*)\)|([^\n]*))", re.MULTILINE)
_BESIDE = re.compile(r"^\s*from \.\.(?!\.)(\w+)\.(\w+) import ", re.MULTILINE)
_NAME = re.compile(r"(?<!as )\b(?!as\b)\w+")


@lru_cache(maxsize=None)  # noqa: UP033 (a cache by that name is something else here)
def schedule(kernel: Kernel) -> str:
    """The version of a kernel's schedule: 8 hex digits, the same whatever its comments say.

    They are of the SHA-256 of the kernel's file and of `imported_files`, without docstrings,
    comments and blank lines.
    """
    digest = hashlib.sha256()
    for path in imported_files(Path(inspect.getfile(type(kernel)))):
        raw = f"{path.name}\n{_code(path)}".encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:8]


def imported_files(path: Path) -> list[Path]:
    """A Python file and those in its folder, or one beside that, that it imports, by name.

    Directly or not: a kernel for GPUs may share the packing of its constants with one for CPUs.
    """
    found, new = {path}, [path]
    while new:
        siblings = _siblings(new.pop())
        new += siblings - found
        found |= siblings
    return sorted(found)


@lru_cache(maxsize=None)  # noqa: UP033
def _siblings(path: Path) -> frozenset[Path]:
    names = set()
    for module, listed, line in _IMPORT.findall(_code(path)):
        names |= {module} if module else set(_NAME.findall(listed or line))
    found = {path.with_name(f"{name}.py") for name in names}
    for folder, name in _BESIDE.findall(_code(path)):
        other = path.parent.parent / folder / f"{name}.py"
        found |= {other} if other.is_file() else set()
    return frozenset(found)


@lru_cache(maxsize=None)  # noqa: UP033
def _code(path: Path) -> str:
    return stripped(path.read_text())


def stripped(source: str) -> str:
    """Python source without docstrings, comments and blank lines."""
    source = _COMMENT.sub(lambda found: found["string"] or "", source)
    source = _DOCSTRING.sub(lambda found: found["before"], source)
    return "\n".join(line.rstrip() for line in source.splitlines() if line.strip())
