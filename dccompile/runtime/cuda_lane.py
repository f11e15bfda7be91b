"""Calls with tensors of the host: a stream with memory of its own, for one call at a time.

Inputs are copied into page-locked memory, from there in one piece to the device; outputs come back
the same way. Addresses stay the same from call to call, so that a graph of everything, captured at
the second call with the same shapes, replaces all launches of later ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np

from .cuda_code import Code
from .device import Device
from .device_array import host_handle
from .driver import STICKY
from .ffi import import_tvm_ffi
from .resources import Block, Graph, Pinned
from .signature import Plan
from .tensors import Shape, aligned, int64, lend

_ALIGN = 256
_FRAMES = 8  # shapes whose handles and graph a lane keeps


class Frame:
    """One choice of shapes in a lane's memory: arguments of `main`, and what goes to and fro.

    `inputs` and `outputs` are arrays in page-locked memory, `sizes` the dims that a model which
    computes them tells; `up` and `down` are offset and bytes of inputs and outputs in memory.
    """

    def __init__(self) -> None:
        self.inputs: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        self.handles: list[Any] = []
        self.sizes: np.ndarray | None = None
        self.up = self.down = (0, 0)
        self.calls = 0
        self.graph: Graph | None = None


class Lane:
    """`params` is the weights' handle, `told` how many dims the model computes at a call."""

    def __init__(self, code: Code, params: Any, told: int | None, graphs: bool) -> None:
        self._code, self._params, self._told = code, params, told
        self._graphs = graphs and told is None
        self._device: Device = code.device
        self._stream = self._device.stream()
        self._memory: Block | None = None
        self._host: Pinned | None = None
        self._frames: OrderedDict[Any, Frame] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the lane holds."""
        return self._memory.nbytes if self._memory else 0

    def frame(self, shapes: tuple[Shape, ...], dtypes: Sequence[np.dtype], plan: Plan) -> Frame:
        """The frame for inputs of these shapes; the context is current."""
        found = self._frames.get(shapes)
        if found is not None:
            self._frames.move_to_end(shapes)
            return found
        sides = [
            [(s, d, prod(s) * d.itemsize) for s, d in zip(shapes, dtypes, strict=True)],
            list(plan.outputs),
        ]
        frame = Frame()
        at = 0
        places = []
        for side in sides:
            begin = at
            for shape, dtype, nbytes in side:
                places.append((at, shape, dtype))
                at += -(-nbytes // _ALIGN) * _ALIGN
            frame.up, frame.down = frame.down, (begin, at - begin)
        self._grow(at, at + plan.workspace)
        assert self._memory is not None and self._host is not None
        for i, (offset, shape, dtype) in enumerate(places):
            array = lend(self._host, self._host.address + offset, shape, dtype)
            (frame.inputs if i < len(shapes) else frame.outputs).append(array)
            address = self._memory.address + offset
            frame.handles.append(host_handle(self._memory, address, shape, dtype))
        if self._told is not None:
            frame.sizes = aligned((self._told,), int64)
            frame.handles.append(import_tvm_ffi().from_dlpack(frame.sizes))
        work = host_handle(
            self._memory, self._memory.address + at, (plan.workspace,), np.dtype(np.uint8)
        )
        frame.handles += [self._params, work]
        while len(self._frames) >= _FRAMES:
            self._frames.popitem(last=False)
        self._frames[shapes] = frame
        return frame

    def _grow(self, staged: int, total: int) -> None:
        """Makes room; what was made for the old memory goes with it."""
        enough = self._memory is not None and self._memory.nbytes >= total
        if enough and self._host is not None and self._host.nbytes >= staged:
            return
        self._frames.clear()
        if not enough:
            self._memory = None
            self._memory = self._device.allocate(total, "for a call")
        if self._host is None or self._host.nbytes < staged:
            self._host = None
            self._host = self._device.pinned(staged, "for a call")

    def run(self, frame: Frame, at_once: bool = False) -> None:
        """Runs the model from the frame's inputs to its outputs, and waits; the context is current.

        `at_once` captures the graph after the first call instead of at the second. Raises Error.
        """
        device = self._device
        enqueue = partial(self._enqueue, frame)
        wanted = self._graphs and frame.calls == (0 if at_once else 1)
        frame.calls += 1
        try:
            if wanted and not at_once:
                frame.graph = device.capture(self._stream.handle, enqueue)
            if frame.graph is not None:
                frame.graph.launch(self._stream.handle)
            else:
                enqueue()
            if frame.sizes is not None:
                self._download(frame, frame.sizes.tolist())
        except Exception:  # what was started ends before its memory serves another call
            result = device.driver.cuStreamSynchronize(self._stream.handle)
            if result in STICKY:
                raise device.failure(result, "running a model") from None
            raise
        device.check(device.driver.cuStreamSynchronize(self._stream.handle), "running a model")
        if wanted and at_once:
            frame.graph = device.capture(self._stream.handle, enqueue)

    def _enqueue(self, frame: Frame) -> None:
        assert self._memory is not None and self._host is not None
        device, stream = self._device, self._stream.handle
        offset, nbytes = frame.up
        if nbytes:
            device.check(
                device.driver.cuMemcpyHtoDAsync_v2(
                    self._memory.address + offset, self._host.address + offset, nbytes, stream
                ),
                "copying inputs",
            )
        self._code.run(frame.handles, stream)
        if frame.sizes is None:
            self._copy_back(*frame.down)

    def _copy_back(self, offset: int, nbytes: int) -> None:
        assert self._memory is not None and self._host is not None
        device = self._device
        if nbytes:
            device.check(
                device.driver.cuMemcpyDtoHAsync_v2(
                    self._host.address + offset,
                    self._memory.address + offset,
                    nbytes,
                    self._stream.handle,
                ),
                "copying outputs",
            )

    def _download(self, frame: Frame, dims: list[int]) -> None:
        """Copies the part of each output that the call has filled."""
        at = frame.down[0]
        for array in frame.outputs:
            shape, dims = dims[: array.ndim], dims[array.ndim :]
            self._copy_back(at, prod(shape) * array.itemsize)
            at += -(-array.nbytes // _ALIGN) * _ALIGN
