"""Loading an artifact: ``load(path)`` gives a `Module`."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Any

import numpy as np

from ..errors import IncompatibleError, UsageError
from ..machine import default_threads, missing_features
from . import artifact as dcm
from . import ffi
from .driver import gpu_number
from .ffi import import_tvm_ffi
from .module import Bound, Module
from .outputs import Outputs
from .tensors import ALIGN, TensorSpec, aligned, uint8

__all__ = ["Bound", "Module", "Outputs", "TensorSpec", "import_tvm_ffi", "load"]

_MAX_THREADS = 1024


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    device: str = "cpu",
    target: str | None = None,
    huge_pages: bool = False,
) -> Module:
    """Loads an artifact, in its best variant for the `device` or in the one named `target`.

    `device` is cpu, cuda or ``cuda:<number>``: a GPU of those that CUDA_VISIBLE_DEVICES leaves.
    There the weights are copied to its memory, once for all modules of the same file, and calls
    are as `CudaModule` says; `huge_pages` and what follows on threads are about the CPU.

    `threads` is how many cores one call may use (default: DCCOMPILE_NUM_THREADS,
    OMP_NUM_THREADS, the affinity mask and cgroup quota). The process has one set of worker
    threads, which nothing pins: a call from another Python thread that finds them at work runs
    on its own thread alone. A forked child starts workers of its own.

    `huge_pages` copies the weights into memory of 2 MiB pages where the kernel grants them: for
    tables beyond the reach of the address cache (1 GB and more), at the price of a copy per
    process instead of one mapping shared by all.

    The whole file is checked against its hashes before any of its code runs; the weights stay
    mapped from it, so replace the file by renaming, never write into it. Raises
    IncompatibleError where file and machine do not fit.
    """
    if threads is None:
        threads = default_threads()
    if type(threads) is not int or not 1 <= threads <= _MAX_THREADS:
        raise UsageError(
            f"threads={threads!r}: not a number of threads. Fix: give 1 to {_MAX_THREADS}", "DC2021"
        )
    index = gpu_number(device)
    with dcm.read(path) as file:
        where = f"'{file.path}'"
        if index is not None:
            return _load_on_gpu(file, target, index, threads)
        variant = _choose(file, target)
        _check_ffi(file, where)
        file.verify()
        data = aligned((0,), uint8)
        if variant["params"] is not None:
            data = file.params(variant["params"])
            if huge_pages:
                data = _on_huge_pages(data)
        if data.__array_interface__["data"][0] % ALIGN and data.nbytes:
            raise IncompatibleError(
                f"{where}: the weights are not on a {ALIGN}-byte boundary. "
                "Fix: compile the model again",
                "DC4006",
            )
        ffi.load_pool(file.code(dcm.RUNTIME), where)
        library = ffi.load_library(file.code(variant["library"]), variant["target"], where)
        for name in ("main", "plan"):
            if not library.implements_function(name):
                raise IncompatibleError(
                    f"{where}: {variant['library']} has no function {name!r}. "
                    "Fix: compile the model again",
                    "DC4011",
                )
        return Module(file.manifest, variant["target"], library, data, threads)


def _load_on_gpu(file: dcm.Artifact, target: str | None, index: int, threads: int) -> Module:
    from . import cuda_variant

    chosen = cuda_variant.choose(file, target, index)
    where = f"'{file.path}'"
    _check_ffi(file, where)
    file.verify()
    ffi.load_pool(file.code(dcm.RUNTIME), where)
    return cuda_variant.load(file, chosen, threads)


def _on_huge_pages(data: np.ndarray) -> np.ndarray:
    """A copy in memory that asks for huge pages; page-aligned, as mmap gives it."""
    memory = mmap.mmap(-1, max(1, data.nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages: the copy serves all the same
        memory.madvise(mmap.MADV_HUGEPAGE)
    copy = np.frombuffer(memory, np.uint8)[: data.nbytes]
    copy[...] = data
    return copy


def _choose(file: dcm.Artifact, target: str | None) -> dict[str, Any]:
    """The first variant that this CPU can run: the manifest has the best one first."""
    rows = file.manifest["variants"]
    variants = [row for row in rows if "images" not in row]
    has = ", ".join(row["target"] for row in rows)
    if not variants:
        raise IncompatibleError(
            f"'{file.path}': no variant for the CPU, it has {has}. Fix: "
            "load(device='cuda'), or compile the model with --target x86-64-v3 too",
            "DC4028",
        )
    if target is not None:
        if any(row["target"] == target for row in rows if "images" in row):
            raise IncompatibleError(
                f"'{file.path}': variant {target!r} is for a GPU. Fix: load(device='cuda')",
                "DC4007",
            )
        variants = [row for row in variants if row["target"] == target]
        if not variants:
            raise IncompatibleError(
                f"'{file.path}': no variant {target!r}, it has {has}. Fix: name one of these",
                "DC4007",
            )
    lacks = []
    for row in variants:
        missing = missing_features(row["features"])
        if not missing:
            return row
        lacks.append(f"{row['target']} needs {', '.join(missing)}")
    raise IncompatibleError(
        f"'{file.path}': no variant runs on this CPU: {'; '.join(lacks)}. "
        "Fix: compile the model with --target x86-64-v3 too, or use another machine",
        "DC4008",
    )


def _check_ffi(file: dcm.Artifact, where: str) -> None:
    wanted = file.manifest["runtime"]["tvm_ffi"]
    found = ffi.import_tvm_ffi().__version__
    if wanted.split(".")[:2] != found.split(".")[:2]:
        raise IncompatibleError(
            f"{where}: made for tvm_ffi {wanted}, here is {found}. "
            "Fix: install that version, or compile the model again",
            "DC4012",
        )
