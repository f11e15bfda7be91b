"""Dot products of all pairs of a sample's f32 vectors on a GPU: multiply-adds of f32, in order.

Tensor cores would round the vectors to 10 bits or need them in parts, and memory is the bound.
"""

from __future__ import annotations

from ._interaction import InteractionKernel


class InteractionSimt(InteractionKernel):
    name = "interaction_f32f32f32_simt"
    features = ("sm_80",)


KERNEL = InteractionSimt()
