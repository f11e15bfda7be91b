"""One call of a model on a GPU: its tensors checked, its outputs made."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .cuda_lane import Lane
from .device import Device
from .device_array import (
    DeviceArray,
    admit_device,
    current_stream,
    host_handle,
    is_on_device,
    maker,
    stream_key,
)
from .ffi import import_tvm_ffi
from .outputs import cut
from .resources import Block, Lent
from .signature import Plan
from .tensors import Foreign, Shape, admit, aligned, exporter, int64, uint8

if TYPE_CHECKING:
    from .cuda_module import CudaModule

_MAX_SIZES = 1024


class Space:
    """The workspace of calls that run one after the other; `lock` is held while one is started."""

    def __init__(self, device: Device) -> None:
        self.lock = threading.Lock()
        self._device = device
        self._block: Block | None = None
        self._handles: dict[int, Any] = {}

    def handle(self, nbytes: int) -> Any:
        """uint8[nbytes] for `main`; the context is current."""
        found = self._handles.get(nbytes)
        if found is not None:
            return found
        if self._block is None or self._block.nbytes < nbytes:
            self._handles.clear()
            self._block = None
            self._block = self._device.allocate(nbytes, "for the workspace of a call")
        if len(self._handles) >= _MAX_SIZES:
            self._handles.clear()
        handle = host_handle(self._block, self._block.address, (nbytes,), uint8)
        self._handles[nbytes] = handle
        return handle


class HostCall:
    """A call with tensors of the host. `results` are the buffers for outputs as far as given."""

    def __init__(self, module: CudaModule, args: Any, out: Mapping[str, Any] | None) -> None:
        self._module = module
        specs = zip(module.inputs, module._dtypes, args, strict=True)
        self._inputs = [admit("input", spec.name, spec, dtype, x) for spec, dtype, x in specs]
        self._shapes = tuple(x.shape for x in self._inputs)
        self._plan: Plan = module._planned(self._shapes)
        self._exporter = exporter(args[0]) if args else None
        given = dict(out or {})
        self._targets: list[Foreign | None] = []
        self.results: list[Any] = []
        used: list[Foreign] = []
        for spec, (shape, dtype, _) in zip(module.outputs, self._plan.outputs, strict=True):
            target, buffer = None, given.pop(spec.name, None)
            if out and spec.name in out:
                target = admit("output", spec.name, spec, dtype, buffer)
                module._check_output(spec, target, shape, [*self._inputs, *used])
                used.append(target)
            self._targets.append(target)
            self.results.append(buffer)
        for name in given:
            module._output(name)

    def keep(self) -> None:
        """Makes the buffers that are missing, for this and every later run."""
        for i, (shape, dtype, _) in enumerate(self._plan.outputs):
            if self._targets[i] is None:
                array = aligned(shape, dtype)
                self._targets[i] = Foreign(array, 0, shape, dtype, None)
                self.results[i] = self._exporter(array) if self._exporter else array

    def run(self, lane: Lane, at_once: bool) -> list[Any]:
        """The outputs; the context is current. `at_once` as for `Lane.run`."""
        module = self._module
        frame = lane.frame(self._shapes, module._dtypes, self._plan)
        for staged, source in zip(frame.inputs, self._inputs, strict=True):
            np.copyto(staged, source.array())
        module.wait(partial(lane.run, frame, at_once))
        dims = None if frame.sizes is None else frame.sizes.tolist()
        results = []
        for array, target, buffer in zip(frame.outputs, self._targets, self.results, strict=True):
            shape = array.shape
            if dims is not None:
                shape, dims = tuple(dims[: array.ndim]), dims[array.ndim :]
            place = aligned(shape, array.dtype) if target is None else cut(target.array(), shape)
            np.copyto(place, cut(array, shape))
            if target is not None:
                results.append(cut(buffer, shape))
            else:
                results.append(self._exporter(place) if self._exporter else place)
        return results


class DeviceCall:
    """A call with tensors of the device."""

    def __init__(self, module: CudaModule, args: Any, out: Mapping[str, Any] | None) -> None:
        self._module = module
        device = module._gpu
        first = next(x for x in args if is_on_device(x))
        chosen = module.stream
        self._stream = current_stream(first, device.index) if chosen is None else chosen
        place = device, self._stream
        specs = zip(module.inputs, module._dtypes, args, strict=True)
        inputs = [
            admit_device("input", spec.name, spec, dtype, x, *place) for spec, dtype, x in specs
        ]
        self._plan: Plan = module._planned(tuple(x.shape for x in inputs))
        self._exporter = maker(first)
        self._tensors = [*inputs]  # which must live until the call has been started
        self._results: list[Any] = []
        given = dict(out or {})
        for spec, (shape, dtype, nbytes) in zip(module.outputs, self._plan.outputs, strict=True):
            if spec.name in given:
                buffer = given.pop(spec.name)
                target = admit_device(
                    "output", spec.name, spec, dtype, buffer, device, self._stream
                )
                module._check_output(spec, target, shape, self._tensors)
                self._results.append(buffer)
            else:
                with device:
                    lent = device.lend(stream_key(self._stream), nbytes)
                target = _foreign(lent, shape, dtype)
                self._results.append(DeviceArray(device, lent, shape, dtype, self._stream))
            self._tensors.append(target)
        for name in given:
            module._output(name)
        self._sizes: np.ndarray | None = None
        if module.told is not None:
            self._sizes = aligned((module.told,), int64)

    def arguments(self, space: Space) -> list[Any]:
        """What `main` takes; the context is current."""
        handles = [x.handle for x in self._tensors]
        if self._sizes is not None:
            handles.append(import_tvm_ffi().from_dlpack(self._sizes))
        return [*handles, self._module._params, space.handle(self._plan.workspace)]

    def run(self) -> None:
        """Starts the model; the context is current."""
        space = self._module.space(self._stream)
        with space.lock:
            self._module._code.run(self.arguments(space), self._stream)

    def finish(self) -> list[Any]:
        """The outputs, as large as the call has told, of the kind of the first input."""
        dims = None if self._sizes is None else self._sizes.tolist()
        results = []
        for (shape, _, _), array in zip(self._plan.outputs, self._results, strict=True):
            filled = shape
            if dims is not None:
                filled, dims = tuple(dims[: len(shape)]), dims[len(shape) :]
            if isinstance(array, DeviceArray):
                array = array if filled == shape else array.cut(filled)
                results.append(self._exporter(array) if self._exporter else array)
            else:
                results.append(array if filled == shape else cut(array, filled))
        return results


def _foreign(lent: Lent, shape: Shape, dtype: np.dtype) -> Foreign:
    return Foreign(lent, lent.address, shape, dtype, host_handle(lent, lent.address, shape, dtype))
