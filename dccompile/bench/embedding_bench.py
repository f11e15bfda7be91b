"""``bench --kernels`` for embedding bags: one table, random rows, against torch and the memory.

Every call gets new random indices, written just before it and not timed, so that no competitor
finds rows of its own last call in a cache. torch reads the very memory that the kernel reads, in
pages of the same size. Both are called from Python and pay for their call.

The limit is a kernel that reads one byte of every line of the same rows, prefetching at the best of
some distances: no gather of these rows can be faster than their lines come from memory.
"""

from __future__ import annotations

import fnmatch
import importlib.resources
import json
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import reference, registry
from ..console import Progress
from ..kernel import Kernel
from ..machine import Machine, host
from ..runtime import ffi
from ..workload import NUMPY, EmbeddingBag, EmbeddingTables
from . import measure
from .peers import PEERS, PeerError, compare
from .suite import fitting, parameters, usable

OURS, TORCH = "kernel", "torch"
FORMS = ("u8", "u4", "f16", "f32")  # how rows are stored
PAGES = {"4k": mmap.MADV_NOHUGEPAGE, "huge": mmap.MADV_HUGEPAGE}
HEADERS = (
    "kernel", "machine", "bags x rows x dim x pooling", "pages", "us [p20, p80]", "Mrows/s", "GB/s",
    "% limit", "vs-torch", "",
)  # fmt: skip

# Rows ahead at which the limit prefetches into the second-level and into the first-level cache.
_DISTANCES = ((0, 0), (64, 0), (128, 16))
_SHARE = 0.4  # of the free memory that a table may take
_HUGE = 2 << 20
_BLOCK = 16 << 20  # bytes of random rows, repeated all over a table


@dataclass(frozen=True)
class Case:
    """A kernel on a machine."""

    kernel: Kernel
    machine: Machine

    def __str__(self) -> str:
        return self.kernel.name


def shapes() -> list[tuple[int, int, int, int]]:
    """The deployed (bags, rows, dim, pooling), and those of the issue's comparison with torch."""
    text = (importlib.resources.files("dccompile.models") / "shapes.json").read_text()
    deployed = [tuple(shape) for shape in json.loads(text)["embedding"]]
    return list(dict.fromkeys([*deployed, (100, 1_000_000, 128, 100)]))


