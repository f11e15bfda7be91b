"""Which variant of an artifact a GPU runs, and its loading there.

Machine code runs on later parts of its own generation, sm_80 on sm_86; PTX runs on everything
later, after the driver has translated it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import IncompatibleError
from ..machine import GPUS
from . import artifact as dcm
from . import cuda_code, device
from .cuda_module import CudaModule
from .device import Device
from .manifest import GPU, VERSION


@dataclass(frozen=True)
class Choice:
    """A variant's row of the manifest; `kind` is the sort of code to load, cubin or ptx."""

    gpu: Device
    row: dict[str, Any]
    kind: str


def choose(file: dcm.Artifact, target: str | None, index: int) -> Choice:
    """The best variant for the GPU of this number. Raises IncompatibleError."""
    rows = [row for row in file.manifest["variants"] if "images" in row]
    if not rows:
        has = ", ".join(row["target"] for row in file.manifest["variants"])
        raise IncompatibleError(
            f"'{file.path}': no variant for a GPU, it has {has}. Fix: compile the model with "
            "--target cuda:sm_80 too, or use device='cpu'",
            "DC4027",
        )
    has = ", ".join(row["target"] for row in rows)
    if target is not None:
        rows = [row for row in rows if row["target"] == target]
        if not rows:
            raise IncompatibleError(
                f"'{file.path}': no variant {target!r} for a GPU, it has {has}. "
                "Fix: name one of these",
                "DC4007",
            )
    gpu = device.find(index)
    found = _best(rows, gpu.arch)
    if found is None:
        raise IncompatibleError(
            f"'{file.path}': no variant runs on {gpu}, {gpu.name} with sm_{gpu.arch}: it has "
            f"{has if target is None else target}. Fix: {_fix(gpu.arch)}",
            "DC4026",
        )
    row, kind = found
    _check_driver(file, gpu, kind)
    return Choice(gpu, row, kind)


def load(file: dcm.Artifact, choice: Choice, threads: int) -> CudaModule:
    """The module. `file` has been verified and the worker threads' library loaded."""
    gpu, row = choice.gpu, choice.row
    where = f"'{file.path}'"
    images = [
        (image[choice.kind], bytes(file.code(image[choice.kind])), image["kernels"])
        for image in row["images"]
    ]
    pieces: list[np.ndarray] = []
    key = ""
    if row["params"] is not None:
        data = file.params(row["params"])
        pieces = [data[begin : begin + nbytes] for begin, nbytes in row["pieces"]]
        key = f"{file.manifest['entries'][row['params']]['sha256']} {row['pieces']}"
    params = gpu.params(key, pieces)
    name = row["target"].replace(":", "_")
    code = cuda_code.load(gpu, file.code(row["library"]), images, name, where)
    return CudaModule(file.manifest, row["target"], code, params, threads)


def _best(rows: list[dict[str, Any]], arch: int) -> tuple[dict[str, Any], str] | None:
    """The newest variant with machine code for `arch`, else the newest with PTX for it."""
    known = {}
    for row in rows:
        number = re.fullmatch(rf"{GPU}sm_(\d{{1,4}})", row["target"], re.ASCII)
        if number is not None and int(number[1]) <= arch:
            known[int(number[1])] = row
    if not known:
        return None
    same = [number for number in known if number // 10 == arch // 10]
    return (known[max(same)], "cubin") if same else (known[max(known)], "ptx")


def _fix(arch: int) -> str:
    older = [m.name for m in GPUS.values() if int(m.arch[3:]) <= arch]
    if not older:
        first = next(iter(GPUS.values()))
        return f"use a GPU of {first.arch} or newer, or device='cpu'"
    return f"compile the model with --target {older[-1]} too, or use device='cpu'"


def _check_driver(file: dcm.Artifact, gpu: Device, kind: str) -> None:
    """Machine code needs a driver of its compiler's generation, PTX one as new as the compiler."""
    made = VERSION.fullmatch(file.manifest["runtime"].get("cuda", "0.0"))
    assert made is not None
    major, minor = int(made[1]), int(made[2])
    needed = 1000 * major + (10 * minor if kind == "ptx" else 0)
    if gpu.driver.version < needed:
        least = f"{major}.{minor if kind == 'ptx' else 0}"
        raise IncompatibleError(
            f"'{file.path}': needs a driver of CUDA {least}, this one is of CUDA "
            f"{gpu.driver.release}. Fix: update the driver, or use device='cpu'",
            "DC4024",
        )
