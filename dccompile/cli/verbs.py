"""What each verb of the command line does. Results on stdout, the rest through `Progress`."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import sources
from ..console import Progress, document, out, table, warn
from ..environment import environment
from ..errors import Error, IncompatibleError, UsageError
from ..workload import from_json
from .islands import island_line

Options = argparse.Namespace


def models(options: Options) -> int:
    from .. import models as zoo

    if options.action == "export":
        path = Path(options.output or f"{options.name}.onnx")
        names = [name for name, _ in zoo.names()]
        if options.name not in names:
            raise UsageError(
                f"models export '{options.name}': no such reference model. "
                f"Fix: name one of {', '.join(names)}"
            )
        with Progress(options.quiet) as progress:
            progress.step(f"make the weights of {options.name} from seed {options.seed}")
            try:
                files = zoo.save(options.name, path, options.seed)
            except OSError as error:
                raise UsageError(
                    f"-o '{path}': {error.strerror or error}. Fix: name a file that can be written"
                ) from None
        for file in files:
            out(f"{file}  {size_text(file.stat().st_size)}")
        return 0
    rows = zoo.names()
    if options.json:
        listed = [{"name": name, "description": text} for name, text in rows]
        document("models", {"environment": environment(), "models": listed})
    else:
        table(["model", "what it is"], rows)
    return 0


def check(options: Options) -> int:
    from ..checker import check as run

    source = sources.resolve(options.model, options.seed)
    with Progress(options.quiet) as progress:
        progress.step(f"check {source.name}")
        report = run(
            source.compilable(),
            targets=options.target or ["host"],
            shapes=source.shapes(options.shape),
            precision=options.precision,
            embedding=options.embedding,
            tuning=options.tuning,
            require_tuned=options.require_tuned,
        )
    for line in report.warnings:
        warn(line)
    problems = [
        {"code": p.code, "where": p.where, "found": p.found, "fix": p.fix} for p in report.problems
    ]
    if options.json:
        body = {"model": source.name, "ok": report.ok, "problems": problems, "nodes": report.nodes}
        body |= {"variants": report.variants, "warnings": report.warnings}
        body |= {"islands": report.islands}
        document("check", {"environment": environment(), **body})
    elif report.ok:
        _node_table(report.nodes)
        out()
        _precision_lines(report.nodes, report.islands)
        _kernel_lines({"variants": report.variants})
        out(f"{source.name} can be compiled")
    else:
        for problem in report.problems:
            out(f"error {problem.code}: {problem}")
    return 0 if report.ok else 3


def compile_(options: Options) -> int:
    from ..compiler import DEFAULT_TARGETS, compile

    source = sources.resolve(options.model, options.seed)
    path = Path(options.output or f"{source.name}.dcm")
    if not path.parent.is_dir():
        raise UsageError(
            f"-o '{path}': there is no folder '{path.parent}'. Fix: create it or name another"
        )
    with Progress(options.quiet) as progress:
        made = compile(
            source.compilable(),
            targets=options.target or list(DEFAULT_TARGETS),
            shapes=source.shapes(options.shape),
            precision=options.precision,
            embedding=options.embedding,
            accumulation=options.accumulation,
            tuning=options.tuning,
            require_tuned=options.require_tuned,
            name=source.name,
            progress=lambda event: progress.step(_step(event)),
        )
        progress.step(f"write {path}")
        made.save(path)
    manifest = made.manifest
    for line in manifest["tuning"]["warnings"]:
        warn(line)
    size = path.stat().st_size
    if options.json:
        body = {"output": str(path), "bytes": size, "seconds": round(made.seconds, 2)}
        document("compile", {"environment": environment(), **body, "manifest": manifest})
    elif not options.quiet:
        if options.explain:
            _node_table(manifest["nodes"])
            out()
            _kernel_table(manifest, explain=True)
            out()
        _precision_lines(manifest["nodes"], manifest["islands"])
        _kernel_lines(manifest)
        _table_lines(manifest)
        variants = ", ".join(v["target"] for v in manifest["variants"])
        out(f"variants: {variants}")
        out(f"{path}: {size_text(size)} in {made.seconds:.1f} s")
    return 0


def run(options: Options) -> int:
    source = sources.resolve(options.model, options.seed)
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder, Progress(options.quiet) as p:
        path = _artifact(source, options, Path(folder), p)
        from ..runtime.loader import load

        module = load(path, threads=options.threads, device=options.device)
        feeds = sources.make_inputs(module.inputs, options.input, options.batch)
        values = module.run(None, feeds)
    outputs = {spec.name: value for spec, value in zip(module.outputs, values, strict=True)}
    saved = sources.save_arrays(options.output, outputs) if options.output else []
    wrong = sources.check_expected(outputs, options.expect, options.rtol, options.atol)
    rows = []
    for name, value in outputs.items():
        stats = (float(value.min()), float(value.max()), float(value.mean())) if value.size else ()
        rows.append((name, str(value.dtype), list(value.shape), *(stats or (None,) * 3)))
    keys = ("name", "dtype", "shape", "min", "max", "mean")
    if options.json:
        body = {
            "model": source.name,
            "outputs": [dict(zip(keys, row, strict=True)) for row in rows],
            "saved": [str(path) for path in saved],
            "mismatches": wrong,
        }
        document("run", {"environment": environment(options.threads), **body})
    else:
        table(("output", *keys[1:]), [(*r[:2], "x".join(map(str, r[2])), *r[3:]) for r in rows])
        for file in saved:
            out(str(file))
    if wrong:
        tolerance = f"rtol {options.rtol:g}, atol {options.atol:g}"
        raise Error(f"{'; '.join(wrong)} ({tolerance}). Fix: compare the layers before", "DC5000")
    return 0


def inspect(options: Options) -> int:
    from ..runtime import artifact

    path = Path(options.model)
    if not path.is_file():
        raise UsageError(f"'{path}': no such file. Fix: give a .dcm artifact")
    with artifact.read(path) as found:
        found.verify()
        manifest = found.manifest
        if options.asm:
            from .disassemble import disassemble

            for line in disassemble(found, options.asm, options.target):
                out(line)
            return 0
    if options.json:
        body = {"file": str(path), "bytes": path.stat().st_size, "manifest": manifest}
        document("inspect", {"environment": environment(), **body})
        return 0
    producer = manifest.get("producer", "unknown producer")
    out(f"{manifest.get('name', path.stem)}: format {manifest['format']}, {producer}")
    out()
    rows = [
        (what[:-1], t["name"], t["dtype"], "x".join(map(str, t["shape"])))
        for what in ("inputs", "outputs")
        for t in manifest[what]
    ]
    table(("", "name", "dtype", "shape"), rows)
    out()
    _kernel_table(manifest)
    out()
    _precision_lines(manifest.get("nodes", []), manifest.get("islands", {}))
    for variant in manifest["variants"]:
        out(_memory_line(variant))
    out()
    entries = manifest["entries"].items()
    table(("entry", "bytes", "sha256"), [(n, e["size"], e["sha256"]) for n, e in entries])
    return 0


def _memory_line(variant: dict[str, Any]) -> str:
    """The arena of intermediate tensors, beside the most that are alive at once."""
    arena, peak = variant.get("workspace"), variant.get("peak")
    if not arena or not peak:
        return f"memory {variant['target']}: depends on the shapes of a call"
    ratio = f"{arena / peak:.2f}x the largest live set of {size_text(peak)}"
    return f"memory {variant['target']}: one arena of {size_text(arena)}, {ratio}"


def _in(module: str, name: str) -> Callable[[Options], int]:
    """The verb of a module of its own, which is imported when it runs."""

    def verb(options: Options) -> int:
        function: Callable[[Options], int] = getattr(import_module(module, __package__), name)
        return function(options)

    return verb


VERBS: dict[str, Callable[[Options], int]] = {
    "models": models,
    "check": check,
    "quantize": _in(".quantize", "quantize"),
    "compile": compile_,
    "run": run,
    "bench": _in(".bench", "bench"),
    "tune": _in(".tune", "tune"),
    "worker": _in(".worker", "worker"),
    "records": _in(".records", "run"),
    "accuracy": _in(".accuracy", "accuracy"),
    "inspect": inspect,
    "doctor": _in(".doctor", "doctor"),
}


def _artifact(source: sources.Source, options: Options, folder: Path, progress: Progress) -> Path:
    """The artifact itself, or one compiled for the device that runs it, this host or a GPU."""
    if source.path is not None and source.kind == "dcm":
        return source.path
    from ..compiler import compile

    made = compile(
        source.compilable(),
        targets=options.target or [target_of(options.device)],
        shapes=source.shapes(options.shape),
        precision=options.precision,
        embedding=options.embedding,
        accumulation=options.accumulation,
        tuning=options.tuning,
        require_tuned=options.require_tuned,
        name=source.name,
        progress=lambda event: progress.step(_step(event)),
    )
    for line in made.manifest["tuning"]["warnings"]:
        warn(line)
    return made.save(folder / "model.dcm")


def target_of(device: str) -> str:
    """The target to compile for what a device is: ``host``, or that of a GPU's architecture."""
    if device == "cpu":
        return "host"
    from ..machine import GPUS
    from ..runtime.device import named

    arch = named(device).arch
    fits = [m for m in GPUS.values() if int(m.arch.removeprefix("sm_")) <= arch]
    if not fits:
        raise IncompatibleError(
            f"device '{device}': sm_{arch} is too old, sm_80 is the least. Fix: use the CPU",
            "DC4026",
        )
    return fits[-1].name


