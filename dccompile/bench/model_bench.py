"""``bench MODEL``: latency and throughput of a compiled model, in turns with the peers.

Everybody runs the same model on the same inputs with the same number of threads, inputs and
outputs bound in advance, and the outputs are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import sources
from ..console import Progress, warn
from ..sources import Source
from . import measure
from .peers import Peer, PeerError, Prepared, Torch, aligned, compare

OURS, CALL = "dccompile", "dccompile m(x)"
# Outputs of one model on two runtimes: float sums associate differently, and a code of a
# quantized layer that falls on the other side of a tie moves everything behind it.
FLOAT_TOLERANCE, INT8_TOLERANCE = 1e-3, 5e-2
# The largest of half a million differences is no measure: ONNX Runtime and OpenVINO differ by 0.06
# of the features of the ShuffleNet at the root mean square, by 0.08 of the range at the worst.
INT8_RMS_TOLERANCE = 0.1


def run(
    source: Source,
    *,
    targets: Sequence[str],
    shapes: Mapping[str, Sequence[int | str]] | None,
    precision: str,
    embedding: str,
    tuning: str | None,
    require_tuned: bool,
    inputs: Sequence[str],
    batches: Sequence[int],
    threads: Sequence[int],
    peers: Sequence[Peer],
    duration_s: float,
    warmup_s: float,
    progress: Progress,
    device: str = "cpu",
) -> dict[str, Any]:
    """Compiles unless given an artifact, then benches every batch and number of threads.

    On a `device` other than the CPU inputs and outputs are there, and its own clock counts.
    """
    if source.kind == "dcm" and peers:
        source.onnx()  # raises: the peers need the model itself
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        how = targets, shapes, precision, embedding, tuning, require_tuned
        path, compiled = artifact_of(source, *how, Path(folder), progress)
        rows = []
        for batch in batches:
            for count in threads:
                progress.step(f"bench {source.name}: batch {batch}, {count} threads")
                times = duration_s, warmup_s
                rows.append(_bench(source, path, inputs, batch, count, peers, *times, device))
    return {"model": source.name, **compiled, "rows": rows}


def artifact_of(
    source: Source,
    targets: Sequence[str],
    shapes: Mapping[str, Sequence[int | str]] | None,
    precision: str,
    embedding: str,
    tuning: str | None,
    require_tuned: bool,
    folder: Path,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """The artifact to run, compiled into `folder` if there is none; and what compiling took."""
    if source.kind == "dcm":
        assert source.path is not None
        return source.path, {}
    from ..compiler import compile

    start = time.perf_counter()
    made = compile(
        source.compilable(),
        targets=targets,
        shapes=shapes,
        precision=precision,
        embedding=embedding,
        tuning=tuning,
        require_tuned=require_tuned,
        name=source.name,
        progress=lambda event: progress.step(f"compile: {event.get('step', '')}"),
    )
    for line in made.manifest["tuning"]["warnings"]:
        warn(line)
    path = made.save(folder / "model.dcm")
    return path, {"compile_seconds": round(time.perf_counter() - start, 2)}


def _bench(
    source: Source,
    path: Path,
    inputs: Sequence[str],
    batch: int,
    threads: int,
    peers: Sequence[Peer],
    duration_s: float,
    warmup_s: float,
    device: str,
) -> dict[str, Any]:
    from ..runtime.loader import load

    module = load(path, threads=threads, device=device)
    feeds = {name: aligned(a) for name, a in _feeds(source, module, inputs, batch).items()}
    first = [np.array(v) for v in module.run(None, feeds)]
    makers: dict[str, Callable[[], Prepared]]
    if device == "cpu":
        ours: measure.Runner = module.bind(feeds)
        makers = {peer.name: partial(_prepare, peer, source, feeds, threads) for peer in peers}
    else:
        from ..runtime.device import named
        from . import gpu_measure, gpu_models

        ours = gpu_measure.bound_loop(module, [feeds])
        makers = gpu_models.routes(peers, source, feeds, named(device))
    runners: dict[str, measure.Runner] = {OURS: ours, CALL: lambda: module(feeds)}
    results: dict[str, dict[str, Any]] = {}
    prepared: dict[str, Prepared] = {}
    for name, make in makers.items():
        try:
            prepared[name] = make()
        except PeerError as error:
            results[name] = {"reason": str(error)}
    quantized = any(value.dtype.kind in "iu" for value in first) or is_quantized(path)
    for name, ready in prepared.items():
        ready.call()
        difference = difference_of(source, first, ready.outputs())
        agreed = agrees(difference, quantized, ready.tolerance)
        results[name] = {"difference": difference, "agrees": agreed, "same": ready.same}
        runners[name] = ready.timed or ready.call
    times = measure.interleave(runners, duration_s, warmup_s, threads)
    for name in prepared:
        results[name].update(times[name].to_json())
        results[name]["ratio"] = round(measure.ratio(times[name], times[OURS]), 4)
    ratios = [r["ratio"] for r in results.values() if "ratio" in r]
    return {
        "batch": _rows_of(feeds, batch),
        "threads": threads,
        "inputs": {name: [str(a.dtype), list(a.shape)] for name, a in feeds.items()},
        **times[OURS].to_json(),
        "per_second": round(_rows_of(feeds, batch) * 1e6 / times[OURS].us, 1),
        "call": times[CALL].to_json(),
        "peers": results,
        "best_ratio": min(ratios, default=None),
        "agrees": all(not ready.same for ready in prepared.values())
        or any(results[name]["agrees"] for name in prepared),
    }


def _rows_of(feeds: Mapping[str, np.ndarray], batch: int) -> int:
    """Samples of one call: the leading dim if all inputs share it, else the asked batch."""
    leading = {a.shape[0] for a in feeds.values() if a.ndim}
    return leading.pop() if len(leading) == 1 else batch


def _feeds(source: Source, module: Any, inputs: Sequence[str], batch: int) -> dict[str, np.ndarray]:
    if source.kind == "reference" and not inputs:
        from .. import models

        return dict(models.sample_inputs(source.name, batch, source.seed))
    return sources.make_inputs(module.inputs, inputs, batch)


def is_quantized(path: Path) -> bool:
    from ..runtime import artifact

    with artifact.read(path) as found:
        return any("8" in str(node["precision"]) for node in found.manifest["nodes"])


def _prepare(peer: Peer, source: Source, feeds: Mapping[str, np.ndarray], threads: int) -> Prepared:
    if isinstance(peer, Torch) and source.kind == "reference" and peer.available() is None:
        from .. import models

        module = models.definition(source.name, source.seed)
        if module is not None:
            return peer.prepare_module(module, feeds, threads)
    return peer.prepare(source.onnx(), feeds, threads)


def difference_of(
    source: Source, ours: list[np.ndarray], theirs: list[np.ndarray]
) -> dict[str, Any]:
    if source.kind == "reference":
        from .. import models

        ours, theirs = models.matched(source.name, ours, theirs)
    return compare(ours, theirs)


def agrees(difference: Mapping[str, Any], quantized: bool, tolerance: float | None = None) -> bool:
    """Whether two runtimes computed the same: integers within a step, floats within tolerance.

    Floats of a quantized model: the largest difference, or the root mean square of all. A
    `tolerance` of a peer's own may be wider.
    """
    if "shape" in difference:
        return False
    if difference.get("steps", 0) > 1:
        return False
    wide = max(tolerance or 0.0, INT8_TOLERANCE if quantized else FLOAT_TOLERANCE)
    near = difference.get("relative", 0.0) <= wide
    return near or (quantized and difference.get("rms", np.inf) <= INT8_RMS_TOLERANCE)


def call_overhead(duration_s: float, progress: Progress) -> dict[str, Any]:
    """Times a compiled model whose kernel is one addition of 4 floats: all but the call is free."""
    from ..compiler import compile
    from ..runtime.loader import load

    progress.step("compile an addition of 4 floats")
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        path = Path(folder) / "add.dcm"
        compile(_addition(), targets=["host"], name="add").save(path)
        module = load(path, threads=1)
        x = aligned(np.ones((1, 4), np.float32))
        y = aligned(np.zeros((1, 4), np.float32))
        bound = module.bind({"x": x}, {"y": y})
        runners: dict[str, measure.Runner] = {
            "m.bind(...)()": bound,
            "m(x, out=...)": lambda: module({"x": x}, out={"y": y}),
            "m(x)": lambda: module({"x": x}),
            "m.run(None, feeds)": lambda: module.run(None, {"x": x}),
        }
        times = measure.interleave(runners, duration_s, 0.05)
    return {"routes": {name: samples.to_json() for name, samples in times.items()}}


def _addition() -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    one = numpy_helper.from_array(np.ones((1, 4), np.float32), "one")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["y"])], "add", value[:1], value[1:], [one]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
