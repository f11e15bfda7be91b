"""Interaction kernels for CUDA, run by the emulator, against products in float64."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
from kernels import listed_cuda, load_cuda

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate
from embedding import interact
from test_interaction import SHAPES

from dccompile import registry
from dccompile.cuda import device, toolchain
from dccompile.errors import Error
from dccompile.machine import GPUS
from dccompile.workload import Interaction

NAMES = listed_cuda("interaction")
KERNELS = pytest.mark.parametrize("name", NAMES)
A100 = GPUS["cuda:sm_80"]

MORE = {
    "a tile": Interaction(4, 8, diagonal=True),
    "a tile less one": Interaction(3, 8, order="upper"),
    "a tile and one": Interaction(5, 12, bags=3),
    "odd rows of tiles": Interaction(20, 16, diagonal=True),
    "even rows of tiles": Interaction(32, 9, order="upper"),
    "several tiles a thread": Interaction(100, 8),
    "in chunks": Interaction(57, 184, order="upper", bags=2),
    "in chunks, odd": Interaction(63, 171, bags=2, diagonal=True),
}


def run(kernel, work, tile, bags, order="forward"):
    rng = np.random.default_rng(bags)
    dense = rng.standard_normal((bags, work.dim)).astype(np.float32)
    rows = rng.standard_normal((bags, work.vectors - 1, work.dim)).astype(np.float32)
    out = np.full((bags, work.dim + work.pairs), np.nan, np.float32)
    function = kernel.build(work, kernel.Params(tile), A100).with_attr("dcc.kernel", kernel.name)
    assert emulate.run(function, [dense, rows, out], A100, order=order) is None
    np.testing.assert_array_equal(out[:, : work.dim], dense)
    x = max(np.abs(dense).max(initial=0), np.abs(rows).max(initial=0))
    most = work.dim**1.5 * x**2 * 2**-24
    np.testing.assert_allclose(out, interact(work, dense, rows), rtol=0, atol=most)


@pytest.mark.parametrize("shape", [*SHAPES, *MORE])
@KERNELS
def test_shapes(name, shape):
    """With either tile, by turns, and the small ones with both."""
    work = {**SHAPES, **MORE}[shape]
    tiles = (2, 4) if work.vectors < 10 else (2 + 2 * (work.vectors % 2),)
    for tile in tiles:
        for bags in (work.bags,) if work.bags else (1, 6):
            run(load_cuda(name), work, tile, bags)


@KERNELS
def test_no_samples(name):
    run(load_cuda(name), Interaction(5, 8), 4, 0)


@pytest.mark.parametrize("order", ["reverse", "random"])
@KERNELS
def test_order_of_threads(name, order):
    run(load_cuda(name), Interaction(40, 24), 4, 2, order)
    run(load_cuda(name), Interaction(9, 8), 4, 5, order)


@KERNELS
def test_not_numbers(name):
    """One vector that is infinite leaves the products of the others alone."""
    kernel, work = load_cuda(name), Interaction(6, 8)
    x = np.ones((2, 6, 8), np.float32)
    x[0, 3], x[1, 0, 2] = np.inf, np.nan
    out = np.zeros((2, 8 + work.pairs), np.float32)
    function = kernel.build(work, kernel.Params(4), A100).with_attr("dcc.kernel", name)
    emulate.run(function, [x[:, 0].copy(), x[:, 1:].copy(), out], A100)
    np.testing.assert_array_equal(out, interact(work, x[:, 0], x[:, 1:]))


@KERNELS
def test_selection(name):
    kernel = load_cuda(name)
    assert registry.select(Interaction(27, 64), A100).kernel is kernel
    assert kernel.default(Interaction(27, 64), A100) == kernel.Params(4)
    assert kernel.default(Interaction(9, 64), A100) == kernel.Params(2)
    assert "200 vectors" in kernel.refuses(Interaction(200, 64))
    assert kernel.pack(Interaction(27, 64), None, kernel.Params(4)).size == 0


@KERNELS
def test_shared_memory(name):
    """No workload needs more than every block may have, nor more threads."""
    from dccompile.schedules.cuda._interaction import plan

    for vectors in range(2, 129):
        for dim in (8, 31, 64, 100, 512, 1000, 4096):
            for tile in (2, 4):
                cut = plan(Interaction(vectors, dim), tile)
                floats = max(vectors * cut.stride, vectors * (vectors + 1) // 2 + 3)
                assert cut.samples * floats * 4 <= 48 << 10, (vectors, dim, tile)
                assert cut.stride // 4 % 2 == 1 and cut.chunk % 4 == cut.stride % 4 == 0
                assert cut.each * cut.threads >= cut.tiles and cut.samples * cut.threads <= 256


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@KERNELS
def test_compiles(name, arch, tmp_path, monkeypatch):
    """For a GPU, with all sums in registers."""
    monkeypatch.setenv(toolchain.VARIABLE, "nvrtc")
    try:
        compiler = toolchain.find()
    except Error as missing:
        pytest.skip(str(missing))
    kernel, machine = load_cuda(name), GPUS[f"cuda:{arch}"]
    for work in (Interaction(27, 64), Interaction(128, 31, order="upper", diagonal=True)):
        for params in kernel.candidates(machine):
            built = kernel.build(work, params, machine).with_attr("dcc.kernel", name)
            code = compiler.compile(device.split({"k": built}, machine).source, arch)
            assert code.cubin[:4] == b"\x7fELF" and b".local" not in code.ptx
            if shutil.which("ptxas") is None:
                continue
            path = tmp_path / "k.ptx"
            path.write_bytes(code.ptx.rstrip(b"\0"))
            command = ["ptxas", "-v", f"-arch={arch}", str(path), "-o", str(tmp_path / "k.cubin")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            assert "0 bytes spill stores" in said
            assert int(re.search(r"Used (\d+) registers", said)[1]) <= kernel.registers(params)
