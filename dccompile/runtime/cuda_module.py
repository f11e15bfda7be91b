"""A model on a GPU, and its calls.

Tensors of the host go through memory of the module: such a call returns when its outputs are
there. Tensors of the device are used where they are, on the stream their library is using: such a
call returns at once, and what kernels find wrong with its inputs is raised by a later call of the
module, at the latest by `synchronize`. Calls may come from many threads, on many streams, at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from . import driver as cuda
from .cuda_calls import DeviceCall, HostCall, Space
from .cuda_code import Code
from .cuda_lane import Lane
from .device_array import current_stream, is_on_device, stream_handle, stream_key
from .module import Bound, Module, check_out, only_one
from .outputs import Outputs
from .resources import Block, Graph
from .tensors import lend, uint8

_KEEP = 1 << 30  # bytes of a lane that is kept for the next call
_MAX_STREAMS = 64


class _Local(threading.local):
    stream: int | None = None


class CudaModule(Module):
    """A loaded model on a GPU: called as a `Module` is, with tensors of the host or its own.

    `graphs` may be set to False before the first call: a capture disturbs other threads that
    synchronize the whole device in that moment.
    """

    def __init__(
        self, manifest: Mapping[str, Any], target: str, code: Code, params: Block, threads: int
    ) -> None:
        data = lend(params, params.address, (params.nbytes,), uint8)
        super().__init__(manifest, target, code.library, data, threads)
        self._gpu = code.device
        self.device = str(code.device)
        self.graphs = True
        self._code = code
        told = sum(len(spec.shape) for spec in self.outputs)
        self.told = told if self._signature.sized else None
        self._lanes: list[Lane] = []  # those that no call is using
        self._spaces: dict[Any, Space] = {}
        self._stream: int | None = None
        self._local = _Local()

    def __repr__(self) -> str:
        inputs = ", ".join(map(repr, self.inputs))
        outputs = ", ".join(map(repr, self.outputs))
        return f"Module({self.name}({inputs}) -> {outputs}; {self.target} on {self.device})"

    # Streams

    @property
    def stream(self) -> int | None:
        """The stream of calls with device tensors; None: the one their library is using."""
        return self._stream if self._local.stream is None else self._local.stream

    @stream.setter
    def stream(self, stream: Any) -> None:
        self._stream = None if stream is None else stream_handle(stream)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Calls of this thread in the block use that stream: a handle, or torch's, or cupy's."""
        before, self._local.stream = self._local.stream, stream_handle(stream)
        try:
            yield
        finally:
            self._local.stream = before

    def synchronize(self) -> None:
        """Waits for all calls. Raises what they found: InputError, or Error of a dead context."""
        with self._gpu as device:
            device.synchronize()
            if self._code.findings is not None:
                self._code.findings.settle()

    # Calls

    def __call__(self, /, *args: Any, out: Any = None, **named: Any) -> Outputs:
        """Runs the model; tensors in, tensors of the same kind in the same place out.

        `out` maps output names to row-major buffers to write into. Raises InputError.
        """
        cuda.refuse_child()
        if named or len(args) != self._arity or (args and type(args[0]) is dict):
            args = self._arrange(args, named)
        check_out(out)
        if any(map(is_on_device, args)):
            device_call = DeviceCall(self, args, out)
            self._start(device_call.run)
            return self._class(device_call.finish())
        call = HostCall(self, args, out)
        lane = self._lane()
        try:
            with self._gpu:
                return self._class(call.run(lane, at_once=False))
        finally:
            if lane.nbytes <= _KEEP:
                self._lanes.append(lane)

    def bind(
        self,
        feeds: Mapping[str, Any] | None = None,
        out: Mapping[str, Any] | None = None,
        /,
        **buffers: Any,
    ) -> Bound:
        """As `Module.bind`; the first call captures a graph, which the later ones launch."""
        cuda.refuse_child()
        args, given = self._buffers(feeds, out, buffers)
        kind = _DeviceBound if any(map(is_on_device, args)) else _HostBound
        return kind(self, args, given)

    # What calls use of the module; the context is current but for `space`

    def lane(self) -> Lane:
        """A new lane."""
        return Lane(self._code, self._params, self.told, self.graphs)

    def _lane(self) -> Lane:
        try:
            return self._lanes.pop()
        except IndexError:
            with self._gpu:
                return self.lane()

    def space(self, stream: int) -> Space:
        """The workspace of calls on that stream."""
        key = stream_key(stream)
        space = self._spaces.get(key)
        if space is None:
            if len(self._spaces) >= _MAX_STREAMS:
                self._spaces.clear()
            space = self._spaces.setdefault(key, Space(self._gpu))
        return space

    def wait(self, body: Callable[[], None]) -> None:
        """Runs `body`, which waits for what it starts; raises what kernels found."""
        findings = self._code.findings
        body() if findings is None else findings.wait(body)

    def _start(self, body: Callable[[], None]) -> None:
        """Runs `body`, which does not wait for what it starts."""
        findings = self._code.findings
        with self._gpu:
            body() if findings is None else findings.start(body)


class _HostBound(Bound):
    """A bound call with buffers of the host."""

    def __init__(self, module: CudaModule, args: Any, out: Mapping[str, Any]) -> None:
        self._module = module
        self._busy = threading.Lock()
        self._call_ = HostCall(module, args, out)
        self._call_.keep()
        with module._gpu:
            self._lane = module.lane()
        self.outputs = module._class(self._call_.results)

    def __call__(self) -> Outputs:
        """Runs the model on what the input buffers hold now; returns the output buffers."""
        cuda.refuse_child()
        with only_one(self._busy), self._module._gpu:
            self.outputs = self._module._class(self._call_.run(self._lane, at_once=True))
        return self.outputs


class _DeviceBound(Bound):
    """A bound call with buffers of the device: it returns before they are filled."""

    def __init__(self, module: CudaModule, args: Any, out: Mapping[str, Any]) -> None:
        self._module = module
        self._busy = threading.Lock()
        self._call_ = DeviceCall(module, args, out)
        self._first = next(x for x in args if is_on_device(x))
        with module._gpu as device:
            self._space = Space(device)
            self._arguments = self._call_.arguments(self._space)
        self._graph: Graph | None = None
        self._calls = 0
        self.outputs = module._class(self._call_.finish())

    def __call__(self) -> Outputs:
        """Starts the model on what the input buffers hold then; returns the output buffers."""
        cuda.refuse_child()
        with only_one(self._busy):
            self._module._start(self._run)
            if self._module.told is not None:
                self.outputs = self._module._class(self._call_.finish())
        return self.outputs

    def _run(self) -> None:
        module, code = self._module, self._module._code
        chosen = module.stream
        stream = current_stream(self._first, module._gpu.index) if chosen is None else chosen
        if self._graph is not None:
            self._graph.launch(stream)
            return
        code.run(self._arguments, stream)
        self._calls += 1
        if self._calls == 1 and module.graphs and module.told is None:
            aside = module._gpu.stream()
            enqueue = partial(code.run, self._arguments, aside.handle)
            self._graph = module._gpu.capture(aside.handle, enqueue)
