"""The host's half of a CUDA variant: x86 code that launches kernels through the driver.

A library of a variant calls four functions of the driver, which the runtime looks up and hands over
together with the loaded kernels: nothing is linked, and a machine without a GPU reads the file.
The functions below are written in LLVM's language, like the worker threads of `threadpool`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvm import tirx
from tvm.ir import Call, StringImm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .device import is_launch, launch_of

_FAILED = "DC4022: the CUDA driver refused a launch or a copy"

_SOURCE = r"""
target triple = "x86_64-unknown-linux-gnu"

@driver = internal global [4 x ptr] zeroinitializer   ; launch, copy, read back, synchronize
@kernels = internal global [COUNT x ptr] zeroinitializer
@stream = internal thread_local global ptr null       ; of the calls of this thread
@status = internal thread_local global i32 0          ; of the last call of the driver that failed

declare ptr @llvm.threadlocal.address.p0(ptr)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define void @dcc_cuda_attach(ptr %driver, ptr %functions) {
  call void @llvm.memcpy.p0.p0.i64(ptr @driver, ptr %driver, i64 32, i1 false)
  call void @llvm.memcpy.p0.p0.i64(ptr @kernels, ptr %functions, i64 BYTES, i1 false)
  ret void
}

define void @dcc_cuda_stream(ptr %stream) {
  %place = call ptr @llvm.threadlocal.address.p0(ptr @stream)
  store ptr %stream, ptr %place
  ret void
}

; The status of the call that failed last, 0 if none did; it is forgotten.
define i32 @dcc_cuda_status() {
  %place = call ptr @llvm.threadlocal.address.p0(ptr @status)
  %status = load i32, ptr %place
  store i32 0, ptr %place
  ret i32 %status
}

define internal i32 @result(i32 %status) {
  %good = icmp eq i32 %status, 0
  br i1 %good, label %done, label %failed
failed:
  %place = call ptr @llvm.threadlocal.address.p0(ptr @status)
  store i32 %status, ptr %place
  br label %done
done:
  ret i32 %status
}

; A pointer as a number: TVM has no word for it.
define hidden i64 @dcc_cuda_address(ptr %pointer) {
  %number = ptrtoint ptr %pointer to i64
  ret i64 %number
}

; Launches a kernel; every argument is in 8 bytes of its own. No block at all is no launch.
define hidden i32 @dcc_cuda_launch(ptr %kernel, i64 %gx, i64 %gy, i64 %gz, i32 %bx, i32 %by,
                                   i32 %bz, i32 %shared, ptr %values, i32 %count) {
entry:
  %pointers = alloca ptr, i32 %count
  %xy = or i64 %gx, %gy
  %xyz = or i64 %xy, %gz
  %large = icmp ugt i64 %xyz, 2147483647
  br i1 %large, label %refuse, label %sized
refuse:
  %invalid = call i32 @result(i32 1)
  ret i32 %invalid
sized:
  %a = mul i64 %gx, %gy
  %blocks = mul i64 %a, %gz
  %none = icmp eq i64 %blocks, 0
  br i1 %none, label %done, label %point
done:
  ret i32 0
point:
  %i = phi i32 [ 0, %sized ], [ %next, %point ]
  %value = getelementptr i64, ptr %values, i32 %i
  %pointer = getelementptr ptr, ptr %pointers, i32 %i
  store ptr %value, ptr %pointer
  %next = add i32 %i, 1
  %more = icmp ult i32 %next, %count
  br i1 %more, label %point, label %call
call:
  %place = call ptr @llvm.threadlocal.address.p0(ptr @stream)
  %stream = load ptr, ptr %place
  %launch = load ptr, ptr @driver
  %x = trunc i64 %gx to i32
  %y = trunc i64 %gy to i32
  %z = trunc i64 %gz to i32
  %status = call i32 %launch(ptr %kernel, i32 %x, i32 %y, i32 %z, i32 %bx, i32 %by, i32 %bz,
                             i32 %shared, ptr %stream, ptr %pointers, ptr null)
  %result = call i32 @result(i32 %status)
  ret i32 %result
}

; Copies within the device.
define hidden i32 @dcc_cuda_copy(ptr %target, ptr %source, i64 %bytes) {
  %none = icmp eq i64 %bytes, 0
  br i1 %none, label %done, label %call
done:
  ret i32 0
call:
  %place = call ptr @llvm.threadlocal.address.p0(ptr @stream)
  %stream = load ptr, ptr %place
  %copy = load ptr, ptr getelementptr ([4 x ptr], ptr @driver, i64 0, i64 1)
  %status = call i32 %copy(ptr %target, ptr %source, i64 %bytes, ptr %stream)
  %result = call i32 @result(i32 %status)
  ret i32 %result
}

