"""The contract between the compiler and a hand-written schedule.

A kernel is algorithm + schedule + packing for one operator and one family of machines. The
compiler knows kernels only through this class; `dccompile.schedules` lists them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from .machine import Machine
from .workload import (
    Conv,
    ConvWeights,
    EmbeddingBag,
    EmbeddingTables,
    Gemm,
    GemmWeights,
    Interaction,
)

# Points of the space whose estimate is so much worse than the best one are not worth a trial.
_HOPELESS = 1.12

WorkloadT = TypeVar("WorkloadT", Gemm, Conv, EmbeddingBag, Interaction)
WeightsT = TypeVar("WeightsT", GemmWeights, ConvWeights, EmbeddingTables, None)


class Kernel(ABC, Generic[WorkloadT, WeightsT]):
    """One hand-written kernel: ``<op>_<dtypes>_<isa>`` names file, list entry, log and bench row.

    It is for workloads of the operator `op`. `features` are the CPU flags it needs, `Params` a
    frozen dataclass of its knobs whose fields' legal values `SPACE` lists.
    """

    name: ClassVar[str]
    features: ClassVar[tuple[str, ...]]
    Params: ClassVar[type]
    SPACE: ClassVar[dict[str, tuple[Any, ...]]]

    @property
    def op(self) -> str:
        return self.name.rsplit("_", 2)[0]

    @abstractmethod
    def refuses(self, workload: WorkloadT) -> str | None:
        """Why this kernel cannot run the workload, or None if it can."""

    @abstractmethod
    def registers(self, params: Any) -> int:
        """Vector registers that a micro-kernel of these parameters keeps alive."""

    @abstractmethod
    def default(self, workload: WorkloadT, machine: Machine) -> Any:
        """Parameters to use where no tuning record speaks."""

    @abstractmethod
    def pack(self, workload: WorkloadT, weights: WeightsT, params: Any) -> np.ndarray:
        """All constants of the kernel as one buffer: uint8 (bytes,), bytes a multiple of 64."""

    @abstractmethod
    def build(self, workload: WorkloadT, params: Any, machine: Machine) -> Any:
        """The kernel as a ``tvm.tirx.PrimFunc``.

        Every buffer is row-major and 64-byte aligned, W (bytes,) uint8 is as packed. In order,

        - gemm: A (m, k); W; with workload.runtime a_zero (1,) and, unless out is s32, a_scale
          (1,) f32; C (m, n)
        - conv: A (batch, d, h, w, channels); W; with workload.residual R of C's shape;
          C (batch, d, h, w, filters)
        - embedding_bag: index; unless the layout is 'fixed' its offsets or lengths; with
          workload.weighted the weights, f32, of the index's shape; W; out (bags, tables, dim) f32
        - interaction: dense (bags, dim); rows (bags, vectors - 1, dim); out (bags, dim + pairs)

        m, batch, bags and the number of terms are symbolic int64 where the workload leaves them
        open.
        """

    def narrowed(self, workload: WorkloadT) -> WorkloadT:
        """The workload without the facts about weights that this kernel makes no use of.

        What it is compiled and tuned for: layers that differ in such facts alone share both.
        """
        if isinstance(workload, Gemm) and (workload.outliers or workload.spill):
            return replace(workload, outliers=(), spill=0)
        return workload

    def remark(self, workload: WorkloadT, params: Any) -> str:
        """What people should know about the kernel's choice for a workload, or ""."""
        return ""

    def effect(self, workload: WorkloadT, params: Any) -> Hashable:
        """What the code for a workload depends on: points of equal effect are the same code."""
        return params

    def estimate(self, workload: WorkloadT, params: Any, machine: Machine) -> float:
        """Estimated time in a unit of the kernel's own: what a point is worth trying for."""
        return 1.0

    def candidates(self, machine: Machine, workload: WorkloadT | None = None) -> Iterator[Any]:
        """Every point of the space whose registers the machine has.

        With a workload: the default first, then the points with an effect of their own that are
        not hopeless by `estimate`, the best of it first, so that each of them is worth a trial.
        """
        names = list(self.SPACE)
        values = itertools.product(*self.SPACE.values())
        points = (self.Params(**dict(zip(names, v, strict=True))) for v in values)
        points = (p for p in points if self.registers(p) <= machine.registers)
        if workload is None:
            yield from points
            return
        default = self.default(workload, machine)
        distinct = {self.effect(workload, default): default}
        for params in points:
            distinct.setdefault(self.effect(workload, params), params)
        estimates = {p: self.estimate(workload, p, machine) for p in distinct.values()}
        most = _HOPELESS * min(estimates.values())
        for params in sorted(estimates, key=lambda p: (p is not default, estimates[p])):
            if params is default or estimates[params] <= most:
                yield params
