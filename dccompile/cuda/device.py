"""From scheduled functions to CUDA source and the launches that run it.

A function with thread bindings becomes kernels, and a host function that launches them: TVM splits
the two. What TVM would make of the host's half is a call into its runtime; here every launch stays
a plain record, from which `host` makes calls of the small library that artifacts carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from ..generic.lanes import walk
from ..machine import Gpu

_S, _X = s_tir.transform, tirx.transform
_DIMS = ("x", "y", "z")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel. Everything is in terms of the host function's parameters.

    `args` are data pointers and scalars in the order of the kernel's parameters, `grid` and
    `block` have 3 extents each, `shared` is the dynamic shared memory in bytes.
    """

    kernel: str
    args: tuple[Any, ...]
    grid: tuple[Any, Any, Any]
    block: tuple[Any, Any, Any]
    shared: Any


@dataclass(frozen=True)
class Split:
    """Functions after the split: source of all their kernels, host functions by symbol."""

    source: str
    kernels: tuple[str, ...]
    hosts: dict[str, tirx.PrimFunc]  # with calls of `call_ffi_kernel` where they launch


def target_of(machine: Gpu) -> tvm.target.Target:
    """The code generator's target."""
    host = {"kind": "llvm", "mcpu": machine.mcpu}
    return tvm.target.Target({"kind": "cuda", "arch": machine.arch}, host=host)


def split(functions: Mapping[str, tirx.PrimFunc], machine: Gpu) -> Split:
    """Separates kernels from the host's code, and writes the kernels' source."""
    target = target_of(machine)
    named = {n: f.with_attr("global_symbol", n) for n, f in functions.items()}
    by_hand = all("dcc.kernel" in (f.attrs or {}) for f in functions.values())
    mod = _X.BindTarget(target)(tvm.IRModule(named))
    with target:
        mod = tvm.ir.transform.Sequential(_passes(by_hand))(mod)
    kernels: dict[str, tirx.PrimFunc] = {}
    hosts: dict[str, tirx.PrimFunc] = {}
    for gv, func in mod.functions_items():
        side = kernels if int(func.attrs.get("calling_conv", 0)) == 2 else hosts
        side[gv.name_hint] = func
    device = tvm.IRModule(kernels)
    finish = [] if by_hand else [_X.LowerWarpMemory(), _X.StmtSimplify()]
    device = tvm.ir.transform.Sequential([*finish, _X.LowerIntrin()])(device)
    built = tvm_ffi.get_global_func("target.build.cuda")(device, target)
    text = built.inspect_source("cuda")
    body = text[text.index('extern "C" __global__') :]
    reports = "#define DCC_REPORTS\n" if "dcc_report" in body else ""
    source = f"{reports}{prelude()}\n{body}"
    return Split(source, tuple(sorted(kernels)), hosts)


def launches(host: tirx.PrimFunc) -> list[Launch]:
    """The launches of a host function, in order."""
    return [launch_of(node) for node in walk(host.body) if is_launch(node)]


def is_launch(node: Any) -> bool:
    return isinstance(node, tvm.ir.Call) and getattr(node.op, "name", "") == "tirx.call_ffi_kernel"


def launch_of(call: Any) -> Launch:
    """The record of one launch."""
    names = [str(p) for p in call.attrs["launch_params"]]
    name, *args = list(call.args)
    extents = dict(zip(names, args[len(args) - len(names) :], strict=True))
    one = tirx.const(1, "int32")
    grid, block = (
        tuple(extents.get(f"{kind}Idx.{d}", one) for d in _DIMS) for kind in ("block", "thread")
    )
    shared = extents.get("tirx.use_dyn_shared_memory", tirx.const(0, "int32"))
    values = tuple(args[: len(args) - len(names)])
    return Launch(str(name.value), values, grid, block, shared)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def prelude() -> str:
    """The source that every kernel's source begins with."""
    return (Path(__file__).parent / "device.cuh").read_text()


def _passes(by_hand: bool) -> list[Any]:
    """TVM's own pipeline up to the split, of which hand-written kernels need few passes.

    These have no blocks and place their barriers themselves; what is left out takes four fifths of
    the time for them and changes nothing that NVRTC does not do too.
    """
    if by_hand:
        return [
            _S.LowerOpaqueBlock(),
            _X.FlattenBuffer(),
            _X.NarrowDataType(32),
            _X.VectorizeLoop(True),
            _X.UnrollLoop(),
            _X.StmtSimplify(),
            _X.VerifyMemory(),
            _X.AnnotateEntryFunc(),
            _S.MergeSharedMemoryAllocations(),
            _X.SplitHostDevice(),
        ]
    return [
        _S.CanonicalizeLoop(),
        _S.LowerCrossThreadReduction(),
        _S.LowerInitBlock(),
        _S.PlanAndUpdateBufferAllocationLocation(),
        _S.ConvertBlocksToOpaque(),
        _S.LiftThreadBinding(),
        _S.CompactBufferAllocation(),
        _S.UnifyThreadBinding(),
        _S.LowerMatchBuffer(),
        _S.StmtSimplify(),
        _S.AnnotateIrregularLoop(),
        _S.LowerOpaqueBlock(),
        _X.FlattenBuffer(),
        _X.BF16ComputeLegalize(),
        _X.NarrowDataType(32),
        _S.LoopPartition(),
        _X.VectorizeLoop(True),
        _X.StorageRewrite(),
        _X.UnrollLoop(),
        _S.RenormalizeSplitPattern(),
        _X.StmtSimplify(),
        _X.RemoveNoOp(),
        _S.RewriteUnsafeSelect(),
        _X.CommonSubexprElim(),
        _X.VerifyMemory(),
        _X.AnnotateEntryFunc(),
        _S.ThreadSync("shared"),
        _S.ThreadSync("shared.dyn"),
        _S.ThreadSync("warp"),
        _S.InferFragment(),
        _S.LowerThreadAllreduce(),
        _S.MergeSharedMemoryAllocations(),
        _X.SplitHostDevice(),
    ]
