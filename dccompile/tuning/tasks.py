"""What there is to tune: the distinct workloads of models, each with the kernel chosen for it.

A task's claim to time is its share of the time of the models that use it, times its distance from
the roofline, by the trials it already had.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from .. import records, registry
from ..bench import problems
from ..bench.cost import bytes_of, cost
from ..errors import ScheduleError, UsageError
from ..kernel import Kernel
from ..machine import Gpu, Machine, missing_features, resolve
from ..workload import Conv, EmbeddingBag, Gemm, Workload, from_json

# Weights that pass through the caches between two calls of a kernel: in a benchmark alone more than
# a core's own cache, in models at most what no cache holds.
LEAST_WEIGHTS, MOST_WEIGHTS = 8 << 20, 96 << 20
SHAPES = "shapes.json"  # as the name of a model: every shape weighs the same

_CACHED = 8 << 20  # bytes that a second-level cache does not hold, and a third-level one does
_GOPS = 100.0  # where a kernel does not say how fast it is
_LEAST_ROOM = 0.05  # floors are estimates, so no task is ever at its own


@dataclass(frozen=True)
class Peaks:
    """What one core can reach at most: Gop/s, and GB/s read from the last cache and from memory."""

    int8: float
    f32: float
    cache: float
    memory: float

    @staticmethod
    def nominal(machine: Machine) -> Peaks:
        """Estimates for a machine that is elsewhere, of CPUs at 3 GHz."""
        if isinstance(machine, Gpu):  # GHz x what a multiprocessor of an A100 does in a cycle
            clocks = machine.multiprocessors * machine.clock
            near = 2.5 * machine.bandwidth
            return Peaks(4096 * clocks, 128 * clocks, near, machine.bandwidth)
        fma = 3.0 * machine.lanes * 2
        return Peaks(4 * fma if machine.vnni else 2 * fma, fma, 30.0, 12.0)

    @staticmethod
    @lru_cache(maxsize=8)
    def measure(machine: Machine) -> Peaks:
        """Measured here; `nominal` of GPUs, and where this host lacks features of the machine."""
        if missing_features(machine.features):
            return Peaks.nominal(machine)
        from ..bench import measure

        gops = []
        for peak in (measure.int8_peak(machine), measure.fma_peak(machine)):
            samples = measure.interleave({"peak": peak.loop}, 0.05, 0.02)["peak"]
            gops.append(peak.gops(samples))
        bands = [measure.stream_gbs(machine, mib=n) for n in (_CACHED >> 20, 256)]
        return Peaks(*gops, *bands)


@dataclass(eq=False)
class Task:
    """A workload, the representative of its like, to tune a kernel for on a target.

    `uses` counts its calls in every model that has it. `totals` are the estimated microseconds of
    all kernels of these models; of SHAPES the number of tasks. `weights` are bytes: of the largest
    model that has it, whose weights pass through the caches between two calls.
    """

    kernel: Kernel
    target: Machine
    workload: Workload
    uses: dict[str, int] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    weights: int = LEAST_WEIGHTS

    @cached_property
    def key(self) -> str:
        """Kernel and workload: what trials of this task have in common, on whatever target."""
        return f"{self.kernel.name} {self.record_key}"

    @cached_property
    def record_key(self) -> str:
        """The workload alone, as records and trials of one kernel name it."""
        return records.key(self.workload)

    @cached_property
    def label(self) -> str:
        """For people: ``conv_u8s8s32_vnni 1x56x56x64 -> 256, 1x1 -> u8 +s32 bias``."""
        return " ".join([self.kernel.name, *self.workload.describe().split()[2:]])

    def matches(self, pattern: str) -> bool:
        """Whether a glob is for this task: of its kernel's name or of its label."""
        return any(fnmatch.fnmatchcase(t, pattern) for t in (self.kernel.name, self.label))

    def default(self) -> Any:
        """The parameters that are used without a record."""
        return self._default

    def space(self) -> list[Any]:
        """All parameters worth a trial, each once: the default, then the most promising."""
        return list(self._space)

    @cached_property
    def _default(self) -> Any:
        return self.kernel.default(self.workload, self.target)

    @cached_property
    def _space(self) -> tuple[Any, ...]:
        points = self.kernel.candidates(self.target, self.workload)
        return tuple(dict.fromkeys([self._default, *points]))

    def floor_us(self, peaks: Peaks) -> float:
        """Microseconds that no kernel can beat: of its operations or its bytes, the longer."""
        return sum(_floor(work, self.target, peaks) for work in closed(self.workload))

    def estimate_us(self) -> float:
        """Microseconds by the speed that the kernel says it has, or by that of memory."""
        peaks = Peaks.nominal(self.target)
        if not isinstance(self.target, Gpu):
            speed = getattr(self.kernel, "gops", None) or _GOPS
            peaks = replace(peaks, int8=speed, f32=speed)
        return self.floor_us(peaks)

    def priority(self, default_us: float | None, peaks: Peaks | None, trials: int) -> float:
        """How much one more trial promises: share of model time x room to the roofline / trials.

        `default_us`: the measured time of the default, None if not known yet. `peaks`: None where
        the room is not known. `trials`: those already made.
        """
        us = self.estimate_us() if default_us is None else default_us
        room = 1.0 if peaks is None or not us else 1 - self.floor_us(peaks) / us
        share = sum(count * self._part(model, us) for model, count in self.uses.items())
        return share * max(room, _LEAST_ROOM) / (1 + trials)

    def _part(self, model: str, us: float) -> float:
        total = self.totals.get(model, 0.0)
        return (1.0 if model == SHAPES else us) / total if total else 1.0


