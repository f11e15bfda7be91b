"""Kernels by name: as parameters of tests, and loaded where this CPU can run them."""

from __future__ import annotations

import pytest

from dccompile import machine, schedules

TARGETS = {m.isa: m for m in machine.TARGETS.values()}


def listed(part):
    """Names of the CPU kernels of the list that have `part` in them."""
    return _listed(part, False)


def listed_cuda(part):
    """Names of the CUDA kernels of the list that have `part` in them."""
    return _listed(part, True)


def _listed(part, cuda):
    entries = [k for k in schedules.KERNELS if k.startswith("cuda.") == cuda]
    return [n for n in (k.rpartition(".")[2] for k in entries) if part in n]


def load_cuda(name):
    """The CUDA kernel of this name: the emulator runs it anywhere."""
    return next(k for k in schedules.load() if k.name == name)


def marked(names):
    """Parameters with the marker of their instruction set."""
    return [
        pytest.param(name, marks=getattr(pytest.mark, name.rpartition("_")[2])) for name in names
    ]


def load(name):
    """The kernel and the target of its instruction set; skips where the CPU lacks that."""
    kernel = next(k for k in schedules.load() if k.name == name)
    missing = machine.missing_features(kernel.features)
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    return kernel, TARGETS[name.rpartition("_")[2]]
