"""Embedding bags on CUDA, in the emulator: bit by bit as the reference, errors as on x86."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from dataclasses import replace

import numpy as np
import pytest
import test_embedding_bag as x86
from kernels import listed, listed_cuda, load_cuda

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate
from memory import aligned, tensor

from dccompile import reference, registry
from dccompile.cuda import device, toolchain
from dccompile.errors import Error
from dccompile.machine import GPUS
from dccompile.workload import EmbeddingBag

NAMES = listed_cuda("embedding_bag")
KERNELS = pytest.mark.parametrize("name", NAMES)
U8, F32 = "embedding_bag_u8f32_warp", "embedding_bag_f32f32_warp"
A100 = GPUS["cuda:sm_80"]
SMALL = replace(A100, multiprocessors=2)  # so that a block has several bags where lengths count


class Case:
    """A workload on a kernel, with its tables, parameters and function."""

    def __init__(self, name, machine=SMALL, params=None, **options):
        self.kernel, self.machine = load_cuda(name), machine
        options = {"rows": (60,), "storage": self.kernel.storage, **options}
        self.work = EmbeddingBag(**options)
        self.params = self.kernel.Params(*params) if params else None
        self.params = self.params or self.kernel.default(self.work, machine)
        self.seed = zlib.crc32(repr((self.work, self.params)).encode())
        self.tables = x86._tables(self.work, self.seed)
        self.packed = self.kernel.pack(self.work, self.tables, self.params)
        function = self.kernel.build(self.work, self.params, machine)
        self.function = function.with_attr("dcc.kernel", name)

    def call(self, inputs, bags, **options):
        """The output, and what was reported."""
        out = np.full((bags, self.work.tables, self.work.dim), np.nan, np.float32)
        arrays = [*(a for a in inputs if a is not None), self.packed, out]
        return out, emulate.run(self.function, arrays, self.machine, **options)

    def run(self, bags=None, **options):
        bags = self.work.bags or bags or 13
        inputs = x86._inputs(self.work, self.seed + bags, bags)
        out, said = self.call(inputs, bags, **options)
        assert said is None
        expected = reference.embedding_bag(self.work, self.tables, *inputs)
        np.testing.assert_array_equal(out, expected, err_msg=f"{self.work} {self.params}")


# ---- classes ----
BAGS = (
    {"pooling": 20, "bags": 13},
    {"layout": "offsets", "bags": 13, "mode": "mean"},
    {"layout": "lengths", "weighted": True, "index": "s32"},
    {"layout": "offsets+1", "negative": True, "mode": "mean"},
    {"pooling": 3, "weighted": True, "rows": (9, 60, 1), "index": "s32"},
    {"layout": "offsets", "padding": 3, "weighted": True, "scale": "f16"},
    {"layout": "lengths", "padding": 2, "negative": True, "mode": "mean"},
)
DIMS = (1, 3, 16, 64, 100, 128, 256)


@pytest.mark.parametrize("dim", DIMS)
@KERNELS
def test_dims(name, dim):
    """Every width of every storage, with bags of another kind for each."""
    options = BAGS[(DIMS.index(dim) + 3 * NAMES.index(name)) % len(BAGS)]
    Case(name, dim=dim, **options).run()


MORE = {
    "pooling_0": {"dim": 20, "pooling": 0},
    "pooling_1": {"dim": 24, "pooling": 1, "rows": (9, 300, 1), "scale": "f16"},
    "pooling_100": {"dim": 33, "pooling": 100, "rows": (70, 8), "mode": "mean"},
    "tables": {"dim": 8, "pooling": 5, "rows": tuple(range(1, 27))},
    "padding_mean": {"dim": 21, "pooling": 20, "padding": 3, "mode": "mean"},
    "padding_outside": {"dim": 48, "layout": "offsets", "padding": -1, "index": "s32"},
    "wide": {"dim": 900, "pooling": 9, "bags": 3, "weighted": True},
    "wide_odd": {"dim": 333, "layout": "offsets", "bags": 3, "scale": "f16"},
    "half_scales_weighted": {"dim": 36, "pooling": 6, "weighted": True, "scale": "f16"},
}


@pytest.mark.parametrize("label", MORE)
def test_bags(label):
    name = NAMES[(3 * list(MORE).index(label) + 2) % len(NAMES)]
    case = Case(name, **MORE[label])
    for bags in (1, 14) if case.work.bags is None else (None,):
        case.run(bags)


@pytest.mark.parametrize("point", [(4, 8, 1), (8, 4, 4), (16, 16, 1)])
def test_params(point):
    """Fewer lanes than a row has units: several to a lane, or passes."""
    name = NAMES[point[0] % 3]
    for options in ({"dim": 64, "pooling": 20}, {"dim": 104, "layout": "offsets"}):
        Case(name, params=point, **options).run()


def test_lengths_of_many_bags():
    """More bags than lanes, in ranges that do not come out even, and fewer than blocks."""
    case = Case(U8, dim=16, layout="lengths")
    for bags in (1, 5, 300):
        case.run(bags)


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_order_of_threads(order):
    for options in ({"layout": "lengths"}, {"pooling": 5, "rows": (7, 8)}):
        Case(U8, dim=16, **options).run(order=order)


def test_no_bags():
    for layout in ("fixed", "offsets", "lengths"):
        case = Case(F32, dim=16, layout=layout, pooling=4)
        index = np.zeros((0, 1, 4) if layout == "fixed" else (0,), np.int64)
        cuts = None if layout == "fixed" else np.zeros(0, np.int64)
        assert case.call((index, cuts), 0)[1] is None
    index = np.zeros(3, np.int64)
    _, said = case.call((index, cuts), 0)
    assert said == "DC2113: lengths: their sum is 0, the number of indices is 3"


def test_numbers_that_are_none():
    """A row that is skipped has no part in the sum, whatever its weight."""
    case = Case(F32, dim=16, pooling=40, padding=3, weighted=True, bags=5)
    index, cuts, weight = x86._inputs(case.work, 1, 5)
    case.tables.tables[0][5, ::3] = np.nan
    case.tables.tables[0][7] = -np.inf
    case.tables.tables[0][9] = -0.0
    case.packed = case.kernel.pack(case.work, case.tables, case.params)
    weight[index == 3] = np.nan
    index[4] = 3
    index[3, :, 1:] = 3
    index[3, :, 0], weight[3, :, 0] = 9, 1.0
    out, said = case.call((index, cuts, weight), 5)
    assert said is None
    expected = reference.embedding_bag(case.work, case.tables, index, cuts, weight)
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


# ---- errors ----
@pytest.mark.parametrize("label", x86.ERRORS)
def test_error(label):
    """The same text as on x86, where that can run, and nothing out of range is touched."""
    options, change, pattern = x86.ERRORS[label]
    case = Case(U8, dim=24, **options)
    index, cuts, _ = x86._inputs(case.work, case.seed, 13)
    change(index, cuts)
    _, said = case.call((index, cuts), 13)
    assert re.search(pattern, said) and said.startswith("DC211")
    case.run()
    library, cases = x86._error_cases(listed("embedding_bag_u8f32")[-1])
    given = [tensor(a) for a in (index, cuts) if a is not None]
    out, _ = aligned((13, case.work.tables, 24), np.float32)
    with pytest.raises(ValueError) as caught:
        cases[label].call(library, given, out)
    assert said == str(caught.value)


def test_names_in_errors():
    """The first of the wrong indices of a bag, by the table's own name as far as it fits."""
    case = Case(U8, dim=16, pooling=40, rows=(60, 70))
    case.tables = replace(case.tables, names=("first", "zweite$%ü" * 11))
    case.packed = case.kernel.pack(case.work, case.tables, case.params)
    index, cuts, _ = x86._inputs(case.work, case.seed, 13)
    index[5, 1, 38:] = 70
    index[5, 1, 21] = -1
    _, said = case.call((index, cuts), 13)
    assert said == (
        f"DC2110: embedding table '{('zweite$%ü' * 11)[:94]}' of 70 rows: index -1 at [5, 1, 21] "
        "of bag 5; indices must be from 0 to 69"
    )


