"""One unit of a CUDA variant: the object file of its host half, and its kernels' machine code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from .. import fingerprint
from ..generic import legalize, stack
from ..machine import Gpu
from . import device, hostlib, toolchain


@dataclass(frozen=True)
class Built:
    """`host` is an x86 object file, `cubin` and `ptx` are of one source with all `kernels`."""

    host: bytes
    cubin: bytes
    ptx: bytes
    kernels: tuple[str, ...]

    def pack(self) -> bytes:
        """As one run of bytes, for the cache."""
        parts = (self.host, self.cubin, self.ptx)
        head = {"kernels": self.kernels, "sizes": [len(p) for p in parts]}
        return json.dumps(head).encode() + b"\n" + b"".join(parts)


def unpack(data: bytes) -> Built:
    """The inverse of `Built.pack`."""
    line, _, rest = data.partition(b"\n")
    head = json.loads(line)
    host, cubin, _ = head["sizes"]
    device = rest[host:]
    return Built(rest[:host], device[:cubin], device[cubin:], tuple(head["kernels"]))


def build(functions: Mapping[str, tirx.PrimFunc], machine: Gpu) -> Built:
    """Compiles functions with thread bindings, by symbol. Raises what the compilers raise."""
    made = device.split(functions, machine)
    code = toolchain.find().compile(made.source, machine.arch)
    hosts = {
        name: hostlib.host_function(func).with_attr("global_symbol", name)
        for name, func in made.hosts.items()
    }
    built = stack.build(tvm.IRModule(hosts), legalize.target_of(machine.host))
    return Built(_object(built), code.cubin, code.ptx, made.kernels)


def _object(module: Any) -> bytes:
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        path = Path(folder) / "host.o"
        module.write_to_file(str(path), "o")
        return path.read_bytes()


def tools(machine: Gpu) -> tuple[str, ...]:
    """What machine code for a GPU depends on beside its functions."""
    compiler = toolchain.find()
    return (str(device.target_of(machine)), compiler.kind, compiler.version, *_sources())


@lru_cache(maxsize=1)
def _sources() -> tuple[str, ...]:
    return (device.prelude(), *(p.read_text() for p in fingerprint.imported_files(Path(__file__))))
