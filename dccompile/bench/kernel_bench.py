"""``bench --kernels``: every kernel over the deployed shapes, against the peers' single operators.

Two times are taken of our kernel in every round. `us`, Gop/s and % of peak come from a loop
outside Python: the kernel alone. The ratios compare one Python call of ours with one Python call
of the peer: both pay for their call. Nothing is subtracted; what a call of each costs by itself
is measured on a 1x1x1 product and reported.
"""

from __future__ import annotations

import fnmatch
import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import reference, registry
from ..console import Progress
from ..errors import UsageError
from ..kernel import Kernel
from ..machine import TARGETS, Machine, host, missing_features
from ..runtime import ffi
from ..workload import INT8_LIMITS, NUMPY, Gemm, GemmWeights
from . import gemm_peers, measure
from .peers import PeerError, compare

OURS, CALL, PEAK = "kernel", "call", "peak"


@dataclass(frozen=True)
class Form:
    """A kind of workload: the types of A, B and C, and the bits that B uses."""

    a: str
    b: str
    out: str
    b_bits: int = 8

    def __str__(self) -> str:
        return f"{self.a}{'s7' if self.b_bits == 7 else self.b}->{self.out}"


# What recommendation models run: requantized products, then the float forms.
FORMS = (
    Form("u8", "s8", "u8"),
    Form("u8", "s8", "u8", b_bits=7),
    Form("s8", "s8", "s8"),
    Form("f32", "f32", "f32"),
    Form("f32", "f16", "f32"),
)


@dataclass(frozen=True)
class Case:
    """A kernel on a machine and the form of workload to feed it."""

    kernel: Kernel
    machine: Machine
    form: Form

    def __str__(self) -> str:
        return f"{self.kernel.name} {self.form}"


def shapes() -> list[tuple[int, int, int]]:
    """The deployed (m, n, k), largest innermost structure first as the set lists them."""
    text = (importlib.resources.files("dccompile.models") / "shapes.json").read_text()
    return [(m, n, k) for m, n, k in json.loads(text)["gemm"]]


def workload(form: Form, m: int, n: int, k: int) -> Gemm:
    """A requantized product or a plain float one."""
    return Gemm(
        m,
        n,
        k,
        form.a,
        form.b,
        form.out,
        b_bits=form.b_bits,
        zero_point=3 if form.out == "u8" else 0,
        bounded=form.a != "f32",  # scales of `problem` keep |y| far below 2**31
    )


def problem(work: Gemm, seed: int = 0) -> tuple[GemmWeights, np.ndarray]:
    """Weights and A (m, k) whose outputs fill the range of the output type."""
    assert work.m is not None
    rng = np.random.default_rng([seed, work.m, work.n, work.k])
    if work.a == "f32":
        a = rng.standard_normal((work.m, work.k)).astype(np.float32)
        return GemmWeights(rng.standard_normal((work.k, work.n)).astype(NUMPY[work.b])), a
    low, high = INT8_LIMITS[work.a]
    a = rng.integers(low, high + 1, (work.m, work.k)).astype(NUMPY[work.a])
    reach = 64 if work.b_bits == 7 else 127
    b = rng.integers(-reach, reach + 1, (work.k, work.n)).astype(np.int8)
    # |a| is about 140 (u8) and |b| 0.58 reach in the mean square: codes deviate by about 30
    spread = 30 / (140 * 0.58 * reach * np.sqrt(work.k))
    scale = (rng.uniform(0.5, 1.5, work.n) * spread).astype(np.float32)
    return GemmWeights(b, scale, a_zero=7 if work.a == "u8" else 0), a


def cases(pattern: str | None, target: Machine | None) -> list[Case]:
    """Kernels to bench: those of a glob, else those that this host would choose."""
    machine = target or host()
    if pattern is None:
        chosen = []
        for form in FORMS:
            if form.b_bits == 8:
                work = workload(form, 64, 512, 512)
                chosen.append(Case(registry.select(work, machine).kernel, machine, form))
        return chosen
    known = [k for k in registry.kernels() if k.op == "gemm"]
    found = [k for k in known if fnmatch.fnmatchcase(k.name, pattern)]
    if not found:
        names = ", ".join(k.name for k in known)
        raise UsageError(f"--kernels {pattern!r}: no such kernel. Fix: name some of {names}")
    return [case for kernel in found for case in _forms(kernel, target)]


def _forms(kernel: Kernel, target: Machine | None) -> Iterator[Case]:
    """The forms that the kernel takes, on the least machine that runs it."""
    fits = [m for m in TARGETS.values() if set(kernel.features) <= set(m.features)]
    machine = target if target in fits else fits[0]
    missing = missing_features(machine.features)
    if missing:
        raise UsageError(
            f"--kernels: {kernel.name} needs {machine.name}, this host lacks {', '.join(missing)}. "
            "Fix: name kernels that this host runs"
        )
    for form in FORMS:
        shortcut = form.b_bits == 7  # of interest only to the kernels that exist for it
        if shortcut and "s7" not in kernel.name:
            continue
        if kernel.refuses(workload(form, 64, 512, 512)) is None:
            yield Case(kernel, machine, form)


