"""Every embedding kernel of the list, bit by bit against the reference, over classes of bags."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from kernels import listed, load, marked
from memory import aligned, before_a_hole, tensor

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import tvm

from dccompile import reference, registry
from dccompile.bench import measure
from dccompile.errors import ScheduleError
from dccompile.runtime import ffi
from dccompile.workload import NUMPY, EmbeddingBag, EmbeddingTables, Gemm

NAMES = listed("embedding_bag")
KERNELS = pytest.mark.parametrize("name", marked(NAMES))
ONE = pytest.mark.parametrize("name", marked(["embedding_bag_u8f32_avx512"]))


# ---- data ----
def _tables(work, seed):
    """Random rows; scales of either sign, so that sums cancel."""
    rng = np.random.default_rng(seed)
    tables = []
    for rows in work.rows:
        if work.storage in ("f32", "f16"):
            values = rng.standard_normal((rows, work.dim)).astype(NUMPY[work.storage])
        else:
            values = rng.integers(0, 256, (rows, work.row_bytes)).astype(np.uint8)
            parts = rng.uniform(-1, 1, (rows, 2)).astype(NUMPY[work.scale]).view(np.uint8)
            values[:, -parts.shape[1] :] = parts
        tables.append(values)
    return EmbeddingTables(tables)


def _inputs(work, seed, bags):
    """Index with the first and last rows in it; offsets or lengths of bags, some empty; weights."""
    rng = np.random.default_rng(seed + 1)
    kind = NUMPY[work.index]
    if work.layout == "fixed":
        size, lengths = (bags, work.pooling), None
    else:
        lengths = rng.integers(0, 30, bags)
        lengths[:: max(1, bags // 3)] = 0
        size = (int(lengths.sum()),)
    columns = []
    for rows in work.rows:
        index = rng.integers(-rows if work.negative else 0, rows, size)
        ends = rng.choice([0, rows - 1, -rows if work.negative else 0], size)
        index = np.where(rng.random(size) < 0.2, ends, index)
        if work.padding is not None:
            index = np.where(rng.random(size) < 0.3, work.padding, index)
        columns.append(index.astype(kind))
    index = np.stack(columns, axis=1) if work.layout == "fixed" else columns[0]
    cuts = None
    if lengths is not None:
        ends = np.append(0, np.cumsum(lengths))
        cuts = {"lengths": lengths, "offsets": ends[:-1], "offsets+1": ends}[work.layout]
        cuts = cuts.astype(kind)
    weight = rng.uniform(-2, 2, index.shape).astype(np.float32) if work.weighted else None
    return index, cuts, weight


class Case:
    """A workload with its tables, parameters and name in the compiled module."""

    def __init__(self, kernel, target, work, params=None):
        self.work, self.params = work, params or kernel.default(work, target)
        self.seed = zlib.crc32(repr((work, self.params)).encode())
        self.tables = _tables(work, self.seed)
        self.symbol = f"f{self.seed:x}"
        function = kernel.build(work, self.params, target)
        self.function = function.with_attr("global_symbol", self.symbol)
        self.packed = kernel.pack(work, self.tables, self.params)
        self.w = tensor(self.packed)

    def run(self, library, bags=None, guard=0):
        """Runs on `bags` bags, or those of the workload, and compares."""
        bags = self.work.bags or bags or 13
        inputs = _inputs(self.work, self.seed + bags, bags)
        out, raw = aligned((bags, self.work.tables, self.work.dim), np.float32, guard)
        self.call(library, [tensor(a) for a in inputs if a is not None], out)
        expected = reference.embedding_bag(self.work, self.tables, *inputs)
        np.testing.assert_array_equal(out, expected, err_msg=f"{self.work} {self.params}")
        if guard:
            out.view(np.uint8)[...] = 0x5A
            assert (raw == 0x5A).all(), f"{self.work}: bytes around the output were written"

    def call(self, library, inputs, out):
        library[self.symbol](*inputs, self.w, tvm.runtime.from_dlpack(out))


def _compile(cases, target):
    functions = {case.symbol: case.function for case in cases}
    config = {"kind": "llvm", "mcpu": target.mcpu, "mattr": list(target.mattr)}
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        return tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(config))


# ---- classes ----
FIXED = {"pooling": 20, "bags": 13}
WIDTHS = {
    "1": {"dim": 1, **FIXED},
    "7": {"dim": 7, **FIXED, "index": "s32"},
    "16": {"dim": 16, **FIXED, "negative": True},
    "31": {"dim": 31, **FIXED, "weighted": True},
    "32": {"dim": 32, "layout": "offsets", "bags": 13},
    "64": {"dim": 64, "layout": "lengths"},
    "100": {"dim": 100, "layout": "offsets+1", "index": "s32", "bags": 13},
    "128": {"dim": 128, "pooling": 20, "mode": "mean"},
    "256": {"dim": 256, **FIXED, "weighted": True},
    "300": {"dim": 300, "layout": "offsets", "weighted": True, "scale": "f16"},
    "900": {"dim": 900, **FIXED},
}
# What does not depend on how rows are stored: on the kernels of LOOPS.
BAGS = {
    "pooling_0": {"dim": 20, "pooling": 0},
    "pooling_1": {"dim": 24, "pooling": 1, "rows": (9, 300, 1)},
    "pooling_200": {"dim": 33, "pooling": 200, "rows": (70, 8), "mode": "mean"},
    "tables": {"dim": 40, "pooling": 5, "rows": tuple(range(1, 27)), "scale": "f16"},
    "tables_s32": {"dim": 16, "pooling": 17, "rows": (5, 80), "index": "s32", "negative": True},
    "padding": {"dim": 21, "pooling": 20, "padding": 3, "mode": "mean"},
    "padding_outside": {"dim": 64, "layout": "offsets", "padding": -1, "mode": "mean"},
    "padding_negative": {"dim": 30, "pooling": 9, "padding": 2, "negative": True, "index": "s32"},
    "mean_f16": {"dim": 48, "layout": "lengths", "mode": "mean", "scale": "f16", "index": "s32"},
    "threads": {"dim": 16, "pooling": 100, "bags": 70},
    "threads_tables": {"dim": 16, "pooling": 30, "rows": (100, 3, 50)},
    "threads_lengths": {"dim": 16, "layout": "lengths", "weighted": True},
}


LOOPS = marked(["embedding_bag_f32f32_avx2", *NAMES[4:6]])


@cache
def _cases(name, which):
    kernel, target = load(name)
    cases = {
        label: Case(kernel, target, EmbeddingBag(**{"rows": (60,), "storage": kernel.storage, **o}))
        for label, o in (WIDTHS if which == "widths" else BAGS).items()
    }
    return _compile(cases.values(), target), cases


@KERNELS
@pytest.mark.parametrize("label", WIDTHS)
def test_width(name, label):
    library, cases = _cases(name, "widths")
    for bags in (1, 13):
        cases[label].run(library, bags, guard=256)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("label", BAGS)
def test_bags(name, label):
    library, cases = _cases(name, "bags")
    for bags in (700,) if "threads" in label else (1, 2, 13):
        cases[label].run(library, bags, guard=256)


@pytest.mark.parametrize("name", marked([NAMES[4], NAMES[-1]]))
def test_params(name):
    """Every point of the space, of one table and of several."""
    kernel, target = load(name)
    cases = []
    for i, params in enumerate(kernel.candidates(target)):
        rows = ((50,), (9, 20, 7))[i % 2]
        work = EmbeddingBag(rows, 16, kernel.storage, bags=12, pooling=(3, 40)[i // 2 % 2])
        cases.append(Case(kernel, target, work, params))
    assert cases
    library = _compile(cases, target)
    for case in cases:
        case.run(library)


@ONE
def test_no_bags(name):
    kernel, target = load(name)
    for layout in ("fixed", "offsets", "lengths"):
        work = EmbeddingBag((5,), 16, "u8", layout=layout, pooling=4)
        case = Case(kernel, target, work)
        library = _compile([case], target)
        index = np.zeros((0, 1, 4) if layout == "fixed" else (0,), np.int64)
        cuts = [] if layout == "fixed" else [np.zeros(0, np.int64)]
        inputs = [tensor(a) for a in (index, *cuts)]
        library[case.symbol](*inputs, case.w, tensor(np.zeros((0, 1, 16), np.float32)))


# ---- memory ----
@KERNELS
def test_memory_bounds(name):
    """Nothing past the inputs is read (that would be a segmentation fault)."""
    kernel, target = load(name)
    cases = []
    for dim in (1, 7, 9, 17, 31, 64):
        work = EmbeddingBag((4, 2), dim, kernel.storage, bags=4, pooling=8, weighted=True)
        cases.append(Case(kernel, target, work))
    library = _compile(cases, target)
    for case in cases:
        index, _, weight = _inputs(case.work, case.seed, 4)
        index[:, 1] = 1  # the last row
        held = [before_a_hole(a) for a in (index, weight, case.packed)]
        out, _ = aligned((4, 2, case.work.dim), np.float32)
        library[case.symbol](*(t for t, _ in held), tvm.runtime.from_dlpack(out))
        expected = reference.embedding_bag(case.work, case.tables, index, None, weight)
        np.testing.assert_array_equal(out, expected, err_msg=str(case.work))


# ---- errors ----
def _place(at, value):
    def change(index, cuts):
        index[at] = value

    return change


def _cut(at, value):
    def change(index, cuts):
        cuts[at] = value

    return change


TWO = {"rows": (60, 77), "pooling": 20}
ERRORS = {
    "rows": (TWO, _place((3, 1, 19), 77), "DC2110: .* '1' of 77 rows: index 77 at .3, 1, 19. "),
    "below_0": (TWO, _place((0, 0, 0), -1), "DC2110: .* '0' .* -1 at .0, 0, 0. .* from 0 to 59"),
    "least": (TWO, _place((12, 0, 8), -(2**63)), "index -9223372036854775808 at .12, 0, 8. "),
    "largest": (TWO, _place((12, 0, 8), 2**63 - 1), "index 9223372036854775807 at .12, 0, 8. "),
    "s32": ({"index": "s32", "pooling": 20}, _place((1, 0, 3), -(2**31)), "index -2147483648 at"),
    "negative": (
        {"negative": True, "pooling": 20},
        _place((12, 0, 7), -61),
        "index -61 at .12, 0, 7. of bag 12; indices must be from -60 to 59",
    ),
    "flat": ({"layout": "offsets"}, _place(17, 60), "index 60 at .17. of bag"),
    "flat_negative_padding": (
        {"layout": "lengths", "negative": True, "padding": -61, "index": "s32"},
        _place(17, 60),
        "index 60 at .17. of bag",
    ),
    "falls": ({"layout": "offsets"}, _cut(6, 1), "DC2112: offsets: bag 5 is from .* to 1 of"),
    "past_the_end": ({"layout": "offsets"}, _cut(12, 10**6), "DC2112: .* to 1000000 of"),
    "begins_below_0": ({"layout": "offsets+1"}, _cut(0, -1), "DC2112: .* bag 0 is from -1 to"),
    "ends_past": ({"layout": "offsets+1"}, _cut(13, 10**6), "DC2112: .* bag 12 .* to 1000000 of"),
    "length_below_0": ({"layout": "lengths"}, _cut(5, -2), "DC2113: lengths: -2 at .5."),
    "lengths_sum": ({"layout": "lengths"}, _cut(5, 10**6), "DC2113: .* sum is 1000.*, the number"),
}


@cache
def _error_cases(name):
    kernel, target = load(name)
    cases = {}
    for label, (options, _, _) in ERRORS.items():
        work = EmbeddingBag(**{"rows": (60,), "dim": 24, "storage": kernel.storage, **options})
        cases[label] = Case(kernel, target, work)
    return _compile({c.symbol: c for c in cases.values()}.values(), target), cases


@pytest.mark.parametrize("name", marked(NAMES[4:6]))
@pytest.mark.parametrize("label", ERRORS)
def test_error(name, label):
    library, cases = _error_cases(name)
    case, (_, change, message) = cases[label], ERRORS[label]
    index, cuts, _ = _inputs(case.work, case.seed, 13)
    change(index, cuts)
    out, _ = aligned((13, case.work.tables, 24), np.float32)
    with pytest.raises(ValueError, match=message) as caught:
        case.call(library, [tensor(a) for a in (index, cuts) if a is not None], out)
    assert str(caught.value).startswith("DC211")
    case.run(library)  # an error leaves nothing behind


@ONE
@pytest.mark.parametrize("threads", (1, 2))
def test_error_in_a_thread(name, threads):
    kernel, target = load(name)
    work = EmbeddingBag((60, 70), 16, "u8", pooling=30)
    tables = replace(_tables(work, 0), names=("first", "zweite" * 40))
    function = kernel.build(work, kernel.default(work, target), target)
    library = measure.build(function.with_attr("global_symbol", "bags"), target)
    index, _, _ = _inputs(work, 0, 500)
    index[499, 1, 29] = 70
    out, _ = aligned((500, 2, 16), np.float32)
    packed = tensor(kernel.pack(work, tables, kernel.default(work, target)))
    ffi.configure_threads(threads)
    text = "table '(zweite){17}zw' of 70 rows: index 70 at .499, 1, 29."
    with pytest.raises(ValueError, match=text):
        library["bags"](tensor(index), packed, tvm.runtime.from_dlpack(out))


# ---- selection and packing ----
@KERNELS
def test_refuses(name):
    kernel, target = load(name)
    work = EmbeddingBag((4,), 16, kernel.storage, pooling=1)
    assert kernel.refuses(work) is None
    assert kernel.op == work.op == "embedding_bag"
    other = "u8" if kernel.storage != "u8" else "f32"
    assert other in kernel.refuses(replace(work, storage=other))
    assert "2147483648 rows" in kernel.refuses(replace(work, rows=(4, 2**31)))
    choice = registry.select(work, target)
    assert choice.kernel.name == name
    assert registry.select(Gemm(4, 8, 8, "f32", "f32", "f32"), target).kernel.op == "gemm"
    with pytest.raises(ScheduleError, match="no kernel"):
        registry.select(replace(work, rows=(2**31,)), target)


@ONE
def test_pieces(name):
    """Tables given in blocks of rows are packed as whole ones are; too few rows are noticed."""
    kernel, _ = load(name)
    work = EmbeddingBag((10, 3), 20, "u8", pooling=1)
    tables = _tables(work, 0)
    packed = kernel.pack(work, tables, None)
    assert packed.nbytes == kernel.nbytes(work) and packed.nbytes % 64 == 0
    blocks = [[table[:2], table[2:]] for table in tables.tables]
    pieces = [np.ascontiguousarray(p).reshape(-1) for p in kernel.pieces(work, blocks)]
    np.testing.assert_array_equal(np.concatenate([p.view(np.uint8) for p in pieces]), packed)
    with pytest.raises(ValueError, match="10 x 28 bytes gave 56"):
        list(kernel.pieces(work, [[tables.tables[0][:2]], []]))
