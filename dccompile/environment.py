"""Where a result was made: CPU, instruction set, threads, versions. Part of every ``--json``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from . import __version__
from .errors import Error
from .machine import cpu_name, default_threads, host

PACKAGES = {
    "numpy": "numpy",
    "tvm": "apache-tvm",
    "tvm_ffi": "apache-tvm-ffi",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "torch": "torch",
}


def versions() -> dict[str, str | None]:
    """Installed versions by short name, None where a package is missing; imports none of them."""
    found: dict[str, str | None] = {"dccompile": __version__, "python": platform.python_version()}
    for short, package in PACKAGES.items():
        try:
            found[short] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[short] = None
    return found


def environment(threads: int | None = None) -> dict[str, Any]:
    """CPU, target, cores that may be used, threads used and versions."""
    try:
        isa: str | None = host().name
    except Error:
        isa = None
    return {
        "cpu": cpu_name(),
        "isa": isa,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads if threads is not None else default_threads(),
        "os": f"{platform.system()} {platform.release()}",
        "versions": versions(),
    }


def thread_source() -> str:
    """Where `default_threads` takes its number from."""
    for variable in ("DCCOMPILE_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(variable, "").strip():
            return variable
    cpus = len(os.sched_getaffinity(0))
    return "affinity mask" if default_threads() == cpus else "cgroup quota"