def run(
    benched: list[Case],
    threads: int,
    duration_s: float,
    warmup_s: float,
    against: list[str] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Benches all cases over all shapes; returns rows, geometric means and call overheads."""
    rows = []
    todo = [(case, shape) for case in benched for shape in shapes()]
    for index, (case, shape) in enumerate(todo):
        progress.step(f"{case.kernel.name} {'x'.join(map(str, shape))}", index + 1, len(todo))
        rows.append(bench_one(case, shape, threads, duration_s, warmup_s, against))
    overhead = {}
    for case in benched:
        row = bench_one(case, (1, 1, 1), threads, 0.2, 0.02, against)
        times = {name: peer["us"] for name, peer in row["peers"].items() if "us" in peer}
        overhead[str(case)] = {"ours": row["call"]["us"], **times}
    return {"rows": rows, "geometric_means": summary(rows), "call_overhead_us": overhead}


def bench_one(
    case: Case,
    shape: tuple[int, int, int],
    threads: int,
    duration_s: float,
    warmup_s: float,
    against: list[str] | None,
) -> dict[str, Any]:
    """One row: ours checked against the reference, then timed in turns with peers and peak."""
    work = workload(case.form, *shape)
    weights, a = problem(work)
    expected = reference.gemm(work, weights, a)
    kernel, machine = case.kernel, case.machine
    params = kernel.default(work, machine)
    module, args, result = _compiled(kernel, work, weights, a, params, machine)
    ffi.configure_threads(threads)
    function = module["gemm"]
    function(*args)
    agreement = compare([result()], [expected])
    peak = (measure.fma_peak if work.a == "f32" else measure.int8_peak)(machine, threads)
    runners: dict[str, measure.Runner] = {
        OURS: measure.kernel_loop(module, "gemm", args),
        CALL: lambda: function(*args),
        PEAK: peak.loop,
    }
    found: dict[str, dict[str, Any]] = {}
    for name in gemm_peers.names(work):
        if against is not None and name.partition("-")[0] not in against:
            continue
        try:
            peer = gemm_peers.prepare(name, work, weights, a, threads)
            runners[name] = peer.call
            found[name] = {"difference": compare(peer.outputs(), [expected])}
        except PeerError as error:
            found[name] = {"reason": str(error)}
    times = measure.interleave(runners, duration_s, warmup_s, threads)
    for name, entry in found.items():
        if name in times:
            entry.update(times[name].to_json())
            entry["ratio"] = round(measure.ratio(times[name], times[CALL]), 4)
    ratios = [entry["ratio"] for entry in found.values() if "ratio" in entry]
    share = measure.ratio(times[PEAK], times[OURS]) * work.ops / peak.ops
    return {
        "kernel": kernel.name,
        "form": str(case.form),
        "machine": machine.name,
        "shape": list(shape),
        "threads": threads,
        "params": str(params),
        "correct": _correct(agreement),
        "difference": agreement,
        **times[OURS].to_json(),
        "call": times[CALL].to_json(),
        "gops": round(work.ops / times[OURS].us / 1e3, 2),
        "peak_gops": round(peak.gops(times[PEAK]), 2),
        "peak_instruction": peak.instruction,
        "peak_share": round(share, 4),
        "peers": found,
        "best_ratio": min(ratios, default=None),
    }


def _correct(difference: dict[str, Any]) -> bool:
    """Integers must be exact; float sums may be associated differently."""
    return difference.get("steps", 0) == 0 and difference.get("relative", 0.0) < 1e-5


def _compiled(
    kernel: Kernel, work: Gemm, weights: GemmWeights, a: np.ndarray, params: Any, machine: Machine
) -> tuple[Any, tuple[Any, ...], Any]:
    """The kernel alone: its module with function 'gemm', its arguments, a reader of C."""
    import tvm

    func = kernel.build(work, params, machine).with_attr("global_symbol", "gemm")
    module = measure.build(func, machine)
    c = tvm.runtime.tensor(np.zeros((len(a), work.n), NUMPY[work.out]))
    packed = tvm.runtime.tensor(kernel.pack(work, weights, params))
    return module, (tvm.runtime.tensor(a), packed, c), c.numpy


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means per kernel and form: % of peak where M >= 10, N, K >= 256; ratios; best."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["form"], row["machine"]), []).append(row)
    means = []
    for (kernel, form, machine), members in groups.items():
        large = [r for r in members if r["shape"][0] >= 10 and min(r["shape"][1:]) >= 256]
        names = [n for n in members[0]["peers"] if any("ratio" in r["peers"][n] for r in members)]
        best = [r["best_ratio"] for r in members if r["best_ratio"] is not None]
        means.append(
            {
                "kernel": kernel,
                "form": form,
                "machine": machine,
                "shapes": len(members),
                "peak_share_large": _mean([r["peak_share"] for r in large]),
                "peak_share_large_min": min((r["peak_share"] for r in large), default=None),
                "ratio": {
                    n: _mean([r["peers"][n]["ratio"] for r in members if "ratio" in r["peers"][n]])
                    for n in names
                },
                "best": _mean(best),
                "best_large": _mean([r["best_ratio"] for r in large if r["best_ratio"]]),
                "best_min": min(best, default=None),
                "faster": sum(r > 1 for r in best),
            }
        )
    return means


def _mean(values: list[float]) -> float | None:
    return round(measure.geometric_mean(values), 4) if values else None
