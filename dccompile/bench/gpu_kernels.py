"""``bench --kernels --device cuda``: every kernel for GPUs over the deployed shapes.

All times are the device's own, of calls back to back. Every call reads another copy of the weights,
which together exceed the second-level cache, and of bags other rows; activations stay. What a
workload could take at best follows from peaks measured on the device: its operations at that of its
instruction, or its bytes at that of memory, whichever is longer; the share is of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import Progress
from ..cuda import loose
from ..cuda.replay import replay
from ..errors import UsageError
from ..kernel import Kernel
from ..machine import Gpu
from ..runtime.device import Device
from ..workload import EmbeddingBag
from . import embedding_bench, gpu_torch, kernel_bench, measure, problems
from .cost import cost
from .gpu_measure import peaks
from .gpu_memory import Memory
from .kernel_means import summary
from .peers import PeerError, compare
from .suite import parameters

OURS = "kernel"
_BAGS = EmbeddingBag.op
_COLD = 100 << 20  # bytes of weights that calls take in turns: twice the cache of an H100


@dataclass(frozen=True)
class Case:
    """A kernel on a workload; `large` where that has work enough to be near a peak."""

    kernel: Kernel
    machine: Gpu
    form: str
    family: str
    label: str
    shape: tuple[int, ...]
    work: Any
    large: bool = True


def cases(pattern: str | None, machine: Gpu) -> list[Case]:
    """Those of a glob of kernels or families of shapes, else all that the machine would choose."""
    found: list[Case] = []
    if pattern is None or not pattern.startswith("embedding"):
        for case in kernel_bench.cases(pattern, machine):
            found += [
                Case(
                    case.kernel,
                    machine,
                    str(case.form),
                    case.family,
                    case.suite.label(shape),
                    shape,
                    case.suite.workload(case.form, shape),
                    case.suite.large(shape),
                )
                for shape in case.shapes
            ]
    if pattern is None or pattern.startswith("embedding"):
        found += _bags(None if pattern == "embedding" else pattern, machine)
    if not found:
        raise UsageError(
            f"--kernels {pattern!r}: no such kernel for {machine.name}. "
            "Fix: name some of embedding_bag_*, gemm_*, conv_*"
        )
    return found


def _bags(pattern: str | None, machine: Gpu) -> Iterator[Case]:
    for case in embedding_bench.cases(pattern, machine):
        storage = case.kernel.storage  # type: ignore[attr-defined]
        for shape in embedding_bench.shapes():
            work = embedding_bench.workload(storage, *shape)
            text = "x".join(map(str, (work.bags, work.rows[0], work.dim, work.pooling)))
            yield Case(case.kernel, machine, storage, "embedding", text, shape, work)


def run(
    benched: list[Case],
    gpu: Device,
    duration_s: float,
    warmup_s: float,
    against: list[str] | None,
    progress: Progress,
    logs: Path | None = None,
) -> dict[str, Any]:
    """Benches all cases; returns rows, geometric means, and the peaks of the device.

    `against` are peers, None for all; `logs` is a folder of tuning logs, None for the defaults.
    """
    progress.step(f"measure the peaks of {gpu.name}")
    found = peaks(gpu)
    rows = []
    for number, case in enumerate(benched, 1):
        progress.step(f"{case.kernel.name} {case.label}", number, len(benched))
        rows.append(bench_one(case, gpu, duration_s, warmup_s, against, logs))
    limits = {name: round(value, 1) for name, value in vars(found).items()}
    return {"gpu": gpu.name, "peaks": limits, "rows": rows, **summary(rows)}


def bench_one(
    case: Case,
    gpu: Device,
    duration_s: float,
    warmup_s: float,
    against: list[str] | None,
    logs: Path | None = None,
) -> dict[str, Any]:
    """One row: ours checked against the reference, then timed in turns with the peers."""
    kernel, machine, work = case.kernel, case.machine, case.work
    choice = parameters(kernel, work, machine, logs, gpu.kind)
    func = kernel.build(work, choice.params, machine)  # type: ignore[arg-type]
    func = func.with_attrs({"global_symbol": "main", "dcc.kernel": kernel.name})
    function = loose.load(loose.compile(func, machine), gpu)
    (problem,) = problems.make(work)
    packed = problems.pack(kernel, work, problem.weights, choice.params)
    memory = Memory(gpu, work, [problem], [packed], _COLD)
    function(*memory.arguments(0, 0))
    wrong = function.finding() or problem.check(memory.result(0))
    agreement = compare([memory.result(0)], [problem.expected])
    calls = memory.calls(function, 0, 0)
    runners: dict[str, measure.Runner] = {OURS: measure.Loop(replay(gpu, calls).run)}
    found: dict[str, dict[str, Any]] = {}
    for name in gpu_torch.names(work):
        if against is not None and name.partition("-")[0] not in against:
            continue
        try:
            found[name], runners[name] = _peer(name, work, problem, gpu)
        except PeerError as error:
            found[name] = {"reason": str(error)}
    times = measure.interleave(runners, duration_s, warmup_s)
    for name in runners.keys() & found.keys():
        ratio = round(measure.ratio(times[name], times[OURS]), 4)
        found[name].update(times[name].to_json(), ratio=ratio)
    same = {name: entry for name, entry in found.items() if entry.get("agrees")}
    best = min(same, key=lambda name: same[name]["ratio"], default=None)
    return {
        "kernel": kernel.name,
        "form": case.form,
        "machine": machine.name,
        "family": case.family,
        "shape": list(case.shape),
        "label": case.label,
        "large": case.large,
        "params": str(choice.params),
        "source": choice.source,
        "correct": wrong is None,
        "wrong": wrong,
        "difference": agreement,
        "copies": len(calls),
        **times[OURS].to_json(),
        **_shares(work, gpu, times[OURS].us),
        "peers": found,
        "best_peer": best,
        "best_ratio": None if best is None else same[best]["ratio"],
    }


def _peer(
    name: str, work: Any, problem: problems.Problem, gpu: Device
) -> tuple[dict[str, Any], measure.Loop]:
    """What a peer computes, how far that is from what it should be, and its calls.

    Its calls are on torch's current stream, the legacy default one as ours.
    """
    route = gpu_torch.prepare(name, work, problem, _COLD, str(gpu))
    try:
        route.calls[0](0)
        difference = route.differs()
        loop = measure.Loop(replay(gpu, route.calls, gpu_torch.capture).run)
    except Exception as error:  # whatever the peer throws is its answer
        gpu.alive()  # but for what ends the context
        raise PeerError(gpu_torch.one_line(error)) from error
    entry = {"difference": difference, "agrees": route.agrees(difference), "route": route.note}
    return entry, loop


def _shares(work: Any, gpu: Device, us: float) -> dict[str, Any]:
    """Speed, and the share of what the device could reach."""
    ops, nbytes, _ = cost(work)
    found = peaks(gpu)
    instruction, peak = found.of(work)
    bounds = {instruction: ops / peak / 1e3, "memory": nbytes / found.memory / 1e3}
    bound = max(bounds, key=lambda name: bounds[name])
    return {
        "gops": round(ops / us / 1e3, 2),
        "gbs": round(nbytes / us / 1e3, 2),
        "bound": bound,
        "peak_share": round(bounds[bound] / us, 4),
    }
