"""``dccompile bench``: reads its options, runs the benches, prints tables, keeps the gate."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from .. import lookup, sources
from ..bench import model_bench as benches
from ..bench.peers import PEERS, parse
from ..console import Progress, document, out, table
from ..environment import environment
from ..errors import Error, UsageError
from ..machine import Gpu, resolve
from ..runtime.device import named
from . import verbs
from ._bench_tables import difference_text, gpu_tables, kernel_tables, shape

Options = argparse.Namespace


def bench(options: Options) -> int:
    """Dispatches to kernels, call overhead or a model."""
    what = (options.model, options.kernels, options.overhead or None, options.quantize)
    if sum(value is not None for value in what) != 1:
        found = "no MODEL" if not any(what) else "MODEL together with another"
        raise UsageError(
            f"bench: {found}. Fix: name a model, or give --kernels, --overhead or --quantize"
        )
    if options.quantize is not None:
        return _quantize(options)
    threads = sources.parse_counts(options.threads or ["1"], "--threads")
    if options.kernels is not None:
        return _kernels(options, threads)
    if options.overhead:
        return _overhead(options)
    return _model(options, threads)


def _quantize(options: Options) -> int:
    from .. import models
    from ..bench import quantization_bench

    known = [name for name, _ in models.names() if not name.endswith("-int8")]
    names = options.quantize.split(",") if options.quantize else models.vision_names()
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"--quantize '{unknown[0]}': no such float model. Fix: name one of {', '.join(known)}"
        )
    rows = []
    with Progress(options.quiet) as progress:
        for name in names:
            tests = 4 if name in models.vision_names() else 100  # of these one has few outputs
            rows.append(quantization_bench.run(name, options.samples, tests, progress))
    if options.json:
        body = [{**asdict(row), "best": row.best, "gain": row.gain} for row in rows]
        document("bench", {"environment": environment(), "rows": body})
        return 0
    table(
        ("model", "samples", "dB", *(f"ORT {m}" for m in quantization_bench.METHODS), "gain",
         "steps", "s"),
        [
            (row.model, row.samples, row.ours,
             *(v if isinstance(v := row.peer[m], float) else None
               for m in quantization_bench.METHODS),
             row.gain, row.steps, row.seconds)
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        for method, value in row.peer.items():
            if isinstance(value, str):
                out(f"{row.model}, {method}: {value}")
    return 0


def _model(options: Options, threads: list[int]) -> int:
    source = sources.resolve(options.model, options.seed)
    batches = sources.parse_counts(options.batch or ["1"], "--batch")
    on_gpu = options.device != "cpu"
    default = verbs.target_of(options.device)
    with Progress(options.quiet) as progress:
        result = benches.run(
            source,
            targets=options.target or [default],
            shapes=source.shapes(options.shape, batches),
            precision=options.precision,
            embedding=options.embedding,
            tuning=options.tuning,
            require_tuned=options.require_tuned,
            inputs=options.input,
            batches=batches,
            threads=threads,
            peers=parse(options.against) if options.against else [],
            duration_s=sources.parse_seconds(options.duration or "3s"),
            warmup_s=sources.parse_seconds(options.warmup),
            progress=progress,
            device=options.device,
        )
    if on_gpu:
        result["device"] = named(options.device).name
    if options.json:
        document("bench", {"environment": environment(max(threads)), **result})
    else:
        _model_table(result)
    for row in result["rows"]:
        if not row["agrees"]:
            raise Error(
                f"bench {source.name}: batch {row['batch']}: no peer agrees with the output. "
                "Fix: compare with another peer, then report the model",
                "DC5000",
            )
    ratios = [row["best_ratio"] for row in result["rows"]]
    best = None if None in ratios else min(ratios)
    _gate(best, options.fail_below, f"bench {source.name}")
    return 0


def _model_table(result: dict[str, Any]) -> None:
    rows: list[tuple[Any, ...]] = []
    for row in result["rows"]:
        lead = (row["batch"], row["threads"])
        rows.append((*lead, benches.OURS, *_times(row), row["per_second"], None, ""))
        rows.append((*lead, benches.CALL, *_times(row["call"]), *(_rate(row, "call"), None, "")))
        for name, peer in row["peers"].items():
            if "reason" in peer:
                rows.append((*lead, name, None, "", None, None, f"not run: {peer['reason']}"))
                continue
            rate = round(row["per_second"] * row["us"] / peer["us"], 1)
            verdict = difference_text(peer["difference"])
            if not peer["same"]:
                verdict = f"another form of the model: {verdict}"
            elif not peer["agrees"]:
                verdict = f"DIFFERS: {verdict}"
            rows.append((*lead, name, *_times(peer), rate, round(peer["ratio"], 2), verdict))
    seconds = f", compiled in {result['compile_seconds']} s" if "compile_seconds" in result else ""
    info = environment()
    where = result.get("device") or f"{info['cpu']} ({info['isa']})"
    out(f"{result['model']} on {where}{seconds}")
    headers = ("batch", "threads", "runtime", "us", "[p20, p80]", "per s", "ratio", "outputs")
    table(headers, rows)


def _times(entry: dict[str, Any]) -> tuple[float, str]:
    return entry["us"], f"[{entry['p20']:.1f}, {entry['p80']:.1f}]"


def _rate(row: dict[str, Any], key: str) -> float:
    return round(row["per_second"] * row["us"] / row[key]["us"], 1)


def _kernels(options: Options, threads: list[int]) -> int:
    from ..bench import embedding_bench, kernel_bench, measure

    if options.device != "cpu":
        return _gpu_kernels(options)
    measure.import_tvm()
    bags = (options.kernels or "").startswith("embedding_bag")
    bench: Any = embedding_bench if bags else kernel_bench
    target = resolve(options.target[0]) if options.target else None
    cases = bench.cases(options.kernels or None, target)
    against = [p.name for p in parse(options.against)] if options.against else list(PEERS)
    duration = sources.parse_seconds(options.duration or "1s")
    warmup = min(sources.parse_seconds(options.warmup), duration / 5)
    results = []
    logs = lookup.logs(options.tuning)
    with Progress(options.quiet) as progress:
        for count in threads:
            found = bench.run(cases, count, duration, warmup, against, progress, logs)
            results.append({"threads": count, **found})
    if options.json:
        document("bench", {"environment": environment(max(threads)), "kernels": results})
    else:
        for result in results:
            if bags:
                out(f"threads: {result['threads']}; limit: a kernel that only touches the lines")
                table(embedding_bench.HEADERS, [embedding_bench.cells(r) for r in result["rows"]])
            else:
                kernel_tables(result)
    rows = [row for result in results for row in result["rows"]]
    _check(rows)
    if bags:
        ratios = [p["ratio"] for row in rows for p in row["peers"].values() if p.get("ratio")]
        _gate(min(ratios, default=None), options.fail_below, "bench --kernels, least ratio")
        return 0
    _gate_means([m for result in results for m in result["geometric_means"]], options)
    return 0


def _check(rows: list[dict[str, Any]]) -> None:
    """Raises Error where a kernel did not compute what the reference does."""
    wrong = [row for row in rows if not row["correct"]]
    if wrong:
        places = ", ".join(f"{r['kernel']} {shape(r)}" for r in wrong[:5])
        raise Error(f"{len(wrong)} of {len(rows)} rows are wrong: {places}. Fix: report", "DC5000")


def _gate_means(means: list[dict[str, Any]], options: Options) -> None:
    best = [mean["best"] for mean in means]
    least = None if None in best else min(best, default=None)
    _gate(least, options.fail_below, "bench --kernels, geometric mean")


def _gpu_kernels(options: Options) -> int:
    from ..bench import gpu_kernels
    from ..cuda.loose import machine_of
    from ..tuning.gpu_trial import mismatch

    gpu = named(options.device)
    if options.target:
        machine = resolve(options.target[0])
        if reason := mismatch(machine, gpu.arch):
            raise UsageError(f"--target {machine.name}: {reason}. Fix: name no target")
        assert isinstance(machine, Gpu)
    else:
        verbs.target_of(options.device)  # raises where it is too old
        machine = machine_of(gpu)
    cases = gpu_kernels.cases(options.kernels or None, machine)
    duration = sources.parse_seconds(options.duration or "1s")
    warmup = min(sources.parse_seconds(options.warmup), duration / 5)
    against = [p.name for p in parse(options.against)] if options.against else None
    with Progress(options.quiet) as progress:
        logs = lookup.logs(options.tuning)
        result = gpu_kernels.run(cases, gpu, duration, warmup, against, progress, logs)
    if options.json:
        document("bench", {"environment": environment(1), "kernels": [result]})
    else:
        gpu_tables(result)
    _check(result["rows"])
    _gate_means(result["geometric_means"], options)
    return 0


def _overhead(options: Options) -> int:
    with Progress(options.quiet) as progress:
        duration = sources.parse_seconds(options.duration or "1s")
        result = benches.call_overhead(duration, progress)
    if options.json:
        document("bench", {"environment": environment(1), "overhead": result})
        return 0
    out("one call of a compiled addition of 4 floats, 1 thread")
    rows = [(name, *_times(times)) for name, times in result["routes"].items()]
    table(("route", "us", "[p20, p80]"), rows)
    return 0


def _gate(best: float | None, floor: float | None, what: str) -> None:
    """Raises with exit code 6 where the ratio to the best peer is below the floor."""
    if floor is None:
        return
    if best is None:
        raise UsageError(
            f"--fail-below {floor:g}: {what}: some row was compared with no peer. "
            "Fix: name peers that are installed and run this with --against"
        )
    if best < floor:
        raise Error(
            f"{what}: {best:.3f} times the best peer, the gate is {floor:g}. "
            "Fix: run again on an idle machine, then look at the slowest row",
            "DC6000",
        )