; Reads bytes of the device into memory of the host, when all work before is done.
define hidden i32 @dcc_cuda_read(ptr %target, ptr %source, i64 %bytes) {
  %place = call ptr @llvm.threadlocal.address.p0(ptr @stream)
  %stream = load ptr, ptr %place
  %read = load ptr, ptr getelementptr ([4 x ptr], ptr @driver, i64 0, i64 2)
  %first = call i32 %read(ptr %target, ptr %source, i64 %bytes, ptr %stream)
  %good = icmp eq i32 %first, 0
  br i1 %good, label %wait, label %done
wait:
  %synchronize = load ptr, ptr getelementptr ([4 x ptr], ptr @driver, i64 0, i64 3)
  %second = call i32 %synchronize(ptr %stream)
  br label %done
done:
  %status = phi i32 [ %first, %0 ], [ %second, %wait ]
  %result = call i32 @result(i32 %status)
  ret i32 %result
}
"""

_KERNEL = """
define hidden ptr @{function}() {{
  %kernel = load ptr, ptr getelementptr ([{count} x ptr], ptr @kernels, i64 0, i64 {index})
  ret ptr %kernel
}}
"""


def build(kernels: Sequence[str], output: Path) -> None:
    """Writes the object file that a library with these kernels, in this order, links."""
    import tvm_ffi

    count = max(1, len(kernels))
    text = _SOURCE.replace("COUNT", str(count)).replace("BYTES", str(8 * len(kernels)))
    for index, name in enumerate(kernels):
        text += _KERNEL.format(function=_handle(name), count=count, index=index)
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        source = Path(folder) / "host.ll"
        source.write_text(text)
        tvm_ffi.load_module(source).write_to_file(str(output), "o")


def _handle(kernel: str) -> str:
    """The function that gives the loaded kernel."""
    return f"dcc_cuda_kernel_{kernel}"


def _checked(name: str, *args: Any) -> None:
    """A call of one of the functions above, in a host function that ends if it fails."""
    status = T.Bind(tirx.call_extern("int32", f"dcc_cuda_{name}", *args))
    # AssertStmt's constructor hands its first two arguments on in the order condition, kind.
    T.add_to_parent(
        tirx.AssertStmt(tirx.EQ(status, 0), StringImm("RuntimeError"), [StringImm(_FAILED)])
    )


def copy(target: Any, source: Any, nbytes: Any) -> None:
    """Emits a copy within the device, in the order of the stream."""
    _checked("copy", target, source, nbytes)


def read(target: Any, source: Any, nbytes: Any) -> None:
    """Emits a copy from the device to the host that waits for the work before it."""
    _checked("read", target, source, nbytes)


def host_function(host: tirx.PrimFunc) -> tirx.PrimFunc:
    """The host's half of a split function, its launches as calls of this library."""
    roots: dict[Any, Any] = {}  # buffers of the body by the parameter whose memory they are
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("host")
        T.func_attr({"tirx.noalias": True})
        for p in host.params:
            if tirx.is_buffer_var(p):
                buffer = T.arg(p.name, T.buffer(list(p.ty.shape), str(p.ty.dtype)))
                roots[p] = tirx.buffer_data(buffer)
            else:
                T.arg(p.name, p)
        _emit(host.body, roots)
    return builder.get().without_attr("global_symbol")


def _emit(stmt: Any, roots: dict[Any, Any]) -> None:
    kind = type(stmt).__name__
    if kind == "SeqStmt":
        for part in stmt.seq:
            _emit(part, roots)
    elif kind == "DeclBuffer":
        roots[stmt.buffer] = _pointer(stmt.data, roots)
    elif kind == "Bind":
        T.Bind(stmt.value, var=stmt.var)
    elif kind == "Evaluate" and is_launch(stmt.value):
        _launch(stmt.value, roots)
    elif kind == "IfThenElse" and stmt.else_case is None:
        with T.If(stmt.condition), T.Then():
            _emit(stmt.then_case, roots)
    elif kind == "AttrStmt":
        _emit(stmt.body, roots)
    else:
        raise NotImplementedError(f"{kind} between the launches of a function")


def _pointer(data: Any, roots: dict[Any, Any]) -> Any:
    """The host's pointer for ``buffer.data``."""
    return roots[data.args[0]]


def _launch(call: Any, roots: dict[Any, Any]) -> None:
    launch = launch_of(call)
    count = len(launch.args)
    values = T.alloc_buffer(
        (max(1, count),), "uint64", scope="local", annotations={"disable_lower_builtin": True}
    )
    for i, arg in enumerate(launch.args):
        T.buffer_store(values, _value(arg, roots), [i])
    kernel = tirx.call_extern("handle", _handle(launch.kernel))
    grid = [tirx.Cast("int64", extent) for extent in launch.grid]
    block = [tirx.Cast("int32", extent) for extent in (*launch.block, launch.shared)]
    _checked("launch", kernel, *grid, *block, T.address_of(values[0]), count)


def _value(arg: Any, roots: dict[Any, Any]) -> Any:
    """An argument in 8 bytes."""
    if isinstance(arg, Call) and getattr(arg.op, "name", "") == "tirx.buffer_data":
        return tirx.call_extern("uint64", "dcc_cuda_address", _pointer(arg, roots))
    kind = str(arg.ty)
    if kind.startswith("float"):
        arg = tirx.reinterpret(kind.replace("float", "uint"), arg)
    return tirx.Cast("uint64", arg)
