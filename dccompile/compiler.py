"""`compile`: an ONNX model becomes one artifact. The work happens in a child process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cache, errors, lookup
from .errors import Error, Problem, UsageError
from .runtime import artifact

if TYPE_CHECKING:
    from .runtime.loader import Module

PRECISIONS = ("keep", "fp16-weights", "int8-weights")
EMBEDDINGS = ("keep", "fp16", "int8", "int4")
ACCUMULATIONS = ("exact", "calibrated")
_IMAGES = ("cubin", "ptx")  # of a group of kernels, in a variant for a GPU
DEFAULT_TARGETS = ("host", "x86-64-v3")


class CompiledArtifact:
    """A compiled model that has not been saved yet.

    `manifest` is what the saved file will hold; `seconds` is what compiling took.
    """

    def __init__(self, folder: tempfile.TemporaryDirectory[str], manifest: dict[str, Any]) -> None:
        self._folder = folder
        self.manifest = manifest
        self.seconds = 0.0

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the artifact; the file appears whole or not at all. Returns its path."""
        root = Path(self._folder.name)
        names = [v["library"] for v in self.manifest["variants"]]
        for variant in self.manifest["variants"]:
            names += [image[kind] for image in variant.get("images", ()) for kind in _IMAGES]
        names += ["params.safetensors", artifact.RUNTIME]
        entries: dict[str, Any] = {name: root / name for name in names}
        target = Path(path)
        artifact.write(target, self.manifest, entries)
        return target

    def load(self, threads: int | None = None, device: str = "cpu") -> Module:
        """Loads without keeping a file; arguments as for `dccompile.load`."""
        from .runtime.loader import load

        path = self.save(Path(self._folder.name) / "unsaved.dcm")
        try:
            return load(path, threads=threads, device=device)
        finally:
            path.unlink()


