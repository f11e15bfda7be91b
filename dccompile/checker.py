"""`check`: can it compile, and what runs in which precision? No code is generated."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import lookup
from .errors import ModelError, Problem, UnsupportedError
from .machine import resolve


@dataclass(frozen=True)
class Report:
    """What `check` found. `nodes` holds, per node: name, op, precision, kernel, reason.

    `variants` holds, per target, its name and the kernels, and `islands` the float islands, as a
    manifest does, `warnings` what is wrong with the tuning logs.
    """

    problems: list[Problem] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    variants: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    islands: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


def check(
    model: Any,
    *,
    targets: str | Sequence[str] = ("host",),
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    precision: str = "keep",
    embedding: str = "keep",
    tuning: str | os.PathLike[str] | None = None,
    require_tuned: bool = False,
) -> Report:
    """Reports every problem of a model at once, by node name, or how each node would run.

    Arguments as for `compile`. Problems are returned, not raised; wrong arguments raise
    UsageError, kernels without a tuning record, where they need one, TuningError.
    """
    names = [targets] if isinstance(targets, str) else list(targets)
    cpus = lookup.cpus(names)
    logs = lookup.logs(tuning)
    if "torch" not in sys.modules:
        from .runtime.loader import import_tvm_ffi

        import_tvm_ffi()  # without torch, which its package would import
    from . import pipeline
    from .frontend.islands import islands

    source = model.SerializeToString() if hasattr(model, "SerializeToString") else model
    lowered = []
    try:
        front = pipeline.front(source, dict(shapes) if shapes else None, precision, embedding)
        for name, cpu in cpus.items():
            tuned = lookup.Tuning(logs, name, cpu)
            lowered.append(pipeline.lower(front, resolve(name), pipeline.Constants(), tuned))
    except (ModelError, UnsupportedError) as error:
        return Report(problems=list(error.problems))
    if require_tuned:
        pipeline.refuse_untuned("the model", lowered)
    kernels: dict[str, str] = {}
    for placed in (p for low in lowered for p in low.placed):
        kernels.setdefault(placed.site.name, placed.choice.kernel.name)
    nodes = [{**n, "kernel": kernels.get(n["site"])} for n in front.recovered.nodes]
    variants = [{"target": v.machine.name, "kernels": pipeline.kernels(v)} for v in lowered]
    warnings = [line for low in lowered for line in low.warnings]
    return Report([], nodes, variants, warnings, islands(front.recovered).to_json())
