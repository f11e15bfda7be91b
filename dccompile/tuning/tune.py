"""`tune`: from models to records that make them faster, and are proven to."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import fingerprint, lookup, records, sources
from ..console import Progress
from ..errors import IncompatibleError, TuningError, UsageError
from ..machine import Gpu, Machine, available_cores, cpu_type, missing_features, resolve
from . import gpu_engine, job, search, tasks, whole
from .cluster import Local
from .job import Decision
from .journal import Journal
from .server import versions
from .tasks import Task

_HARM = 0.995  # of a model's speed: less is more than noise
_STEPS = 10  # from the default, tried before a search begins


@dataclass(frozen=True)
class Plan:
    """One line of a dry run: a task, the size of its space, how many trials are in the journal."""

    task: Task
    space: int
    done: int


@dataclass
class Report:
    """What a job came to.

    `plans` of all tasks. `decisions` of those that were searched; `kept` those of them that went
    into the logs with something else than the default. `models` has, by model and target, the
    comparison that speaks for its winners, None where none were kept.
    """

    plans: list[Plan]
    seconds: float = 0.0  # of a dry run: an estimate
    trials: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # trials by how they failed
    failed: dict[str, str] = field(default_factory=dict)  # tasks without a working default
    decisions: list[Decision] = field(default_factory=list)
    kept: list[Decision] = field(default_factory=list)
    models: dict[tuple[str, str], whole.Comparison | None] = field(default_factory=dict)
    skipped: int = 0  # tasks that the budget did not reach


def tune(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    *,
    targets: str | Sequence[str] = ("host",),
    kernels: str | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    precision: str = "keep",
    embedding: str = "keep",
    task: str = "*",
    seconds: float | None = None,
    trials: int | None = None,
    workers: int | str | None = None,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Finds the fastest parameters of the kernels of models and writes them to tuning logs.

    `models` are ONNX files or names of reference models; `kernels`, a glob, adds the deployed
    shapes for such kernels or families of shapes. `task` is a glob for kernel names or
    descriptions of workloads. `seconds` and `trials` bound the search. `workers` is how many
    processes of this machine measure (default: its cores), or the address of a dask scheduler,
    tcp://host:port; for a GPU, at most 4, they compile side by side and measure in turns. `log` is
    the folder of the logs (default: the packaged ones). The journal in it makes a later job go on
    where this one ended.

    Raises TuningError with code DC7001 when Ctrl-C stopped it, its trials being saved; else where
    logs cannot be written or workers not used; UsageError for wrong arguments.
    """
    progress = progress or Progress(quiet=True)
    folder = Path(log) if log is not None else records.packaged()
    names = [models] if isinstance(models, (str, os.PathLike)) else list(models)
    if not names and kernels is None:
        raise UsageError("tune: no model. Fix: name a model, or deployed shapes with --kernels")
    wanted = [targets] if isinstance(targets, str) else list(targets)
    machines = list(dict.fromkeys(resolve(t) for t in wanted))
    options = {"precision": precision, "embedding": embedding}
    journal = Journal(folder)
    with tempfile.TemporaryDirectory(prefix="dccompile-") as scratch, ExitStack() as stack:
        if not dry_run:  # what cannot be measured or written is said before hours of work
            records.check_writable(folder)
            engine = stack.enter_context(_engine(workers, machines))
            for line in getattr(engine, "refused", ()):
                progress.note(f"warning: {line}. It gets no trials")
        found: list[whole.Model] = []
        listed: list[Task] = []
        for machine in machines:
            for name in names:
                progress.step(f"compile {name} with defaults for {machine.name}")
                model, mine = _model(str(name), shapes, options, machine, Path(scratch))
                found.append(model)
                listed += mine
            if kernels is not None:
                listed += tasks.from_shapes(kernels, machine)
        listed = [t for t in tasks.merged(listed) if t.matches(task)]
        if not listed:
            raise UsageError(
                f"tune: no task matches --task {task!r}. Fix: see the labels of --dry-run"
            )
        if dry_run:
            return _dry(listed, journal, workers)
        return _Run(listed, found, engine, journal, folder).run(seconds, trials, seed, progress)


