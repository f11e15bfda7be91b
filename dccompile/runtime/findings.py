"""What kernels find wrong with their input, and which call it was.

A kernel that meets an index out of range goes on with a harmless one and leaves a note in memory
that host and device both see; there is one place for it in a model. Calls run at the same time
all the same: one that ends and sees a note runs once more, alone, and raises if the note comes
again. Calls that do not wait for the device are never under way together with those that do.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

from .device import Device
from .signature import translate
from .turns import Turns


class _Finding(ctypes.Structure):
    """`dcc_finding` of the kernels' prelude."""

    _fields_ = (
        ("taken", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("values", ctypes.c_int64 * 4),
        ("text", ctypes.c_char * 320),
        ("name", ctypes.c_ubyte * 128),
    )


class Findings:
    """Of one model on one device; `seen` is where the device sees the note."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory = device.pinned(ctypes.sizeof(_Finding), "for errors")
        self.seen = self._memory.seen
        self._finding = _Finding.from_address(self._memory.address)
        self._clear()
        self._turns = Turns()
        self._behind = False  # calls that did not wait may have left a note

    def wait(self, body: Callable[[], None]) -> None:
        """Runs `body`, which waits for what it starts. Raises what it, or earlier calls, found."""
        with self._turns.shared():
            if not self._behind:
                body()
                if not self._finding.taken:
                    return
        with self._turns.alone():
            self._settle()
            self._clear()  # others that made the note come here too
            body()
            self._raise("")

    def start(self, body: Callable[[], None]) -> None:
        """Runs `body`, which does not wait. Raises what earlier such calls are known to have found.

        A call that waits and is about to run again makes its note again.
        """
        with self._turns.alone():
            if self._finding.taken:
                self._settle()
                self._clear()
            self._behind = True
            body()

    def settle(self) -> None:
        """Waits for the device. Raises what earlier calls that did not wait have found."""
        with self._turns.alone():
            self._settle()

    def _settle(self) -> None:
        if self._behind:
            self._device.synchronize()
            self._behind = False
            self._raise("an earlier call: ")

    def _raise(self, prefix: str) -> None:
        text = self.take()
        if text is not None:
            code, _, rest = text.partition(": ")
            raise translate(RuntimeError(f"{code}: {prefix}{rest}"))

    def take(self) -> str | None:
        """The message of the note, which is forgotten; the work that made it has finished."""
        found = self._finding
        if not found.taken:
            return None
        name = bytes(found.name)[: max(0, found.length)].decode(errors="replace")
        values = iter([*found.values])
        text = found.text.decode(errors="replace")
        self._clear()
        return re.sub("[%$]", lambda m: name if m[0] == "$" else str(next(values, "?")), text)

    def _clear(self) -> None:
        ctypes.memset(self._memory.address, 0, ctypes.sizeof(_Finding))
