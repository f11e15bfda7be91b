"""Links object files into a shared library with whatever linker the machine has."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .errors import Error

_DRIVERS = ("cc", "gcc", "clang", "g++", "c++")
_LINKERS = ("ld", "ld.lld", "ld.gold")


def find() -> list[str] | None:
    """The command, up to the file names, that links a shared library; None if there is none.

    A compiler driver named by CC comes first, then those on PATH, then bare linkers, then the
    one inside the ``ziglang`` package. No C library is linked in: the library then takes memcpy
    and the like from whatever process loads it, not from versions of the build machine's libc.
    What it defines itself it never takes from elsewhere (-Bsymbolic). Debug sections, which name
    no source and are a third of the file, are left out.
    """
    named = os.environ.get("CC")
    for driver in ([named] if named else []) + list(_DRIVERS):
        if path := shutil.which(driver):
            return [path, "-shared", "-nostdlib", "-Wl,--build-id=none,-Bsymbolic,-S"]
    for linker in _LINKERS:
        if path := shutil.which(linker):
            return [path, "-shared", "--build-id=none", "-Bsymbolic", "-S"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-shared", "-nostdlib", "-Wl,-Bsymbolic,-S"]
    return None


def link(objects: list[Path], output: Path) -> None:
    """Writes the shared library. Raises Error where no linker is found or it fails."""
    command = find()
    if command is None:
        raise Error(
            "linking: no C compiler or linker on PATH, one is needed to write the library. "
            "Fix: pip install ziglang, or install gcc",
            "DC1010",
        )
    done = subprocess.run(
        [*command, "-o", str(output), *map(str, objects)], capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise Error(f"linking with {command[0]}: {reason}. Fix: check that linker", "DC1011")
