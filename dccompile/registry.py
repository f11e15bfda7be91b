"""Chooses a kernel and its parameters for a workload on a machine. The only way to schedules."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from .errors import ScheduleError
from .kernel import Kernel
from .machine import Machine
from .workload import Conv, EmbeddingBag, Gemm, Interaction


@dataclass(frozen=True)
class Choice:
    """A kernel with parameters, and why: `source` is exact, nearest, family or default."""

    workload: Gemm | Conv | EmbeddingBag | Interaction
    kernel: Kernel
    params: Any
    source: str
    why: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.kernel.name, "params": asdict(self.params), "source": self.source}


@lru_cache(maxsize=1)
def kernels() -> tuple[Kernel, ...]:
    """Every kernel, preferred ones first."""
    from . import schedules

    return tuple(schedules.load())


def runnable(machine: Machine) -> list[Kernel]:
    """Kernels whose instructions the machine has."""
    return [k for k in kernels() if set(k.features) <= set(machine.features)]


def select(workload: Gemm | Conv | EmbeddingBag | Interaction, machine: Machine) -> Choice:
    """The first kernel of the list that the machine can run and that takes the workload.

    Raises ScheduleError, with every refusal, where there is none.
    """
    refusals = []
    for kernel in runnable(machine):
        if kernel.op != workload.op:
            continue
        reason = kernel.refuses(workload)
        if reason is None:
            params = kernel.default(workload, machine)
            why = "no tuning record: the default of its analytical model"
            return Choice(workload, kernel, params, "default", why)
        refusals.append(f"{kernel.name}: {reason}")
    raise ScheduleError(
        f"{workload.describe()}: no kernel for {machine.name} takes it ({'; '.join(refusals)}). "
        "Fix: report the model, the front end should have left this node to the generic schedule"
    )
