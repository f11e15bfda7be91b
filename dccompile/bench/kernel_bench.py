"""``bench --kernels``: every kernel over the deployed shapes, against the peers' single operators.

Two times are taken of our kernel in every round. `us`, Gop/s and % of peak come from a loop
outside Python: the kernel alone. A peer whose operator can be chained is compared with that: its
time is that of a chain less that of one operator. Any other is called, and compared with one
Python call of ours: both pay for their call. Nothing is subtracted; what a call of each costs by
itself is measured on a tiny operator and reported. A row's peers say which `route` was theirs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..console import Progress
from ..errors import ScheduleError, UsageError
from ..kernel import Kernel
from ..machine import Machine, host
from ..runtime import ffi
from ..workload import NUMPY
from . import measure
from .conv_cases import Convs
from .gemm_cases import Gemms
from .kernel_means import summary
from .peers import PeerError, compare
from .suite import RIVAL, Case, Form, Suite, fitting, parameters, usable

OURS, CALL, PEAK = "kernel", "call", "peak"
SUITES: tuple[Suite, ...] = (Gemms(), Convs())


def cases(pattern: str | None, target: Machine | None) -> list[Case]:
    """Kernels to bench: those of a glob, else those that this host would choose.

    A glob of no kernel but of families of shapes (``depthwise3d``) means those that this host
    would choose for these. Of a glob's kernels those for convolutions get the shapes for which
    the least machine that runs them would choose them.
    """
    kernels = [k for k in registry.kernels() if usable(k, target)]
    known = [(suite, k) for suite in SUITES for k in kernels if k.op == suite.op]
    if pattern is not None:
        found = [(s, k) for s, k in known if fnmatch.fnmatchcase(k.name, pattern)]
        if found:
            return [case for suite, kernel in found for case in _of_kernel(suite, kernel, target)]
    families = [(s, f) for s in SUITES for f in s.families]
    wanted = [(s, f) for s, f in families if fnmatch.fnmatchcase(f, pattern or "*")]
    if not wanted:
        names = ", ".join([*(f for _, f in families), *(k.name for _, k in known)])
        raise UsageError(f"--kernels {pattern!r}: no such kernel. Fix: name some of {names}")
    return [case for suite, family in wanted for case in _of_family(suite, family, target)]


def _of_family(suite: Suite, family: str, target: Machine | None) -> Iterator[Case]:
    """The kernels that the machine would choose for the shapes of a family."""
    machine = target or host()
    for form in suite.forms:
        if form.b_bits == 8:
            yield from _chosen(suite, family, form, machine, lambda kernel: True)


def _of_kernel(suite: Suite, kernel: Kernel, target: Machine | None) -> Iterator[Case]:
    """The forms that the kernel takes, on the least machine that runs it."""
    machine = fitting(kernel, target)
    for form in suite.forms_of(kernel):
        shortcut = form.b_bits == 7  # of interest only to the kernels that exist for it
        if shortcut and "s7" not in kernel.name:
            continue
        for family in suite.families:
            if suite.op == "conv":
                yield from _chosen(suite, family, form, machine, lambda k: k is kernel)
                continue
            taken = [
                shape
                for shape in suite.shapes(family)
                if kernel.refuses(suite.workload(form, shape)) is None
            ]
            if taken:
                yield Case(suite, kernel, machine, form, family, tuple(taken))


def _chosen(
    suite: Suite, family: str, form: Form, machine: Machine, wanted: Callable[[Kernel], bool]
) -> Iterator[Case]:
    """The kernels that are chosen for a family's shapes, each with those."""
    found: dict[Kernel, list[tuple[int, ...]]] = {}
    for shape in suite.shapes(family):
        try:
            kernel = registry.select(suite.workload(form, shape), machine).kernel
        except ScheduleError:  # the machine has no kernel for it
            continue
        if wanted(kernel):
            found.setdefault(kernel, []).append(shape)
    for kernel, shapes in found.items():
        yield Case(suite, kernel, machine, form, family, tuple(shapes))


