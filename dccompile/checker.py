"""`check`: can it compile, and what runs in which precision? No code is generated."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import ModelError, Problem, UnsupportedError
from .machine import resolve


@dataclass(frozen=True)
class Report:
    """What `check` found. `nodes` holds, per node: name, op, precision, kernel, reason."""

    problems: list[Problem] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)

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
) -> Report:
    """Reports every problem of a model at once, by node name, or how each node would run.

    Arguments as for `compile`. Problems are returned, not raised; wrong arguments raise
    UsageError.
    """
    names = [targets] if isinstance(targets, str) else list(targets)
    machines = [resolve(t) for t in names]
    if "torch" not in sys.modules:
        from .runtime.loader import import_tvm_ffi

        import_tvm_ffi()  # without torch, which its package would import
    from . import pipeline

    source = model.SerializeToString() if hasattr(model, "SerializeToString") else model
    kernels: dict[str, str] = {}
    try:
        front = pipeline.front(source, dict(shapes) if shapes else None, precision, embedding)
        for machine in machines:
            lowered = pipeline.lower(front, machine, pipeline.Constants())
            for placed in lowered.placed:
                kernels.setdefault(placed.site.name, placed.choice.kernel.name)
    except (ModelError, UnsupportedError) as error:
        return Report(problems=list(error.problems))
    nodes = [{**n, "kernel": kernels.get(n["site"])} for n in front.recovered.nodes]
    return Report(nodes=nodes)
