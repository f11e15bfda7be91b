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
from ..machine import resolve

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
    with Progress(options.quiet) as progress:
        result = benches.run(
            source,
            targets=options.target or ["host"],
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
        )
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
            if not peer["agrees"]:
                verdict = f"DIFFERS: {verdict}"
            rows.append((*lead, name, *_times(peer), rate, round(peer["ratio"], 2), verdict))
    seconds = f", compiled in {result['compile_seconds']} s" if "compile_seconds" in result else ""
    info = environment()
    out(f"{result['model']} on {info['cpu']} ({info['isa']}){seconds}")
    headers = ("batch", "threads", "runtime", "us", "[p20, p80]", "per s", "ratio", "outputs")
    table(headers, rows)


def _times(entry: dict[str, Any]) -> tuple[float, str]:
    return entry["us"], f"[{entry['p20']:.1f}, {entry['p80']:.1f}]"


def _rate(row: dict[str, Any], key: str) -> float:
    return round(row["per_second"] * row["us"] / row[key]["us"], 1)


def difference_text(difference: dict[str, Any]) -> str:
    """``equal``, ``1 step``, ``2e-07 relative``."""
    if "shape" in difference:
        return f"shapes {difference['shape']}"
    parts = []
    if difference.get("steps"):
        parts.append(f"{difference['steps']} step{'s' if difference['steps'] > 1 else ''}")
    if difference.get("relative"):
        parts.append(f"{difference['relative']:.1e} relative")
    return ", ".join(parts) or "equal"


def _kernels(options: Options, threads: list[int]) -> int:
    from ..bench import embedding_bench, kernel_bench, measure

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
                _kernel_tables(result)
    rows = [row for result in results for row in result["rows"]]
    wrong = [row for row in rows if not row["correct"]]
    if wrong:
        places = ", ".join(f"{r['kernel']} {_shape(r)}" for r in wrong[:5])
        raise Error(f"{len(wrong)} of {len(rows)} rows are wrong: {places}. Fix: report", "DC5000")
    if bags:
        ratios = [p["ratio"] for row in rows for p in row["peers"].values() if p.get("ratio")]
        _gate(min(ratios, default=None), options.fail_below, "bench --kernels, least ratio")
        return 0
    means = [m["best"] for result in results for m in result["geometric_means"]]
    best = None if None in means else min(means, default=None)
    _gate(best, options.fail_below, "bench --kernels, geometric mean")
    return 0


def _shape(row: dict[str, Any]) -> str:
    return str(row.get("label") or "x".join(map(str, row["shape"])))


def _kernel_tables(result: dict[str, Any]) -> None:
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    table_rows = []
    for row in rows:
        ratios = [row["peers"].get(name, {}).get("ratio") for name in names]
        table_rows.append(
            (
                row["kernel"],
                row["form"],
                row["machine"],
                _shape(row),
                f"{row['us']:.2f} [{row['p20']:.2f}, {row['p80']:.2f}]",
                row["gops"],
                round(100 * row["peak_share"], 1),
                *(r and round(r, 2) for r in ratios),
                row["best_ratio"] and round(row["best_ratio"], 2),
                _route(row),
                "" if row["correct"] else f"WRONG: {difference_text(row['difference'])}",
            )
        )
    headers = ("kernel", "form", "machine", "shape", "us [p20, p80]", "Gop/s", "% peak")
    out(f"threads: {result['threads']}; ratios: time of the peer by ours, above 1 ours is faster")
    versus = (*(f"vs-{name}" for name in names), "vs-best")
    table((*headers, *versus, "timed by", ""), table_rows)
    out()
    means = [("kernel", result["geometric_means"])]
    if len(result["family_means"]) < len(result["geometric_means"]):
        means.append(("family", result["family_means"]))
    for title, found in means:
        _mean_table(title, found, names)
        out()
    out("timed by chain: the kernel alone, ours too; by call: one call from Python of each")
    out("one call of a tiny operator, us: what each pays beside the kernel")
    for label, times in result["call_overhead_us"].items():
        out(f"  {label}: " + ", ".join(f"{name} {us:.1f}" for name, us in times.items()))
    _reasons(rows)


def _route(row: dict[str, Any]) -> str:
    """How the best peer was timed."""
    best = row["best_peer"]
    return "" if best is None else str(row["peers"][best]["route"])


def _mean_table(title: str, means: list[dict[str, Any]], names: list[str]) -> None:
    rows = []
    for mean in means:
        shares = [mean["peak_share_large"], mean["peak_share_large_min"]]
        rows.append(
            (
                f"{mean.get('kernel', mean['machine'])} {mean['form']} {mean['family']}",
                *(share and round(100 * share, 1) for share in shares),
                *(mean["ratio"].get(name) for name in names),
                mean["best"],
                mean["best_large"],
                mean["best_min"],
                f"{mean['faster']} of {mean['shapes']}",
            )
        )
    headers = (f"geometric mean, {title}", "% peak*", "least", *(f"vs-{name}" for name in names))
    table((*headers, "vs-best", "vs-best*", "least", "faster"), rows)
    out("* of products those with M >= 10 and N, K >= 256; convolutions count taps in the padding")


def _reasons(rows: list[dict[str, Any]]) -> None:
    """Why a peer is missing: each reason once."""
    seen: dict[str, None] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if "reason" in peer:
                seen[f"  {name}, {row['form']}: {peer['reason']}"] = None
            elif not peer["agrees"]:
                shape = _shape(row)
                text = difference_text(peer["difference"])
                seen[f"  {name}, {row['form']} {shape}: differs from the reference, {text}"] = None
    for line in seen:
        out(line)


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