def run(
    benched: list[Case],
    threads: int,
    duration_s: float,
    warmup_s: float,
    against: list[str] | None,
    progress: Progress,
    logs: Path | None = None,
) -> dict[str, Any]:
    """Benches all cases over all shapes; returns rows, geometric means and call overheads.

    `logs` is a folder of tuning logs, None for the kernels' defaults.
    """
    rows = []
    todo = [(case, shape) for case in benched for shape in case.shapes]
    for index, (case, shape) in enumerate(todo):
        progress.step(f"{case.kernel.name} {case.suite.label(shape)}", index + 1, len(todo))
        rows.append(bench_one(case, shape, threads, duration_s, warmup_s, against, logs))
    overhead: dict[str, dict[str, float]] = {}
    for case in benched:
        if str(case) not in overhead:
            overhead[str(case)] = _overhead(case, threads, against)
    return {"rows": rows, **summary(rows), "call_overhead_us": overhead}


def _overhead(case: Case, threads: int, against: list[str] | None) -> dict[str, float]:
    """Microseconds of one call of next to nothing, by each."""
    work = case.suite.tiny(case.form)
    kernel = case.kernel
    if kernel.refuses(work) is not None:
        kernel = registry.select(work, case.machine).kernel
    params = kernel.default(work, case.machine)
    one = case.suite, kernel, case.machine, work, params
    _, found, times = _timed(*one, threads, 0.2, 0.02, against, 1)
    peers = {name: times[name].us for name in found if name in times}
    return {"ours": round(times[CALL].us, 3), **{n: round(us, 3) for n, us in peers.items()}}


def bench_one(
    case: Case,
    shape: tuple[int, ...],
    threads: int,
    duration_s: float,
    warmup_s: float,
    against: list[str] | None,
    logs: Path | None = None,
) -> dict[str, Any]:
    """One row: ours checked against the reference, then timed in turns with peers and peak."""
    kernel, machine = case.kernel, case.machine
    work = case.suite.workload(case.form, shape)
    choice = parameters(kernel, work, machine, logs)
    one = case.suite, kernel, machine, work, choice.params
    agreement, found, times = _timed(*one, threads, duration_s, warmup_s, against, None)
    for name, entry in found.items():
        if name in times:
            _compare(name, entry, times)
    peak = _peak(work, machine, threads)
    same = {name: entry for name, entry in found.items() if entry.get("agrees")}
    best = min(same, key=lambda name: same[name]["ratio"], default=None)
    share = measure.ratio(times[PEAK], times[OURS]) * work.ops / peak.ops
    return {
        "kernel": kernel.name,
        "form": str(case.form),
        "machine": machine.name,
        "family": case.family,
        "shape": list(shape),
        "label": case.suite.label(shape),
        "large": case.suite.large(shape),
        "threads": threads,
        "params": str(choice.params),
        "source": choice.source,
        "correct": _correct(agreement),
        "difference": agreement,
        **times[OURS].to_json(),
        "call": times[CALL].to_json(),
        "gops": round(work.ops / times[OURS].us / 1e3, 2),
        "peak_gops": round(peak.gops(times[PEAK]), 2),
        "peak_instruction": peak.instruction,
        "peak_share": round(share, 4),
        "peers": found,
        "best_peer": best,
        "best_ratio": None if best is None else same[best]["ratio"],
    }


