"""``dccompile doctor``: what of this machine and its software dccompile finds."""

from __future__ import annotations

import argparse
from typing import Any

from .. import cache, linker
from ..bench.peers import PEERS
from ..console import document, table
from ..environment import environment, thread_source
from ..errors import Error
from ..machine import TARGETS, missing_features
from . import verbs

Options = argparse.Namespace


def doctor(options: Options) -> int:
    info = environment()
    targets = {name: missing_features(m.features) for name, m in TARGETS.items()}
    peers = {n: {"version": p.version, "reason": p.available()} for n, p in PEERS.items()}
    command = linker.find()
    folder = cache.folder()
    kept = cache.Cache(folder).usage()
    cuda, compiler = gpus(), cuda_compiler()
    if options.json:
        body = {
            "targets": {n: {"runs": not lacks, "lacks": lacks} for n, lacks in targets.items()},
            "threads_from": thread_source(),
            "peers": peers,
            "gpus": cuda,
            "cuda_compiler": compiler,
            "linker": command,
            "cache": {
                "folder": folder and str(folder),
                "entries": kept.entries,
                "bytes": kept.nbytes,
            },
        }
        document("doctor", {"environment": info, **body})
        return 0
    size = verbs.size_text(kept.nbytes)
    rows = [
        ("cpu", info["cpu"]),
        ("best target", info["isa"] or "none"),
        *((f"target {n}", f"lacks {', '.join(x)}" if x else "runs") for n, x in targets.items()),
        *_gpu_rows(cuda),
        ("cuda compiler", compiler.get("reason") or "{kind} {version}, {path}".format(**compiler)),
        ("cores", str(info["cores"])),
        ("threads", f"{info['threads']} ({thread_source()})"),
        *((name, version or "not installed") for name, version in info["versions"].items()),
        *((f"peer {n}", p["reason"] or f"found, {p['version']}") for n, p in peers.items()),
        ("linker", " ".join(command) if command else "none found (pip install ziglang)"),
        ("cache", f"{folder}: {kept.entries} functions, {size}" if folder else "off"),
    ]
    table(("", "found"), rows)
    return 0


def gpus() -> dict[str, Any]:
    """The driver's CUDA version and the GPUs, each with a context of its own tried out.

    `reason` says why there are none.
    """
    from ..runtime import device, driver

    try:
        found = driver.start()
    except Error as error:
        return {"driver": None, "devices": [], "reason": str(error)}
    listed = []
    for index in range(found.devices):
        try:
            gpu = device.find(index)
        except Error as error:
            listed.append({"device": f"cuda:{index}", "reason": str(error)})
        else:
            arch = f"sm_{gpu.arch}"
            listed.append({"device": str(gpu), "name": gpu.name, "arch": arch, "kind": gpu.kind})
    reason = None if listed else "the driver sees no GPU"
    return {"driver": found.release, "devices": listed, "reason": reason}


def cuda_compiler() -> dict[str, Any]:
    """Its kind, path and version, or the `reason` why there is none."""
    from ..cuda import toolchain

    try:
        found = toolchain.find()
    except Error as error:
        return {"reason": str(error)}
    return {"kind": found.kind, "path": found.path, "version": found.version}


def _gpu_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    if found["reason"]:
        return [("gpu", found["reason"])]
    rows = [("gpu driver", f"CUDA {found['driver']}")]
    for gpu in found["devices"]:
        rows.append((gpu["device"], gpu.get("reason") or f"{gpu['name']}, {gpu['arch']}"))
    return rows