def _model(
    name: str,
    shapes: Mapping[str, Sequence[int | str]] | None,
    options: Mapping[str, Any],
    machine: Machine,
    scratch: Path,
) -> tuple[whole.Model, list[Task]]:
    source = sources.resolve(name)
    given = shapes if shapes is not None else source.shapes(())
    folder = scratch / machine.name
    folder.mkdir(exist_ok=True)
    path = folder / f"{source.name}.dcm"
    model = whole.Model(source, given, machine.name, options, path)
    made = model.compile(folder, lookup.NO_LOGS)
    return model, tasks.from_manifest(made.manifest, source.name)


def _dry(listed: list[Task], journal: Journal, workers: int | str | None) -> Report:
    tvm = versions()["tvm"]
    plans = []
    left = []
    kinds: dict[bool, str] = {}
    for task in listed:
        gpu = isinstance(task.target, Gpu)
        cpu = kinds.setdefault(gpu, _gpu_kind() if gpu else cpu_type())
        space = len(task.space())
        done = journal.done(task, cpu, fingerprint.schedule(task.kernel), tvm)
        plans.append(Plan(task, space, len(done)))
        left.append((task, max(0, min(space, search.LIMIT) - len(done))))
    slots = workers if isinstance(workers, int) else available_cores()
    return Report(plans, job.estimate(left, slots))


def _gpu_kind() -> str:
    """What records call this machine's GPU, "" where there is none."""
    try:
        return gpu_engine.probe().kind
    except IncompatibleError:
        return ""


def _engine(workers: int | str | None, machines: Sequence[Machine]) -> Any:
    if any(isinstance(m, Gpu) for m in machines):
        return gpu_engine.engine(workers, machines)
    if isinstance(workers, str):
        from .cluster import Cluster

        return Cluster(workers, machines)
    for machine in machines:
        if missing := missing_features(machine.features):
            raise UsageError(
                f"--target {machine.name}: this host lacks {', '.join(missing)}. "
                "Fix: measure on a machine that has it, with --workers tcp://SCHEDULER:PORT",
                "DC2038",
            )
    return Local(workers or available_cores())