def test_lengths_below_0_come_first():
    case = Case(U8, dim=16, layout="lengths")
    index, cuts, _ = x86._inputs(case.work, case.seed, 600)
    cuts[[77, 500]] = -5, -(2**62)
    _, said = case.call((index, cuts), 600)
    assert said == "DC2113: lengths: -5 at [77] is below 0"


# ---- selection and packing ----
@KERNELS
def test_refuses(name):
    kernel = load_cuda(name)
    work = EmbeddingBag((4,), 16, kernel.storage, pooling=1)
    assert kernel.refuses(work) is None and kernel.op == work.op
    assert "not" in kernel.refuses(replace(work, storage="u8" if name != U8 else "f32"))
    assert "2147483648 rows" in kernel.refuses(replace(work, rows=(4, 2**31)))
    assert registry.select(work, A100).kernel.name == name


@KERNELS
def test_same_bytes_as_x86(name):
    """One artifact has kernels for CPUs and GPUs, and the tables once."""
    kernel = load_cuda(name)
    work = EmbeddingBag((10, 3), 20, kernel.storage, pooling=1)
    tables = replace(x86._tables(work, 0), names=("a", "b"))
    other = registry.named(f"embedding_bag_{kernel.storage}f32_avx2")
    np.testing.assert_array_equal(kernel.pack(work, tables, None), other.pack(work, tables, None))
    assert kernel.nbytes(work) == other.nbytes(work)


