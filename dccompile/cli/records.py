"""``dccompile records``: prints what maintain, replay and coverage of `tuning` find."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import lookup, records, sources
from ..console import Progress, document, out, table
from ..environment import environment
from ..errors import TuningError, UsageError
from ..machine import Gpu, resolve
from ..tuning import coverage, maintain
from ..tuning import replay as replaying

Options = argparse.Namespace


def run(options: Options) -> int:
    """Dispatches to the action."""
    return _ACTIONS[options.action](options)


def _folder(given: str | None) -> Path:
    """A folder of logs; one below the current folder is shown as such."""
    folder = Path(given) if given else records.packaged()
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _print(options: Options, folder: Path, body: dict[str, Any]) -> bool:
    """The document of --json, if that is wanted."""
    if options.json:
        what = {"action": options.action, "folder": str(folder)}
        document("records", {"environment": environment(), **what, **body})
    return bool(options.json)


# ---- verify, prune, merge ----


def _verify(options: Options) -> int:
    folder = _folder(options.folder)
    files = maintain.scan(folder)
    problems = [text for file in files for text in file.problems]
    if not _print(options, folder, {"files": _listed(files), "problems": problems}):
        _file_table(files, folder)
        for text in problems:
            out(text)
    if problems:
        total = sum(len(file.lines) for file in files)
        raise TuningError(
            f"records verify '{folder}': {len(problems)} of {total} lines are not ok, all must be. "
            "Fix: 'dccompile records replay --update' measures stale records anew, "
            "'dccompile records prune' drops what is of no use",
            "DC7040",
        )
    return 0


def _prune(options: Options) -> int:
    folder = _folder(options.folder)
    files = maintain.prune(folder, options.dry_run)
    problems = [text for file in files for text in file.problems]
    dropped = sum(len(f.lines) - len(f.records) for f in files)
    body = {"dry_run": options.dry_run, "dropped": dropped, "files": _listed(files)}
    if not _print(options, folder, {**body, "problems": problems}):
        _file_table(files, folder)
        for text in problems:
            out(text)
        kept = sum(len(f.records) for f in files)
        verb = "would be dropped" if options.dry_run else "dropped"
        out(f"{dropped} lines {verb}, {kept} stay")
    return 0


def _merge(options: Options) -> int:
    folder = _folder(options.log)
    merged = maintain.merge([Path(source) for source in options.source], folder)
    if not _print(options, folder, asdict(merged)):
        for text in merged.skipped:
            out(f"left out: {text}")
        counts = f"{merged.added} added, {merged.replaced} replaced, {merged.kept} kept"
        out(f"{folder}: {counts}, {len(merged.skipped)} left out")
    return 0


def _listed(files: Sequence[maintain.File]) -> list[dict[str, Any]]:
    return [{"file": f.name, "lines": len(f.lines), **f.counts} for f in files]


def _file_table(files: Sequence[maintain.File], folder: Path) -> None:
    if not files:
        out(f"{folder}: no records")
        return
    counts = [(len(file.lines), *file.counts.values()) for file in files]
    rows: list[tuple[Any, ...]] = [(f.name, *n) for f, n in zip(files, counts, strict=True)]
    if len(rows) > 1:
        rows.append(("all", *map(sum, zip(*counts, strict=True))))
    table(("file", "lines", *maintain.STATES), rows)


# ---- stats ----


def _stats(options: Options) -> int:
    folder = _folder(options.log)
    return _model_stats(options, folder) if options.model else _file_stats(options, folder)


def _file_stats(options: Options, folder: Path) -> int:
    files = maintain.scan(folder)
    if options.target:
        wanted = [resolve(t).name for t in options.target]
        files = [file for file in files if file.target in wanted]
    found = [(file, coverage.gains(file.records)) for file in files]
    everything = coverage.gains([r for file in files for r in file.records])
    listed = [{"file": f.name, **asdict(g), "unused": len(f.lines) - g.records} for f, g in found]
    if _print(options, folder, {"files": listed, "all": asdict(everything)}):
        return 0
    if not files:
        out(f"{folder}: no records")
        return 0
    rows: list[tuple[Any, ...]] = []
    for name, gains in [*((f.name, g) for f, g in found), ("all", everything)]:
        means = (gains.mean and round(gains.mean, 3), gains.best and round(gains.best, 3))
        cpus = ", ".join(gains.cpus)
        rows.append((name, gains.records, gains.tuned, *means, cpus, gains.newest or "-"))
    table(("file", "records", "tuned", "gain", "best", "cpu", "newest"), rows)
    unused = sum(entry["unused"] for entry in listed)
    if unused:
        out(f"lines of no use: {unused}, see 'dccompile records verify'")
    out("tuned: not the default won; gain: geometric mean of the default's time by the winner's")
    return 0


def _model_stats(options: Options, folder: Path) -> int:
    maintain.check(folder)
    found: list[tuple[str, str, list[coverage.Covered]]] = []
    warnings: dict[str, None] = {}
    with Progress(options.quiet) as progress:
        for model in options.model:
            source = sources.resolve(model, options.seed)
            manifest, cpus = _manifest(source, options, progress)
            for target, cpu in cpus.items():
                rows, texts = coverage.cover(manifest, source.name, target, folder, cpu)
                found.append((source.name, target, rows))
                warnings.update(dict.fromkeys(texts))
    listed = [
        {
            "model": model,
            "target": target,
            **asdict(coverage.summary(rows)),
            "workloads": [asdict(row) for row in rows],
        }
        for model, target, rows in found
    ]
    if not _print(options, folder, {"models": listed, "warnings": list(warnings)}):
        _model_tables(found)
        for text in warnings:
            out(f"warning: {text}")
    return 0


def _manifest(
    source: sources.Source, options: Options, progress: Progress
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """A model's manifest, and the kind of CPU whose records count for each of the targets."""
    if source.path is None or source.kind != "dcm":
        from ..compiler import compile

        progress.step(f"compile {source.name}")
        targets = options.target or ["host"]
        made = compile(
            source.compilable(),
            targets=targets,
            shapes=source.shapes(options.shape),
            precision=options.precision,
            embedding=options.embedding,
            tuning=lookup.NO_LOGS,
            name=source.name,
        )
        return made.manifest, lookup.cpus(targets)
    from ..runtime import artifact

    with artifact.read(source.path) as file:
        manifest = file.manifest
    has = [v["target"] for v in manifest["variants"]]
    cpus = lookup.cpus(options.target or has)
    for target in cpus:
        if target not in has:
            raise UsageError(
                f"--target {target}: '{source.path}' has only {', '.join(has)}. "
                "Fix: name one of these"
            )
    return manifest, cpus


