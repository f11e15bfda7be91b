"""Depthwise and group convolutions for CUDA, run by the emulator, against the reference."""

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
from test_conv import DEPTHWISE, FLOAT, GROUPED, INTEGER, RESIDUALS, SHAPES, typed

from dccompile import reference, registry
from dccompile.cuda import device, toolchain
from dccompile.errors import Error
from dccompile.machine import GPUS
from dccompile.workload import NUMPY

NAMES = [n for n in listed_cuda("conv") + listed_cuda("depthwise") if not n.startswith("conv_")]
KERNELS = pytest.mark.parametrize("name", NAMES)
DW, DWF = "depthwise_u8s8s32_dp4a", "depthwise_f32f32f32_simt"
GROUP, GROUPF = "groupconv_u8s8s32_dp4a", "groupconv_f32f32f32_simt"
A100, H100 = GPUS["cuda:sm_80"], GPUS["cuda:sm_90"]

MORE = {  # shapes that the kernels cut in ways of their own
    "dw_1x11": conv((3, 13), 8, 8, (1, 11), groups=8),
    "dw_9x9_stride": conv((11, 10), 8, 8, 9, 2, groups=8),
    "dw_far_pad": conv((3, 4), 8, 8, 3, pad=4, groups=8),
    "dw_one_side": replace(conv((7, 9), 8, 8, (3, 2), groups=8), pads=((0, 0), (0, 2), (1, 0))),
    "dw_dilated_stride": conv((9, 8), 20, 20, 3, 2, dilation=2, groups=20),
    "dw_tall": conv((19, 2), 16, 16, (5, 1), groups=16),
    "multiplied": conv((5, 6), 8, 16, 3, groups=8),
    "multiplied_odd": conv((4, 5), 5, 15, 3, groups=5),
    "3_a_group": conv((5, 6), 12, 12, 3, groups=4),
    "3_a_group_odd": conv((5, 6), 9, 9, 3, 2, groups=3),
    "5_to_6_a_group": conv((4, 5), 15, 18, 3, groups=3),
    "33_to_7_a_group": conv((4, 4), 66, 14, 3, groups=2),
    "group_1x11": conv((3, 13), 16, 16, (1, 11), groups=4),
}
# Parameters besides the default, which for such small problems is the smallest tile.
POINTS = {
    DW: [(2, 2, 1), (4, 1, 2), (1, 4, 1), (8, 2, 1), (2, 1, 4), (4, 2, 2)],
    DWF: [(2, 2, 4), (4, 1, 2), (1, 4, 1), (8, 2, 2)],
    GROUP: [(2, 1, 1), (4, 2, 2), (7, 1, 4), (8, 1, 1)],
    GROUPF: [(2, 1, 4), (4, 2, 2), (7, 1, 1), (8, 2, 1)],
}
ENDS = {DW: "dw_24", DWF: "dw_24", GROUP: "8_a_group_overlap", GROUPF: "8_a_group_overlap"}
TAILS = {DW: "dw_few", DWF: "dw_few", GROUP: "3_a_group_odd", GROUPF: "3_a_group_odd"}


class Case:
    """A workload on a kernel, with its weights, parameters, and function."""

    def __init__(self, name, work, params=None, machine=A100):
        self.kernel, self.work, self.machine = load_cuda(name), work, machine
        self.params = self.kernel.default(work, machine)
        if params is not None:
            self.params = self.kernel.Params(*params)
        self.seed = zlib.crc32(repr((work, self.params)).encode())
        self.weights = weights(work, self.seed)
        self.packed = self.kernel.pack(work, self.weights, self.params)
        built = self.kernel.build(work, self.params, machine)
        self.function = built.with_attr("dcc.kernel", name)

    def call(self, a, r=None, **options):
        out = np.full((len(a), *self.work.outputs, self.work.filters), 77, NUMPY[self.work.out])
        emulate.run(
            self.function, [a, self.packed, *([] if r is None else [r]), out], self.machine,
            **options,
        )  # fmt: skip
        return out

    def run(self, batch=None, **options):
        batch = batch if self.work.batch is None else self.work.batch
        a, r = activations(self.work, batch, self.seed)
        expected = reference.conv(self.work, self.weights, a, r)
        check(self.work, self.call(a, r, **options), expected, str(self.params))


