"""Quantization with ranges: calibrate, search the layers to leave in float, write the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dccompile.console import Progress
from dccompile.frontend import gate
from dccompile.frontend.islands import islands
from dccompile.frontend.recover import recover

from . import feeds, selective
from .compare import own_errors
from .evaluate import Evaluation, Metric
from .observe import largest_batch
from .quantizer import Quantizer
from .report import Report
from .spills import metadata, spills
from .statistics import collect

_KEPT = 64 << 20  # bytes of calibration data that layers are ranked, and builds compared, with


class Static:
    """The steps in their order; each adds to `report`."""

    def __init__(
        self,
        quantizer: Quantizer,
        report: Report,
        shapes: Mapping[str, Sequence[int | str]] | None,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self.quantizer, self.report = quantizer, report
        self.shapes, self.threads, self.progress = shapes, threads, progress
        self.inputs = gate.read(quantizer.model, shapes).inputs
        self.samples: list[dict[str, np.ndarray]] = []  # the first ones
        self.left: tuple[str, ...] = ()  # nodes that the search leaves in float

    def calibrate(self, calib: Any) -> None:
        """Runs the float model over the samples, for the statistics of the quantizer."""
        names, axes = self.quantizer.wanted()
        batch = largest_batch(self.quantizer.model, names, self.inputs)
        kept = _Kept(feeds.read(calib, self.inputs, batch=batch))
        self.samples = kept.feeds
        self.progress.step("calibrate")
        statistics = self.quantizer.statistics = collect(
            self.quantizer.model,
            names,
            axes,
            kept,
            shapes=self.shapes,
            threads=self.threads,
            progress=self._show,
        )
        assert statistics.observed is not None
        self.report.samples = statistics.observed.samples
        self.progress.step("choose ranges, round weights")

    def search(
        self, val: Any, metric: Metric | None, max_drop: float, journal: str | Path | None
    ) -> str | None:
        """Finds the layers to leave in float; says what is missed where `max_drop` is."""
        samples = self.samples
        if val is not None:
            samples = list(feeds.read(val, self.inputs, what="--val", extra=True))
        quantizer = self.quantizer
        evaluation = Evaluation(quantizer.model, samples, metric, self.shapes, self.threads)
        self.progress.step("rank the layers by their own errors")
        whole = quantizer.build()
        ranked = own_errors(quantizer.model, whole, self.samples, self.shapes, self.threads)
        found = selective.search(
            [layer.node for layer in ranked],
            quantizer.build,
            evaluation,
            evaluation.reference,
            max_drop,
            None if journal is None else Path(journal),
            _digest(whole, evaluation),
            self.progress.note,
        )
        self.left = found.excluded
        known = {"name": evaluation.title, "float": evaluation.reference, "max_drop": max_drop}
        self.report.selective = {**known, **asdict(found)}
        if found.reached:
            return None
        return (
            f"{evaluation.title} {found.metric:.6g}, {evaluation.reference:.6g} in float: a drop "
            f"of {found.drop:.3%}, --max-drop allows {max_drop:.3%}; the best model found leaves "
            f"{len(found.excluded)} layers in float. Fix: allow more, or calibrate on more samples"
        )

    def finish(self, acc16: bool) -> onnx.ModelProto:
        """The QDQ model; with `acc16` it carries the facts on 16-bit accumulation."""
        quantizer, report = self.quantizer, self.report
        model = quantizer.build(self.left)
        report.tensors, report.layers = quantizer.tensors(), quantizer.layers(self.left)
        report.techniques, report.notes = quantizer.techniques(self.left), quantizer.notes()
        if acc16:
            self.progress.step("16-bit accumulation")
            facts = spills(quantizer, self.left, self.samples, self.shapes, self.threads)
            report.spills = {name: asdict(spill) for name, spill in facts.items()}
            entry = model.metadata_props.add()
            entry.key, entry.value = metadata(facts)
        graph = gate.read(model, self.shapes)
        report.islands = islands(recover(graph.model, graph.constants)).to_json()
        return model

    def _show(self, event: dict[str, Any]) -> None:
        """An event of the compiler, or of observation, as a line of progress."""
        done = event.get("done", 0) if event["step"] == "observe" else 0
        if self.progress.live or done & (done - 1) == 0:  # lines that stay: 1, 2, 4, 8 ..
            self.progress.step(f"calibrate: {event['step']}{f' {done}' if done else ''}")


def _digest(model: onnx.ModelProto, evaluation: Evaluation) -> str:
    """Of everything that a search depends on: the model with all layers quantized, the samples."""
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    digest.update(evaluation.title.encode())
    for name, value in sorted(evaluation.data.items()):
        digest.update(f"{name}{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).data)
    return digest.hexdigest()[:16]


class _Kept:
    """Feeds as they pass; the first of them stay."""

    def __init__(self, source: Iterable[dict[str, np.ndarray]]) -> None:
        self.source = source
        self.feeds: list[dict[str, np.ndarray]] = []

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        size = 0
        for feed in self.source:
            size += sum(value.nbytes for value in feed.values())
            if size <= _KEPT or not self.feeds:
                self.feeds.append(feed)
            yield feed
