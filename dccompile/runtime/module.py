"""A loaded model and its calls.

A module may be called from many threads at once. Each Python thread has its own workspace and
staging buffers, which it keeps: they grow to what the largest call needed, except that anything
beyond 1 GiB is allocated for its call alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import InputError, UsageError
from . import ffi
from .outputs import Outputs, cut, outputs_class
from .signature import Plan, Signature, translate
from .tensors import (
    ALIGN,
    Foreign,
    TensorSpec,
    admit,
    aligned,
    empty,
    exporter,
    int64,
    ndarray,
    uint8,
)

_KEEP = 1 << 30  # bytes of workspace or staging that a thread keeps for its next call
_MAX_SHAPES = 1024


class _Scratch(threading.local):
    """A thread's workspace and staging buffers for one module."""

    def __init__(self) -> None:
        self.buffer = aligned((0,), uint8)
        self.handles: dict[int, Any] = {}
        self.staged: dict[Any, tuple[np.ndarray, Any]] = {}

    def workspace(self, nbytes: int) -> Any:
        """A handle of uint8[nbytes] that no other thread and no running call uses."""
        if nbytes in self.handles:
            return self.handles[nbytes]
        dlpack = ffi.import_tvm_ffi().from_dlpack
        if nbytes > _KEEP:
            return dlpack(aligned((nbytes,), uint8))
        if nbytes > self.buffer.nbytes or len(self.handles) > _MAX_SHAPES:
            self.handles.clear()
            if nbytes > self.buffer.nbytes:
                self.buffer = aligned((nbytes,), uint8)
        handle = self.handles[nbytes] = dlpack(
            aligned((0,), uint8) if not nbytes else self.buffer[:nbytes]
        )
        return handle

    def stage(self, key: Any, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, Any]:
        """An aligned array for the tensor `key`, and its handle; the last one if it fits."""
        held = self.staged.get(key)
        if held is None or held[0].shape != shape:
            array = aligned(shape, dtype)
            held = array, ffi.import_tvm_ffi().from_dlpack(array)
            if array.nbytes <= _KEEP:
                self.staged[key] = held
        return held


