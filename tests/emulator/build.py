"""Makes libraries that run CUDA source on the CPU, from the source and the files of this folder.

Run as a program this is nvcc, as far as `dccompile.cuda.toolchain` calls it: what it makes "PTX" is
the source, what it makes a cubin such a library.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Not -march=native, and nothing contracted: the same numbers on every machine.
FLAGS = "-std=c++17 -O1 -w -fPIC -mf16c -mfma -mavx2 -ffp-contract=off -fwrapv -fno-strict-aliasing"
FLAGS += " -fno-math-errno -fno-gnu-unique"
CHECKS = (
    "-g1 -fsanitize=thread,alignment,bounds,integer-divide-by-zero "
    "--param tsan-instrument-func-entry-exit=0"
)
PLAIN_FROM = "// ---- plain C++"  # from here on g++ compiles the source's prelude too
_KERNEL = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\((\d+)[^)]*\) )?(\w+)\(([^)]*)\)\s*\{'
)
_SHARED = re.compile(r"__shared__ (?:alignas\(\d+\) )?([\w ]+?) (\w+)\[(\w+)\];")
_DYNAMIC = re.compile(r"extern __shared__ (?:(?:__align__|alignas)\(\d+\) )?([\w ]+?) (\w+)\[\];")


def library(source: str, check: bool, arch: str = "sm_80") -> Path:
    """The library of CUDA source, kept in `folder()`.

    Raises RuntimeError with g++'s first complaint, FileNotFoundError without g++.
    """
    code = translate(source, check, arch)
    parts = [_object(HERE / name, "") for name in ("simt.cpp", "memory.cpp", "guard.cpp")]
    made = _object(None, CHECKS if check else "-O2", code)
    return _made(
        ["-shared", "-Wl,-Bsymbolic", made, *parts],
        b"".join(Path(p).name.encode() for p in parts),
        ".so",
    )


def translate(source: str, check: bool, arch: str = "sm_80") -> str:
    """C++ for g++, its first line that of the first kernel, and the list of kernels."""
    start = source.find(PLAIN_FROM)
    body = source[start if start >= 0 else source.index('extern "C" __global__') :]
    body = _DYNAMIC.sub(r"EMU_DYNAMIC_SHARED(\1, \2);", body)
    body = _SHARED.sub(r"EMU_SHARED(\1, \2, \3);", body)
    calls, rows = [], []
    number = int(arch.rpartition("_")[2])
    for bound, name, parameters in _KERNEL.findall(body):
        kinds = [re.sub(r"\w+$", "", p.strip()) for p in parameters.split(",") if p.strip()]
        kinds = [k.replace("__restrict__", "").strip() for k in kinds]
        given = ", ".join(f"*({kind}*)a[{i}]" for i, kind in enumerate(kinds))
        sizes = ", ".join(f"sizeof({kind})" for kind in kinds)
        calls.append(f"EMU_RAW static void emu_call_{name}(void** a) {{ {name}({given}); }}")
        calls.append(f"static const unsigned emu_sizes_{name}[] = {{{sizes}}};")
        call = f"emu_call_{name}, {bound or 1024}, {len(kinds)}, emu_sizes_{name}"
        rows.append(f'  {{"{name}", {call}}},')
    lines = [
        *calls,
        "const emu::Kernel emu_kernels[] = {",
        *rows,
        "  {}};",
        f"const int emu_arch = {number};",
        f"const bool emu::checked = {str(check).lower()};",
    ]
    reports = "#define DCC_REPORTS\n" if "dcc_report" in body else ""
    head = f'{reports}#include "cuda.h"\n#include "device.h"\n#line 1 "kernel"'
    return "\n".join([head, body, *lines, ""])


def driver() -> Path:
    """The stand-in for libcuda.so.1, in a folder of its own."""
    sources = sorted(str(p) for p in HERE.glob("driver*.cpp"))
    contents = b"".join(Path(p).read_bytes() for p in sources)
    contents += b"".join(p.read_bytes() for p in sorted(HERE.glob("*.h")))
    made = _made(["-shared", f"-I{HERE}", *sources, "-ldl"], contents, ".driver.so")
    path = made.with_suffix("") / "libcuda.so.1"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"partial.{os.getpid()}")
        shutil.copy(made, partial)
        os.replace(partial, path)
    return path


def folder() -> Path:
    """Where libraries are kept: EMU_CACHE, else a folder that goes with this process."""
    if "EMU_CACHE" not in os.environ:
        import atexit

        made = tempfile.mkdtemp(prefix="dccompile-emulator-")
        os.environ["EMU_CACHE"] = made
        atexit.register(shutil.rmtree, made, True)
    found = Path(os.environ["EMU_CACHE"])
    found.mkdir(parents=True, exist_ok=True)
    return found


def _object(path: Path | None, flags: str, code: str = "") -> str:
    text = path.read_bytes() if path else code.encode()
    source = str(path)
    if path is None:
        kept = folder() / f"{_hash(text)}.cpp"
        kept.write_bytes(text)
        source = str(kept)
    headers = b"".join(p.read_bytes() for p in sorted(HERE.glob("*.h")))
    return str(_made(["-c", f"-I{HERE}", *flags.split(), source], text + headers, ".o"))


def _made(arguments: list[str], contents: bytes, suffix: str) -> Path:
    """What g++ makes, if it has not made it before."""
    names = [a for a in arguments if not a.endswith(".cpp")]
    path = folder() / (_hash(" ".join([FLAGS, *names]).encode() + contents) + suffix)
    if not path.exists():
        partial = f"{path}.{os.getpid()}"
        command = ["g++", *FLAGS.split(), *arguments, "-o", partial]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [s for s in done.stderr.splitlines() if "error" in s or "undefined" in s]
            raise RuntimeError("\n".join((lines or done.stderr.splitlines())[:5]))
        os.replace(partial, path)
    return path


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


# ---- nvcc ----

VERSION = "13.0"
_PTX = "// emulator "


def nvcc(arguments: list[str]) -> int:
    """Does what the command line says; returns the exit status."""
    if arguments == ["--version"]:
        print("nvcc: stand-in of the emulator")
        print(f"Cuda compilation tools, release {VERSION}, V{VERSION}.0")
        return 0
    arch = next((a for a in arguments if a.startswith("-arch=")), "-arch=").partition("=")[2]
    files = [a for a in arguments if not a.startswith("-")]
    try:
        if len(files) != 2 or arguments[-2] != "-o" or not arch:
            raise RuntimeError(f"error: this stand-in for nvcc does not know {arguments}")
        source = Path(files[0]).read_text()
        if "-ptx" in arguments:
            if files[0].endswith(".cu") and 'extern "C" __global__' not in source:
                raise RuntimeError("error: no kernel")
            Path(files[1]).write_text(f"{_PTX}{arch}\n{source}")
        elif "-cubin" in arguments and source.startswith(_PTX):
            check = os.environ.get("EMU_CHECK") == "1"
            shutil.copy(library(source.partition("\n")[2], check, arch), files[1])
        else:
            raise RuntimeError("error: neither -ptx of a source nor -cubin of what -ptx has made")
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(nvcc(sys.argv[1:]))