def compile(
    model: Any,
    *,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    precision: str = "keep",
    embedding: str = "keep",
    accumulation: str = "exact",
    tuning: str | os.PathLike[str] | None = None,
    require_tuned: bool = False,
    name: str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    timeout: float = 3600.0,
) -> CompiledArtifact:
    """Compiles an ONNX model: a path, bytes, or an onnx.ModelProto.

    `targets` lists variants, the best one that a machine can run is used there. `shapes` fixes
    dims or gives them a range: ``{"x": ("1..64", 13)}``. `precision` 'fp16-weights' stores the
    weights of float matrix multiplications in fp16 and computes in f32, 'int8-weights' stores
    them in 8 bits with a scale for every column. `embedding` is how the rows of embedding tables
    are stored: fp16, or int8 or int4 codes with a scale and bias for every row.
    `accumulation` 'calibrated' allows 16-bit sums that calibration found not to overflow, but that
    other inputs could make overflow, on machines without VNNI; 'exact' results are for any input.
    `tuning` is a folder of tuning logs: the packaged ones by default, 'none' for none. With
    `require_tuned` every hand-written kernel must have a record in them.

    Raises ModelError or UnsupportedError with every problem of the model, UsageError for a wrong
    argument, TuningError listing the kernels without a record, Error where the compiler itself
    fails.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision '{precision}': allowed are {', '.join(PRECISIONS)}. Fix: name one of these",
            "DC2010",
        )
    if embedding not in EMBEDDINGS:
        raise UsageError(
            f"embedding '{embedding}': allowed are {', '.join(EMBEDDINGS)}. Fix: name one of these",
            "DC2010",
        )
    if accumulation not in ACCUMULATIONS:
        raise UsageError(
            f"accumulation '{accumulation}': allowed are {', '.join(ACCUMULATIONS)}. "
            "Fix: name one of these",
            "DC2010",
        )
    if importlib.util.find_spec("tvm") is None:
        raise Error(
            "compile: the compiler is not installed. Fix: pip install 'dccompile[compile]'",
            "DC1012",
        )
    names = [targets] if isinstance(targets, str) else list(targets)
    machines = lookup.cpus(names)
    if not machines:
        raise UsageError("targets: none given. Fix: name one, e.g. host", "DC2011")
    logs = lookup.logs(tuning)
    job: dict[str, Any] = {
        "targets": machines,
        "logs": {"folder": logs and str(logs), "name": lookup.name(tuning)},
        "require_tuned": require_tuned,
        "shapes": {k: list(v) for k, v in shapes.items()} if shapes else None,
        "precision": precision,
        "embedding": embedding,
        "accumulation": accumulation,
        "cache": str(cached) if (cached := cache.folder()) else None,
    }
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="dccompile-")
    size = _put_model(model, job, Path(folder.name))
    job["name"] = name or job["name"]
    job["memory"] = _memory_limit(size)
    start = time.monotonic()
    result = _run(job, Path(folder.name), progress, timeout)
    if "error" in result:
        raise revive(result["error"], result.get("traceback"))
    compiled = CompiledArtifact(folder, result["manifest"])
    compiled.seconds = time.monotonic() - start
    return compiled


def _put_model(model: Any, job: dict[str, Any], folder: Path) -> int:
    """Puts the model where the child finds it; returns its bytes, external data included."""
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        job.update(path=str(path.absolute()), name=path.stem)
        try:
            nearby = [p.stat().st_size for p in path.parent.iterdir() if p.is_file()]
            return max(path.stat().st_size, *nearby)
        except OSError:
            return 0
    data = model if isinstance(model, bytes) else _serialize(model)
    (folder / "model.onnx").write_bytes(data)
    job.update(name="model")
    return len(data)


def _serialize(model: Any) -> bytes:
    if not hasattr(model, "SerializeToString"):
        raise UsageError(
            f"model: got {type(model).__name__}, allowed are a path, bytes and onnx.ModelProto. "
            "Fix: pass one of these",
            "DC2012",
        )
    return bytes(model.SerializeToString())


def _memory_limit(model_bytes: int) -> int:
    """Address space for the child: 8 GiB and 8 times the model, unless the environment says."""
    given = os.environ.get("DCCOMPILE_MEMORY_LIMIT", "")
    if given.isdigit():
        return int(given) << 20
    return (8 << 30) + 8 * model_bytes


def _run(
    job: dict[str, Any],
    folder: Path,
    progress: Callable[[dict[str, Any]], None] | None,
    timeout: float,
) -> dict[str, Any]:
    (folder / "job.json").write_text(json.dumps(job))
    log = folder / "log"
    with log.open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "dccompile.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            cwd=folder,  # not the caller's, which -m would import from
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    step = "start"
    killer = _Deadline(child, timeout)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # something the compiler printed
            step = event.get("step", step)
            if progress is not None:
                progress(event)
        child.wait()
    finally:
        killer.stop()
    result = folder / "result.json"
    if child.returncode == 0 and result.exists():
        return dict(json.loads(result.read_text()))
    if killer.fired:
        text = f"compiling '{job['name']}' took more than {timeout:g} s in step '{step}'"
        fix = "fix open dims with --shape, or give more time"
        return {"error": {"class": "Error", "code": "DC1004", "text": f"{text}. Fix: {fix}"}}
    tail = log.read_text(errors="replace").strip().splitlines()
    code = child.returncode
    died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = f"{died}{': ' + tail[-1] if tail else ''}"
    text = f"the compiler ended in step '{step}' ({reason}). Fix: report the model that does this"
    return {
        "error": {"class": "Error", "code": "DC1002", "text": text},
        "traceback": "\n".join(tail),
    }


class _Deadline:
    """Kills the child and its children when their time is over, or when the caller leaves."""

    def __init__(self, child: subprocess.Popen[bytes], seconds: float) -> None:
        import threading

        self.child, self.fired = child, False
        self.timer = threading.Timer(seconds, self._fire)
        self.timer.daemon = True
        self.timer.start()

    def _fire(self) -> None:
        self.fired = True
        self._kill()

    def _kill(self) -> None:
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def stop(self) -> None:
        self.timer.cancel()
        if self.child.poll() is None:
            self._kill()
            self.child.wait()
        if self.child.stdout:
            self.child.stdout.close()


def revive(described: dict[str, Any], trace: str | None = None) -> Error:
    """The error that the child described."""
    kind = getattr(errors, described["class"])
    problems = [Problem(**p) for p in described.get("problems", [])]
    error: Error = kind(problems or described["text"], described["code"])
    if trace:
        error.__cause__ = RuntimeError(trace)
    return error
