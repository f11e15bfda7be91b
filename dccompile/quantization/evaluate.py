"""Whole models on validation data: what a metric says of their outputs."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from dccompile.compiler import compile
from dccompile.errors import UsageError

Arrays = Mapping[str, np.ndarray]
Metric = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], float]


def named(text: str) -> Metric:
    """The function that ``package.module:function`` names; the current folder is searched too."""
    name, colon, attribute = text.partition(":")
    if not colon or not name or not attribute:
        raise UsageError(
            f"--metric '{text}': not MODULE:FUNCTION. Fix: write for example eval:accuracy",
            "DC2042",
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UsageError(
            f"--metric '{text}': cannot be imported ({error}). Fix: check the module, which must "
            "be installed or lie in the current folder, and the name of the function",
            "DC2042",
        ) from None
    if not callable(found):
        raise UsageError(f"--metric '{text}': not a function. Fix: name a function", "DC2042")
    metric: Metric = found
    return metric


class Evaluation:
    """Runs models over the same samples.

    `feeds` are kept; arrays in them that no model reads, such as labels, are for the metric, which
    is called with the outputs and all arrays, both joined along the first axis, and returns a
    number, larger is better. Without a metric it is 1 less the relative error of the outputs,
    ||y - f|| / ||f||, against the outputs f of `reference`.
    """

    def __init__(
        self,
        reference: onnx.ModelProto,
        feeds: Sequence[Arrays],
        metric: Metric | None = None,
        shapes: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        self.feeds, self.shapes, self.threads = feeds, shapes, threads
        self.title = getattr(metric, "__name__", "metric") if metric else "1 - relative error"
        self.data = {name: _join([feed[name] for feed in feeds]) for name in feeds[0]}
        outputs = self.outputs(reference)
        self.metric: Metric = metric or _Fidelity(outputs)
        self.reference = self._score(outputs)

    def __call__(self, model: onnx.ModelProto) -> float:
        """The metric of a model."""
        return self._score(self.outputs(model))

    def outputs(self, model: onnx.ModelProto) -> dict[str, np.ndarray]:
        """The outputs of a model for all samples."""
        module = compile(model, targets=["host"], shapes=self.shapes).load(self.threads)
        names = [spec.name for spec in module.inputs]
        found = [module({name: feed[name] for name in names}) for feed in self.feeds]
        return {spec.name: _join([y[spec.name] for y in found]) for spec in module.outputs}

    def _score(self, outputs: dict[str, np.ndarray]) -> float:
        try:
            value = float(self.metric(outputs, self.data))
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise UsageError(
                f"metric '{self.title}': raised {type(error).__name__}"
                f"{': ' + reason[0] if reason else ''}. It is called with two dicts of arrays, the "
                f"outputs ({', '.join(outputs)}) and the data ({', '.join(self.data)}). "
                "Fix: correct the function",
                "DC2043",
            ) from error
        if not math.isfinite(value):
            raise UsageError(
                f"metric '{self.title}': returned {value}, a finite number is allowed. "
                "Fix: correct the function",
                "DC2043",
            )
        return value


class _Fidelity:
    """1 less the relative error of the outputs, all of them together."""

    def __init__(self, outputs: dict[str, np.ndarray]) -> None:
        self.outputs = {name: value.astype(np.float64) for name, value in outputs.items()}

    def __call__(self, outputs: Arrays, data: Arrays) -> float:
        noise = sum(float(np.square(outputs[n] - f).sum()) for n, f in self.outputs.items())
        signal = sum(float(np.square(f).sum()) for f in self.outputs.values())
        return 1 - math.sqrt(noise / signal) if signal else float(noise == 0)


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays[0].ndim else np.stack(arrays)
