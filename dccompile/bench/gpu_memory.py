"""What the competitors of a trial or a bench read and write on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from ..cuda.loose import Function, Tensor
from ..cuda.replay import Call
from ..runtime.device import Device
from ..workload import EmbeddingBag, Interaction
from .problems import Problem

_COPIES = 256


class Memory:
    """Inputs and results of problems, and every competitor's weights in copies for its turns.

    The copies of one competitor fill `weights` bytes: in a model, other layers' weights pass
    through the second-level cache between two calls of one. Activations are there once, as the
    layer before leaves them; of tables, whose rows the inputs choose, there is one copy.
    """

    def __init__(
        self,
        gpu: Device,
        workload: Any,
        problems: Sequence[Problem],
        packed: Sequence[np.ndarray],
        weights: int,
    ) -> None:
        self._problems = [
            (
                [tuple(Tensor(gpu, a) for a in turn) for turn in problem.turns],
                tuple(Tensor(gpu, a) for a in problem.after),
                Tensor(gpu, _unset(problem.expected)),
            )
            for problem in problems
        ]
        shared = isinstance(workload, EmbeddingBag)
        self.weights = [
            []
            if isinstance(workload, Interaction)
            else [Tensor(gpu, w) for _ in range(1 if shared else copies(w.nbytes, weights))]
            for w in packed
        ]

    def arguments(self, problem: int, which: int, turn: int = 0) -> tuple[Tensor, ...]:
        """Of a call of a competitor, in the order of the kernel's parameters."""
        turns, after, out = self._problems[problem]
        kept = self.weights[which]
        w = (kept[turn % len(kept)],) if kept else ()
        return (*turns[turn % len(turns)], *w, *after, out)

    def calls(self, function: Function, problem: int, which: int) -> list[Call]:
        """Those of a competitor in turns."""
        count = max(len(self._problems[problem][0]), len(self.weights[which]))
        sets = [self.arguments(problem, which, turn) for turn in range(count)]
        return [partial(_start, function, tensors) for tensors in sets]

    def result(self, problem: int) -> np.ndarray:
        """What the last call of a problem wrote; waits."""
        return self._problems[problem][2].numpy()


def copies(nbytes: int, total: int) -> int:
    """How many of so many bytes fill the total, within reason."""
    return max(1, min(_COPIES, ceil(total / max(nbytes, 1))))


def _start(function: Function, tensors: Sequence[Tensor], stream: int) -> None:
    function(*tensors, stream=stream)


def _unset(like: np.ndarray) -> np.ndarray:
    """An array of bytes that no result has."""
    return np.full(like.nbytes, 0x5A, np.uint8).view(like.dtype).reshape(like.shape)