def from_manifest(manifest: Mapping[str, Any], model: str, target: str | None = None) -> list[Task]:
    """The tasks of a compiled model, of all its variants or that of one target."""
    found: list[Task] = []
    for variant in manifest["variants"]:
        if target in (None, variant["target"]):
            rows = ((_kernel(k["name"]), from_json(k["workload"])) for k in variant["kernels"])
            found += _tasks(rows, resolve(variant["target"]), model)
    return found


def from_shapes(pattern: str | None, machine: Machine) -> list[Task]:
    """The tasks of the deployed shapes, with the kernels that the machine would choose.

    `pattern`: a glob of names of kernels, families of shapes or labels; None: all.
    Raises UsageError where none matches.
    """
    found: dict[str, Task] = {}
    for family, work in _deployed():
        try:
            choice = registry.select(work, machine)
        except ScheduleError:
            continue  # this target has no such kernel
        if isinstance(work, (Gemm, Conv)) and work.b_bits == 7 and "s7" not in choice.kernel.name:
            continue  # the form exists for the kernels that make use of it
        task = Task(choice.kernel, machine, choice.workload.representative())
        if pattern is None or task.matches(pattern) or fnmatch.fnmatchcase(family, pattern):
            found.setdefault(task.key, task)
    if not found:
        raise UsageError(
            f"--kernels '{pattern}': none of the deployed shapes on {machine.name}. "
            f"Fix: name a family ({', '.join(dict.fromkeys(f for f, _ in _deployed()))}), "
            "or a glob of kernels",
            "DC2036",
        )
    for task in found.values():
        task.uses, task.totals = {SHAPES: 1}, {SHAPES: float(len(found))}
    return list(found.values())


def merged(tasks: Iterable[Task]) -> list[Task]:
    """The distinct ones; those of several models count for each of them."""
    found: dict[tuple[str, str], Task] = {}
    for task in tasks:
        first = found.setdefault((task.target.name, task.key), replace(task, uses={}, totals={}))
        for model, count in task.uses.items():
            first.uses[model] = max(count, first.uses.get(model, 0))
        first.totals.update(task.totals)
        first.weights = max(first.weights, task.weights)
    return list(found.values())


def closed(workload: Workload) -> list[Any]:
    """The workload at each size that it is tuned for, where a dim is open; else itself."""
    name, sizes = {
        Gemm.op: ("m", problems.ROWS),
        Conv.op: ("batch", problems.BATCHES),
    }.get(workload.op, ("bags", problems.BAGS))
    if getattr(workload, name) is not None:
        return [workload]
    return [replace(workload, **{name: size}) for size in sizes]  # type: ignore[arg-type]


def _tasks(rows: Iterable[tuple[Kernel, Workload]], machine: Machine, model: str) -> Iterator[Task]:
    found: dict[str, Task] = {}
    for kernel, workload in rows:
        task = Task(kernel, machine, workload.representative())
        task = found.setdefault(task.key, task)
        task.uses[model] = task.uses.get(model, 0) + 1
    total = sum(t.uses[model] * t.estimate_us() for t in found.values())
    weights = sum(t.uses[model] * _weight_bytes(t.workload) for t in found.values())
    for task in found.values():
        task.totals[model] = total
        task.weights = min(max(weights, LEAST_WEIGHTS), MOST_WEIGHTS)
    yield from found.values()


def _kernel(name: str) -> Kernel:
    kernel = registry.named(name)
    assert kernel is not None, name
    return kernel


def _deployed() -> Iterator[tuple[str, Workload]]:
    """Family and workload of every deployed shape in every form."""
    from ..bench import embedding_bench, kernel_bench

    for suite in kernel_bench.SUITES:
        for family in suite.families:
            for form in suite.forms:
                for shape in suite.shapes(family):
                    yield family, suite.workload(form, shape)
    for storage in embedding_bench.FORMS:
        scale = "f16" if storage == "u4" else "f32"  # as the bench has them
        for bags, rows, dim, pooling in embedding_bench.shapes():
            work = EmbeddingBag((rows,), dim, storage, scale, bags=bags, pooling=pooling)
            yield "embedding", work


def _floor(work: Any, machine: Machine, peaks: Peaks) -> float:
    """Microseconds of a workload without open dims."""
    ops, nbytes, near = cost(work)
    speed = peaks.int8 if getattr(work, "a", "f32") != "f32" else peaks.f32
    band = peaks.cache if near <= machine.l3 else peaks.memory
    return max(ops / speed, nbytes / band) / 1e3


def _weight_bytes(work: Workload) -> int:
    """Of a layer's own weights; tables are read in parts, other than those each time."""
    if isinstance(work, Gemm):
        return bytes_of(work.b) * work.n * work.k
    if isinstance(work, Conv):
        return bytes_of(work.b) * prod(work.kernel) * work.group_channels * work.filters
    return 0
