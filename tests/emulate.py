"""Runs CUDA kernels without a GPU: their source, compiled by g++ for an emulated multiprocessor.

The emulator (folder ``emulator``) runs one block at a time and checks every access to memory:
bounds, alignment, shared memory without a value, races between threads and between blocks,
barriers that not all threads reach, asynchronous copies that nobody waits for.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dccompile.cuda import device, loose
from dccompile.errors import IncompatibleError
from dccompile.machine import GPUS
from dccompile.runtime import device as devices
from dccompile.runtime import driver
from dccompile.runtime.device import find

_HERE = Path(__file__).resolve().parent / "emulator"
_spec = importlib.util.spec_from_file_location("emulator_build", _HERE / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

on_gpu = False  # see conftest.py
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
_GUARD = 4096  # bytes without an owner between arrays


class EmulatorError(Exception):
    """What is wrong with a kernel: its name, block, thread, the defect, the line of its source."""


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("name", ctypes.c_char_p))


class _Launch(ctypes.Structure):
    """`emu::Launch` of simt.h."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("order", ctypes.c_uint),
        ("seconds", ctypes.c_uint),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
        ("ranges", ctypes.POINTER(_Range)),
        ("range_count", ctypes.c_size_t),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_size_t),
        ("where", ctypes.c_size_t),
    )


class Finding(ctypes.Structure):
    """`dcc_finding` of device.cuh."""

    _fields_ = (
        ("taken", ctypes.c_int),
        ("length", ctypes.c_int),
        ("values", ctypes.c_longlong * 4),
        ("text", ctypes.c_char * 320),
        ("name", ctypes.c_char * 128),
    )

    def message(self):
        """The text with its values, None where nothing was reported."""
        if not self.taken:
            return None
        values = iter(self.values)
        name = ctypes.string_at(ctypes.addressof(self) + Finding.name.offset, self.length).decode()
        text = self.text.decode()
        return "".join(str(next(values)) if c == "%" else name if c == "$" else c for c in text)