def _timed(
    suite: Suite,
    kernel: Kernel,
    machine: Machine,
    work: Any,
    params: Any,
    threads: int,
    duration_s: float,
    warmup_s: float,
    against: list[str] | None,
    layers: int | None,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, measure.Samples]]:
    """Our difference to the reference, the peers' or their reasons, and all times.

    `layers` overrides the suite's length of chains. A chain of n has its time at "<peer> x n".
    """
    weights, a = suite.problem(work)
    expected = suite.reference(work, weights, a)
    module, args, result = _compiled(kernel, work, weights, a, params, machine, expected.shape)
    ffi.configure_threads(threads)
    function = module[suite.op]
    function(*args)
    agreement = compare([result()], [expected])
    runners: dict[str, measure.Runner] = {
        OURS: measure.kernel_loop(module, suite.op, args),
        CALL: lambda: function(*args),
        PEAK: _peak(work, machine, threads).loop,
    }
    found: dict[str, dict[str, Any]] = {}
    rival = suite.rival(work, kernel, machine)
    if rival is not None:
        plain = rival.narrowed(work)
        chosen = rival.default(plain, machine)
        other, own, told = _compiled(rival, plain, weights, a, chosen, machine, expected.shape)
        other[suite.op](*own)
        found[RIVAL] = {"difference": compare([told()], [expected]), "kernel": rival.name}
        runners[RIVAL] = measure.kernel_loop(other, suite.op, own)
    prepared = {}  # owns the memory that the peers borrow
    for name in suite.peers(work):
        if against is not None and name.partition("-")[0] not in against:
            continue
        count = layers or suite.layers(work, name)
        routes = {name: 1} | ({f"{name} x {count}": count} if count > 1 else {})
        try:
            ready = {
                route: suite.prepare(name, work, weights, a, threads, length)
                for route, length in routes.items()
            }
        except PeerError as error:
            found[name] = {"reason": str(error)}
            continue
        difference = compare(ready[name].outputs(), [expected])
        found[name] = {"difference": difference, "layers": count}
        prepared.update(ready)
    runners.update({route: peer.call for route, peer in prepared.items()})
    return agreement, found, measure.interleave(runners, duration_s, warmup_s, threads)


def _compare(name: str, entry: dict[str, Any], times: dict[str, measure.Samples]) -> None:
    """Adds to a peer's entry whether it agrees, its time, by which route, and its ratio to ours."""
    one, count = times[name], entry.pop("layers", 1)
    entry["agrees"] = agrees(entry["difference"])
    if name == RIVAL:  # a loop outside Python, as ours
        entry.update(one.to_json(), route="kernel", ratio=round(measure.ratio(one, times[OURS]), 4))
        return
    if count > 1:
        chain = times[f"{name} x {count}"]
        alone = measure.Samples((chain.ns - one.ns) / (count - 1), chain.inner)
        if alone.us > 0:  # not so where the machine is too busy to tell one call from a chain
            entry.update(alone.to_json(), route=f"chain of {count}", call=one.to_json())
            entry["ratio"] = round(measure.ratio(alone, times[OURS]), 4)
            return
    entry.update(one.to_json(), route="call")
    entry["ratio"] = round(measure.ratio(one, times[CALL]), 4)


def _peak(work: Any, machine: Machine, threads: int) -> measure.Peak:
    return (measure.fma_peak if work.a == "f32" else measure.int8_peak)(machine, threads)


def agrees(difference: dict[str, Any]) -> bool:
    """Whether a peer computed the same, within a step of its integers: else it is no peer.

    FBGEMM's depthwise convolutions are off by tens of steps with weights of 8 bits: its sums of
    two products saturate at 16 bits.
    """
    close = difference.get("steps", 0) <= 1 and difference.get("relative", 0.0) < 1e-4
    return close and "shape" not in difference


def _correct(difference: dict[str, Any]) -> bool:
    """Integers must be exact; float sums may be associated differently."""
    close = difference.get("steps", 0) == 0 and difference.get("relative", 0.0) < 1e-5
    return close and "shape" not in difference


def _compiled(
    kernel: Kernel,
    work: Any,
    weights: Any,
    a: np.ndarray,
    params: Any,
    machine: Machine,
    shape: tuple[int, ...],
) -> tuple[Any, tuple[Any, ...], Any]:
    """The kernel alone: its module with a function of the operator's name, its arguments, a
    reader of C, which has `shape`.
    """
    import tvm

    func = kernel.build(work, params, machine).with_attr("global_symbol", kernel.op)
    module = measure.build(func, machine)
    c = tvm.runtime.tensor(np.zeros(shape, NUMPY[work.out]))
    packed = tvm.runtime.tensor(kernel.pack(work, weights, params))
    return module, (tvm.runtime.tensor(a), packed, c), c.numpy