class Module:
    """A loaded model: ``m(x)``, ``m(x=x)`` or ``m({"x": x})`` gives its `Outputs`."""

    device = "cpu"

    def __init__(
        self,
        manifest: Mapping[str, Any],
        target: str,
        library: Any,
        params: np.ndarray,
        threads: int,
    ) -> None:
        self.name = str(manifest.get("name", ""))
        self.target = target
        self.threads = threads
        self._signature = Signature(dict(manifest), library["plan"])
        self.inputs: tuple[TensorSpec, ...] = self._signature.inputs
        self.outputs: tuple[TensorSpec, ...] = self._signature.outputs
        self._names = tuple(spec.name for spec in self.inputs)
        self._dtypes = self._signature.input_dtypes
        self._arity = len(self.inputs)
        self._class = outputs_class([spec.name for spec in self.outputs])
        self._main = library["main"]
        self._dlpack = ffi.import_tvm_ffi().from_dlpack
        self._params = self._dlpack(params)
        self._scratch = _Scratch()
        self._shapes: dict[Any, Plan] = {}

    def __repr__(self) -> str:
        inputs = ", ".join(map(repr, self.inputs))
        outputs = ", ".join(map(repr, self.outputs))
        return f"Module({self.name}({inputs}) -> {outputs}; {self.target}, {self.threads} threads)"

    def __call__(self, /, *args: Any, out: Any = None, **named: Any) -> Outputs:
        """Runs the model; arrays in, arrays of the same kind out, which the caller owns.

        `out` maps output names to row-major buffers to write into. Raises InputError.
        """
        if named or len(args) != self._arity or (args and type(args[0]) is dict):
            args = self._arrange(args, named)
        handles = []
        shapes = []
        dlpack = self._dlpack
        for x, dtype in zip(args, self._dtypes):  # noqa: B905 (strict costs 60 ns, lengths are equal)
            if type(x) is not ndarray or x.dtype is not dtype or not x.flags.carray:
                return self._general(args, out)
            shapes.append(x.shape)
            handles.append(dlpack(x))
        key = tuple(shapes)
        plan = self._shapes.get(key)
        if plan is None or plan.general or out is not None:
            return self._general(args, out)
        scratch = self._scratch
        for i, handle in enumerate(handles):
            if handle.data_ptr() & 63:
                array, handles[i] = scratch.stage(i, shapes[i], self._dtypes[i])
                array[...] = args[i]
        results = []
        for shape, dtype, nbytes in plan.outputs:
            raw = empty(nbytes + 64, uint8)
            result = ndarray(shape, dtype, raw, -dlpack(raw).data_ptr() & 63)
            results.append(result)
            handles.append(dlpack(result))
        if ffi.local.threads != self.threads:
            ffi.configure_threads(self.threads)
        workspace = scratch.handles.get(plan.workspace)
        if workspace is None:
            workspace = scratch.workspace(plan.workspace)
        try:
            self._main(*handles, self._params, workspace)
        except Exception as error:  # any class the compiled code chose
            raise translate(error) from None
        return self._class(results)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        """ONNX Runtime's call: the named outputs, or all of them, as a list."""
        outputs = self(dict(feeds))
        if names is None:
            return list(outputs)
        for name in names:
            self._output(name)
        return [outputs[name] for name in names]

    def bind(
        self,
        feeds: Mapping[str, Any] | None = None,
        out: Mapping[str, Any] | None = None,
        /,
        **buffers: Any,
    ) -> Bound:
        """Fixes the buffers of inputs and outputs, by name; each call then reads and writes them.

        Outputs without a buffer get a new array. ``bind({...}, {...})`` is for names that are
        both an input's and an output's.
        """
        args, given = self._buffers(feeds, out, buffers)
        call = self._prepare(args, given, keep=True)
        return (Bound if call.sizes is None else _SizedBound)(self, call)

    # The general way, which every check and every kind of tensor takes

    def _buffers(
        self, feeds: Any, out: Any, buffers: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `bind` as inputs in their order and outputs by name."""
        feeds, out = dict(feeds or {}), dict(out or {})
        results = {spec.name for spec in self.outputs}
        for name, value in buffers.items():
            side = feeds if name in self._names else out
            if name in side or (name in self._names and name in results):
                raise InputError(f"'{name}' is not one buffer; use bind(inputs, outputs)", "DC2101")
            side[name] = value
        return self._arrange((feeds,), {}), out

    def _arrange(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """The inputs in their order, however they were given."""
        alone = named if not args else args[0] if len(args) == 1 and not named else None
        if type(alone) is dict and len(alone) == self._arity:
            try:
                return tuple([alone[name] for name in self._names])
            except KeyError:
                pass  # said below
        count = len(args)
        if count == 1 and isinstance(args[0], Mapping):
            given = dict(args[0])
            both = sorted(given.keys() & named.keys())
            given.update(named)
        else:
            given = dict(zip(self._names, args, strict=False))
            both = sorted(given.keys() & named.keys())
            given.update(named)
            if count > self._arity:
                raise self._wrong(f"got {count} inputs for {self._arity}")
        if both:
            raise self._wrong(f"input '{both[0]}' is given twice")
        if unknown := [name for name in given if name not in self._names]:
            raise self._wrong(f"no input is called {unknown[0]!r}")
        if missing := [name for name in self._names if name not in given]:
            raise self._wrong(f"input '{missing[0]}' is missing")
        return tuple(given[name] for name in self._names)

    def _wrong(self, found: str) -> InputError:
        wanted = ", ".join(map(repr, self.inputs)) or "none"
        return InputError(f"{found}; the inputs are {wanted}", "DC2101")

    def _output(self, name: str) -> int:
        index = self._class._index.get(name)
        if index is None:
            wanted = ", ".join(map(repr, self.outputs))
            raise InputError(f"no output is called {name!r}; the outputs are {wanted}", "DC2101")
        return index

    def _planned(self, shapes: tuple[tuple[int, ...], ...]) -> Plan:
        plan = self._shapes.get(shapes)
        if plan is None:
            plan = self._signature.plan(shapes)
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            self._shapes[shapes] = plan
        return plan

    def _prepare(self, args: tuple[Any, ...], out: Mapping[str, Any] | None, keep: bool) -> _Call:
        """What a call needs; `keep` gives buffers that are its own, instead of the thread's."""
        admitted = [
            admit("input", spec.name, spec, dtype, x)
            for spec, dtype, x in zip(self.inputs, self._dtypes, args, strict=True)
        ]
        plan = self._planned(tuple(x.shape for x in admitted))
        scratch = _Scratch() if keep else self._scratch
        before = []
        handles = []
        for i, x in enumerate(admitted):
            if x.address % ALIGN:
                array, handle = scratch.stage(i, x.shape, x.dtype)
                before.append((array, x.array()))
            else:
                handle = x.handle
            handles.append(handle)
        results: list[Any] = []
        after: list[Any] = []
        used: list[Foreign] = []
        given = dict(out or {})
        sized = self._signature.sized
        convert = exporter(args[0]) if args and not sized else None
        for spec, (shape, dtype, _) in zip(self.outputs, plan.outputs, strict=True):
            if spec.name not in given:
                result = aligned(shape, dtype)
                handles.append(self._dlpack(result))
                results.append(convert(result) if convert else result)
                continue
            buffer = given.pop(spec.name)
            target = admit("output", spec.name, spec, dtype, buffer)
            self._check_output(spec, target, shape, [*admitted, *used])
            used.append(target)
            results.append(buffer)
            if target.address % ALIGN:
                array, handle = scratch.stage(spec.name, shape, dtype)
                after.append((target.array(), array))
            else:
                handle = target.handle
            handles.append(handle)
        for name in given:
            self._output(name)
        sizes = None
        if sized:
            sizes = aligned((sum(len(spec.shape) for spec in self.outputs),), int64)
            handles.append(self._dlpack(sizes))
        handles += [self._params, scratch.workspace(plan.workspace)]
        return _Call(handles, results, before, after, sizes)

    def _cut(self, call: _Call) -> list[Any]:
        """The outputs as large as the call has told."""
        assert call.sizes is not None
        dims = call.sizes.tolist()
        cuts = []
        for spec, buffer in zip(self.outputs, call.results, strict=True):
            shape, dims = dims[: len(spec.shape)], dims[len(spec.shape) :]
            cuts.append(cut(buffer, shape))
        return cuts

    def _check_output(
        self, spec: TensorSpec, target: Foreign, shape: tuple[int, ...], others: list[Foreign]
    ) -> None:
        if target.shape != shape:
            raise InputError(
                f"output '{spec.name}': this call makes {spec.dtype}{list(shape)}, "
                f"the buffer is {spec.dtype}{list(target.shape)}; give one of that shape",
                "DC2104",
            )
        if any(target.overlaps(other) for other in others):
            raise InputError(
                f"output '{spec.name}': the buffer overlaps another one; give memory of its own",
                "DC2109",
            )

    def _general(self, args: tuple[Any, ...], out: Mapping[str, Any] | None) -> Outputs:
        check_out(out)
        call = self._prepare(args, out, keep=False)
        if ffi.local.threads != self.threads:
            ffi.configure_threads(self.threads)
        for target, source in call.before:
            target[...] = source
        try:
            self._main(*call.handles)
        except Exception as error:  # any class the compiled code chose
            raise translate(error) from None
        for target, source in call.after:
            target[...] = source
        if call.sizes is None:
            return self._class(call.results)
        convert = exporter(args[0]) if args else None
        results = self._cut(call)
        for i, (spec, buffer) in enumerate(zip(self.outputs, call.results, strict=True)):
            if not out or spec.name not in out:
                # a copy where less is left: what the caller keeps should not hold the rest
                results[i] = results[i] if results[i] is buffer else results[i].copy()
                results[i] = convert(results[i]) if convert else results[i]
        return self._class(results)


def check_out(out: Any) -> None:
    if out is not None and not isinstance(out, Mapping):
        raise InputError("out: expected a dict from output names to buffers", "DC2101")


@dataclass
class _Call:
    """Arguments of `main`, the outputs, copies to make before and after.

    Where the model computes sizes, `sizes` receives the dims of all outputs, which are arrays of
    the largest sizes.
    """

    handles: list[Any]
    results: list[Any]
    before: list[Any]
    after: list[Any]
    sizes: np.ndarray | None


@contextmanager
def only_one(busy: threading.Lock) -> Iterator[None]:
    """Holds the lock of a bound call; raises UsageError where another thread does."""
    if not busy.acquire(False):
        raise _busy_elsewhere()
    try:
        yield
    finally:
        busy.release()


def _busy_elsewhere() -> UsageError:
    return UsageError(
        "a bound call is running in another thread. Fix: bind once for every thread", "DC2023"
    )


class Bound:
    """A call with fixed buffers, from `Module.bind`: ``b()`` allocates nothing.

    The buffers belong to one call at a time: bind once for every thread that calls.
    """

    def __init__(self, module: Module, call: _Call) -> None:
        self.outputs = module._class(call.results)
        self._threads = module.threads
        self._call = partial(module._main, *call.handles)
        self._before = call.before
        self._after = call.after
        self._busy = threading.Lock()

    def __call__(self) -> Outputs:
        """Runs the model on what the input buffers hold now; returns the output buffers."""
        if not self._busy.acquire(False):
            raise _busy_elsewhere()
        try:
            if ffi.local.threads != self._threads:
                ffi.configure_threads(self._threads)
            for target, source in self._before:
                target[...] = source
            self._call()
            for target, source in self._after:
                target[...] = source
        except Exception as error:  # any class the compiled code chose
            raise translate(error) from None
        finally:
            self._busy.release()
        return self.outputs


class _SizedBound(Bound):
    """Of a model that computes sizes: each call gives the part of the buffers that it filled."""

    def __init__(self, module: Module, call: _Call) -> None:
        super().__init__(module, call)
        self._cut = partial(module._cut, call)
        self._class = module._class

    def __call__(self) -> Outputs:
        super().__call__()
        self.outputs = self._class(self._cut())
        return self.outputs
