"""How far tuning logs reach: what they have for a model's kernels, and what tuning brought."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import lookup, registry
from ..bench import measure
from ..errors import UsageError
from ..records import Record
from . import tasks

SOURCES = ("exact", "nearest", "family", "default")


@dataclass(frozen=True)
class Gains:
    """What tuning brought in some records: times of the default by those of the winner."""

    records: int
    cpus: list[str]
    tuned: int  # something else than the default won
    mean: float | None  # geometric, of all
    best: float | None
    newest: str | None  # date


def gains(found: Sequence[Record]) -> Gains:
    """Figures of records that `compile` uses."""
    values = [r.gain for r in found]
    return Gains(
        len(found),
        sorted({r.cpu for r in found}),
        sum(v > 1 for v in values),
        _mean(values),
        max(values, default=None),
        max((r.date for r in found), default=None),
    )


def _mean(values: Sequence[float]) -> float | None:
    """The geometric mean, None of nothing."""
    return measure.geometric_mean(values) if values else None


@dataclass(frozen=True)
class Covered:
    """One distinct workload of a model: where its parameters come from, and why.

    `gain` over the default and the microseconds of a call of default and winner are those of an
    exact record, else None.
    """

    label: str
    kernel: str
    uses: int
    source: str  # exact | nearest | family | default
    why: str
    params: dict[str, Any]
    gain: float | None
    default_us: float | None
    us: float | None


def cover(
    manifest: Mapping[str, Any], model: str, target: str, folder: Path, cpu: str | None
) -> tuple[list[Covered], list[str]]:
    """The distinct workloads of a compiled model's variant, and warnings of the logs.

    `cpu` is the kind of CPU that it is for, None for any. Raises UsageError for the manifest of a
    version with other kernels.
    """
    tuning = lookup.Tuning(folder, target, cpu)
    known = {kernel.name for kernel in registry.kernels()}
    own = [v for v in manifest["variants"] if v["target"] == target]
    used = {k["name"] for v in own for k in v["kernels"]}
    try:
        found = tasks.from_manifest({"variants": own}, model) if used <= known else None
    except ValueError:
        found = None
    if found is None:
        made = manifest.get("producer", "another version")
        raise UsageError(
            f"MODEL '{model}': made by {made}, whose kernels this version does not all have. "
            "Fix: give the ONNX model that it was compiled from"
        )
    return [_covered(task, tuning, model) for task in found], tuning.warnings


def _covered(task: tasks.Task, tuning: lookup.Tuning, model: str) -> Covered:
    found = tuning.find(task.kernel, task.workload, task.target)
    params = task.default() if found is None else found.params
    own = found.record if found is not None and found.source == "exact" else None
    return Covered(
        task.label,
        task.kernel.name,
        task.uses[model],
        "default" if found is None else found.source,
        "no record is near" if found is None else found.why,
        asdict(params),
        own.gain if own else None,
        own.default_us if own else None,
        own.us if own else None,
    )


@dataclass(frozen=True)
class Summary:
    """Some workloads together.

    `calls` counts uses; `speedup` is the time of all calls with an exact record by the default's
    parameters, by that of the winners: what tuning brings to these kernels together.
    """

    workloads: int
    calls: int
    counts: dict[str, int]  # workloads by source
    tuned_calls: int  # with anything but the default's parameters for want of a record
    mean_gain: float | None  # geometric, over the workloads with an exact record
    speedup: float | None


def summary(rows: Sequence[Covered]) -> Summary:
    """Of one model, or of one kernel in it."""
    counts = Counter(row.source for row in rows)
    exact = [(r.uses, r.default_us, r.gain) for r in rows if r.gain and r.default_us]
    before = sum(uses * us for uses, us, _ in exact)
    after = sum(uses * us / gain for uses, us, gain in exact)
    return Summary(
        len(rows),
        sum(row.uses for row in rows),
        {source: counts[source] for source in SOURCES},
        sum(row.uses for row in rows if row.source != "default"),
        _mean([gain for *_, gain in exact]),
        before / after if exact else None,
    )
