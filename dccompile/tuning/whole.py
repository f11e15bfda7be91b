"""Winners in whole models: they are kept only if the model they are for gets faster.

A kernel alone has other neighbours in the caches than in a model. So the model is compiled with
the defaults and with the winners, both run in turns, and the winners stay where the model is
faster beyond the noise. Where it is not, the half and the quarter of them that promise most get
a chance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import records
from ..bench import measure, model_bench
from ..bench.peers import aligned
from ..errors import TuningError
from ..machine import Gpu, find
from ..sources import Source
from .race import bounds

SECONDS = 3.0  # of a comparison, per size of the open dims
BATCHES = (1, 64)  # of models whose batch is open
TURNS = 8  # sets of inputs of a model that takes indices


@dataclass(frozen=True)
class Comparison:
    """Times of a model with the defaults by those with winners: above 1 winners are faster.

    `ratio` is the median over rounds (over batches: the geometric mean), `low` and `high` hold it
    at 95 %. Milliseconds are medians.
    """

    ratio: float
    low: float
    high: float
    default_ms: float
    tuned_ms: float

    @property
    def faster(self) -> bool:
        return self.low > 1.0


@dataclass(frozen=True)
class Model:
    """A model to tune for: compiled once with the defaults."""

    source: Source
    shapes: Mapping[str, Sequence[int | str]] | None
    target: str
    options: Mapping[str, Any]  # precision and embedding, as `compile` takes them
    baseline: Path

    def compile(self, folder: Path, logs: Path | str) -> Any:
        """Compiles with the logs of a folder; 'none': without."""
        from ..compiler import compile

        made = compile(
            self.source.compilable(),
            targets=[self.target],
            shapes=self.shapes,
            name=self.source.name,
            tuning=logs,
            **self.options,
        )
        made.save(folder / f"{self.source.name}.dcm")
        return made

    def compare(self, winners: Sequence[records.Record], seconds: float = SECONDS) -> Comparison:
        """The model with these records beside the model without any."""
        with tempfile.TemporaryDirectory(prefix="dccompile-") as name:
            folder = Path(name)
            for kernel in {r.kernel for r in winners}:
                mine = [r for r in winners if r.kernel == kernel]
                records.update(folder / "logs", self.target, kernel, mine)
            self.compile(folder, folder / "logs")
            return self._timed(folder / f"{self.source.name}.dcm", seconds)

    def _timed(self, tuned: Path, seconds: float) -> Comparison:
        from ..runtime.loader import load

        device = "cuda" if isinstance(find(self.target), Gpu) else "cpu"
        modules = [load(path, threads=1, device=device) for path in (self.baseline, tuned)]
        dims = [d for spec in modules[0].inputs for d in spec.shape]
        batches = BATCHES if any(isinstance(d, str) for d in dims) else BATCHES[:1]
        found = [self._batch(modules, batch, seconds) for batch in batches]

        def mean(name: str) -> float:
            return measure.geometric_mean(getattr(c, name) for c in found)

        return Comparison(*(mean(n) for n in ("ratio", "low", "high", "default_ms", "tuned_ms")))

    def _batch(self, modules: Sequence[Any], batch: int, seconds: float) -> Comparison:
        turns = [feeds_of(self.source, modules[0], batch, 0)]
        if any(a.dtype.kind in "iu" for a in turns[0].values()):  # rows must not stay in caches
            turns += [feeds_of(self.source, modules[0], batch, n) for n in range(1, TURNS)]
        first, second = ([np.array(v) for v in m.run(None, turns[0])] for m in modules)
        difference = model_bench.difference_of(self.source, first, second)
        if not model_bench.agrees(difference, model_bench.is_quantized(self.baseline)):
            raise TuningError(
                f"{self.source.name}: its outputs differ with tuned kernels ({difference}). "
                "Fix: report this, with the records",
                "DC7012",
            )
        runners: dict[str, measure.Runner] = {
            name: _in_turns(module, turns) for name, module in zip("ab", modules, strict=True)
        }
        times = measure.interleave(runners, seconds)
        ratios = times["a"].ns / times["b"].ns
        low, high = bounds(np.sort(ratios))
        ratio, ms = float(np.median(ratios)), [times[n].us / 1e3 / len(turns) for n in "ab"]
        return Comparison(ratio, low, high, *ms)


def _in_turns(module: Any, turns: Sequence[Mapping[str, np.ndarray]]) -> measure.Runner:
    """Bound calls with sets of inputs, timed by a GPU's own clock where the module is on one."""
    if module.device != "cpu":
        from ..bench.gpu_measure import bound_loop

        return bound_loop(module, turns)
    calls = [module.bind(feeds) for feeds in turns]

    def run() -> None:
        for call in calls:
            call()

    return calls[0] if len(calls) == 1 else run


def feeds_of(source: Source, module: Any, batch: int, number: int) -> dict[str, np.ndarray]:
    """Inputs of a model: a reference model's own, else random ones."""
    from .. import models, sources

    if source.kind == "reference":
        found = dict(models.sample_inputs(source.name, batch, source.seed + number))
    else:
        options = [f"{spec.name}=random:{number}" for spec in module.inputs]
        found = sources.make_inputs(module.inputs, options, batch)
    return {name: aligned(array) for name, array in found.items()}


def settle(
    model: Model, winners: Sequence[tuple[records.Record, int]]
) -> tuple[list[records.Record], Comparison | None]:
    """The winners to keep for a model, each given with its number of uses, and the proof.

    None of them, and no proof, where the model is not faster with any set that was tried.
    """
    order = sorted(winners, key=lambda w: (w[0].default_us - w[0].us) * w[1], reverse=True)
    count = len(order)
    for size in dict.fromkeys((count, (count + 1) // 2, (count + 3) // 4)):
        chosen = [record for record, _ in order[:size]]
        if not chosen:
            break
        found = model.compare(chosen)
        if found.faster:
            return chosen, found
    return [], None
