"""The vector functions of the x86 schedules against float64, over all of float32."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import tvm
from dccompile.schedules.x86 import _math
from dccompile.schedules.x86._ir import T, prim_func, ramp

from dccompile import machine

COUNT = 1 << 16
EXACT = {  # function: float64 form, limits at -inf, -0.0 and +inf, largest relative error
    "exp": (np.exp, (0.0, 1.0, np.inf), 1.0e-7),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), (0.0, 0.5, 1.0), 2.0e-7),
    "tanh": (np.tanh, (-1.0, -0.0, 1.0), 2.5e-7),
}


def _function(name, lanes):
    with prim_func(name) as builder:
        x = T.arg("x", T.buffer((COUNT,), "float32"))
        y = T.arg("y", T.buffer((COUNT,), "float32"))
        with T.serial(0, COUNT // lanes) as i:
            value = T.Bind(x[ramp(i * lanes, lanes)])
            T.buffer_store(y, getattr(_math, name)(value, lanes), [ramp(i * lanes, lanes)])
    return builder.get()


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("x86-64-v3", marks=pytest.mark.avx2),
        pytest.param("x86-64-v4", marks=pytest.mark.avx512),
    ],
)
def test_functions(target):
    isa = machine.TARGETS[target]
    missing = machine.missing_features(isa.features)
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    module = tvm.IRModule({name: _function(name, isa.lanes) for name in EXACT})
    library = tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "mcpu": isa.mcpu}))
    rng = np.random.default_rng(0)
    inputs = [rng.normal(0, width, COUNT).astype(np.float32) for width in (0.01, 1, 10, 60)]
    inputs += [rng.integers(0, 2**32, COUNT, np.uint32).view(np.float32) for _ in range(4)]
    for x in inputs:
        x[:4] = (-np.inf, -0.0, np.inf, np.nan)
        for name, (exact, limits, bound) in EXACT.items():
            y = tvm.runtime.tensor(np.zeros(COUNT, np.float32))
            library[name](tvm.runtime.tensor(x), y)
            got = y.numpy()
            np.testing.assert_array_equal(got[:3], np.float32(limits))
            np.testing.assert_array_equal(np.signbit(got[:2]), np.signbit(limits[:2]))
            np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
            with np.errstate(over="ignore", invalid="ignore"):
                expected = exact(x.astype(np.float64))
                normal = (np.abs(expected) > 2.0**-125) & (np.abs(expected) < 2.0**127.99)
                error = np.abs(got / expected - 1)[normal].max()
            assert error <= bound, f"{name}: relative error {error:.2e}"