class Memory:
    """Device memory of one run: copies of arrays, each between guard zones."""

    def __init__(self):
        self._kept = []

    def add(self, name, array):
        """Returns the address of a copy: 64-byte aligned, not more."""
        raw = np.full(array.nbytes + 2 * _GUARD + 128, 0x5A, np.uint8)
        start = -(raw.ctypes.data + _GUARD) % 128 + 64 + _GUARD
        raw[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._kept.append((name, array, raw, start))
        return raw.ctypes.data + start

    def ranges(self):
        rows = [
            _Range(raw.ctypes.data + start, raw.ctypes.data + start + array.nbytes, name.encode())
            for name, array, raw, start in self._kept
        ]
        return (_Range * len(rows))(*rows)

    def back(self):
        """Copies what kernels have made into the arrays; EmulatorError if a guard zone changed."""
        for name, array, raw, start in self._kept:
            end = start + array.nbytes
            if (raw[:start] != 0x5A).any() or (raw[end:] != 0x5A).any():
                raise EmulatorError(f"bytes before or after '{name}' were written")
            made = raw[start:end].view(array.dtype).reshape(array.shape)
            if made.tobytes() != array.tobytes():
                array[...] = made


def run(
    func,
    arrays,
    machine=GPUS["cuda:sm_80"],
    symbols=None,
    order="forward",
    check=True,
    seconds=120,
):
    """Runs a PrimFunc with thread bindings on numpy arrays, one for each buffer parameter in order.

    Outputs are written in place. `symbols` gives variables that no shape tells, by name. `order` is
    that of the threads of a block: forward, reverse, random. `check=False` is some 10 times as fast
    and finds little. Returns the text that a kernel reported, or None; raises EmulatorError.

    With ``pytest -m cuda`` it runs on this machine's GPU instead.
    """
    if on_gpu and not symbols:
        return _on_gpu(func, arrays)
    symbol = str((func.attrs or {}).get("global_symbol", "kernel"))
    split = device.split({symbol: func}, machine)
    host = split.hosts[symbol]
    library = load(split.source, check)
    memory, values = Memory(), {name: int(n) for name, n in (symbols or {}).items()}
    assert len(host.params) == len(arrays), (len(host.params), len(arrays))
    for param, array in zip(host.params, arrays, strict=True):
        if not hasattr(param.ty, "shape"):
            values[param] = array
            continue
        assert str(param.ty.dtype) == str(array.dtype), (param, param.ty.dtype, array.dtype)
        assert len(param.ty.shape) == array.ndim, (param, param.ty.shape, array.shape)
        values[param] = memory.add(param.name, array)
        for dim, size in zip(param.ty.shape, array.shape, strict=True):
            if type(dim).__name__ == "Var":
                assert values.setdefault(dim, size) == size, (param, dim, size)
    for param, array in zip(host.params, arrays, strict=True):
        want = tuple(_value(d, values) for d in getattr(param.ty, "shape", ()))
        assert not hasattr(param.ty, "shape") or want == array.shape, (param, want, array.shape)
    finding = Finding()
    _point_to(library, finding)
    for launch in _launches(host.body, values, memory):
        _launch(library, launch, values, memory, machine, ORDERS[order], seconds)
    memory.back()
    return finding.message()


def _on_gpu(func, arrays):
    gpu = find(0)
    function = loose.load(loose.compile(func, loose.machine_of(gpu)), gpu)
    tensors = [loose.Tensor(gpu, array) for array in arrays]
    function(*tensors)
    found = function.finding()
    for array, tensor in zip(arrays, tensors, strict=True):
        made = tensor.numpy()
        if made.tobytes() != array.tobytes():
            array[...] = made
    return found


@cache
def load(source, check=True):
    """The library of CUDA source; skips the test where g++ is missing."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator of GPUs needs g++")
    library = ctypes.CDLL(str(build.library(source, check)))
    library.source = build.translate(source, check).split('#line 1 "kernel"\n')[1].splitlines()
    return library


def _point_to(library, finding):
    try:
        ctypes.c_void_p.in_dll(library, "dcc_status").value = ctypes.addressof(finding)
    except ValueError:
        pass


def _launch(library, launch, values, memory, machine, order, seconds):
    """One launch of `dccompile.cuda.device`."""
    args = []
    for arg in launch.args:
        value = _value(arg, values)
        kind = str(getattr(arg.ty, "dtype", "handle"))
        kinds = {"float32": ctypes.c_float, "float64": ctypes.c_double, "int32": ctypes.c_int32}
        args.append(kinds.get(kind, ctypes.c_int64)(value))
    grid, block = ([_value(e, values) for e in extents] for extents in (launch.grid, launch.block))
    if 0 not in grid:
        call(
            library,
            launch.kernel,
            grid,
            block,
            args,
            memory,
            machine,
            dynamic=_value(launch.shared, values),
            order=order,
            seconds=seconds,
        )


def call(
    library,
    kernel,
    grid,
    block,
    args,
    memory,
    machine=GPUS["cuda:sm_80"],
    dynamic=0,
    order=0,
    seconds=120,
):
    """Launches a kernel of `load` with ctypes values; raises EmulatorError."""
    ranges = memory.ranges()
    pointers = (ctypes.c_void_p * max(1, len(args)))(*map(ctypes.addressof, args))
    text = ctypes.create_string_buffer(1024)
    launch = _Launch(
        kernel.encode(),
        (ctypes.c_uint * 3)(*grid),
        (ctypes.c_uint * 3)(*block),
        dynamic,
        machine.shared,
        order,
        seconds,
        pointers,
        ranges,
        len(ranges),
        ctypes.cast(text, ctypes.c_char_p),
        len(text),
    )
    if library.emu_launch(ctypes.byref(launch)):
        raise EmulatorError(text.value.decode() + _source_line(library, launch.where))


def _source_line(library, where):
    """`; in the line: ...` for an address in a library with line numbers."""
    if not where or shutil.which("addr2line") is None:
        return ""
    command = ["addr2line", "-i", "-e", library._name, hex(where - 1)]
    frames = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    for frame in frames:
        file, _, number = frame.partition(" ")[0].rpartition(":")
        known = number.isdigit() and 0 < int(number) <= len(library.source)
        if known and not file.endswith(".h"):
            return f"; line {number}: {library.source[int(number) - 1].strip()[:200]}"
    return ""


# ---- the host's half of a function ----


def _launches(body, values, memory):
    """The launches in order; what the statements between them define goes into `values`."""
    kind = type(body).__name__
    if kind == "SeqStmt":
        for part in body.seq:
            yield from _launches(part, values, memory)
    elif kind in ("DeclBuffer", "Bind"):
        name = body.buffer if kind == "DeclBuffer" else body.var
        source = getattr(body, "data", None) if kind == "DeclBuffer" else body.value
        values[name] = _value(source, values)
    elif kind == "AllocBuffer":
        shape = tuple(_value(d, values) for d in body.buffer.shape)
        dtype = np.dtype(str(body.buffer.dtype))
        array = np.full(int(np.prod(shape)) * dtype.itemsize, 0xA5, np.uint8).view(dtype)
        values[body.buffer] = memory.add(body.buffer.name, array)
    elif kind == "IfThenElse":
        taken = body.then_case if _value(body.condition, values) else body.else_case
        if taken is not None:
            yield from _launches(taken, values, memory)
    elif kind == "For":
        first = _value(body.min, values)
        for i in range(first, first + _value(body.extent, values)):
            values[body.loop_var] = i
            yield from _launches(body.body, values, memory)
    elif kind == "Evaluate":
        if device.is_launch(body.value):
            yield device.launch_of(body.value)
    elif kind == "AttrStmt":
        yield from _launches(body.body, values, memory)
    else:
        raise NotImplementedError(f"{kind} in the host's code: {body}")


_OPERATORS = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "FloorDiv": lambda a, b: a // b,
    "FloorMod": lambda a, b: a % b,
    "Div": lambda a, b: int(a / b) if isinstance(a, int) else a / b,
    "Mod": lambda a, b: a - int(a / b) * b,
    "Min": min,
    "Max": max,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "shift_right": lambda a, b: a >> b,
    "shift_left": lambda a, b: a << b,
    "bitwise_and": lambda a, b: a & b,
    "bitwise_or": lambda a, b: a | b,
    "bitwise_xor": lambda a, b: a ^ b,
}


def _value(expr, values):
    """A number or an address."""
    if isinstance(expr, int | float):
        return expr
    kind = type(expr).__name__
    if kind in ("IntImm", "FloatImm"):
        return expr.value if kind == "FloatImm" else int(expr.value)
    if kind == "Var":
        return values[expr] if expr in values else values[expr.name]
    if kind == "Cast":
        value = _value(expr.value, values)
        return int(value) if "int" in str(expr.ty.dtype) else value
    if kind == "Select":
        return _value(
            expr.true_value if _value(expr.condition, values) else expr.false_value, values
        )
    if kind == "Not":
        return not _value(expr.a, values)
    if kind in _OPERATORS:
        return _OPERATORS[kind](_value(expr.a, values), _value(expr.b, values))
    if kind == "Call":
        name = getattr(expr.op, "name", "").rpartition(".")[2]
        if name in _OPERATORS:
            return _OPERATORS[name](*(_value(a, values) for a in expr.args))
        if name == "if_then_else":
            return _value(expr.args[1 if _value(expr.args[0], values) else 2], values)
        if len(expr.args) == 1:  # the data of a buffer, likely(...)
            return _value(expr.args[0], values)
    raise NotImplementedError(f"{kind} in the host's code: {expr}")


# ---- the driver and the compiler ----


@dataclass(frozen=True)
class Toolkit:
    """What programs that use CUDA need to find, in place of NVIDIA's."""

    nvcc: Path
    libcuda: Path

    def environment(self, **settings):
        """The environment of this process for a child; `settings` are those of driver.h, without
        their EMU_, in any case: ``devices=2``."""
        ours = {
            "PATH": f"{self.nvcc.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "LD_LIBRARY_PATH": str(self.libcuda.parent),
            "DCCOMPILE_CUDA_COMPILER": "nvcc",
            "EMU_NVCC": str(self.nvcc),
            "EMU_CACHE": str(build.folder()),
        }
        return {**os.environ, **ours, **{f"EMU_{k.upper()}": str(v) for k, v in settings.items()}}

    def patch(self, monkeypatch, **settings):
        """The same for this process; the driver is found by its path alone: `libcuda`."""
        for name, value in self.environment(**settings).items():
            if os.environ.get(name) != value:
                monkeypatch.setenv(name, value)


def toolkit(folder):
    """Puts a stand-in for nvcc into the folder, and makes the driver; skips without g++."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator of GPUs needs g++")
    nvcc = Path(folder) / "nvcc"
    compiler = f"{shlex.quote(sys.executable)} -S {shlex.quote(str(_HERE / 'build.py'))}"
    program = f'#!/bin/sh\nexec {compiler} "$@"\n'
    nvcc.write_text(program)
    nvcc.chmod(0o755)
    return Toolkit(nvcc, build.driver())


@contextmanager
def place(kind, folder, **settings):
    """Makes this process use the emulator, compiler and driver, or a GPU: `kind` emulated or gpu.

    `settings` are those of the emulated driver. Skips where there is no GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_driver", None)
        patch.setattr(devices, "_devices", {})
        if kind == "emulated":
            made = toolkit(folder)
            made.patch(patch, **settings)
            patch.setattr(driver, "LIBRARY", str(made.libcuda))
        try:
            find(0)
        except IncompatibleError as error:
            assert kind == "gpu", error
            pytest.skip(str(error))
        yield kind
