"""The compiled code of a CUDA variant: kernels on the device, and the host code that runs them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import Error, IncompatibleError
from . import driver as cuda
from .device import Device
from .ffi import EXPORTS, load_library
from .findings import Findings
from .signature import translate

_OLD = 222  # a PTX version that the driver does not know
_STATIC, _DYNAMIC = 1, 8  # attributes of a kernel: shared memory it has, and may ask for
_ABSENT = 500  # the image has nothing of that name


class _Image:
    """A loaded module of kernels."""

    def __init__(self, device: Device, handle: int) -> None:
        self.device, self.handle = device, handle

    def __del__(self) -> None:
        device, handle = self.device, self.handle
        device.release(lambda: device.driver.cuModuleUnload(handle))


class Code:
    """One variant on one device. `findings` is None where no kernel has anything to report."""

    def __init__(
        self,
        device: Device,
        library: Any,
        exports: Mapping[str, int],
        images: Sequence[tuple[str, bytes, Sequence[str]]],
        where: str,
    ) -> None:
        """`exports` are addresses in the library; `images` have a name, code and kernels."""
        missing = [name for name in EXPORTS if name not in exports]
        if missing:
            raise _broken(where, f"the library has no function {missing[0]!r}")
        self.device = device
        self.library = library
        self._main: Callable[..., Any] = library["main"]
        self._stream = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(exports["dcc_cuda_stream"])
        self._status = ctypes.PYFUNCTYPE(ctypes.c_int)(exports["dcc_cuda_status"])
        self._images: list[_Image] = []
        self.findings: Findings | None = None
        functions: list[int] = []
        with device:
            for name, code, kernels in images:
                functions += self._load(name, code, kernels, where)
        attach = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(
            exports["dcc_cuda_attach"]
        )
        calls = [ctypes.cast(getattr(device.driver, n), ctypes.c_void_p) for n in cuda.HOST_TABLE]
        self._calls = (ctypes.c_void_p * len(calls))(*calls)
        self._functions = (ctypes.c_void_p * max(1, len(functions)))(*functions)
        attach(self._calls, self._functions)

    def _load(self, name: str, code: bytes, kernels: Sequence[str], where: str) -> list[int]:
        device, driver = self.device, self.device.driver
        module = ctypes.c_void_p()
        result = driver.cuModuleLoadData(ctypes.byref(module), code + b"\0")
        if result == _OLD:
            raise IncompatibleError(
                f"{where}: {name} needs a newer driver than this one of CUDA {driver.release}: "
                f"{driver.describe(result)}. Fix: update the driver",
                "DC4024",
            )
        if result == cuda.OUT_OF_MEMORY or result in cuda.STICKY:
            raise device.failure(result, "loading kernels")
        if result:
            raise _broken(where, f"{name} does not load on {device}: {driver.describe(result)}")
        self._images.append(_Image(device, module.value or 0))
        functions = []
        for kernel in kernels:
            function = ctypes.c_void_p()
            if driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()):
                raise _broken(where, f"{name} has no kernel {kernel!r}")
            functions.append(function.value or 0)
            self._allow_shared(function)
        place, size = ctypes.c_uint64(), ctypes.c_size_t()
        result = driver.cuModuleGetGlobal_v2(
            ctypes.byref(place), ctypes.byref(size), module, b"dcc_status"
        )
        if not result:
            self.findings = self.findings or Findings(device)
            value = ctypes.c_uint64(self.findings.seen)
            result = driver.cuMemcpyHtoD_v2(place.value, ctypes.addressof(value), 8)
        if result != _ABSENT:
            device.check(result, "loading kernels")
        return functions

    def _allow_shared(self, function: Any) -> None:
        """Lets a launch ask for as much dynamic shared memory as the device has."""
        device, static = self.device, ctypes.c_int()
        device.check(
            device.driver.cuFuncGetAttribute(ctypes.byref(static), _STATIC, function),
            "loading kernels",
        )
        most = max(0, device.shared - static.value)
        device.check(device.driver.cuFuncSetAttribute(function, _DYNAMIC, most), "loading kernels")

    def run(self, handles: Sequence[Any], stream: int) -> None:
        """Starts the model on a stream; the context is current. Raises Error."""
        self._stream(stream)
        try:
            self._main(*handles)
        except Exception as error:  # any class the compiled code chose
            result = self._status()
            if result:
                raise self.device.failure(result, "starting kernels") from None
            raise translate(error) from None


def load(device: Device, image: memoryview, images: Sequence[Any], name: str, where: str) -> Code:
    """`Code` from the library `image`, in a copy of its own."""
    exports: dict[str, int] = {}
    library = load_library(image, name, where, exports)
    for function in ("main", "plan"):
        if not library.implements_function(function):
            raise _broken(where, f"the library has no function {function!r}")
    return Code(device, library, exports, images, where)


def _broken(where: str, found: str) -> Error:
    return IncompatibleError(f"{where}: {found}. Fix: compile the model again", "DC4029")
