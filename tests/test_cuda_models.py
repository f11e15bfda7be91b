"""Whole models on a GPU give what they give on the CPU: integers the same, floats within a bound.

The GPU is the emulator's, and with ``-m cuda`` a real one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate
import trained

import dccompile as dc
from dccompile import models, registry
from dccompile.machine import GPUS
from dccompile.quantization.quantize import quantize
from dccompile.workload import Gemm, GemmWeights

TARGETS = ["cuda:sm_80", "x86-64-v3"]


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def machine(request, tmp_path_factory):
    """The emulator as this process's compiler and driver, or a GPU of this machine."""
    with emulate.place(request.param, tmp_path_factory.mktemp("gpu")) as kind:
        yield kind


def both(model, folder, **options):
    """The model on the GPU and on the CPU, from one artifact."""
    path = dc.compile(model, targets=TARGETS, **options).save(folder / "model.dcm")
    return dc.load(path, device="cuda"), dc.load(path)


def agree(model, folder, *feeds, steps=0, relative=0.0, **options):
    """Several calls, so that a graph is captured and replayed too."""
    gpu, cpu = both(model, folder, **options)
    for feed in feeds:
        for got, want in zip(gpu.run(None, feed), cpu.run(None, feed), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            if got.dtype.kind in "iub":
                assert np.abs(got.astype(int) - want.astype(int)).max(initial=0) <= steps
            else:
                bound = relative * np.abs(want).max(initial=0)
                np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@cache
def data(name):
    return trained.arrays(trained.Trained(name).val)


def samples(name, *counts):
    """The first rows of the validation data, so many for each call."""
    wanted = [value.name for value in trained.Trained(name).model().graph.input]
    return [{key: data(name)[key][:count] for key in wanted} for count in counts]


@pytest.mark.parametrize("name", ["digits", "clicks", "sequence"])
def test_a_trained_model(machine, name, tmp_path):
    agree(trained.Trained(name).model(), tmp_path, *samples(name, 1, 9, 9, 9), relative=1e-5)


@pytest.mark.parametrize("name", ["digits", "clicks", "sequence"])
def test_a_trained_model_in_integers(machine, name, tmp_path):
    """The heads are floats of sums of integers: equal but for the order of float additions."""
    model = quantize(trained.Trained(name).model(), trained.Trained(name).calib)
    agree(model, tmp_path, *samples(name, 1, 9, 9, 9), relative=1e-6)


@pytest.mark.parametrize("embedding", ["keep", "fp16", "int8", "int4"])
def test_the_recommendation_model(machine, embedding, tmp_path):
    feeds = [models.sample_inputs("dlrm-small", batch, seed=batch) for batch in (1, 6)]
    agree(models.export("dlrm-small-int8"), tmp_path, *feeds, relative=1e-6, embedding=embedding)


@pytest.mark.parametrize("precision", ["fp16-weights", "int8-weights"])
def test_weights_in_fewer_bits(machine, precision, tmp_path):
    feeds = [models.sample_inputs("dlrm-mlp", batch, seed=batch) for batch in (1, 20)]
    agree(models.export("dlrm-mlp"), tmp_path, *feeds, relative=1e-5, precision=precision)


def test_mobilenet_in_integers(machine, tmp_path):
    """Every convolution equals the CPU's to the last bit, so the scores do."""
    feeds = [models.sample_inputs("mobilenet-v2-int8", 1)]
    agree(models.export("mobilenet-v2-int8"), tmp_path, *feeds)


def test_an_index_out_of_range_is_named_and_the_module_goes_on(machine, tmp_path):
    gpu, cpu = both(models.export("dlrm-small"), tmp_path)
    good = models.sample_inputs("dlrm-small", 2)
    bad = {**good, "sparse": good["sparse"].copy()}
    bad["sparse"][1, 3, 7] = 1000
    with pytest.raises(dc.InputError) as here:
        gpu.run(None, bad)
    with pytest.raises(dc.InputError) as there:
        cpu.run(None, bad)
    assert str(here.value) == str(there.value) and here.value.code == there.value.code
    np.testing.assert_allclose(gpu(good)[0], cpu(good)[0], rtol=1e-5)


def test_a_kernel_alone(machine, monkeypatch):
    """What ``pytest -m cuda`` does with the tests of single kernels."""
    work = Gemm(5, 24, 48, "u8", "s8", "s32")
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (5, 48), np.uint8)
    weights = GemmWeights(rng.integers(-128, 128, (48, 24), np.int8))
    choice = registry.select(work, GPUS["cuda:sm_80"])
    func = choice.kernel.build(choice.workload, choice.params, GPUS["cuda:sm_80"])
    packed = choice.kernel.pack(choice.workload, weights, choice.params)
    c = np.zeros((5, 24), np.int32)
    monkeypatch.setattr(emulate, "on_gpu", True)
    assert emulate.run(func.with_attr("dcc.kernel", choice.kernel.name), [a, packed, c]) is None
    np.testing.assert_array_equal(c, a.astype(np.int32) @ weights.b.astype(np.int32))
