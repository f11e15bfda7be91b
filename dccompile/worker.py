"""The compiler's child process: ``python -m dccompile.worker JOB_FOLDER``.

Compiling runs LLVM, which ends the process on what it cannot do; here that ends a child and the
caller gets an error. The folder holds job.json; progress goes to stdout as JSON lines, the result
to result.json. Not for use by hand.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .errors import Error, ModelError, UnsupportedError


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    try:
        result: dict[str, Any] = {"manifest": compile_job(job, folder)}
    except MemoryError:
        result = {"error": {"class": "Error", "code": "DC1003", "text": _memory_text(job)}}
    except Error as error:
        result = {"error": describe(error)}
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[-1]
        if "bad_alloc" in text:
            text = _memory_text(job)
        else:
            text = f"{type(error).__name__}: {text}. Fix: report the model that does this"
        result = {"error": {"class": "Error", "code": "DC1001", "text": text}}
        result["traceback"] = traceback.format_exc()
    (folder / "result.json").write_text(json.dumps(result))


def _memory_text(job: dict[str, Any]) -> str:
    return (
        f"compiling '{job['name']}' needs more than the limit of {job['memory'] >> 20} MiB. "
        "Fix: fix large or open dims with --shape, or raise DCCOMPILE_MEMORY_LIMIT (MiB)"
    )


def describe(error: Error) -> dict[str, Any]:
    """An error as JSON; `compiler.revive` is the inverse."""
    out: dict[str, Any] = {"class": type(error).__name__, "code": error.code, "text": str(error)}
    if isinstance(error, (ModelError, UnsupportedError)):
        out["problems"] = [asdict(p) for p in error.problems]
    return out


def say(step: str, **values: Any) -> None:
    print(json.dumps({"step": step, **values}), flush=True)


def compile_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compiles as the job says; writes libraries and params, returns the manifest."""
    say("import")
    sys.modules["torch"] = None  # type: ignore[assignment]  # tvm_ffi would import it, 2 s
    from .frontend import sandbox

    sandbox.start()  # while TVM is imported
    from . import pipeline, threadpool
    from .lookup import Tuning
    from .machine import resolve
    from .runtime import artifact

    say("read")
    model = job.get("path") or (folder / "model.onnx").read_bytes()
    calibrated = job["accumulation"] == "calibrated"
    front = pipeline.front(model, job["shapes"], job["precision"], job["embedding"], calibrated)
    constants = pipeline.Constants()
    lowered = []
    logs = job["logs"]["folder"]
    for name, cpu in job["targets"].items():
        say("lower", target=name)
        tuning = Tuning(Path(logs) if logs else None, name, cpu)
        lowered.append(pipeline.lower(front, resolve(name), constants, tuning))
    if job["require_tuned"]:
        pipeline.refuse_untuned(job["name"], lowered)
    (folder / "lib").mkdir()
    (folder / artifact.RUNTIME).parent.mkdir()
    libraries = [folder / _library(low.machine) for low in lowered]
    _generate(lowered, libraries, job["cache"])
    say("write")
    constants.write(folder / "params.safetensors")
    threadpool.build(folder / artifact.RUNTIME)
    return _manifest(job, front, lowered)


def _library(machine: Any) -> str:
    """The library's name in the artifact."""
    return f"lib/{machine.name.replace(':', '_')}.so"


def _generate(lowered: list[Any], libraries: list[Path], folder: str | None) -> None:
    from . import codegen, pipeline
    from .cache import Cache
    from .machine import available_cores

    def progress(missing: int, total: int) -> None:
        say("generate", functions=missing, cached=total - missing)

    cache = Cache(Path(folder) if folder else None)
    try:
        pipeline.generate(lowered, libraries, cache, available_cores(), progress)
    except codegen.Crash as crash:  # this process ends as its child did, the caller tells
        if crash.code < 0:
            os.kill(os.getpid(), -crash.code)
        os._exit(abs(crash.code))


def _manifest(job: dict[str, Any], front: Any, lowered: list[Any]) -> dict[str, Any]:
    import onnx
    import tvm
    import tvm_ffi

    from . import pipeline
    from .frontend.islands import islands
    from .frontend.tables import report

    graph = front.graph
    variants = []
    for low in lowered:
        work = low.program.workspace
        variants.append(
            {
                "target": low.machine.name,
                "features": list(low.machine.features),
                "library": _library(low.machine),
                "params": "params.safetensors",
                "kernels": pipeline.kernels(low),
                "steps": [s.name for s in low.program.steps],
                "unscheduled": low.unscheduled,
                "workspace": work if isinstance(work, int) else None,
                "peak": low.program.peak,
            }
        )
        if low.machine.name.startswith("cuda:"):
            variants[-1] |= {"images": low.images, "pieces": low.pieces}
    chosen = {p.site.name: p.choice.kernel.name for p in lowered[0].placed}
    tables = [row for site in front.recovered.bags.values() for row in report(site)]
    nodes = [{**n, "kernel": chosen.get(n["site"])} for n in front.recovered.nodes]
    for node in nodes:  # of weights that were quantized here
        site = front.recovered.gemms.get(node["name"])
        if site is not None and site.error is not None:
            node["weight_error"] = site.error
    return {
        "format": 1,
        "producer": f"dccompile {__version__}",
        "name": job["name"],
        "inputs": [_spec(t) for t in graph.inputs],
        "outputs": [
            {"name": value.name, "dtype": t.dtype, "shape": [_dim(d) for d in t.shape]}
            for value, t in zip(graph.outputs, lowered[0].program.outputs, strict=True)
        ],
        "symbols": _symbols(graph, lowered[0].program),
        "variants": variants,
        "nodes": nodes,
        "islands": islands(front.recovered).to_json(),
        "tables": tables,
        "tuning": {
            "logs": job["logs"]["name"],
            "warnings": [line for low in lowered for line in low.warnings],
        },
        "tools": {"tvm": tvm.__version__, "onnx": onnx.__version__, **_cuda("compiler", lowered)},
        "runtime": {"tvm_ffi": tvm_ffi.__version__, **_cuda("toolkit", lowered)},
    }


def _cuda(fact: str, lowered: list[Any]) -> dict[str, str]:
    """What compiled the kernels of GPUs, or its version of CUDA, under "cuda"; {} without any."""
    if not any(low.images for low in lowered):
        return {}
    from .cuda import toolchain

    found = toolchain.find()
    return {"cuda": found.toolkit if fact == "toolkit" else f"{found.kind} {found.version}"}


def _symbols(graph: Any, program: Any) -> list[dict[str, Any]]:
    """Those of the inputs, in the order of `plan`, then those that the model computes."""
    rows: list[dict[str, Any]] = []
    for v in program.symbols:
        low, high = graph.symbols[v.name]
        rows.append({"name": v.name, "min": low, "max": high})
    for v, bound in program.told().items():
        high = bound if isinstance(bound, int) else None
        rows.append({"name": v.name, "min": 0, "max": high, "computed": True, "bound": _dim(bound)})
    return rows


def _dim(dim: Any) -> int | str:
    """A dim for people: ``N*4`` where it follows from a symbol."""
    from .frontend.symbols import spell

    return dim if isinstance(dim, int) else spell(dim)


def _spec(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


if __name__ == "__main__":
    main()