def workload(storage: str, bags: int, rows: int, dim: int, pooling: int) -> EmbeddingBag:
    """A sum over a table that is cut down to what memory allows."""
    scale = "f16" if storage == "u4" else "f32"  # the forms that torch has
    row_bytes = EmbeddingBag((1,), dim, storage, scale).row_bytes
    rows = min(rows, max(1, int(_available() * _SHARE) // row_bytes))
    return EmbeddingBag((rows,), dim, storage, scale, bags=bags, pooling=pooling)


def cases(pattern: str | None, target: Machine | None) -> list[Case]:
    """Kernels to bench: those of a glob, else those that this host would choose."""
    if pattern is None:
        machine = target or host()
        works = [EmbeddingBag((1,), 64, form, pooling=1) for form in FORMS]
        return [Case(registry.select(work, machine).kernel, machine) for work in works]
    found = []
    for kernel in registry.kernels():
        if kernel.op != EmbeddingBag.op or not fnmatch.fnmatchcase(kernel.name, pattern):
            continue
        if usable(kernel, target):
            found.append(Case(kernel, fitting(kernel, target)))
    return found


def run(
    benched: list[Case],
    threads: int,
    duration_s: float,
    warmup_s: float,
    against: list[str] | None,
    progress: Progress,
    logs: Path | None = None,
) -> dict[str, Any]:
    """Benches all cases over all shapes and sizes of pages; returns their rows.

    `logs` is a folder of tuning logs, None for the kernels' defaults.
    """
    rows = []
    todo = [(case, shape, pages) for case in benched for shape in shapes() for pages in PAGES]
    for index, (case, shape, pages) in enumerate(todo):
        progress.step(f"{case} {'x'.join(map(str, shape))} {pages}", index + 1, len(todo))
        rows.append(bench_one(case, shape, pages, threads, duration_s, warmup_s, against, logs))
    return {"rows": rows}


def cells(row: dict[str, Any]) -> tuple[Any, ...]:
    """A row as a line under HEADERS."""
    return (
        row["kernel"],
        row["machine"],
        "x".join(map(str, row["shape"])),
        row["pages"],
        f"{row['us']:.1f} [{row['p20']:.1f}, {row['p80']:.1f}]",
        row["mrows"],
        row["gbs"],
        round(100 * row["limit_share"], 1),
        row["peers"].get(TORCH, {}).get("ratio"),
        "" if row["correct"] else "WRONG",
    )


def bench_one(
    case: Case,
    shape: tuple[int, int, int, int],
    pages: str,
    threads: int,
    duration_s: float,
    warmup_s: float,
    against: list[str] | None = None,
    logs: Path | None = None,
) -> dict[str, Any]:
    """One row: ours checked against the reference, then timed in turns with torch and the limit."""
    tvm = measure.import_tvm()
    kernel, machine = case.kernel, case.machine
    work = workload(kernel.storage, *shape)  # type: ignore[attr-defined]
    assert work.bags is not None and work.pooling is not None
    memory, table = _table(kernel, work, pages)
    w = tvm.runtime.from_dlpack(memory)
    fresh = Fresh(work)
    index = tvm.runtime.from_dlpack(fresh.index)
    out = tvm.runtime.tensor(np.zeros((work.bags, 1, work.dim), np.float32))
    params = parameters(kernel, work, machine, logs).params
    func = kernel.build(work, params, machine).with_attr("global_symbol", "bags")
    function = measure.build(func, machine)["bags"]
    ffi.configure_threads(threads)
    function(index, w, out)
    expected = reference.embedding_bag(work, EmbeddingTables([table]), fresh.index)
    agreement = compare([out.numpy()], [expected])
    first = table.ctypes.data - memory.ctypes.data
    runners: dict[str, measure.Runner] = {OURS: fresh.loop(lambda: function(index, w, out))}
    for distances in _DISTANCES:
        lines = _lines_kernel(work, first, memory.nbytes, distances, threads)
        limit = measure.build(lines, machine)["lines"]
        sums = tvm.runtime.tensor(np.zeros(threads, np.int32))
        runners[f"limit {distances}"] = fresh.loop(partial(limit, index, w, sums))
    found: dict[str, dict[str, Any]] = {}
    if against is None or TORCH in against:
        try:
            call, result = _torch(work, table, fresh.index, threads)
            call()
            found[TORCH] = {"difference": compare([result()], [expected[:, 0]])}
            runners[TORCH] = fresh.loop(call)
        except PeerError as error:
            found[TORCH] = {"reason": str(error)}
    times = measure.interleave(runners, duration_s, warmup_s, threads)
    if TORCH in times:
        ratio = measure.ratio(times[TORCH], times[OURS])
        found[TORCH].update(times[TORCH].to_json(), ratio=round(ratio, 3))
    limits = [times[f"limit {distances}"] for distances in _DISTANCES]
    best = min(limits, key=lambda samples: samples.us)
    terms = work.bags * work.pooling
    return {
        "kernel": kernel.name,
        "form": work.storage,
        "machine": machine.name,
        "shape": [work.bags, work.rows[0], work.dim, work.pooling],
        "pages": pages,
        "threads": threads,
        "params": str(params),
        "correct": agreement.get("relative", 0.0) == 0.0 and "shape" not in agreement,
        "difference": agreement,
        **times[OURS].to_json(),
        "mrows": round(terms / times[OURS].us, 1),
        "gbs": round(terms * work.row_bytes / times[OURS].us / 1e3, 2),
        "limit": best.to_json(),
        "limit_share": round(measure.ratio(best, times[OURS]), 4),
        "peers": found,
        "best_ratio": found.get(TORCH, {}).get("ratio"),
    }


class Fresh:
    """An index (bags, 1, pooling) s64 that is made anew before every timed call."""

    def __init__(self, work: EmbeddingBag) -> None:
        self._rng = np.random.default_rng(0)
        self._rows = work.rows[0]
        assert work.bags is not None and work.pooling is not None
        memory = np.frombuffer(mmap.mmap(-1, work.bags * work.pooling * 8), np.int64)
        self.index = memory.reshape(work.bags, 1, work.pooling)
        self.draw()

    def draw(self) -> None:
        self.index[...] = self._rng.integers(0, self._rows, self.index.shape)

    def loop(self, call: Callable[[], Any]) -> measure.Loop:
        """Times calls alone."""

        def run(calls: int) -> float:
            spent = 0
            for _ in range(calls):
                self.draw()
                start = time.perf_counter_ns()
                call()
                spent += time.perf_counter_ns() - start
            return spent

        return measure.Loop(run)


def _available() -> int:
    """Bytes of memory that are free or easily freed."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 30


def _table(kernel: Any, work: EmbeddingBag, pages: str) -> tuple[np.ndarray, np.ndarray]:
    """W in memory of pages of one size, and the table (rows, row_bytes or dim) in it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    region = mmap.mmap(-1, kernel.nbytes(work) + _HUGE, flags=flags)
    region.madvise(PAGES[pages])
    everything = np.frombuffer(region, np.uint8)
    start = -everything.ctypes.data % _HUGE
    w = everything[start : start + kernel.nbytes(work)]
    at, first = 0, 0
    for piece in kernel.pieces(work, [_rows(work)]):
        raw = piece.reshape(-1).view(np.uint8)
        w[at : at + raw.size] = raw
        first = first or raw.size  # the table comes after the first piece
        at += raw.size
    table = w[first : first + work.rows[0] * work.row_bytes].reshape(work.rows[0], -1)
    return w, table if work.storage in ("u8", "u4") else table.view(NUMPY[work.storage])


def _rows(work: EmbeddingBag) -> Any:
    """Blocks of rows, the same over and over."""
    rng = np.random.default_rng(1)
    count = min(work.rows[0], max(1, _BLOCK // work.row_bytes))
    if work.storage in ("f32", "f16"):
        block = rng.standard_normal((count, work.dim)).astype(NUMPY[work.storage])
    else:
        block = rng.integers(0, 256, (count, work.row_bytes)).astype(np.uint8)
        parts = rng.uniform(-1, 1, (count, 2)).astype(NUMPY[work.scale]).view(np.uint8)
        block[:, -parts.shape[1] :] = parts
    for first in range(0, work.rows[0], count):
        yield block[: work.rows[0] - first]


def _torch(
    work: EmbeddingBag, table: np.ndarray, index: np.ndarray, threads: int
) -> tuple[Callable[[], Any], Callable[[], np.ndarray]]:
    """FBGEMM's operator for rows of codes, else embedding_bag, on the same memory."""
    reason = PEERS[TORCH].available()
    if reason:
        raise PeerError(reason)
    import torch

    torch.set_num_threads(threads)
    rows, flat = torch.from_numpy(table), torch.from_numpy(index.reshape(-1))
    ends = torch.arange(0, index.size + index.shape[2], index.shape[2])
    last: list[Any] = []
    if work.storage in ("f32", "f16"):
        bag = torch.nn.functional.embedding_bag

        def call() -> None:
            with torch.inference_mode():
                last[:] = [bag(flat, rows, ends, mode="sum", include_last_offset=True)]

    else:
        ops = torch.ops.quantized
        gather = {
            "u8": ops.embedding_bag_byte_rowwise_offsets,
            "u4": ops.embedding_bag_4bit_rowwise_offsets,
        }[work.storage]

        def call() -> None:
            last[:] = [gather(rows, flat, ends, mode=0, include_last_offset=True)]

    return call, lambda: last[0].float().numpy()


def _lines_kernel(
    work: EmbeddingBag, first: int, nbytes: int, distances: tuple[int, int], threads: int
) -> Any:
    """Adds up one byte of every line of the rows; the table begins at byte `first` of W.

    `distances` are those at which rows are prefetched into level 2 and level 1, 0 for not at all.
    """
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    def const(value: int, dtype: str = "int64") -> Any:
        return tirx.const(value, dtype)

    assert work.bags is not None and work.pooling is not None
    row, terms = work.row_bytes, work.bags * work.pooling
    touched = [*range(0, row - 1, 64), row - 1]
    chunk = -(-terms // threads)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("lines")
        T.func_attr({"tirx.noalias": True, "global_symbol": "lines"})
        shape = (work.bags, 1, work.pooling)
        index = T.arg("index", T.buffer(shape, "int64"))
        w = T.arg("w", T.buffer((const(nbytes),), "uint8"))
        out = T.arg("out", T.buffer((threads,), "int32"))
        flat = T.decl_buffer((const(terms),), "int64", data=tirx.buffer_data(index))
        with T.parallel(const(0), const(threads)) as thread:
            total = T.alloc_buffer(
                (1,), "int32", scope="local", annotations={"disable_lower_builtin": True}
            )
            T.buffer_store(total, const(0, "int32"), [0])
            begin = T.Bind(thread * chunk)
            with T.serial(const(0), T.Bind(tirx.min(const(chunk), const(terms) - begin))) as i:
                for distance, locality in zip(distances, (2, 3), strict=True):
                    if distance:
                        later = tirx.min(begin + i + distance, const(terms - 1))
                        ahead = T.Bind(flat[later] * row + first)
                        hint = [const(v, "int32") for v in (0, locality, 1)]  # read, data
                        for offset in touched:
                            line = T.address_of(w[ahead + offset])
                            T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", line, *hint))
                here = T.Bind(flat[begin + i] * row + first)
                value: Any = total[0]
                for offset in touched:
                    value = value + tirx.Cast("int32", w[here + offset])
                T.buffer_store(total, value, [0])
            T.buffer_store(out, total[0], [thread])
    return builder.get()
