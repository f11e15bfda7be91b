"""``dccompile tune``: reads its options, runs the job, prints what was found."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import asdict
from typing import Any

from .. import sources
from ..console import Progress, document, out, table
from ..environment import environment
from ..errors import TuningError, UsageError
from ..tuning import tune as tuning

Options = argparse.Namespace


def tune(options: Options) -> int:
    """Runs the job; Ctrl-C ends it with the command that goes on."""
    seconds, trials = parse_budget(options.budget)
    with Progress(options.quiet) as progress:
        try:
            report = tuning.tune(
                options.model,
                targets=options.target or ["host"],
                kernels=options.kernels,
                shapes=sources.parse_shapes(options.shape),
                precision=options.precision,
                embedding=options.embedding,
                task=options.task,
                seconds=seconds,
                trials=trials,
                workers=parse_workers(options.workers),
                seed=options.seed,
                log=options.log,
                dry_run=options.dry_run,
                progress=progress,
            )
        except TuningError as error:
            if error.code == "DC7001":
                progress.note(f"resume: {shlex.join(['dccompile', *sys.argv[1:]])}")
            raise
    if options.json:
        document("tune", {"environment": environment(1), **_json(report)})
    elif options.dry_run:
        _plan(report)
    else:
        _result(report)
    return 0


def parse_budget(text: str | None) -> tuple[float | None, int | None]:
    """``30m``, ``90s`` as seconds, ``2000trials`` as trials."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)\s*trials?", text.strip())
    if match:
        return None, int(match[1])
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)h", text.strip()):
        return float(match[1]) * 3600, None
    try:
        return sources.parse_seconds(text), None
    except UsageError:
        raise UsageError(
            f"--budget {text!r}: neither a time nor a number of trials. "
            "Fix: write for example 30m or 2000trials"
        ) from None


def parse_workers(text: str | None) -> int | str | None:
    """A number of processes, or the address of a scheduler."""
    if text is None:
        return None
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    if re.fullmatch(r"\w+://\S+", text):
        return text
    raise UsageError(
        f"--workers {text!r}: neither a number of processes nor the address of a scheduler. "
        "Fix: write for example 2 or tcp://host:8786"
    )


def _json(report: tuning.Report) -> dict[str, Any]:
    kept = {id(d) for d in report.kept}
    return {
        "seconds": round(report.seconds, 1),
        "trials": report.trials,
        "failures": report.failures,
        "failed": report.failed,
        "skipped": report.skipped,
        "plan": [{**_task(p.task), "space": p.space, "done": p.done} for p in report.plans],
        "tasks": [
            {
                **_task(d.task),
                "cpu": d.cpu,
                "params": asdict(d.params),
                "gain": d.gain,
                "us": d.us,
                "default_us": d.default_us,
                "tried": d.tried,
                "kept": id(d) in kept,
            }
            for d in report.decisions
        ],
        "models": [
            {"model": model, "target": target, **(asdict(proof) if proof else {"kept": False})}
            for (model, target), proof in report.models.items()
        ],
    }


def _task(task: Any) -> dict[str, Any]:
    return {"kernel": task.kernel.name, "target": task.target.name, "task": task.label,
            "uses": task.uses}  # fmt: skip


def _plan(report: tuning.Report) -> None:
    rows = [
        (p.task.target.name, p.task.label, sum(p.task.uses.values()) or None,
         p.space, p.done)
        for p in report.plans
    ]  # fmt: skip
    table(("target", "task", "uses", "space", "tried"), rows)
    out(f"{len(rows)} tasks, about {report.seconds / 60:.0f} minutes")


def _result(report: tuning.Report) -> None:
    kept = {id(d) for d in report.kept}
    rows = [
        (d.task.target.name, d.task.label, d.default_us, d.us, d.gain,
         ", ".join(f"{k}={v}" for k, v in asdict(d.params).items()),
         "kept" if id(d) in kept else "not faster in the model")
        for d in sorted(report.decisions, key=lambda d: -d.gain)
        if d.changed
    ]  # fmt: skip
    headers = ("target", "task", "default us", "us", "gain", "params", "")
    table(headers, rows)
    if rows:
        out()
    lines = [
        (model, target, *((c.default_ms, c.tuned_ms, c.ratio, f"[{c.low:.3f}, {c.high:.3f}]")
                          if c else (None, None, 1.0, "defaults kept")))
        for (model, target), c in report.models.items()
    ]  # fmt: skip
    table(("model", "target", "default ms", "tuned ms", "gain", "95 %"), lines)
    tried = len(report.decisions)
    out(f"{tried} tasks searched, {len(rows)} winners over the default, {len(kept)} kept")
    for task, reason in report.failed.items():
        out(f"not tuned: {task}: {reason}")
    if report.skipped:
        out(f"{report.skipped} tasks are left: the budget was spent. The same command goes on")
    failures = "".join(f", {n} {status}" for status, n in report.failures.items())
    out(f"{report.trials} trials{failures} in {report.seconds:.0f} s")
