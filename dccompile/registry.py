"""Chooses a kernel and its parameters for a workload on a machine. The only way to schedules."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from .errors import ScheduleError
from .kernel import Kernel
from .lookup import Tuning
from .machine import Machine
from .workload import Workload


@dataclass(frozen=True)
class Choice:
    """A kernel with parameters, and why: `source` is exact, nearest, family or default.

    `record` is the id of the tuning record that speaks, `gain` what was gained where it was made.
    """

    workload: Workload
    kernel: Kernel
    params: Any
    source: str
    why: str
    record: str | None = None
    gain: float | None = None

    def to_json(self) -> dict[str, Any]:
        said = {"name": self.kernel.name, "params": asdict(self.params), "source": self.source}
        if self.record is None:
            return {**said, "why": self.why}
        return {**said, "why": self.why, "record": self.record, "gain": self.gain}


@lru_cache(maxsize=1)
def kernels() -> tuple[Kernel, ...]:
    """Every kernel, preferred ones first."""
    from . import schedules

    return tuple(schedules.load())


def named(name: str) -> Kernel | None:
    """The kernel of this name, None if there is none."""
    return next((kernel for kernel in kernels() if kernel.name == name), None)


def runnable(machine: Machine) -> list[Kernel]:
    """Kernels whose instructions the machine has."""
    return [k for k in kernels() if set(k.features) <= set(machine.features)]


def select(workload: Workload, machine: Machine, tuning: Tuning | None = None) -> Choice:
    """The first kernel of the list that the machine can run and that takes the workload.

    Its parameters are those of the tuning record that speaks for the workload, if one does.
    Raises ScheduleError, with every refusal, where there is none.
    """
    refusals = []
    for kernel in runnable(machine):
        if kernel.op != workload.op:
            continue
        reason = kernel.refuses(workload)
        if reason is None:
            return choose(kernel, workload, machine, tuning)
        refusals.append(f"{kernel.name}: {reason}")
    raise ScheduleError(
        f"{workload.describe()}: no kernel for {machine.name} takes it ({'; '.join(refusals)}). "
        "Fix: report the model, the front end should have left this node to the generic schedule"
    )


def choose(
    kernel: Kernel, workload: Workload, machine: Machine, tuning: Tuning | None = None
) -> Choice:
    """This kernel with the parameters of the record that speaks for the workload, if one does."""
    workload = kernel.narrowed(workload)
    found = tuning.find(kernel, workload, machine) if tuning else None
    if found:
        record = found.record
        why = _why(kernel, workload, found.params, found.why)
        return Choice(workload, kernel, found.params, found.source, why, record.id, record.gain)
    params = kernel.default(workload, machine)
    why = "no tuning record: the default of its analytical model"
    return Choice(workload, kernel, params, "default", _why(kernel, workload, params, why))


def _why(kernel: Kernel, workload: Workload, params: Any, why: str) -> str:
    remark = kernel.remark(workload, params)
    return f"{why}; {remark}" if remark else why
