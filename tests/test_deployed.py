"""Every GEMM kernel at its default parameters, over the whole set of deployed shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from kernels import listed
from memory import tensor

from dccompile import machine, reference, registry
from dccompile.bench import gemm_cases, kernel_bench
from dccompile.generic import legalize, stack
from dccompile.workload import NUMPY, Gemm

KERNELS = listed("gemm")


def _check(work: Gemm, weights: Any, a: np.ndarray, got: np.ndarray) -> None:
    expected = reference.gemm(work, weights, a)
    if work.a != "f32":
        np.testing.assert_array_equal(got, expected)
        return
    b = np.abs(weights.b.astype(np.float64))
    bound = work.k * np.finfo(np.float32).eps * (np.abs(a.astype(np.float64)) @ b)
    assert (np.abs(got - expected) <= bound).all()


@pytest.mark.parametrize("name", KERNELS)
def test_deployed_shapes(name: str) -> None:
    kernel = next(k for k in registry.kernels() if k.name == name)
    if missing := machine.missing_features(kernel.features):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    case = kernel_bench.cases(name, None)[0]
    every = [gemm_cases.workload(case.form, *shape) for shape in gemm_cases.shapes()]
    works = [work for work in every if kernel.refuses(work) is None]
    assert len(works) == len(every) or "split" in name  # that one takes large shapes alone
    assert len(works) > 5
    params = [kernel.default(work, case.machine) for work in works]
    functions = {
        f"f{i}": kernel.build(work, p, case.machine).with_attr("global_symbol", f"f{i}")
        for i, (work, p) in enumerate(zip(works, params, strict=True))
    }
    built = stack.build(tvm.IRModule(functions), legalize.target_of(case.machine))
    library = tvm.runtime.Executable(built)
    for i, (work, p) in enumerate(zip(works, params, strict=True)):
        weights, a = gemm_cases.problem(work)
        out = tensor(np.zeros((a.shape[0], work.n), NUMPY[work.out]))
        library[f"f{i}"](tensor(a), tensor(kernel.pack(work, weights, p)), out)
        _check(work, weights, a, out.numpy())
