"""Single functions on a GPU, without an artifact around them: for tests, benches and tuning."""

from __future__ import annotations

import ctypes
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from tvm import tirx

from .. import linker
from ..machine import GPUS, Gpu
from ..runtime import ffi
from ..runtime.cuda_code import Code
from ..runtime.device import Device
from ..runtime.tensors import lend
from . import build, hostlib


def machine_of(gpu: Device) -> Gpu:
    """The newest target that a device runs."""
    return [m for m in GPUS.values() if int(m.arch.removeprefix("sm_")) <= gpu.arch][-1]


class Tensor:
    """An array in device memory; `handle` is what compiled code takes."""

    def __init__(self, gpu: Device, array: np.ndarray) -> None:
        """Uploads the array."""
        self.gpu, self.shape, self.dtype = gpu, array.shape, array.dtype
        source = np.ascontiguousarray(array)
        with gpu:
            self._block = gpu.allocate(source.nbytes, "for a tensor")
            if source.nbytes:
                place = source.ctypes.data
                result = gpu.driver.cuMemcpyHtoD_v2(self._block.address, place, source.nbytes)
                gpu.check(result, "uploading a tensor")
        mapped = lend(self._block, self._block.address, array.shape, array.dtype)
        self.handle = ffi.import_tvm_ffi().from_dlpack(mapped)

    @property
    def address(self) -> int:
        return self._block.address

    def numpy(self) -> np.ndarray:
        """A copy in host memory; waits for all work of the device."""
        array = np.empty(self.shape, self.dtype)
        with self.gpu as gpu:
            gpu.check(gpu.driver.cuCtxSynchronize(), "waiting for a function")
            if array.nbytes:
                result = gpu.driver.cuMemcpyDtoHAsync_v2(
                    array.ctypes.data, self.address, array.nbytes, None
                )
                gpu.check(result or gpu.driver.cuStreamSynchronize(None), "reading a tensor")
        return array


class Function:
    """A function with thread bindings, compiled for a GPU and loaded there."""

    def __init__(self, code: Code) -> None:
        self.gpu, self._code = code.device, code

    def __call__(self, *tensors: Tensor, stream: int = 0) -> None:
        """Starts it; nothing waits for it. Raises Error where the driver refuses."""
        with self.gpu:
            self._code.run([t.handle for t in tensors], stream)

    def finding(self) -> str | None:
        """Waits; the message of what kernels found wrong with their input, None if nothing."""
        with self.gpu as gpu:
            gpu.check(gpu.driver.cuCtxSynchronize(), "waiting for a function")
        findings = self._code.findings
        return None if findings is None else findings.take()


class Watch:
    """Time between two points of a stream, by the device's own clock; the context is current."""

    def __init__(self, gpu: Device) -> None:
        self.gpu = gpu
        self._events = [ctypes.c_void_p() for _ in range(2)]
        for event in self._events:
            gpu.check(gpu.driver.cuEventCreate(ctypes.byref(event), 0), "making an event")

    def start(self, stream: int) -> None:
        result = self.gpu.driver.cuEventRecord(self._events[0], stream)
        self.gpu.check(result, "recording an event")

    def stop(self, stream: int) -> float:
        """Nanoseconds since `start`; waits."""
        driver, (first, last) = self.gpu.driver, self._events
        self.gpu.check(driver.cuEventRecord(last, stream), "recording an event")
        self.gpu.check(driver.cuEventSynchronize(last), "waiting for a function")
        spent = ctypes.c_float()
        result = driver.cuEventElapsedTime(ctypes.byref(spent), first, last)
        self.gpu.check(result, "reading a clock")
        return spent.value * 1e6

    def __del__(self) -> None:
        for event in self._events:
            self.gpu.release(partial(self.gpu.driver.cuEventDestroy_v2, event))


def compile(func: tirx.PrimFunc, machine: Gpu) -> bytes:
    """A library and its kernels, packed as `load` takes it. Needs no GPU."""
    built = build.build({"main": func}, machine)
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        host, launch, library = (Path(folder) / n for n in ("host.o", "launch.o", "library.so"))
        host.write_bytes(built.host)
        hostlib.build(built.kernels, launch)
        linker.link([host, launch], library)
        linked = build.Built(library.read_bytes(), built.cubin, built.ptx, built.kernels)
    return linked.pack()


def load(packed: bytes, gpu: Device) -> Function:
    """What `compile` made, on a device. Raises IncompatibleError where it does not fit."""
    built = build.unpack(packed)
    exports: dict[str, int] = {}
    library = ffi.load_library(memoryview(built.host), "loose", "a function", exports)
    images = [("its code", built.cubin, built.kernels)]
    return Function(Code(gpu, library, exports, images, "a function"))
