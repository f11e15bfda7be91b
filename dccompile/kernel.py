"""The contract between the compiler and a hand-written schedule.

A kernel is algorithm + schedule + packing for one operator and one family of machines. The
compiler knows kernels only through this class; `dccompile.schedules` lists them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
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

    def candidates(self, machine: Machine) -> Iterator[Any]:
        """Every point of the space whose registers the machine has."""
        names = list(self.SPACE)
        for values in itertools.product(*self.SPACE.values()):
            params = self.Params(**dict(zip(names, values, strict=True)))
            if self.registers(params) <= machine.registers:
                yield params