def shapes(name):
    """Those that the kernel takes, by name."""
    kernel = load_cuda(name)
    found = {n: typed(name, w, {}) for n, w in {**DEPTHWISE, **GROUPED, **MORE}.items()}
    own = {n: w for n, w in found.items() if w.depthwise == ("depthwise" in name)}
    return {n: w for n, w in own.items() if kernel.refuses(w) is None}


def epilogues(name):
    return FLOAT if "_f32f32f32_" in name else INTEGER


def every_shape():
    return [pytest.param(name, n, id=f"{name}-{n}") for name in NAMES for n in shapes(name)]


@pytest.mark.parametrize(("name", "shape"), every_shape())
def test_shapes(name, shape):
    """Each with another epilogue and other parameters."""
    i = list(shapes(name)).index(shape)
    more = list(epilogues(name).values())
    points = [None, *POINTS[name]]
    work = replace(shapes(name)[shape], **more[i % len(more)])
    Case(name, work, points[i % len(points)]).run()


@KERNELS
def test_epilogues(name):
    whole, tails = (shapes(name)[s[name]] for s in (ENDS, TAILS))
    for i, more in enumerate(epilogues(name).values()):
        Case(name, replace((whole, tails)[i % 2], **more), (1, 1, 1 + i % 2)).run()


@KERNELS
def test_residuals(name):
    if "_f32f32f32_" in name:
        added = [("f32", "", {}), ("f32", "", {"bias": "f32", "activation": "relu"})]
    else:
        plain = {"shifted": True, "padded": True, "bias": "s32"}
        added = [(kind, inner, plain) for kind, inner in RESIDUALS.values()]
        added += [("u8", "u8", {"bounded": True}), ("u8", "", {"out": "s8", "clamped": True})]
    for i, (kind, inner, more) in enumerate(added):
        for which in (ENDS, TAILS) if i < 2 else (ENDS,):
            work = replace(shapes(name)[which[name]], **more)
            Case(name, residual(work, kind, inner), (1, 1, 1)).run()


@KERNELS
def test_open_batch(name):
    case = Case(name, replace(shapes(name)[ENDS[name]], batch=None), (4, 1, 1))
    for batch in (0, 1, 2, 5):
        case.run(batch)


@KERNELS
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_order_of_threads(name, order):
    Case(name, shapes(name)[ENDS[name]], (2, 1, 1)).run(order=order)


@pytest.mark.parametrize("name", [DW, GROUP])
def test_extremes(name):
    """The largest sums of either sign, where A is outside too."""
    work = replace(shapes(name)[ENDS[name]], out="s32", padded=True)
    case = Case(name, work, (2, 1, 1))
    for a, b, zero in ((255, 127, 0), (255, -128, 0), (0, -128, 255), (0, 127, 255)):
        case.weights.b[:], case.weights.a_zero = b, zero
        case.packed = case.kernel.pack(work, case.weights, case.params)
        values = np.full((1, *work.size, work.channels), a, np.uint8)
        expected = reference.conv(work, case.weights, values)
        np.testing.assert_array_equal(case.call(values), expected)


@pytest.mark.parametrize("name", [DWF, GROUPF])
def test_infinity_and_nan_stay_where_they_are(name):
    for which in (ENDS, TAILS):
        case = Case(name, replace(shapes(name)[which[name]], activation="relu"), (2, 1, 2))
        a, _ = activations(case.work, 1, case.seed)
        a[0, 0, 1, 1, 0], a[0, 0, -1, -1, -1] = np.inf, np.nan
        with np.errstate(invalid="ignore"):
            expected = reference.conv(case.work, case.weights, a)
        out = case.call(a)
        assert (np.isfinite(out) == np.isfinite(expected)).all()
        assert (np.isnan(out) == np.isnan(expected)).all()


