"""NVIDIA's driver, ``libcuda.so.1``, through ctypes: nothing of the CUDA toolkit is needed.

A call returns its CUresult; `Driver.describe` has words for one. The meaning of every function is
that of the CUDA driver API; pointers, handles and sizes are plain numbers here.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from typing import Any

from ..errors import IncompatibleError, UsageError

LIBRARY = "libcuda.so.1"

OUT_OF_MEMORY = 2
NO_DEVICE = 100
LEGACY_STREAM = 0

# After these a process gets the same error from every call: its context is beyond repair.
STICKY = frozenset({4, 201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719})
_MISMATCH = (803, 804)  # of the kernel's driver and the library, of a compatibility package
_STUB = 34

_int, _pointer, _size = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
_uint, _address = ctypes.c_uint, ctypes.c_uint64

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_uint,),
    "cuDriverGetVersion": (_pointer,),
    "cuGetErrorName": (_int, _pointer),
    "cuGetErrorString": (_int, _pointer),
    "cuDeviceGetCount": (_pointer,),
    "cuDeviceGet": (_pointer, _int),
    "cuDeviceGetName": (_pointer, _int, _int),
    "cuDeviceGetAttribute": (_pointer, _int, _int),
    "cuDevicePrimaryCtxRetain": (_pointer, _int),
    "cuCtxPushCurrent_v2": (_pointer,),
    "cuCtxPopCurrent_v2": (_pointer,),
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (_pointer, ctypes.c_char_p),
    "cuModuleUnload": (_pointer,),
    "cuModuleGetFunction": (_pointer, _pointer, ctypes.c_char_p),
    "cuFuncGetAttribute": (_pointer, _int, _pointer),
    "cuFuncSetAttribute": (_pointer, _int, _int),
    "cuModuleGetGlobal_v2": (_pointer, _pointer, _pointer, ctypes.c_char_p),
    "cuMemAlloc_v2": (_pointer, _size),
    "cuMemFree_v2": (_address,),
    "cuMemGetInfo_v2": (_pointer, _pointer),
    "cuMemHostAlloc": (_pointer, _size, _uint),
    "cuMemFreeHost": (_pointer,),
    "cuMemHostGetDevicePointer_v2": (_pointer, _pointer, _uint),
    "cuMemcpyHtoD_v2": (_address, _pointer, _size),
    "cuMemcpyHtoDAsync_v2": (_address, _pointer, _size, _pointer),
    "cuMemcpyDtoHAsync_v2": (_pointer, _address, _size, _pointer),
    "cuMemcpyAsync": (_address, _address, _size, _pointer),
    "cuStreamCreate": (_pointer, _uint),
    "cuStreamDestroy_v2": (_pointer,),
    "cuStreamSynchronize": (_pointer,),
    "cuStreamWaitEvent": (_pointer, _pointer, _uint),
    "cuEventCreate": (_pointer, _uint),
    "cuEventRecord": (_pointer, _pointer),
    "cuEventSynchronize": (_pointer,),
    "cuEventElapsedTime": (_pointer, _pointer, _pointer),
    "cuEventDestroy_v2": (_pointer,),
    "cuStreamBeginCapture_v2": (_pointer, _int),
    "cuStreamEndCapture": (_pointer, _pointer),
    "cuGraphInstantiateWithFlags": (_pointer, _pointer, ctypes.c_ulonglong),
    "cuGraphLaunch": (_pointer, _pointer),
    "cuGraphDestroy": (_pointer,),
    "cuGraphExecDestroy": (_pointer,),
    "cuLaunchKernel": (_pointer, *[_uint] * 7, _pointer, _pointer, _pointer),
}
HOST_TABLE = ("cuLaunchKernel", "cuMemcpyAsync", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize")

_NO_DRIVER = "Fix: install the driver, or load(device='cpu')"


class Driver:
    """The driver of this machine, started: every function of the table above is a method."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise IncompatibleError(
                    f"the NVIDIA driver is too old: {LIBRARY} has no {name}. "
                    "Fix: install driver 470 or newer, or load(device='cpu')",
                    "DC4024",
                ) from None
            function.argtypes, function.restype = types, _int
            setattr(self, name, function)
        self.version = 0
        self.devices = 0

    def __getattr__(self, name: str) -> Any:  # for the type checker: __init__ sets them
        raise AttributeError(name)

    def start(self) -> None:
        """Raises IncompatibleError where the driver cannot work; without a device `devices` is 0.

        `version` is the CUDA version that the driver knows, 12040 for 12.4.
        """
        result = self.cuInit(0)
        if result and result != NO_DEVICE:
            code = "DC4024" if result in _MISMATCH else "DC4020" if result == _STUB else "DC4030"
            raise IncompatibleError(
                f"the NVIDIA driver does not start: {self.describe(result)}. "
                "Fix: see whether nvidia-smi works, or load(device='cpu')",
                code,
            )
        number = _int()
        self.cuDriverGetVersion(ctypes.byref(number))
        self.version = number.value
        if not result and not self.cuDeviceGetCount(ctypes.byref(number)):
            self.devices = number.value

    def describe(self, result: int) -> str:
        """For example ``CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access``."""
        parts = []
        for function in (self.cuGetErrorName, self.cuGetErrorString):
            text = ctypes.c_char_p()
            known = not function(result, ctypes.byref(text))
            parts.append((text.value or b"").decode(errors="replace") if known else "")
        return f"{parts[0] or 'CUDA error'} ({result}){': ' if parts[1] else ''}{parts[1]}"

    @property
    def release(self) -> str:
        """The CUDA version as people write it, ``12.4``."""
        return f"{self.version // 1000}.{self.version % 1000 // 10}"


def gpu_number(name: Any) -> int | None:
    """The number in ``cuda:<number>``, 0 for ``cuda``, None for ``cpu``. Raises UsageError."""
    found = re.fullmatch(r"cuda(?::(\d{1,6}))?", name, re.ASCII) if type(name) is str else None
    if found is None and name != "cpu":
        raise UsageError(
            f"device={name!r}: allowed are cpu, cuda and cuda:<number>. Fix: use device='cpu'",
            "DC2022",
        )
    return int(found[1] or 0) if found else None


_lock = threading.Lock()
_driver: Driver | None = None
_forked = False


def start() -> Driver:
    """The one driver of this process. Raises IncompatibleError where there is none that works."""
    global _driver
    refuse_child()
    with _lock:
        if _driver is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError:
                raise IncompatibleError(
                    f"no NVIDIA driver: {LIBRARY} cannot be loaded. {_NO_DRIVER}", "DC4020"
                ) from None
            driver = Driver(library)
            driver.start()
            _driver = driver
        return _driver


def forked() -> bool:
    """Whether this process is the child of one that had started the driver."""
    return _forked


def refuse_child() -> None:
    """Raises UsageError in a child of a process that used CUDA: the driver cannot work there."""
    if _forked:
        raise UsageError(
            "CUDA does not work in a forked child of a process that used it. "
            "Fix: start the child with multiprocessing's 'spawn', or load only in the child",
            "DC2025",
        )


def _after_fork() -> None:
    global _forked, _lock
    _lock = threading.Lock()
    _forked = _forked or _driver is not None


os.register_at_fork(after_in_child=_after_fork)
