"""What ``bench --kernels`` runs over: an operator, its deployed shapes, its forms and its peers."""

from __future__ import annotations

import importlib.resources
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .. import registry
from ..errors import UsageError
from ..kernel import Kernel
from ..lookup import Tuning
from ..machine import TARGETS, Gpu, Machine, cpu_type, missing_features
from .peers import Prepared

Shape = tuple[int, ...]
RIVAL = "widening"  # the peer that is a kernel of ours: exact sums in 32 bits


@dataclass(frozen=True)
class Form:
    """A kind of workload: the types of A, B and C, the bits that B uses, and how it is made.

    `weights`: uniform codes, or as training leaves them, see `gemm_cases`.
    """

    a: str
    b: str
    out: str
    b_bits: int = 8
    weights: str = "uniform"

    def __str__(self) -> str:
        made = f" {self.weights}" if self.weights != "uniform" else ""
        return f"{self.a}{'s7' if self.b_bits == 7 else self.b}->{self.out}{made}"


class Suite(ABC):
    """An operator's benches.

    Shapes are those of ``shapes.json``, tuples of numbers. `families` are names of the lists that
    they come from.
    """

    op: ClassVar[str]
    forms: ClassVar[tuple[Form, ...]]
    families: ClassVar[tuple[str, ...]]

    @abstractmethod
    def shapes(self, family: str) -> Sequence[Shape]:
        """The deployed shapes of a family."""

    @abstractmethod
    def workload(self, form: Form, shape: Shape) -> Any:
        """The workload of a shape."""

    @abstractmethod
    def problem(self, work: Any) -> tuple[Any, np.ndarray]:
        """Weights and A whose outputs fill the range of the output type."""

    @abstractmethod
    def reference(self, work: Any, weights: Any, a: np.ndarray) -> np.ndarray:
        """C, exactly; of float workloads nearly."""

    def forms_of(self, kernel: Kernel) -> tuple[Form, ...]:
        """The forms of workload that a kernel is benched on, where it takes them."""
        return self.forms

    def rival(self, work: Any, kernel: Kernel, machine: Machine) -> Kernel | None:
        """A kernel of ours to compare this one with, as the peer RIVAL."""
        return None

    @abstractmethod
    def peers(self, work: Any) -> list[str]:
        """Peers' routes, whether installed or not: the peer's name, a dash and more if any."""

    def layers(self, work: Any, peer: str) -> int:
        """Length of a chain of equal operators whose time tells that of one; 1: there is none."""
        return 1

    @abstractmethod
    def prepare(
        self, peer: str, work: Any, weights: Any, a: np.ndarray, threads: int, layers: int
    ) -> Prepared:
        """A peer ready to compute the workload on A, `layers` times over.

        Raises PeerError with the peer's reason where it cannot.
        """

    @abstractmethod
    def tiny(self, form: Form) -> Any:
        """A workload of next to no work: its time is that of the call."""

    @abstractmethod
    def large(self, shape: Shape) -> bool:
        """Whether the shape has work enough to be near a peak."""

    @abstractmethod
    def label(self, shape: Shape) -> str:
        """The shape in a table."""


def parameters(
    kernel: Kernel, work: Any, machine: Machine, logs: Path | None, cpu: str | None = None
) -> registry.Choice:
    """What the logs of a folder say about a workload on this host, else the default.

    `cpu` is the type of processor that is in use, by default this CPU's.
    """
    return registry.choose(kernel, work, machine, _tuning(logs, machine.name, cpu or cpu_type()))


@lru_cache(maxsize=8)
def _tuning(logs: Path | None, target: str, cpu: str) -> Tuning:
    return Tuning(logs, target, cpu)


def usable(kernel: Kernel, target: Machine | None) -> bool:
    """Whether a bench may run a kernel: on the target if that is a GPU, else on some CPU."""
    machines = [target] if isinstance(target, Gpu) else TARGETS.values()
    return any(set(kernel.features) <= set(m.features) for m in machines)


def fitting(kernel: Kernel, target: Machine | None) -> Machine:
    """The target if it runs a usable kernel, else the least that does.

    Raises UsageError where this host is none.
    """
    if isinstance(target, Gpu):
        return target
    fits = [m for m in TARGETS.values() if set(kernel.features) <= set(m.features)]
    machine = target if target in fits else fits[0]
    if missing := missing_features(machine.features):
        raise UsageError(
            f"--kernels: {kernel.name} needs {machine.name}, this host lacks {', '.join(missing)}. "
            "Fix: name kernels that this host runs"
        )
    return machine


@dataclass(frozen=True)
class Case:
    """A kernel on a machine, and what to feed it: a form of workload, a family's shapes."""

    suite: Suite
    kernel: Kernel
    machine: Machine
    form: Form
    family: str
    shapes: tuple[Shape, ...]

    def __str__(self) -> str:
        return f"{self.kernel.name} {self.form}"


def deployed(family: str) -> list[Shape]:
    """A list of the shape set, largest innermost structure first as the set has it."""
    text = (importlib.resources.files("dccompile.models") / "shapes.json").read_text()
    return [tuple(shape) for shape in json.loads(text)[family]]
