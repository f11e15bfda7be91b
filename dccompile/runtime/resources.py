"""What the driver hands out and wants back: each is freed with its last reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .tensors import lend, uint8

if TYPE_CHECKING:
    from .device import Device


class Block:
    """`nbytes` of device memory from `address`, 256-byte aligned, freed with its last reference."""

    def __init__(self, device: Device, address: int, nbytes: int) -> None:
        self.device, self.address, self.nbytes = device, address, nbytes

    def __del__(self) -> None:
        self.device.free(self.address)


class Pinned:
    """`nbytes` of page-locked host memory from `address`, which the device sees at `seen`."""

    def __init__(self, device: Device, address: int, nbytes: int, seen: int) -> None:
        self.device, self.address, self.nbytes, self.seen = device, address, nbytes, seen

    def array(self) -> np.ndarray:
        """The memory as uint8[nbytes]."""
        return lend(self, self.address, (self.nbytes,), uint8)

    def __del__(self) -> None:
        self.device.release(lambda: self.device.driver.cuMemFreeHost(self.address))


class Lent:
    """Device memory for an output; when it goes, later calls on its stream may have it."""

    def __init__(self, block: Block, key: Any) -> None:
        self.block, self.key = block, key

    @property
    def address(self) -> int:
        return self.block.address

    def __del__(self) -> None:
        self.block.device.take_back(self.key, self.block)


class Stream:
    """A stream of ours; `handle` is the driver's."""

    def __init__(self, device: Device, handle: int) -> None:
        self.device, self.handle = device, handle

    def __del__(self) -> None:
        device, handle = self.device, self.handle
        device.release(lambda: device.driver.cuStreamDestroy_v2(handle))


class Graph:
    """A captured graph, ready to be launched."""

    def __init__(self, device: Device, handle: int) -> None:
        self.device, self.handle = device, handle

    def launch(self, stream: int) -> None:
        self.device.check(self.device.driver.cuGraphLaunch(self.handle, stream), "running a model")

    def __del__(self) -> None:
        device, handle = self.device, self.handle
        device.release(lambda: device.driver.cuGraphExecDestroy(handle))
