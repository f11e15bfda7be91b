"""Timing that survives a shared machine: competitors take turns, ratios are taken pair by pair.

Absolute times drift by tens of percent on a busy host, and two things measured one after the
other drift apart. Here every round times every competitor once (A B C A B C ...), so that a
ratio compares neighbours in time, and the median over rounds drops the rounds that were hit.
"""

from __future__ import annotations

import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import linker, threadpool
from ..machine import Machine
from ..runtime import ffi

MIN_SAMPLE_NS = 100_000
MIN_ROUNDS = 5
# With several threads a sample is longer, and begins when the workers of the competitor before
# it sleep: they spin up to 100 ms for more work. Two threads each on two cores took 204 and 288
# us alone, 1380 and 923 us in turns without this.
MIN_SAMPLE_PARALLEL_NS = 10_000_000
_SETTLE_STEP_S, _SETTLE_LIMIT_S = 0.004, 0.3


@dataclass(frozen=True)
class Samples:
    """Times of one competitor: `ns` (rounds,) float64, nanoseconds per call; `inner` calls each."""

    ns: np.ndarray
    inner: int

    @property
    def us(self) -> float:
        """Median, microseconds per call."""
        return float(np.median(self.ns)) / 1e3

    @property
    def p20(self) -> float:
        return float(np.percentile(self.ns, 20)) / 1e3

    @property
    def p80(self) -> float:
        return float(np.percentile(self.ns, 80)) / 1e3

    def to_json(self) -> dict[str, Any]:
        return {
            "us": round(self.us, 3),
            "p20": round(self.p20, 3),
            "p80": round(self.p80, 3),
            "inner": self.inner,
            "samples_ns": [round(float(v), 1) for v in self.ns],
        }


class Loop:
    """A competitor that times its own loop: `run(calls)` returns nanoseconds for all of them."""

    def __init__(self, run: Callable[[int], float]) -> None:
        self.run = run


Runner = Callable[[], Any] | Loop