class _Run:
    """A job over its tasks, then the check of its winners in whole models."""

    def __init__(
        self,
        listed: list[Task],
        models: list[whole.Model],
        engine: Any,
        journal: Journal,
        folder: Path,
    ) -> None:
        self.tasks, self.models = listed, models
        self.engine, self.journal, self.folder = engine, journal, folder
        self.known: dict[str, lookup.Tuning] = {}

    def run(
        self, seconds: float | None, trials: int | None, seed: int, progress: Progress
    ) -> Report:
        start = time.monotonic()
        progress.step("measure the machine's peaks")
        here = self.engine.cpu if isinstance(self.engine, Local) else cpu_type()
        targets = {t.target.name: t.target for t in self.tasks}
        peaks = {name: tasks.Peaks.measure(machine) for name, machine in targets.items()}
        running = job.Job(
            self.tasks,
            self.engine,
            self.journal,
            peaks,
            seconds=seconds,
            trials=trials,
            seed=seed,
            hints=self._hints,
            progress=progress,
        )
        with _interrupt(running.stop):
            decisions = running.run()
        if running.stopped:
            raise TuningError(
                f"tune: stopped after {running.trials} trials, all of them saved in "
                f"'{self.folder}'. Fix: the same command goes on from there",
                "DC7001",
            )
        report = Report([], trials=running.trials, failures=running.failures, decisions=decisions)
        report.failed = {s.task.label: s.failed for s in running.subjects if s.failed is not None}
        report.skipped = sum(s.skipped for s in running.subjects)
        self._settle(report, here, progress)
        report.seconds = time.monotonic() - start
        return report

    def _hints(self, task: Task) -> list[Any]:
        """What is known to be good for a workload like it, then steps from the default."""
        if task.target.name not in self.known:
            self.known[task.target.name] = lookup.Tuning(self.folder, task.target.name, None)
        found = self.known[task.target.name].find(task.kernel, task.workload, task.target)
        return ([found.params] if found is not None else []) + steps(task)

    def _settle(self, report: Report, here: str, progress: Progress) -> None:
        """Keeps the winners that make their models faster, writes the records of all tasks."""
        winners = {_id(d): d for d in report.decisions if d.changed}
        local = {i: d for i, d in winners.items() if d.cpu == here}
        chosen: dict[tuple[str, str], set[Any]] = {}
        for model in self.models:
            mine = {i: d for i, d in local.items() if _uses(d, model)}
            if not mine:
                continue
            name = model.source.name
            progress.step(f"{name} for {model.target} with {len(mine)} winners, as a whole")
            made = {i: record(d) for i, d in mine.items()}
            rows = [(made[i], d.task.uses[name]) for i, d in mine.items()]
            kept, proof = whole.settle(model, rows)
            report.models[name, model.target] = proof
            chosen[name, model.target] = {i for i, r in made.items() if r in kept}
        rejected = self._rejected(local, chosen, report, progress)
        final = []
        for i, decision in ((_id(d), d) for d in report.decisions):
            keep = decision.changed and i not in rejected
            final.append(record(decision, keep))
            if keep:
                report.kept.append(decision)
        for target, kernel in sorted({(r.target, r.kernel) for r in final}):
            group = [r for r in final if (r.target, r.kernel) == (target, kernel)]
            records.update(self.folder, target, kernel, group)

    def _rejected(
        self,
        winners: Mapping[Any, Decision],
        chosen: Mapping[tuple[str, str], set[Any]],
        report: Report,
        progress: Progress,
    ) -> set[Any]:
        """Winners that no model of theirs keeps, or that one gets slower with."""
        kept: set[Any] = set().union(*chosen.values())
        in_models = {i for i, d in winners.items() if any(_uses(d, m) for m in self.models)}
        for model in self.models:
            name = model.source.name
            mine = {i for i in kept if i in winners and _uses(winners[i], model)}
            own = chosen.get((name, model.target), set())
            if mine == own:
                continue
            progress.step(f"{name} for {model.target} with winners of other models")
            proof = model.compare([record(winners[i]) for i in mine])
            if proof.ratio < _HARM:
                kept -= mine - own
            else:
                report.models[name, model.target] = proof
        return in_models - kept


def _uses(decision: Decision, model: whole.Model) -> bool:
    task = decision.task
    return task.target.name == model.target and model.source.name in task.uses


def steps(task: Task) -> list[Any]:
    """Points that differ from the default in one knob: knobs of few values, which are the least
    like their neighbours, first.
    """
    default = asdict(task.default())
    found = []
    for params in task.space():
        changed = [name for name, value in asdict(params).items() if value != default[name]]
        if len(changed) == 1:
            found.append((len(task.kernel.SPACE[changed[0]]), params))
    return [params for _, params in sorted(found, key=lambda row: row[0])[:_STEPS]]


def _id(decision: Decision) -> tuple[str, str, str]:
    return decision.task.target.name, decision.task.key, decision.cpu


def record(decision: Decision, keep: bool = True) -> records.Record:
    """A decision as it is logged; if it is not kept: the default, which it did not beat."""
    task = decision.task
    params = decision.params if keep else task.default()
    shape, form = records.split(task.workload)
    changed = keep and decision.changed
    figures = (decision.us, decision.p20, decision.p80) if keep else (decision.default_us,) * 3
    return records.Record(
        kernel=task.kernel.name,
        target=task.target.name,
        shape=shape,
        form=form,
        params=asdict(params),
        us=figures[0],
        p20=figures[1],
        p80=figures[2],
        default_us=decision.default_us,
        gain=decision.gain if changed else 1.0,
        threads=1,
        tried=decision.tried,
        cpu=decision.cpu,
        tvm=versions()["tvm"],
        schedule=fingerprint.schedule(task.kernel),
        date=records.today(),
        weights_mib=task.weights >> 20,
        extra={},
    )


@contextmanager
def _interrupt(stop: Any) -> Iterator[None]:
    """The first Ctrl-C stops the job when its trials end, the second at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
