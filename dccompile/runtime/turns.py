"""Calls that may run at the same time, and calls that may not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Any number of holders of `shared`, or one of `alone`, which goes before new ones."""

    def __init__(self) -> None:
        self._change = threading.Condition(threading.Lock())
        self._sharing = self._waiting = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._change:
            while self._alone or self._waiting:
                self._change.wait()
            self._sharing += 1
        try:
            yield
        finally:
            with self._change:
                self._sharing -= 1
                self._change.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._change:
            self._waiting += 1
            while self._alone or self._sharing:
                self._change.wait()
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._change:
                self._alone = False
                self._change.notify_all()