def ratio(other: Samples, ours: Samples) -> float:
    """Median over rounds of other's time by ours: above 1, ours is faster."""
    rounds = min(len(other.ns), len(ours.ns))
    return float(np.median(other.ns[:rounds] / ours.ns[:rounds]))


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean; nan of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def interleave(
    runners: Mapping[str, Runner],
    duration_s: float = 3.0,
    warmup_s: float = 0.2,
    threads: int = 1,
) -> dict[str, Samples]:
    """Times all runners in turns for about `duration_s` seconds altogether.

    Each sample is a loop of as many calls as take MIN_SAMPLE_NS, preceded by one untimed call
    that brings the competitor's own data back. `threads` says how many the runners use: above 1,
    samples are longer and idle workers are waited for. The garbage collector is off while
    timing; nothing is pinned. At least MIN_ROUNDS rounds are run, whatever they take.
    """
    sample_ns = MIN_SAMPLE_NS if threads == 1 else MIN_SAMPLE_PARALLEL_NS
    with _no_gc():
        inner = {name: _calls(runner, sample_ns, warmup_s) for name, runner in runners.items()}
        rows: dict[str, list[float]] = {name: [] for name in runners}
        end = time.perf_counter() + duration_s
        rounds = 0
        while rounds < MIN_ROUNDS or time.perf_counter() < end:
            for name, runner in runners.items():
                if threads > 1:
                    _settle()
                    _time(runner, max(1, inner[name] // 10))
                _time(runner, 1)
                rows[name].append(_time(runner, inner[name]) / inner[name])
            rounds += 1
    return {name: Samples(np.array(rows[name]), inner[name]) for name in runners}


def _settle() -> None:
    """Waits until no thread of this process runs."""
    for _ in range(int(_SETTLE_LIMIT_S / _SETTLE_STEP_S)):
        before = time.process_time()
        time.sleep(_SETTLE_STEP_S)
        if time.process_time() - before < 0.1 * _SETTLE_STEP_S:
            return


def _time(runner: Runner, calls: int) -> float:
    """Nanoseconds for `calls` calls."""
    if isinstance(runner, Loop):
        return runner.run(calls)
    start = time.perf_counter_ns()
    for _ in range(calls):
        runner()
    return time.perf_counter_ns() - start


def _calls(runner: Runner, min_sample_ns: int, warmup_s: float) -> int:
    """Warms up, and finds how many calls fill a sample."""
    end = time.perf_counter() + warmup_s
    calls = 1
    while True:
        spent = min(_time(runner, calls) for _ in range(3))  # a call may be interrupted
        if spent < min_sample_ns:
            calls = min(calls * 10, math.ceil(calls * 1.3 * min_sample_ns / max(spent, 1)))
        elif time.perf_counter() >= end:
            return calls


@contextmanager
def _no_gc() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def import_tvm() -> Any:
    """TVM, imported without torch, which it would bring along if it can (3 s)."""
    without = "torch" not in sys.modules and "tvm" not in sys.modules
    if without:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm
    finally:
        if without:
            del sys.modules["torch"]
    return tvm


def kernel_loop(module: Any, name: str, args: tuple[Any, ...]) -> Loop:
    """A compiled PrimFunc timed by a loop outside Python: the kernel without any call overhead."""
    import tvm

    def run(calls: int) -> float:
        timer = module.time_evaluator(name, tvm.cpu(), number=calls, repeat=1)
        return timer(*args).results[0] * 1e9 * calls

    return Loop(run)


# Registers that a peak loop keeps busy: more than latency (4-5 cycles) x units (2) needs.
_CHAINS = 12
_STEPS = 2000


@dataclass(frozen=True)
class Peak:
    """The multiply-accumulate peak of one instruction: run `loop`, each call does `ops`."""

    instruction: str
    ops: int
    loop: Loop

    def gops(self, samples: Samples) -> float:
        return self.ops / float(np.median(samples.ns))


def int8_peak(machine: Machine, threads: int = 1) -> Peak:
    """u8 x s8 -> s32: vpdpbusd; without VNNI vpmaddwd of widened bytes, additions not counted."""
    return _peak(machine, threads, "vpdpbusd" if machine.vnni else "vpmaddwd")


def fma_peak(machine: Machine, threads: int = 1) -> Peak:
    """f32 fused multiply-add."""
    return _peak(machine, threads, "vfmadd")


@lru_cache(maxsize=16)
def _peak(machine: Machine, threads: int, instruction: str) -> Peak:
    tvm = import_tvm()
    func, ops = _peak_kernel(machine, threads, instruction)
    module = build(func, machine)
    out = tvm.runtime.tensor(np.zeros(threads * machine.lanes * _CHAINS, "int32"))
    seed = tvm.runtime.tensor(np.zeros(machine.lanes, "int32"))
    ffi.configure_threads(threads)
    return Peak(instruction, ops, kernel_loop(module, "peak", (seed, out)))


def _peak_kernel(machine: Machine, threads: int, instruction: str) -> tuple[Any, int]:
    """_CHAINS independent accumulators, _STEPS steps, operands in registers, on every thread."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    lanes, bits = machine.lanes, machine.bits
    ints = f"int32x{lanes}"

    def step(acc: Any, x: Any) -> Any:
        def call(dtype: str, name: str, *args: Any) -> Any:
            return tirx.call_llvm_pure_intrin(dtype, name, *args)

        if instruction == "vpdpbusd":
            data = tirx.reinterpret(f"int8x{bits // 8}", x)
            return call(ints, f"llvm.x86.avx512.vpdpbusd.{bits}", acc, data, data)
        if instruction == "vpmaddwd":
            words = [tirx.reinterpret(f"int16x{bits // 16}", v) for v in (x, acc)]
            name = "avx512.pmaddw.d.512" if bits == 512 else "avx2.pmadd.wd"
            return call(ints, f"llvm.x86.{name}", *words)
        floats = f"float32x{lanes}"
        f, a = tirx.reinterpret(floats, x), tirx.reinterpret(floats, acc)
        return tirx.reinterpret(ints, call(floats, "llvm.fma", f, f, a))

    per_lane = {"vpdpbusd": 8, "vpmaddwd": 4, "vfmadd": 2}[instruction]
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("peak")
            T.func_attr({"tirx.noalias": True})
            seed = T.arg("seed", T.buffer((lanes,), "int32"))
            out = T.arg("out", T.buffer((threads * _CHAINS * lanes,), "int32"))
            with T.parallel(0, threads) as thread:
                acc = T.alloc_buffer((_CHAINS * lanes,), "int32", scope="local")
                at = [T.ramp(tirx.const(c * lanes, "int32"), 1, lanes) for c in range(_CHAINS)]
                x = T.Bind(seed[T.ramp(tirx.const(0, "int32"), 1, lanes)])
                for c in range(_CHAINS):
                    T.buffer_store(acc, T.broadcast(tirx.const(c, "int32"), lanes), [at[c]])
                with T.serial(0, _STEPS):
                    for c in range(_CHAINS):
                        T.buffer_store(acc, step(acc[at[c]], x), [at[c]])
                for c in range(_CHAINS):
                    where = T.ramp((thread * _CHAINS + c) * lanes, 1, lanes)
                    T.buffer_store(out, acc[at[c]], [where])
        func = builder.get()
    return func, per_lane * lanes * _CHAINS * _STEPS * threads


def build(func: Any, machine: Machine) -> Any:
    """Compiles one PrimFunc, named by its global_symbol, and loads it as an artifact's code is."""
    tvm = import_tvm()
    from ..generic import legalize, stack

    name = str(func.attrs["global_symbol"])
    module = stack.build(tvm.IRModule({name: func}), legalize.target_of(machine))
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        code, library = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        module.write_to_file(str(code), "o")
        linker.link([code], library)
        ffi.load_pool(memoryview(_pool_image()), name)
        return ffi.load_library(memoryview(library.read_bytes()), name, name)


@lru_cache(maxsize=1)
def _pool_image() -> bytes:
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        threadpool.build(Path(folder) / "pool.so")
        return (Path(folder) / "pool.so").read_bytes()


def stream_gbs(machine: Machine, threads: int = 1, mib: int = 256) -> float:
    """Best read bandwidth of memory, GB/s: the sum over a buffer larger than any cache.

    The best of ten passes: a slower pass measures the neighbours, not the machine.
    """
    tvm = import_tvm()
    lanes = machine.lanes
    rows = (mib << 20) // (16 * lanes * 4) // threads * threads
    module = build(_stream_kernel(machine, threads, rows), machine)
    data = tvm.runtime.tensor(np.ones(rows * 16 * lanes, "int32"))
    out = tvm.runtime.tensor(np.zeros(threads * lanes, "int32"))
    ffi.configure_threads(threads)
    loop = kernel_loop(module, "stream", (data, out))
    return rows * 16 * lanes * 4 / min(loop.run(1) for _ in range(10))


def _stream_kernel(machine: Machine, threads: int, rows: int) -> Any:
    """Reads rows of 16 vector registers, each thread its share, into four sums."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    lanes = machine.lanes
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("stream")
            T.func_attr({"tirx.noalias": True})
            data = T.arg("data", T.buffer((rows * 16 * lanes,), "int32"))
            out = T.arg("out", T.buffer((threads * lanes,), "int32"))
            with T.parallel(0, threads) as thread:
                acc = T.alloc_buffer((4 * lanes,), "int32", scope="local")
                at = [T.ramp(tirx.const(c * lanes, "int32"), 1, lanes) for c in range(4)]
                for c in range(4):
                    T.buffer_store(acc, T.broadcast(tirx.const(0, "int32"), lanes), [at[c]])
                with T.serial(0, rows // threads) as row:
                    base = (thread * (rows // threads) + row) * 16 * lanes
                    for c in range(16):
                        value = acc[at[c % 4]] + data[T.ramp(base + c * lanes, 1, lanes)]
                        T.buffer_store(acc, value, [at[c % 4]])
                total = acc[at[0]] + acc[at[1]] + acc[at[2]] + acc[at[3]]
                T.buffer_store(out, total, [T.ramp(thread * lanes, 1, lanes)])
        return builder.get()
