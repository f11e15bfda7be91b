"""Tensors in device memory: a caller's through DLPack, and ours for callers to take over."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import InputError
from .device import Device
from .ffi import import_tvm_ffi
from .resources import Lent
from .tensors import (
    ALIGN,
    Foreign,
    Shape,
    TensorSpec,
    describe,
    exporter,
    is_torch,
    lend,
    type_name,
)

CUDA = 2  # DLPack's number of the device kind
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}
_NAME, _USED = b"dltensor", b"used_dltensor"


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_api = ctypes.PyDLL(None)  # of our own: ctypes.pythonapi is shared with whoever else declares types
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_api.PyCapsule_IsValid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_api.Py_IncRef.argtypes = (ctypes.py_object,)

_given: dict[int, Any] = {}  # what lives as long as a consumer holds our tensor, by address


def _delete(address: int, given: dict[int, Any] = _given) -> None:
    given.pop(address, None)


def _drop(capsule: int, api: Any = _api, delete: Any = _delete, name: bytes = _NAME) -> None:
    if api.PyCapsule_IsValid(capsule, name):  # nobody took the tensor out of it
        delete(api.PyCapsule_GetPointer(capsule, name))


_delete_c = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete)
_drop_c = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_drop)
_api.Py_IncRef(_delete_c)  # consumers may outlive this module
_api.Py_IncRef(_drop_c)


class DeviceArray:
    """An output in device memory, for ``from_dlpack`` of any library; `numpy` copies it.

    `shape` and `dtype` are as numpy's, `address` is on the device. The memory goes back when
    the last user of it has gone; calls on the stream `stream` may then write into it.
    """

    def __init__(
        self, device: Device, lent: Lent, shape: Shape, dtype: np.dtype, stream: int
    ) -> None:
        self.device, self.shape, self.dtype, self.stream = device, shape, dtype, stream
        self._lent = lent

    @property
    def address(self) -> int:
        return self._lent.address

    def __repr__(self) -> str:
        return f"DeviceArray({describe(self.dtype, self.shape)} on {self.device})"

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule, never a copy; `stream` waits for what computes the array."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(f"{self!r} is lent where it is; copy it with .numpy()")
        if stream != -1:
            self.device_waits(stream)
        dims = (ctypes.c_int64 * max(1, len(self.shape)))(*self.shape)
        tensor = _DLTensor(
            self.address, *self.__dlpack_device__(), len(self.shape),
            _KINDS[self.dtype.kind], 8 * self.dtype.itemsize, 1, ctypes.addressof(dims),
        )  # fmt: skip
        managed = _Managed(tensor, None, ctypes.cast(_delete_c, ctypes.c_void_p))
        address = ctypes.addressof(managed)
        _given[address] = managed, dims, self._lent
        return _api.PyCapsule_New(address, _NAME, ctypes.cast(_drop_c, ctypes.c_void_p))

    def device_waits(self, stream: int | None) -> None:
        """Makes a consumer's stream, as DLPack names it, wait for the array."""
        other = _driver_stream(stream)
        if other == self.stream:
            return
        event = ctypes.c_void_p()
        with self.device as device:
            driver = device.driver
            device.check(driver.cuEventCreate(ctypes.byref(event), 2), "making an event")
            try:
                device.check(driver.cuEventRecord(event, self.stream), "recording an event")
                device.check(driver.cuStreamWaitEvent(other, event, 0), "waiting for an event")
            finally:
                driver.cuEventDestroy_v2(event)

    def cut(self, shape: Shape) -> DeviceArray:
        """The row-major array of that shape at the start of the same memory."""
        return DeviceArray(self.device, self._lent, shape, self.dtype, self.stream)

    def numpy(self) -> np.ndarray:
        """A copy in host memory; waits for the array."""
        array = np.empty(self.shape, self.dtype)
        with self.device as device:
            if array.nbytes:
                address = array.__array_interface__["data"][0]
                device.check(
                    device.driver.cuMemcpyDtoHAsync_v2(
                        address, self.address, array.nbytes, self.stream
                    ),
                    "copying an output",
                )
            device.check(device.driver.cuStreamSynchronize(self.stream), "copying an output")
        return array


def _driver_stream(stream: int | None) -> int:
    """The driver's handle for a stream in DLPack's numbering, where 1 is the legacy default."""
    return 0 if stream is None or stream == 1 else stream


def is_on_device(value: Any) -> bool:
    """Whether a value is a tensor in the memory of some GPU."""
    if isinstance(value, np.ndarray):
        return False
    try:
        return int(value.__dlpack_device__()[0]) == CUDA
    except Exception:  # no tensor, or one that `admit` will refuse
        return False


