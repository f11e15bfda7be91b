"""Machine code from CUDA source: with nvcc where it is, otherwise with NVRTC from pip.

Neither needs a GPU, a driver or any header. Numbers come out the same: no fast math, and no
contraction to fused multiply-adds but those that the source asks for.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import Error, UsageError

VARIABLE = "DCCOMPILE_CUDA_COMPILER"
_OLDEST = (11, 8)  # the first that knows sm_90


@dataclass(frozen=True)
class Code:
    """What one source becomes: `cubin` for its architecture, `ptx` for later ones."""

    cubin: bytes
    ptx: bytes


@dataclass(frozen=True)
class Compiler:
    """`kind` is nvcc or nvrtc, `path` the program or library, `version` what it says of itself."""

    kind: str
    path: str
    version: str

    @property
    def toolkit(self) -> str:
        """Its version of CUDA, e.g. ``13.0``: code runs on drivers of this major version."""
        return ".".join(self.version.removeprefix("V").split(".")[:2])

    def compile(self, source: str, arch: str) -> Code:
        """Raises Error with the compiler's first complaint."""
        return _nvcc(self.path, source, arch) if self.kind == "nvcc" else _nvrtc(self, source, arch)


def find() -> Compiler:
    """nvcc on PATH or below CUDA_HOME, else NVRTC; DCCOMPILE_CUDA_COMPILER names one of them.

    Raises Error where there is none, UsageError where the variable is wrong.
    """
    wanted = os.environ.get(VARIABLE, "").strip()
    if wanted not in ("", "nvcc", "nvrtc"):
        raise UsageError(f"{VARIABLE}={wanted!r}: allowed are nvcc, nvrtc. Fix: unset it", "DC2024")
    found = None if wanted == "nvrtc" else _find_nvcc()
    found = found or (None if wanted == "nvcc" else _find_nvrtc())
    if found is None:
        raise Error(
            f"CUDA: no {wanted or 'nvcc and no NVRTC'} here, one is needed to make code for GPUs. "
            "Fix: pip install 'dccompile[cuda]'",
            "DC1013",
        )
    return found


def _find_nvcc() -> Compiler | None:
    homes = [os.environ.get(v) for v in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home) / "bin") for home in homes if home]
    for folder in [None, *folders]:
        path = shutil.which("nvcc", path=folder)
        if path and (version := _nvcc_version(path)):
            return Compiler("nvcc", path, version)
    return None


@lru_cache(maxsize=8)
def _nvcc_version(path: str) -> str | None:
    """None where it does not run or is too old."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)(?:, (V[\d.]+))?", done.stdout)
    if done.returncode or not found or (int(found[1]), int(found[2])) < _OLDEST:
        return None
    return found[3] or f"V{found[1]}.{found[2]}"


def _nvcc(path: str, source: str, arch: str) -> Code:
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        code = Path(folder) / "k.cu"
        code.write_text(source)
        made = []
        ptx, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        steps = [
            ["-ptx", f"-arch=compute_{number}", str(code), "-o", str(ptx)],
            ["-cubin", f"-arch={arch}", str(ptx), "-o", str(cubin)],
        ]
        for step in steps:
            command = [path, "-O3", "--fmad=false", "-w", *step]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise _failed("nvcc", done.stderr or done.stdout)
            made.append(Path(step[-1]).read_bytes())
    return Code(made[1], made[0])


def _find_nvrtc() -> Compiler | None:
    for path in _nvrtc_paths():
        try:
            library = _library(path)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        if (major.value, minor.value) >= _OLDEST:
            return Compiler("nvrtc", path, f"{major.value}.{minor.value}")
    return None


def _nvrtc_paths() -> list[str]:
    """Of pip's package, newest first, then by the loader's own search."""
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or []) if spec else []:
        found += sorted(map(str, Path(base).glob("*/lib/libnvrtc.so.*")), reverse=True)
    return [*found, "libnvrtc.so.13", "libnvrtc.so.12"]


@lru_cache(maxsize=8)
def _library(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def _nvrtc(compiler: Compiler, source: str, arch: str) -> Code:
    library = _library(compiler.path)
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"k.cu", 0, None, None)
    )
    try:
        flags = [f"--gpu-architecture={arch}", "--fmad=false", "-w"]
        options = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
        if library.nvrtcCompileProgram(program, len(flags), options):
            raise _failed("NVRTC", _bytes(library, "ProgramLog", program).decode(errors="replace"))
        return Code(_bytes(library, "CUBIN", program), _bytes(library, "PTX", program))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise Error(f"CUDA: NVRTC fails with status {status}. Fix: install it again", "DC1014")


def _failed(name: str, log: str) -> Error:
    lines = [line for line in log.splitlines() if "error" in line or "fatal" in line]
    reason = (lines or log.strip().splitlines() or ["no message"])[0]
    return Error(f"CUDA: {name} refuses a kernel: {reason}. Fix: report the model", "DC1014")