def _model_tables(found: Sequence[tuple[str, str, list[coverage.Covered]]]) -> None:
    names = ("workloads", *coverage.SOURCES, "% of calls", "gain", "speedup")
    models: list[tuple[Any, ...]] = []
    kernels: list[tuple[Any, ...]] = []
    for model, target, rows in found:
        models.append((model, target, *_summary(rows)))
        for kernel in dict.fromkeys(row.kernel for row in rows):
            own = [row for row in rows if row.kernel == kernel]
            kernels.append((model, target, kernel, *_summary(own)))
    table(("model", "target", *names), models)
    out()
    table(("model", "target", "kernel", *names), kernels)
    out()
    out("% of calls: of kernels whose parameters come from a record; gain: geometric mean over")
    out("workloads with a record of their own, speedup: of the time of all their calls together")


def _summary(rows: Sequence[coverage.Covered]) -> tuple[Any, ...]:
    found = coverage.summary(rows)
    share = 100 * found.tuned_calls / found.calls if found.calls else None
    figures = (found.mean_gain, found.speedup)
    return (
        found.workloads,
        *found.counts.values(),
        share and round(share, 1),
        *(f and round(f, 3) for f in figures),
    )


# ---- replay ----


def _replay(options: Options) -> int:
    from ..tuning import gpu_engine
    from ..tuning.cluster import Local

    folder = _folder(options.folder)
    machines = [resolve(t) for t in options.target or []]
    on_gpu = any(isinstance(m, Gpu) for m in machines)
    seconds = sources.parse_seconds(options.duration)
    fallen: list[int] = []
    with Progress(options.quiet) as progress:

        def done(verdict: replaying.Verdict, number: int, total: int) -> None:
            fallen.append(number)
            progress.step(f"{verdict.label}: {verdict.state} {_reason(verdict)}", number, total)

        try:
            with (
                gpu_engine.engine(options.workers, machines) if on_gpu else Local(options.workers)
            ) as engine:
                verdicts = replaying.replay(
                    folder,
                    engine,
                    targets=[machine.name for machine in machines],
                    pattern=options.task,
                    seconds=seconds,
                    seed=options.seed,
                    update=options.update,
                    done=done,
                )
        except KeyboardInterrupt:
            saved = "their lines are renewed" if options.update else "nothing was changed"
            raise TuningError(
                f"records replay '{folder}': stopped after {len(fallen)} records, {saved}. "
                "Fix: run it again, --task and --target choose records",
                "DC7042",
            ) from None
    counts = {state: sum(v.state == state for v in verdicts) for state in replaying.STATES}
    if not _print(
        options,
        folder,
        {"counts": counts, "updated": options.update, "records": [_entry(v) for v in verdicts]},
    ):
        _verdict_table(verdicts)
        out(", ".join(f"{count} {state}" for state, count in counts.items()))
    bad = [v for v in verdicts if v.state in ("lost", "failed")]
    left = [v for v in bad if not options.update or v.renewed is None]
    if left:
        raise TuningError(
            f"records replay '{folder}': {len(left)} of {len(verdicts)} records hold no longer, "
            f"all must: {left[0].label}. Fix: --update puts the default in their place",
            "DC7041",
        )
    return 0


def _entry(verdict: replaying.Verdict) -> dict[str, Any]:
    record = verdict.record
    about = {"target": record.target, "kernel": record.kernel, "label": verdict.label}
    figures = {name: getattr(verdict, name) for name in ("state", "reason", "ratio", "low", "high")}
    renewed = None if verdict.renewed is None else json.loads(verdict.renewed.to_line())
    return {**about, **figures, "record": json.loads(record.to_line()), "renewed": renewed}


def _reason(verdict: replaying.Verdict) -> str:
    if verdict.ratio is not None:
        return f"{verdict.ratio:.3f} [{verdict.low:.3f}, {verdict.high:.3f}]"
    return verdict.reason


def _verdict_table(verdicts: Sequence[replaying.Verdict]) -> None:
    rows = [
        (
            v.record.target,
            v.label,
            round(v.record.gain, 3),
            v.state,
            _reason(v),
            round(v.renewed.us, 2) if v.renewed else None,
        )
        for v in verdicts
    ]
    table(("target", "task", "gain", "state", "now [95 %]", "us"), rows)


_ACTIONS = {
    "verify": _verify,
    "stats": _stats,
    "merge": _merge,
    "prune": _prune,
    "replay": _replay,
}
