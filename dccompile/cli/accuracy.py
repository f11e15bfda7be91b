"""``dccompile accuracy``: reads its options, compares, prints the worst layers and the outputs."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .. import sources
from ..console import Progress, document, out, table, warn
from ..environment import environment
from ..errors import UsageError
from ..quantization.accuracy import Report
from ..quantization.accuracy import accuracy as run
from .quantize import samples

Options = argparse.Namespace


def accuracy(options: Options) -> int:
    """Prints the report, also where an output is below --fail-below; that raises AccuracyError."""
    least = parse_decibels(options.fail_below)
    if options.top < 1:
        raise UsageError(
            f"--top {options.top}: at least 1 is allowed. Fix: write for example --top 20", "DC2051"
        )
    source = sources.resolve(options.model, options.seed)
    reference = sources.resolve(options.reference, options.seed) if options.reference else None
    with Progress(options.quiet) as progress:
        report = run(
            source.compilable(),
            samples(source, options.data),
            reference=reference.compilable() if reference else None,
            top=options.top,
            shapes=source.shapes(options.shape),
            threads=options.threads,
            progress=_teller(progress),
        )
    if options.json:
        body = {"model": source.name, "reference": reference.name if reference else None}
        document("accuracy", {"environment": environment(options.threads), **body, **_json(report)})
    else:
        _print(report)
    if least is not None:
        report.gate(least)
    return 0


def parse_decibels(text: str | None) -> float | None:
    """``20dB`` or ``20``."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:dB)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(
            f"--fail-below {text!r}: not a ratio in dB. Fix: write for example --fail-below 20dB",
            "DC2051",
        )
    return float(match[1])


def _teller(progress: Progress) -> Callable[[dict[str, Any]], None]:
    """Passes on the compiler's steps, and how many feeds were compared."""

    def tell(event: dict[str, Any]) -> None:
        if "done" not in event:
            progress.step(f"compile both models: {event.get('step', '')}")
        elif progress.live or event["done"] % 100 == 1:
            progress.step(f"compare, feed {event['done']}")

    return tell


def _json(report: Report) -> dict[str, Any]:
    """A ratio that is infinite, because there is no error, is null; `max_error` is 0 then."""
    body = asdict(report)
    for row in (*body["layers"], *body["outputs"]):
        row.update({k: None for k, v in row.items() if isinstance(v, float) and math.isinf(v)})
    return body


def _print(report: Report) -> None:
    for note in report.notes:
        warn(note)
    rows = [
        (
            layer.tensor,
            layer.op,
            layer.precision,
            _decibels(layer.own),
            _decibels(layer.sqnr),
            "-" if layer.inherited == math.inf else _decibels(layer.inherited),
            _cosine(layer.cosine),
            layer.max_error,
            None if layer.clipped is None else 100 * layer.clipped,
            layer.flag or None,
        )
        for layer in report.layers
    ]
    ratios = ("own dB", "whole dB", "inherited")
    rest = ("cosine", "max error", "clipped %", "left in float by")
    table(("tensor", "op", "codes", *ratios, *rest), rows)
    if rows:
        out(f"worst {len(rows)} of {report.steps} quantized tensors and layers, by their own error")
        out()
    ends = [
        (
            o.name,
            o.dtype,
            _decibels(o.sqnr),
            _cosine(o.cosine),
            o.max_error,
            o.relative_max,
            None if o.equal is None else 100 * o.equal,
        )
        for o in report.outputs
    ]
    table(("output", "dtype", "dB", "cosine", "max error", "relative", "equal %"), ends)
    compiling = f"{report.compile_seconds:.0f} of them to compile"
    out(f"{report.samples} samples in {report.seconds:.0f} s, {compiling}")


def _decibels(value: float | None) -> str:
    if value is None:
        return "    -"
    return "exact" if value == math.inf else f"{value:5.1f}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
