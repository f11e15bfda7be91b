"""One GPU as a process sees it: its context, its memory, and whether it still works.

The context is the primary one, which torch and every other user of the CUDA runtime share. Memory
goes back without waiting for anybody: a block that a call returned is handed out again on the same
stream only, whose order protects it; everything else is freed after the device has finished.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import Error, IncompatibleError, UsageError
from . import driver as cuda
from .manifest import ALIGN
from .resources import Block, Graph, Lent, Pinned, Stream

_KEEP = 1 << 30  # bytes of returned blocks that a device keeps for later calls
_CHUNK = 16 << 20  # of an upload, twice in pinned memory
_MAPPED = 1 | 2  # flags of pinned memory: known to every context, and in the device's addresses
_MAJOR, _MINOR, _SHARED = 75, 76, 97  # attributes: compute capability, shared memory of a block


class Device:
    """A GPU in use. `arch` is 80 for compute capability 8.0; `lost` tells of a dead context.

    `shared` is the most shared memory in bytes that a block may ask for.
    """

    def __init__(self, driver: cuda.Driver, index: int) -> None:
        self.driver, self.index = driver, index
        self.lost: str | None = None
        self._guard = threading.RLock()  # held while memory goes back, and during a capture
        self._capturing = False
        self._deferred: list[Callable[[], int]] = []
        self._params: weakref.WeakValueDictionary[str, Block] = weakref.WeakValueDictionary()
        self._upload = threading.Lock()
        self._free: dict[Any, list[Block]] = {}
        self._kept = 0
        handle = self._number(driver.cuDeviceGet, index)
        text = ctypes.create_string_buffer(256)
        self.check(driver.cuDeviceGetName(text, 255, handle), "reading the device's name")
        self.name = text.value.decode(errors="replace")
        self.arch = 10 * self._number(driver.cuDeviceGetAttribute, _MAJOR, handle)
        self.arch += self._number(driver.cuDeviceGetAttribute, _MINOR, handle)
        self.shared = self._number(driver.cuDeviceGetAttribute, _SHARED, handle)
        context = ctypes.c_void_p()
        self.check(
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "making a context"
        )
        self._context = context
        self._popped = ctypes.c_void_p()

    def __str__(self) -> str:
        return f"cuda:{self.index}"

    @property
    def kind(self) -> str:
        """The name as records of tuning have it, e.g. ``nvidia-h100-80gb-hbm3``."""
        return re.sub("[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def _number(self, function: Any, *args: Any) -> int:
        number = ctypes.c_int()
        self.check(function(ctypes.byref(number), *args), "asking for the device")
        return number.value

    def __enter__(self) -> Device:
        """Makes the context this thread's current one; raises Error where it is lost."""
        cuda.refuse_child()
        self.alive()
        self.check(self.driver.cuCtxPushCurrent_v2(self._context), "making the context current")
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.cuCtxPopCurrent_v2(ctypes.byref(self._popped))

    # Errors

    def alive(self) -> None:
        """Raises Error where an earlier error has made the context unusable."""
        if self.lost is not None:
            raise Error(
                f"{self}: the CUDA context of this process is lost: {self.lost}. "
                "Fix: start the process again",
                "DC4023",
            )

    def check(self, result: int, doing: str) -> None:
        """Raises what `failure` makes of a driver's result, unless that is success."""
        if result:
            raise self.failure(result, doing)

    def failure(self, result: int, doing: str) -> Error:
        """The error to raise; remembers one that no later call will survive."""
        said = self.driver.describe(result)
        if result in cuda.STICKY:
            self.lost = self.lost or f"{said}, found when {doing}"
            try:
                self.alive()
            except Error as error:
                return error
        if result == cuda.OUT_OF_MEMORY:
            return IncompatibleError(
                f"{self}: out of device memory when {doing}{self._room()}. "
                "Fix: free memory of this device, or use another one",
                "DC4021",
            )
        return Error(f"{self}: {said} when {doing}. Fix: see what nvidia-smi says", "DC4022")

    def _room(self) -> str:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if self.driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)):
            return ""
        return f": {free.value} of its {total.value} bytes are free"

    # Memory; the context is current

    def allocate(self, nbytes: int, what: str) -> Block:
        """A block of at least 1 byte. Raises IncompatibleError with the bytes needed and free."""
        address = ctypes.c_uint64()
        size = max(1, nbytes)
        result = self.driver.cuMemAlloc_v2(ctypes.byref(address), size)
        if result == cuda.OUT_OF_MEMORY and self._free:
            self.trim()
            result = self.driver.cuMemAlloc_v2(ctypes.byref(address), size)
        self.check(result, f"allocating {nbytes} bytes {what}")
        return Block(self, address.value, nbytes)

    def pinned(self, nbytes: int, what: str) -> Pinned:
        """Page-locked memory that the device can address. Raises IncompatibleError."""
        address, seen = ctypes.c_void_p(), ctypes.c_uint64()
        result = self.driver.cuMemHostAlloc(ctypes.byref(address), max(1, nbytes), _MAPPED)
        if result == cuda.OUT_OF_MEMORY:
            raise IncompatibleError(
                f"{self}: {nbytes} bytes of page-locked memory cannot be had {what}. "
                "Fix: free memory of this machine",
                "DC4021",
            )
        self.check(result, f"allocating {nbytes} bytes of page-locked memory {what}")
        pinned = Pinned(self, address.value or 0, nbytes, 0)
        self.check(
            self.driver.cuMemHostGetDevicePointer_v2(ctypes.byref(seen), address, 0),
            "mapping page-locked memory",
        )
        pinned.seen = seen.value
        return pinned

    def lend(self, key: Any, nbytes: int) -> Lent:
        """Memory for an output of a call on the stream that `key` stands for."""
        size = _round(nbytes)
        try:
            block = self._free[key, size].pop()
            self._kept -= size  # threads may lose a count here: `take_back` counts again
        except (KeyError, IndexError):
            block = self.allocate(size, "for an output")
        return Lent(block, (key, size))

    def take_back(self, key: Any, block: Block) -> None:
        """The block of a `Lent` that is gone; takes no lock: this runs in the midst of anything."""
        if self._kept + block.nbytes > _KEEP:
            self._kept = sum(size * len(held) for (_, size), held in [*self._free.items()])
        if self._kept + block.nbytes <= _KEEP:
            self._kept += block.nbytes
            self._free.setdefault(key, []).append(block)

    def trim(self) -> None:
        """Frees the blocks that wait for later calls."""
        kept, self._free, self._kept = self._free, {}, 0
        kept.clear()

    def free(self, address: int) -> None:
        """Frees memory once the device is done with it."""
        self.release(lambda: self.driver.cuMemFree_v2(address))

    def release(self, function: Callable[[], int]) -> None:
        """Calls `function` when no work is under way and no graph is being captured.

        Does nothing where memory is beyond reach: after a fork, a fatal error, at the end.
        """
        if cuda.forked() or self.lost is not None or sys is None or sys.is_finalizing():
            return
        with self._guard:
            if self._capturing:
                self._deferred.append(function)
                return
            driver = self.driver
            if not driver.cuCtxPushCurrent_v2(self._context):
                driver.cuCtxSynchronize()
                function()
                driver.cuCtxPopCurrent_v2(ctypes.byref(self._popped))

    def synchronize(self) -> None:
        """Waits for everything on the device. Raises Error."""
        with self._guard:  # a capture elsewhere would not survive it
            result = self.driver.cuCtxSynchronize()
        self.check(result, "waiting for the device")

    def params(self, key: str, pieces: Sequence[np.ndarray]) -> Block:
        """The weights in device memory: one copy for all that give the same key.

        `pieces` uint8[n] lie there side by side, each on a 64-byte boundary.
        """
        with self._upload:
            found = self._params.get(key)
            if found is None:
                places = [0]
                for piece in pieces:
                    places.append(places[-1] + -(-piece.nbytes // ALIGN) * ALIGN)
                with self:
                    found = self.allocate(places[-1], "for the weights")
                    for place, piece in zip(places, pieces, strict=False):
                        self._copy(found.address + place, piece)
                self._params[key] = found
            return found

    def _copy(self, address: int, data: np.ndarray) -> None:
        """Uploads: while one chunk is under way the next one is read into the other buffer."""
        size = min(_CHUNK, max(1, data.nbytes))
        pinned = [self.pinned(size, "to upload weights") for _ in range(2)]
        views = [p.array() for p in pinned]
        streams = [self.stream() for _ in range(2)]
        try:
            for i, at in enumerate(range(0, data.nbytes, size)):
                stream, view = streams[i % 2].handle, views[i % 2]
                self.check(self.driver.cuStreamSynchronize(stream), "uploading weights")
                count = min(size, data.nbytes - at)
                view[:count] = data[at : at + count]
                self.check(
                    self.driver.cuMemcpyHtoDAsync_v2(
                        address + at, pinned[i % 2].address, count, stream
                    ),
                    "uploading weights",
                )
        finally:
            results = [self.driver.cuStreamSynchronize(s.handle) for s in streams]
        self.check(max(results), "uploading weights")

    # Streams and graphs; the context is current

    def stream(self) -> Stream:
        """A new stream, which the legacy default stream does not wait for."""
        handle = ctypes.c_void_p()
        self.check(self.driver.cuStreamCreate(ctypes.byref(handle), 1), "making a stream")
        return Stream(self, handle.value or 0)

    def capture(self, stream: int, body: Callable[[], None]) -> Graph | None:
        """What `body` does on the stream as a graph, without doing it; None where that fails."""
        driver = self.driver
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        with self._guard:
            self._capturing = True
            try:
                if driver.cuStreamBeginCapture_v2(stream, 2):  # relaxed: others may do anything
                    return None
                try:
                    body()
                    good = True
                except Exception:  # a plain launch will say what it was
                    good = False
                ended = driver.cuStreamEndCapture(stream, ctypes.byref(graph))
                if graph.value:
                    if good and not ended:
                        driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, 0)
                    driver.cuGraphDestroy(graph)
            finally:
                self._capturing = False
                deferred, self._deferred = self._deferred, []
                for function in deferred:
                    self.release(function)
        return Graph(self, executable.value) if executable.value else None


def _round(nbytes: int) -> int:
    """Sizes of output blocks: at most 1/8 more than asked for, so that few differ."""
    step = max(512, 1 << max(0, nbytes.bit_length() - 4))
    return max(step, -(-nbytes // step) * step)


_devices: dict[int, Device] = {}
_lock = threading.Lock()


def find(index: int) -> Device:
    """The GPU of this number. Raises IncompatibleError where there is none, or no driver."""
    driver = cuda.start()
    if not 0 <= index < driver.devices:
        has = f"{driver.devices} GPUs are visible" if driver.devices else "no GPU is visible"
        raise IncompatibleError(
            f"cuda:{index}: {has}. Fix: "
            + ("name one of these" if driver.devices else "load(device='cpu')")
            + ", or see nvidia-smi and CUDA_VISIBLE_DEVICES",
            "DC4025",
        )
    with _lock:
        if index not in _devices:
            _devices[index] = Device(driver, index)
        return _devices[index]


def named(name: str) -> Device:
    """The GPU that ``cuda`` or ``cuda:<number>`` names. Raises UsageError, IncompatibleError."""
    number = cuda.gpu_number(name)
    if number is None:
        raise UsageError(f"device={name!r}: this is no GPU. Fix: name one, e.g. cuda", "DC2022")
    return find(number)