@KERNELS
def test_space(name):
    """Every point fits the registers, and so does what it is cut down to."""
    from dccompile.schedules.cuda._embedding import plan

    kernel = load_cuda(name)
    for dim in (1, 31, 64, 300, 1024):
        work = EmbeddingBag((50,), dim, kernel.storage, pooling=40)
        points = list(kernel.candidates(A100, work))
        assert points and points[0] == kernel.default(work, A100)
        for params in points:
            cut = plan(work, params)
            assert cut.rows * cut.each * cut.words <= 64
            assert cut.passes * cut.lanes * cut.each >= cut.units


# ---- compilers ----
BUILT = (
    {"dim": 64, "pooling": 20},
    {"dim": 64, "pooling": 10},
    {"dim": 128, "layout": "lengths", "weighted": True},
    {"dim": 33, "layout": "offsets", "index": "s32"},
)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@KERNELS
def test_compiles(name, arch, tmp_path, monkeypatch):
    """For a GPU, without spills; as many registers as rows under way take, so they are."""
    from dccompile.schedules.cuda._embedding import plan

    monkeypatch.setenv(toolchain.VARIABLE, "nvrtc")
    try:
        compiler = toolchain.find()
    except Error as missing:
        pytest.skip(str(missing))
    for options in BUILT:
        case = Case(name, GPUS[f"cuda:{arch}"], **options)
        source = device.split({"k": case.function}, case.machine).source
        code = compiler.compile(source, arch)
        assert code.cubin[:4] == b"\x7fELF"
        if shutil.which("ptxas") is None:
            continue
        path = tmp_path / "k.ptx"
        path.write_bytes(code.ptx.rstrip(b"\0"))
        command = ["ptxas", "-v", f"-arch={arch}", str(path), "-o", str(tmp_path / "k.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert not re.search(r"[1-9]\d* bytes spill", said), f"{options}: {said}"
        cut = plan(case.work, case.params)
        used = int(re.search(r"Used (\d+) registers", said)[1])
        assert used > cut.rows * (cut.each * cut.words + cut.pieces), f"{options}: {said}"
        assert used <= case.kernel.registers(case.params), f"{options}: {said}"
