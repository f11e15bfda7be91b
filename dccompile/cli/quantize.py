"""``dccompile quantize``: reads its options, writes the QDQ model, prints what was done."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import sources
from ..console import Progress, document, out, table, warn
from ..environment import environment
from ..errors import AccuracyError, UsageError
from ..quantization.quantize import quantize as run
from ..quantization.report import Report
from .islands import island_line

Options = argparse.Namespace
_SHOWN = 10  # ranges in the table


def quantize(options: Options) -> int:
    """The model is written whole or not at all; where --max-drop is missed, the best one found."""
    start = time.monotonic()
    source = sources.resolve(options.model, options.seed)
    path = Path(options.output or f"{source.name}-int8.onnx")
    if not path.parent.is_dir():
        raise UsageError(
            f"-o '{path}': there is no folder '{path.parent}'. Fix: create it or name another"
        )
    reports: list[Report] = []
    missed = None
    with Progress(options.quiet) as progress:
        try:
            model = run(
                source.compilable(),
                samples(source, options.calib),
                method=options.method,
                activations=options.activations,
                selective=options.selective,
                val=options.val,
                metric=options.metric,
                max_drop=options.max_drop,
                exclude=options.exclude,
                granularity=options.granularity,
                net_aware=options.net_aware,
                fuse_sums=options.fuse_sums,
                bias_correction=options.bias_correction,
                outliers=options.outliers,
                acc16=options.acc16,
                shapes=source.shapes(options.shape),
                threads=options.threads,
                journal=f"{path}.journal" if options.selective else None,
                progress=progress,
                report=reports.append,
            )
        except AccuracyError as error:
            missed, model = error, error.model
    size = _write(path, model.SerializeToString())
    report, seconds = reports[0], time.monotonic() - start
    if options.json:
        body = {"model": source.name, "output": str(path), "bytes": size, **report.to_json()}
        document("quantize", {"environment": environment(options.threads), **body})
    else:
        _print(report)
        out(f"{path}: {size / 1e6:.1f} MB in {seconds:.0f} s")
    if missed is not None:
        raise AccuracyError(f"{missed} (it is in {path})", missed.code)
    return 0


def samples(source: sources.Source, text: str | None) -> Any:
    """What --calib or --data says; ``random:N`` of a reference model are its own kind of inputs."""
    kind, _, count = (text or "").partition(":")
    if source.kind != "reference" or kind != "random" or not count.isdigit():
        return text
    return _reference_samples(source.name, int(count))


def _reference_samples(name: str, count: int) -> Iterator[dict[str, np.ndarray]]:
    from .. import models

    return (models.sample_inputs(name, 1, seed) for seed in range(1, 1 + count))


def _write(path: Path, data: bytes) -> int:
    """Puts the file there whole; returns its bytes."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"-o '{path}': {reason}. Fix: name a file that can be written") from None
    finally:
        part.unlink(missing_ok=True)
    return len(data)


def _print(report: Report) -> None:
    for line in report.notes:
        warn(line)
    if not report.layers:
        return
    left = [row for row in report.layers if row["precision"] == "float32"]
    rows = [row for row in report.layers if row not in left]
    worst = [row for row in report.tensors if row["sqnr"] is not None][:_SHOWN]
    table(
        ("tensor", "low", "high", "clipped %", "dB"),
        [
            (row["tensors"][0], row["low"], row["high"], 100 * row["clipped"], row["sqnr"])
            for row in worst
        ],
    )
    if worst:
        out()
    tensors = sum(len(row["tensors"]) for row in report.tensors)
    ranges = f", {tensors} tensors in {len(report.tensors)} ranges" if tensors else ""
    seen = f", {report.samples} samples" if report.samples else ""
    out(f"{len(rows)} layers quantized, {len(left)} in float{ranges}{seen}")
    for line in report.techniques:
        out(line)
    if found := report.selective:
        out(
            f"selective: {found['name']} {found['metric']:.6g}, {found['float']:.6g} in float, "
            f"a drop of {found['drop']:.3%}; {len(found['decisions'])} models tried"
        )
    for name, spill in report.spills.items():
        chance = f"chance of overflow {spill['probability']:.1e}"
        out(f"16-bit sums of {spill['period']} k-steps: '{name}', {chance}")
    if report.islands:
        out(island_line(**report.islands))
    for row in left:
        out(f"in float: {row['op']} '{row['node']}' ({row['reason']})")