def _step(event: dict[str, Any]) -> str:
    """A progress event of the compiler as a line."""
    target = f" for {event['target']}" if event.get("target") else ""
    if "functions" in event:
        target = f" {event['functions']} functions, {event['cached']} more are in the cache"
    return f"compile: {event.get('step', '')}{target}"


def size_text(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _node_table(nodes: list[dict[str, Any]]) -> None:
    keys = ("name", "op", "precision", "kernel", "reason")
    table(("node", *keys[1:]), [tuple(node.get(k) or "-" for k in keys) for node in nodes])


def _precision_lines(nodes: list[dict[str, Any]], islands: dict[str, Any]) -> None:
    """How many nodes run in which precision, which were left in float and why, where 8 bits end."""
    counts = Counter(str(node["precision"]) for node in nodes)
    out("nodes: " + ", ".join(f"{n} {precision}" for precision, n in counts.most_common()))
    floats = {name for names in islands.get("nodes", []) for name in names}
    reasons: dict[str, list[str]] = {}
    for node in nodes:
        fused = islands.get("switches") and node["name"] not in floats  # it reads and writes bytes
        if node.get("reason") and node["precision"].startswith("f") and not fused:
            reasons.setdefault(node["reason"], []).append(f"{node['op']} '{node['name']}'")
    for reason, names in reasons.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        out(f"left in float: {', '.join(names[:4])}{more}: {reason}")
    if islands.get("switches"):
        out(island_line(**islands))


def _table_lines(manifest: dict[str, Any]) -> None:
    """How the embedding tables are stored, and the worst of their errors."""
    by_precision: dict[str, list[dict[str, Any]]] = {}
    for row in manifest.get("tables", []):
        by_precision.setdefault(row["precision"], []).append(row)
    for precision, rows in by_precision.items():
        worst = max(rows, key=lambda row: row["relative_error"])
        error = ""
        if worst["relative_error"]:
            error = f", relative error up to {worst['relative_error']:.2e} ('{worst['name']}')"
        out(f"tables: {len(rows)} {precision}, {size_text(sum(r['bytes'] for r in rows))}{error}")


def _kernel_shape(work: dict[str, Any]) -> str:
    """The sizes of a kernel's workload: m x n x k, tables x rows x dim, bags x vectors x dim.

    Of convolutions all that `describe` says but the form.
    """
    if work["op"] == "conv":
        try:
            return from_json(work).describe().split(" ", 2)[2].rpartition(" -> ")[0]
        except ValueError:  # of another version
            return "?"
    if work["op"] == "embedding_bag":
        sizes = [len(work["rows"]), max(work["rows"]), work["dim"]]
    else:
        names = ("bags", "vectors", "dim") if work["op"] == "interaction" else ("m", "n", "k")
        sizes = [work.get(name) for name in names]
    return "x".join(str(size or "?") for size in sizes)


def _kernel_table(manifest: dict[str, Any], explain: bool = False) -> None:
    """Every kernel of every variant; where its parameters are from and, to `explain`, why."""
    rows: list[tuple[Any, ...]] = []
    for variant in manifest["variants"]:
        for kernel in variant.get("kernels", []):
            work = kernel["workload"]
            shape = _kernel_shape(work)
            params = ", ".join(f"{k}={v}" for k, v in kernel["params"].items())
            row = (variant["target"], kernel["node"], shape, kernel["name"], params)
            said = (kernel["source"], kernel.get("record"), kernel.get("gain"))
            rows.append((*row, *said, *((kernel.get("why"),) if explain else ())))
    headers = ("variant", "node", "shape", "kernel", "params", "from", "record", "gain")
    table((*headers, *(("why",) if explain else ())), rows)


def _kernel_lines(manifest: dict[str, Any]) -> None:
    for variant in manifest["variants"]:
        names = Counter(k["name"] for k in variant["kernels"])
        tuned = sum(k["source"] != "default" for k in variant["kernels"])
        listed = ", ".join(f"{count} {name}" for name, count in names.items()) or "generic ones"
        counts = f"{tuned} tuned, {sum(names.values()) - tuned} default"
        out(f"kernels for {variant['target']}: {listed} ({counts})")
        for name, why in (variant.get("unscheduled") or {}).items():
            out(f"not scheduled: {name}: {why}")
