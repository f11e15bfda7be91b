"""Dot products of all pairs of a sample's f32 vectors, AVX2.

Zen 4, 1 thread, 64 samples of 27 x 64: 66 us.
"""

from __future__ import annotations

from typing import ClassVar

from ...machine import Machine
from ...workload import Interaction
from ._interaction import InteractionKernel, Tile


class InteractionAvx2(InteractionKernel):
    name = "interaction_f32f32f32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {"accumulators": (4, 6, 8, 10, 12), "lanes": (8,)}

    def default(self, workload: Interaction, machine: Machine) -> Tile:
        return Tile(12, 8)


KERNEL = InteractionAvx2()
