"""The contract between the compiler and a hand-written schedule.

A kernel is algorithm + schedule + packing for one operator and one family of machines. The
compiler knows kernels only through this class; `dccompile.schedules` lists them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from .machine import Machine
from .workload import Gemm, GemmWeights


class Kernel(ABC):
    """One hand-written kernel: ``<op>_<a><b><c>_<isa>`` names file, list entry, log and bench row.

    `features` are the CPU flags it needs, `Params` a frozen dataclass of its knobs whose fields'
    legal values `SPACE` lists.
    """

    name: ClassVar[str]
    features: ClassVar[tuple[str, ...]]
    Params: ClassVar[type]
    SPACE: ClassVar[dict[str, tuple[Any, ...]]]

    @abstractmethod
    def refuses(self, workload: Gemm) -> str | None:
        """Why this kernel cannot run the workload, or None if it can."""

    @abstractmethod
    def registers(self, params: Any) -> int:
        """Vector registers that a micro-kernel of these parameters keeps alive."""

    @abstractmethod
    def default(self, workload: Gemm, machine: Machine) -> Any:
        """Parameters to use where no tuning record speaks."""

    @abstractmethod
    def pack(self, workload: Gemm, weights: GemmWeights, params: Any) -> np.ndarray:
        """All constants of the kernel as one buffer: uint8 (bytes,), bytes a multiple of 64."""

    @abstractmethod
    def build(self, workload: Gemm, params: Any, machine: Machine) -> Any:
        """The kernel as a ``tvm.tirx.PrimFunc``.

        Parameters, in order: A (m, k); W (bytes,) uint8, as packed; with workload.runtime
        a_zero (1,) and, unless out is s32, a_scale (1,) f32; C (m, n). Every buffer is row-major
        and 64-byte aligned; m is a symbolic int64 where the workload leaves it open.
        """

    def candidates(self, machine: Machine) -> Iterator[Any]:
        """Every point of the space whose registers the machine has."""
        names = list(self.SPACE)
        for values in itertools.product(*self.SPACE.values()):
            params = self.Params(**dict(zip(names, values, strict=True)))
            if self.registers(params) <= machine.registers:
                yield params
