"""The float convolution for CUDA by gathered rows, run by the emulator, against float64."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
from kernels import load_cuda

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate
from convolution import activations, check, conv, residual, weights
from test_conv import DENSE, FLOAT, GROUPED, SHAPES, typed

from dccompile import reference, registry
from dccompile.cuda import device, toolchain
from dccompile.errors import Error
from dccompile.machine import GPUS

NAME = "conv_f32f32f32_simt"
KERNEL = load_cuda(NAME)
A100, H100 = GPUS["cuda:sm_80"], GPUS["cuda:sm_90"]
TAKEN = DENSE | {
    name: GROUPED[name]
    for name in ("4_a_group", "group_3d_stride", "rows_of_runs", "unequal_groups", "2_a_group")
}
# without classes that are the same to this kernel as one that stays
SAME = ("3x3_7", "3x3_56", "3x3_valid", "7x1_stride", "first_layer_3x3", "3x5x5_stride", "batch")
LABELS = [label for label in TAKEN if label not in SAME]


def _work(label, **more):
    return typed(NAME, SHAPES[label], more)


def _run(work, params=None, batch=None, machine=A100, change=None, **options):
    """Runs the kernel and compares; `change` puts numbers of its own into A."""
    params = KERNEL.default(work, machine) if params is None else params
    seed = zlib.crc32(repr((work, params)).encode())
    numbers = weights(work, seed)
    batch = work.batch if batch is None else batch
    a, r = activations(work, batch, seed)
    if change is not None:
        change(a)
    out = np.full((batch, *work.outputs, work.filters), np.nan, np.float32)
    inputs = [a, KERNEL.pack(work, numbers, params)] + ([] if r is None else [r])
    function = KERNEL.build(work, params, machine)
    assert emulate.run(function, [*inputs, out], machine, **options) is None
    with np.errstate(invalid="ignore"):
        return out, reference.conv(work, numbers, a, r), f"{params}"


@pytest.mark.parametrize("label", LABELS)
def test_shape(label):
    """Every class of shapes, each with another epilogue."""
    options = list(FLOAT.values())
    work = _work(label, **options[LABELS.index(label) % len(options)])
    check(work, *_run(work, order=("forward", "reverse", "random")[LABELS.index(label) % 3]))


@pytest.mark.parametrize(
    "values",
    (
        {"wm": 4, "wn": 2, "tm": 8, "tn": 8},
        {"wm": 2, "wn": 1, "tm": 8, "tn": 4, "slices": 4, "bk": 32},
        {"wm": 1, "wn": 1, "tm": 4, "tn": 4, "columns": 32},
    ),
)
@pytest.mark.parametrize("label", ("3x3", "3x3_odd_channels"))
def test_params(label, values):
    work = replace(_work(label, bias="f32"), batch=2)
    check(work, *_run(work, KERNEL.Params(**values), machine=H100))


@pytest.mark.parametrize("label", ("pointwise_tails", "3x3", "4_a_group", "pointwise_one_pixel"))
def test_residual(label):
    work = residual(_work(label, bias="f32", activation="relu"), "f32")
    check(work, *_run(work))


@pytest.mark.parametrize(
    "label", ("3x3_stride", "pointwise_one_pixel", "pointwise_few", "first_layer_batch")
)
def test_open_batch(label):
    work = replace(_work(label), batch=None)
    for batch in (0, 1, 5, 9):
        check(work, *_run(work, batch=batch))


def test_infinity_and_nan_stay_where_they_are():
    def change(a):
        a[0, 0, 1, 1, 0], a[0, 0, -1, -1, -1] = np.inf, np.nan

    for label in ("3x3", "pointwise_tails", "3x3_odd_channels"):
        out, expected, what = _run(_work(label, activation="relu"), change=change)
        assert (np.isfinite(out) == np.isfinite(expected)).all(), what


def test_no_float_convolution_is_refused():
    """Whatever no other kernel takes, this one does; integers are not its own."""
    for work in SHAPES.values():
        floats = typed(NAME, work, {})
        assert KERNEL.refuses(floats) is None and KERNEL.refuses(work) is not None
        assert registry.select(floats, A100).kernel.name in (
            NAME,
            "depthwise_f32f32f32_simt",
            "groupconv_f32f32f32_simt",
        )


def test_default_is_a_candidate():
    for machine in (A100, H100):
        every = set(KERNEL.candidates(machine))
        for label in LABELS[::3]:
            for batch in (1, 32, None):
                work = replace(_work(label), batch=batch)
                assert KERNEL.default(work, machine) in every


@pytest.mark.parametrize("machine", (A100, H100), ids=("sm_80", "sm_90"))
def test_machine_code(machine, monkeypatch):
    """NVRTC makes code of every form, with all sums in registers."""
    monkeypatch.setenv(toolchain.VARIABLE, "nvrtc")
    try:
        compiler = toolchain.find()
    except Error as error:
        pytest.skip(str(error))
    layers = {
        "dense": conv((56, 56), 64, 64, 3, batch=32),
        "first": conv((224, 224), 3, 64, 7, 2, batch=32),
        "open": conv((56, 56), 64, 256, 1, batch=None),
        "grouped": conv((28, 28), 256, 256, 3, 2, groups=2),
    }
    for work in layers.values():
        work = residual(typed(NAME, work, {"bias": "f32", "activation": "relu"}), "f32")
        function = KERNEL.build(work, KERNEL.default(work, machine), machine)
        code = compiler.compile(device.split({"k": function}, machine).source, machine.arch)
        assert code.cubin and b".local" not in code.ptx
