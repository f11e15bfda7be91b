"""The integer convolution for CUDA by tensor cores, run by the emulator, exact as the reference."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from dataclasses import replace

import numpy as np
import pytest
from kernels import listed_cuda, load_cuda

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate
from convolution import activations, check, conv, residual, weights
from test_conv import INTEGER, RESIDUALS, SHAPES

from dccompile import reference
from dccompile.cuda import device, toolchain
from dccompile.errors import Error
from dccompile.machine import GPUS
from dccompile.workload import NUMPY

(NAME,) = listed_cuda("conv_u8s8s32_mma")
KERNEL = load_cuda(NAME)
A100, H100 = GPUS["cuda:sm_80"], GPUS["cuda:sm_90"]
RICH = {"padded": True, "shifted": True, "bias": "s32"}


def point(*values):
    return KERNEL.Params(*values)


def run(work, params=None, batches=(None,), order="forward", machine=A100):
    """Computes random problems on the emulator and compares."""
    params = KERNEL.default(work, machine) if params is None else params
    seed = zlib.crc32(repr((work, params)).encode())
    constants = weights(work, seed)
    packed = KERNEL.pack(work, constants, params)
    function = KERNEL.build(work, params, machine)
    for batch in batches:
        a, r = activations(work, work.batch if batch is None else batch, seed)
        out = np.full((len(a), *work.outputs, work.filters), 77, NUMPY[work.out])
        arrays = [a, packed, *([] if r is None else [r]), out]
        assert emulate.run(function, arrays, machine, order=order) is None
        check(work, out, reference.conv(work, constants, a, r), f"{params} batch {batch}")


# ---- classes of shapes ----
TILE = point(16, 16, 2, 2, 1, 1, 3)  # 32 pixels x 32 filters, 32 of K a stage
EDGES = {
    "one_tile": (conv((4, 8), 32, 32), TILE),
    "tile_minus_1": (conv((1, 31), 31, 31), TILE),
    "tile_plus_1": (conv((3, 11), 33, 33), TILE),
    "many_tiles": (conv((7, 9), 80, 70, 3), TILE),
    "one_pixel": (conv((1, 1), 48, 40, 3), TILE),
    "one_filter": (conv((5, 5), 16, 1, 3), TILE),
    "one_channel": (conv((9, 9), 1, 16, 5), TILE),
    "8_channels": (conv((5, 6), 8, 24, 3), TILE),
    "12_channels": (conv((5, 6), 12, 20, 3, 2), TILE),
    "images_in_a_tile": (conv((3, 3), 16, 16, 3, batch=5), TILE),
    "1x31": (conv((2, 40), 16, 12, (1, 31)), TILE),  # more taps than bits of a row
    "1x31_3_channels": (conv((2, 40), 3, 12, (1, 31)), TILE),
    "1x31_inside": (conv((2, 40), 16, 12, (1, 31), pad=0, dilation=1), TILE),
    "cropped": (replace(conv((8, 9), 16, 16, 3, pad=0), pads=((0, 0), (0, -1), (1, -2))), TILE),
}
POINTS = {  # what the parameters change, on a shape with tails everywhere
    "warp_64x64": point(64, 64, 1, 1, 1, 2, 2),
    "warp_32x64": point(32, 64, 2, 1, 1, 2, 2),
    "warp_64x16": point(64, 16, 1, 2, 1, 1, 4),
    "k_2": point(32, 32, 1, 2, 2, 1, 3),
    "k_4": point(16, 16, 1, 1, 4, 2, 3),
    "k_4_deep": point(16, 32, 2, 1, 4, 1, 4),
    "dynamic_shared": point(64, 64, 2, 2, 1, 2, 4),
}
CLASSES = (
    *("pointwise", "pointwise_tails", "pointwise_stride", "pointwise_few", "three_dims_1"),
    *("3x3_7", "3x3_stride", "3x3_valid", "3x3_dilated", "3x3_narrow", "3x3_beyond"),
    *("3x3_odd_channels", "3x3_asymmetric", "5x5_wide_pad", "7x1_stride", "one_dim"),
    *("three_dims", "first_layer_3x3", "first_layer_asymmetric", "3x5x5_stride"),
    *("rows_of_runs", "rows_of_runs_dense", "16_a_group", "unequal_groups", "pointwise_groups"),
)


@pytest.mark.parametrize("label", CLASSES)
def test_shapes(label):
    """As the other kernels have them, at the default parameters."""
    run(replace(SHAPES[label], **RICH))


@pytest.mark.parametrize("label", EDGES)
def test_edges(label):
    work, params = EDGES[label]
    run(replace(work, **RICH), params)


@pytest.mark.parametrize("label", POINTS)
def test_points(label):
    run(replace(conv((9, 9), 40, 100, 3, batch=2), **RICH), POINTS[label])


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_order_of_threads(order):
    run(replace(conv((6, 6), 40, 36, 3), **RICH), point(32, 16, 1, 2, 2, 1, 3), order=order)


@pytest.mark.parametrize("label", ["pointwise_tails", "3x3_stride"])
def test_open_batch(label):
    run(replace(SHAPES[label], batch=None, **RICH), batches=(0, 1, 2, 5))


# ---- what follows the sums ----
@pytest.mark.parametrize("label", INTEGER)
def test_outputs(label):
    """With stores of 16 bytes, and with filters whose number is odd."""
    for filters, params in ((64, point(16, 64, 1, 1, 1, 1, 2)), (41, TILE)):
        run(replace(conv((4, 5), 16, filters, 3), **INTEGER[label]), params)


@pytest.mark.parametrize("filters", [64, 40, 36, 41])  # read by 16, 8, 4 and single bytes
@pytest.mark.parametrize("label", RESIDUALS)
def test_residuals(label, filters):
    work = replace(conv((4, 5), 20, filters), bounded=filters == 40, **RICH)
    if filters == 36:
        work = replace(work, out="s8", clamped=True)
    run(residual(work, *RESIDUALS[label]), point(32, 64, 1, 1, 1, 1, 2))


def test_sums_beyond_all_codes():
    """y beyond 2**31 saturates, and codes are limited before the zero point is added."""
    work = replace(conv((3, 4), 16, 20), shifted=True)
    constants = weights(work, 1)
    constants.scale *= np.float32(1e12)
    a, _ = activations(work, 1, 1)
    out = np.zeros((1, *work.outputs, work.filters), "uint8")
    packed = KERNEL.pack(work, constants, TILE)
    emulate.run(KERNEL.build(work, TILE, A100), [a, packed, out], A100)
    np.testing.assert_array_equal(out, reference.conv(work, constants, a))


# ---- choices ----
MODELS = {
    "first": conv((224, 224), 3, 64, 7, 2),
    "56": conv((56, 56), 64, 64, 3),
    "56_end": residual(conv((56, 56), 64, 256, bias="s32", bounded=True), "u8", "u8"),
    "14": conv((14, 14), 256, 256, 3),
    "7": conv((7, 7), 512, 512, 3),
    "7_end": residual(conv((7, 7), 512, 2048, bias="s32", bounded=True), "u8", "u8"),
    "odd": conv((28, 28), 40, 41),
    "3d": conv((4, 14, 14), 256, 256, 3, padded=True, shifted=True),
    "groups": conv((75, 100), 272, 272, groups=4),
    "words": conv((14, 14), 64, 100, 3, out="f32", bias="f32", activation="sigmoid"),
}
BATCHES = (1, 32, None)


@pytest.mark.parametrize("label", ["first", "7_end", "words"])
def test_candidates(label):
    """Distinct, within the space, each of an effect of its own, the default first; all fit."""
    for machine in (A100, H100, GPUS["cuda:sm_86"]):
        whole = set(KERNEL.candidates(machine))
        for batch in BATCHES:
            work = replace(MODELS[label], batch=batch)
            points = list(KERNEL.candidates(machine, work))
            assert points[0] == KERNEL.default(work, machine)
            assert len({KERNEL.effect(work, p) for p in points}) == len(points)
            assert set(points) <= whole
            assert all(p.shared <= machine.shared for p in points)
            assert all(KERNEL.registers(p) * p.threads <= 65536 for p in points)


def test_small_layers_use_the_whole_gpu():
    for label in ("56", "14", "7", "7_end", "odd"):
        work = MODELS[label]
        p = KERNEL.default(work, H100)
        blocks = -(-np.prod(work.outputs) // p.bm) * -(-work.filters // p.bn)
        assert blocks * p.k >= 128, (label, p)


def test_refuses():
    work = conv((5, 5), 16, 16, 3)
    assert KERNEL.refuses(work) is None
    assert KERNEL.refuses(replace(work, b_bits=7, batch=None)) is None
    assert "f32" in KERNEL.refuses(replace(work, a="f32", b="f32", out="f32"))
    assert "32 bits" in KERNEL.refuses(conv((1 << 15, 1 << 15), 16, 16, 3))
    assert "65536 groups" in KERNEL.refuses(conv((3, 3), 1 << 16, 1 << 16, 3, groups=1 << 16))
    assert "apart" in KERNEL.refuses(conv((3, 3), 16, 16, 3, dilation=20000))


def test_offsets_beyond_32_bits():
    """With 3 GB of C the code is the same but for the base of a tile."""
    work = conv((56, 56), 64, 256, batch=4000)
    assert (
        "(int64_t)"
        in device.split({"k": KERNEL.build(work, TILE, A100)}, A100).source.partition("__global__")[
            2
        ]
    )
    few = replace(work, batch=4)
    text = device.split({"k": KERNEL.build(few, TILE, A100)}, A100).source
    assert "(int64_t)" not in text.partition("__global__")[2]


def test_zero_point_of_padding():
    """A workload that says A's zero point is 0 is not packed with another."""
    work = conv((5, 5), 16, 16, 3)
    constants = weights(work, 0)
    constants.a_zero = 3
    with pytest.raises(ValueError, match="zero point 3"):
        KERNEL.pack(work, constants, TILE)


def compiler():
    try:
        return toolchain.find()
    except Error as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("machine", [A100, H100], ids=lambda m: m.arch)
@pytest.mark.parametrize("label", MODELS)
def test_machine_code(label, machine, tmp_path, monkeypatch):
    """Defaults compile; all of a thread's numbers stay in registers."""
    work = replace(MODELS[label], batch=32 if label in ("56", "7_end") else None)
    monkeypatch.setenv(toolchain.VARIABLE, "nvrtc")
    found = compiler()
    params = KERNEL.default(work, machine)
    source = device.split({"k": KERNEL.build(work, params, machine)}, machine).source
    code = found.compile(source, machine.arch)
    assert b".local" not in code.ptx, params
    if shutil.which("ptxas") is None:
        return
    (tmp_path / "k.ptx").write_bytes(code.ptx.rstrip(b"\0"))
    command = ["ptxas", "-v", "-arch", machine.arch, str(tmp_path / "k.ptx"), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    assert "0 bytes spill stores" in said, (params, said)
    used = int(re.search(r"Used (\d+) registers", said)[1])
    assert used <= KERNEL.registers(params), (params, used)
