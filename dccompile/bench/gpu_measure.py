"""Timing on a GPU by its own clock: bound calls of models, and what the device reaches at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..cuda import loose
from ..cuda.replay import Replay
from ..machine import Gpu
from ..runtime.device import Device
from ..runtime.device_array import DeviceArray
from ..runtime.driver import LEGACY_STREAM
from . import measure

STREAM_BYTES = 512 << 20  # that the peak of memory is measured with: far more than a cache
_THREADS, _BLOCKS = 256, 4  # of a block; blocks of a multiprocessor
_CHAINS, _STEPS = 8, 512  # independent sums of a thread, products of each
_ROUNDS, _CALLS, _SECONDS = 5, 4, 0.3  # rounds at least, for so long
_WORDS, _LOADS = 4, 8  # 32-bit words of a load, loads of a step


def upload(gpu: Device, array: np.ndarray) -> DeviceArray:
    """A copy in device memory, for calls on the legacy default stream."""
    source = np.ascontiguousarray(array)
    with gpu:
        lent = gpu.lend(LEGACY_STREAM, source.nbytes)
        if source.nbytes:
            place = source.__array_interface__["data"][0]
            result = gpu.driver.cuMemcpyHtoD_v2(lent.address, place, source.nbytes)
            gpu.check(result, "uploading an input")
    return DeviceArray(gpu, lent, source.shape, source.dtype, LEGACY_STREAM)


def bound_loop(module: Any, turns: Sequence[Mapping[str, np.ndarray]]) -> measure.Loop:
    """Bound calls with inputs and outputs on the device, one for each set of inputs.

    A call of the loop is one with every set.
    """
    gpu = module._gpu
    placed = [{name: upload(gpu, array) for name, array in feeds.items()} for feeds in turns]
    calls = [module.bind(feeds) for feeds in placed]
    for call in calls:
        call()  # captures its graph
    replay = Replay(gpu, calls)

    def run(count: int) -> float:
        return replay.run(count * len(calls))

    return measure.Loop(run)


@dataclass(frozen=True)
class Peaks:
    """What a device reaches in loops of one instruction: Gop/s, and GB/s read from its memory."""

    int8: float
    f16: float
    f32: float
    memory: float

    def of(self, work: Any) -> tuple[str, float]:
        """The instruction that a workload's products would use at best, and its Gop/s."""
        if getattr(work, "a", "f32") != "f32":
            return "mma.s8", self.int8
        return ("mma.f16", self.f16) if getattr(work, "b", "") == "f16" else ("fma.f32", self.f32)


@lru_cache(maxsize=4)
def peaks(gpu: Device) -> Peaks:
    """Measured now, the best of some rounds."""
    machine = loose.machine_of(gpu)
    blocks = _BLOCKS * machine.multiprocessors
    out = loose.Tensor(gpu, np.zeros((blocks * _THREADS,), np.int32))
    gops = {}
    for name, (instruction, each) in _INSTRUCTIONS.items():
        ops = blocks * _THREADS * _CHAINS * _STEPS * each
        gops[name] = ops / _best(gpu, _products(instruction, blocks), machine, [out])
    steps = max(1, STREAM_BYTES // (4 * _WORDS * _LOADS * _THREADS * blocks))
    data = np.zeros((steps * _LOADS * _WORDS * _THREADS * blocks,), np.int32)
    read = _best(gpu, _stream(steps, blocks), machine, [loose.Tensor(gpu, data), out])
    return Peaks(memory=data.nbytes / read, **gops)


def _best(gpu: Device, func: Any, machine: Gpu, tensors: Sequence[loose.Tensor]) -> float:
    """Nanoseconds of a call, once the device has raised its clock."""
    function = loose.load(loose.compile(func, machine), gpu)
    replay = Replay(gpu, [lambda: function(*tensors)])
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < _ROUNDS or time.perf_counter() < end:
        times.append(replay.run(_CALLS) / _CALLS)
    return min(times)


# And the operations of a lane for one: a tile of 16 x 8 x 32 or 16 x 8 x 16 by 32 lanes.
_INSTRUCTIONS = {
    "int8": ("mma_s8s8", 2 * 16 * 8 * 32 // 32),
    "f16": ("mma_f16", 2 * 16 * 8 * 16 // 32),
    "f32": ("fma", 2),
}


def _kernel(blocks: int, buffers: Mapping[str, int], body: Callable[..., Any]) -> Any:
    """A function of s32 buffers, the last of them `out`, to whose element a thread's value goes."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True, "global_symbol": "main", "dcc.kernel": "peak"})
            args = [T.arg(name, T.buffer((size,), "int32")) for name, size in buffers.items()]
            with T.thread_binding(0, blocks, "blockIdx.x") as block:
                with T.thread_binding(0, _THREADS, "threadIdx.x") as thread:
                    here = tirx.Cast("int64", block) * _THREADS + tirx.Cast("int64", thread)
                    T.buffer_store(args[-1], body(T, tirx, here, thread, *args[:-1]), [here])
        return builder.get()


def _products(name: str, blocks: int) -> Any:
    """_CHAINS independent sums of products that stay in registers."""

    def body(T: Any, tirx: Any, here: Any, thread: Any) -> Any:
        kind = "int32" if name == "mma_s8s8" else "float32"
        width = 1 if name == "fma" else 4
        sums = T.alloc_buffer((_CHAINS * width,), kind, scope="local")
        a = T.alloc_buffer((4,), "float32" if name == "fma" else "uint32", scope="local")
        b = T.alloc_buffer((2,), str(a.dtype), scope="local")
        for factor in (a, b):
            for i in range(int(factor.shape[0])):  # of no value that a compiler knows
                T.buffer_store(factor, tirx.Cast(str(a.dtype), thread + i), [i])
        for i in range(_CHAINS * width):
            T.buffer_store(sums, tirx.const(0, kind), [i])
        with T.serial(0, _STEPS):
            for i in range(_CHAINS):
                if name == "fma":
                    value = tirx.call_extern(kind, "dcc_fma", a[0], b[0], sums[i])
                    T.buffer_store(sums, value, [i])
                else:
                    places = [T.address_of(x[0]) for x in (a, b)]
                    first = T.address_of(sums[i * width])
                    T.evaluate(tirx.call_extern("void", f"dcc_{name}", first, *places))
        total = sums[0]
        for i in range(1, _CHAINS * width):
            total = total + sums[i]
        return total if kind == "int32" else tirx.Cast("int32", total)

    return _kernel(blocks, {"out": blocks * _THREADS}, body)


def _stream(steps: int, blocks: int) -> Any:
    """Adds up all of a buffer, _LOADS loads of every thread under way at once."""
    width = _WORDS * _THREADS * blocks  # words that all threads read together

    def body(T: Any, tirx: Any, here: Any, thread: Any, data: Any) -> Any:
        words = T.alloc_buffer((_LOADS * _WORDS,), "uint32", scope="local")
        total = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(total, tirx.const(0, "int32"), [0])
        with T.serial(tirx.const(0, "int64"), tirx.const(steps, "int64")) as step:
            for i in range(_LOADS):
                source = T.address_of(data[(step * _LOADS + i) * width + here * _WORDS])
                place = T.address_of(words[i * _WORDS])
                T.evaluate(tirx.call_extern("void", "dcc_load16", place, source))
            value = total[0]
            for i in range(_LOADS * _WORDS):
                value = value + tirx.Cast("int32", words[i])
            T.buffer_store(total, value, [0])
        return total[0]

    sizes = {"data": steps * _LOADS * width, "out": blocks * _THREADS}
    return _kernel(blocks, sizes, body)