class _Passed:
    """A tensor whose export is asked for with a stream."""

    def __init__(self, value: Any, stream: int) -> None:
        self.value, self.stream = value, stream

    def __dlpack_device__(self) -> Any:
        return self.value.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        if is_torch(self.value):  # which lends only tensors of its current device
            with sys.modules["torch"].cuda.device(self.value.device):
                return self.value.__dlpack__(stream=self.stream)
        return self.value.__dlpack__(stream=self.stream)


def admit_device(
    what: str,
    name: str,
    spec: TensorSpec,
    dtype: np.dtype,
    value: Any,
    device: Device,
    stream: int,
) -> Foreign:
    """As `tensors.admit`, for a tensor that must be on `device`, to be used on `stream`."""

    def wrong(found: str, code: str) -> InputError:
        return InputError(f"{what} '{name}': expected {spec} on {device}, got {found}", code)

    kind = type_name(value)
    if not is_on_device(value):
        raise wrong(f"{kind} elsewhere; move it to {device} like the others first", "DC2106")
    index = int(value.__dlpack_device__()[1])
    if index != device.index:
        raise wrong(f"{kind} on cuda:{index}; move it to {device} first", "DC2106")
    if is_torch(value) and (value.requires_grad or value.is_neg()):
        fix = "detach" if value.requires_grad else "resolve_neg"
        raise wrong(f"a tensor that needs .{fix}() first", "DC2107")
    try:
        tensor = import_tvm_ffi().from_dlpack(_Passed(value, stream or 1))
        got, shape = str(tensor.dtype), tuple(int(d) for d in tensor.shape)
        contiguous, address = tensor.is_contiguous(), int(tensor.data_ptr())
    except Exception as error:  # whatever a foreign class raises is this input's fault
        reason = " ".join((str(error).strip().splitlines() or [""])[0].split())[:200]
        said = f"{kind} that DLPack cannot lend: {type(error).__name__}: {reason}; give another"
        raise wrong(said, "DC2107") from None
    if got != spec.dtype:
        found = f"{describe(got, shape)}; convert it to {spec.dtype} first"
        raise wrong(found, "DC2103")
    if not contiguous and 0 not in shape:
        raise wrong(
            f"{describe(got, shape)} that is not row-major; make it contiguous first", "DC2105"
        )
    if address % ALIGN and 0 not in shape:
        raise wrong(
            f"{describe(got, shape)} that begins {address % ALIGN} bytes past a multiple of "
            f"{ALIGN}; give a copy, for example x.clone()",
            "DC2105",
        )
    address = address if 0 not in shape else ALIGN
    return Foreign(tensor, address, shape, dtype, host_handle(tensor, address, shape, dtype))


def host_handle(owner: Any, address: int, shape: Shape, dtype: np.dtype) -> Any:
    """What compiled host code takes: device memory in a tensor that claims to be on the CPU."""
    return import_tvm_ffi().from_dlpack(lend(owner, address, shape, dtype))


def current_stream(value: Any, index: int) -> int:
    """The driver's handle of the stream that the library of a caller's tensor is using."""
    library = "torch" if is_torch(value) else type(value).__module__.partition(".")[0]
    module = sys.modules.get(library)
    try:
        if library == "torch":
            return int(module.cuda.current_stream(index).cuda_stream)  # type: ignore[union-attr]
        if library == "cupy":
            return int(module.cuda.get_current_stream().ptr)  # type: ignore[union-attr]
    except AttributeError:  # something else of that name
        pass
    return value.stream if isinstance(value, DeviceArray) else 0


def stream_handle(stream: Any) -> int:
    """The driver's handle of a stream: a number, or torch's, cupy's or any library's object."""
    if type(stream) is int:
        return _driver_stream(stream)
    protocol = getattr(stream, "__cuda_stream__", None)
    handle: Any = None
    if protocol is not None:
        found = protocol() if callable(protocol) else protocol
        handle = found[1]
    for name in ("cuda_stream", "ptr", "handle"):
        if handle is None:
            handle = getattr(stream, name, None)
    if handle is None:
        raise InputError(
            f"stream: got a {type(stream).__name__}; give the number of a CUDA stream, or a "
            "stream of torch or cupy",
            "DC2102",
        )
    return _driver_stream(int(handle))


def maker(value: Any) -> Callable[[Any], Any] | None:
    """How to make an output the same kind of object as `value`; None where `DeviceArray` is."""
    if isinstance(value, DeviceArray):
        return None
    library = sys.modules.get(type(value).__module__.partition(".")[0])
    return exporter(value) or getattr(library, "from_dlpack", None)


def stream_key(stream: int) -> Any:
    """What calls whose order a stream keeps have in common: 2 is another stream in each thread."""
    return (stream, threading.get_ident()) if stream == 2 else stream