def test_every_convolution_has_a_kernel():
    for machine in (A100, H100):
        for work in (SHAPES | MORE).values():
            for kind in ("u8s8s32", "f32f32f32"):
                work = typed(f"conv_{kind}_", work, {})
                kernel = registry.select(work, machine).kernel
                assert kernel.op == "conv" and kind in kernel.name
                expected = "depthwise" if work.depthwise else "conv"
                assert expected in kernel.name


def test_large_groups_are_left_to_dense_kernels():
    work = conv((7, 7), 96, 96, 3, groups=3)
    assert "tensor cores" in load_cuda(GROUP).refuses(work)
    floats = typed(GROUPF, conv((7, 7), 128, 128, groups=2), {})
    assert "shared memory" in load_cuda(GROUPF).refuses(floats)


@KERNELS
def test_defaults_fill_the_machine(name):
    """A single image is cut into small strips; where there are many, threads take more each."""
    small = typed(name, conv((14, 14), 512, 512, 3, groups=512 if "depth" in name else 128), {})
    kernel = load_cuda(name)
    plans = [kernel.plan(w, kernel.default(w, H100)) for w in (small, replace(small, batch=256))]
    one, many = (p.across * p.strips.down * p.work.filters / p.strips.units for p in plans)
    assert one < many
    blocks = plans[0].strips.blocks
    assert blocks[0] * blocks[1] >= H100.multiprocessors // 2


# ---- code for GPUs ----
def machine_code(case):
    """PTX, and what ptxas says of registers and spills, "" where it is not there."""
    split = device.split({"k": case.function}, case.machine)
    try:
        code = toolchain.find().compile(split.source, case.machine.arch)
    except Error as error:
        pytest.skip(f"no compiler for CUDA: {error}")
    assert code.cubin[:4] == b"\x7fELF"
    return code.ptx.rstrip(b"\0")


@KERNELS
@pytest.mark.parametrize("machine", [A100, H100], ids=lambda m: m.arch)
def test_code_keeps_everything_in_registers(name, machine, monkeypatch, tmp_path):
    monkeypatch.setenv(toolchain.VARIABLE, "nvrtc")
    groups = 64 if "depth" in name else 16
    work = typed(name, conv((28, 28), 64, 64, 3, groups=groups, padded=True, shifted=True), {})
    for params in (None, POINTS[name][-1]):
        case = Case(name, work, params, machine)
        ptx = machine_code(case)
        assert b".local" not in ptx
        assert b"ld.global.nc" in ptx and b"st.global" in ptx
        assert (b"dp4a.u32.s32" if "dp4a" in name else b"fma.rn.f32") in ptx
        if shutil.which("ptxas"):
            path = tmp_path / "k.ptx"
            path.write_bytes(ptx)
            command = ["ptxas", "-v", "-arch", machine.arch, str(path), "-o", str(tmp_path / "k")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            assert "0 bytes spill stores, 0 bytes spill loads" in said
            used = int(re.search(r"Used (\d+) registers", said)[1])
            assert used <= 1.35 * case.kernel.registers(case.params)


@pytest.mark.parametrize("name", [DW, GROUP])
def test_large_images_are_addressed_with_64_bits(name):
    work = conv((9, 20000, 20000), 64, 64, 3, groups=64 if name == DW else 16)
    case = Case(name, work, (2, 1, 1))
    assert b"dp4a" in machine_code(case)


def test_what_dense_kernels_refuse_is_taken():
    work = conv((9, 20000, 20000), 64, 8, 3)
    assert registry.select(work, A100).kernel.name == GROUP
