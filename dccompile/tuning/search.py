"""Which parameters to try next: all of them in a small space, Optuna's choice in a larger one.

A search is asked for parameters and told their gain over the default. Several may be under way at
once. What a job that goes on knows from before is told first, and never asked again.
"""

from __future__ import annotations

import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from ..errors import UsageError

LIMIT = 32  # trials of a task; a space of no more points is searched as a whole
_DRAWN, _PROMISING = 8, 4  # points known before Optuna is asked; how many of them promise most


class Search(ABC):
    """The order of trials: hints first, then what the search comes to.

    `points` are all parameters that may be tried, the most promising first. `hints` are some that
    were good elsewhere. Gains are over the `default`, whose own is known from the start: 1.
    """

    def __init__(
        self, points: Iterable[Any], default: Any, hints: Iterable[Any], seed: int, limit: int
    ) -> None:
        self.points = list(dict.fromkeys([default, *points]))
        self.limit = min(limit, len(self.points))
        self.known: dict[Any, float | None] = {}  # None: failed
        self.flying: set[Any] = set()
        self._legal = frozenset(self.points)
        self._hints = [p for p in dict.fromkeys(hints) if p in self._legal]
        self._order = self._ordered(random.Random(seed))
        self.tell(default, 1.0)

    @property
    def left(self) -> int:
        """Trials that may still be asked for."""
        return max(0, self.limit - len(self.known) - len(self.flying))

    def ask(self) -> Any | None:
        """Parameters to try, which nobody was asked to try before; None: no more."""
        if not self.left:
            return None
        hinted = next((p for p in self._hints if self._new(p)), None)
        params = self._choose() if hinted is None else hinted
        self.flying.add(params)
        return params

    def tell(self, params: Any, gain: float | None) -> None:
        """The gain of parameters, be it asked for or not; None: they failed.

        Parameters outside of the space, as of a record that is older than it, are ignored.
        """
        self.flying.discard(params)
        if params in self._legal:
            self._learn(params, gain)
            self.known[params] = gain

    def _new(self, params: Any) -> bool:
        return params in self._legal and params not in self.known and params not in self.flying

    def _draw(self) -> Any:
        """The next new point in the search's order; there is one."""
        return next(p for p in self._order if self._new(p))

    @abstractmethod
    def _ordered(self, generator: random.Random) -> list[Any]:
        """All points, in the order in which they are drawn."""

    @abstractmethod
    def _choose(self) -> Any:
        """A new point; there is one."""

    @abstractmethod
    def _learn(self, params: Any, gain: float | None) -> None:
        """Takes in a gain, before it is known."""


class Exhaustive(Search):
    """Every point, the most promising first."""

    def _ordered(self, generator: random.Random) -> list[Any]:
        return self.points

    def _choose(self) -> Any:
        return self._draw()

    def _learn(self, params: Any, gain: float | None) -> None:
        pass


class Sampled(Search):
    """Points near the proposals of Optuna's tree-structured Parzen estimator, after drawn ones.

    It knows a knob as the number of its value among the sorted ones. Of a proposal that is no
    point of the space, or not a new one, the nearest new point is tried. In 32 trials of 112 points
    of 40 made-up kernels that reaches 98.7 % of the best speed in the mean, to insist on Optuna's
    own points 97.7 %, to draw them all 97.4 %.
    """

    def __init__(
        self, points: Iterable[Any], default: Any, hints: Iterable[Any], seed: int, limit: int
    ) -> None:
        optuna = _optuna()
        points = list(dict.fromkeys([default, *points]))
        names = [f.name for f in fields(default)]
        values = {n: sorted({getattr(p, n) for p in points}) for n in names}
        self._values = {n: v for n, v in values.items() if len(v) > 1}
        self._space = {
            n: optuna.distributions.IntDistribution(0, len(v) - 1) for n, v in self._values.items()
        }
        self._trials: dict[Any, Any] = {}
        with _quiet():
            sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=0, multivariate=True, constant_liar=True
            )
            self._study = optuna.create_study(direction="maximize", sampler=sampler)
        super().__init__(points, default, hints, seed, limit)

    def _ordered(self, generator: random.Random) -> list[Any]:
        rest = self.points[_PROMISING:]
        return [*self.points[:_PROMISING], *generator.sample(rest, len(rest))]

    def _choose(self) -> Any:
        if len(self.known) + len(self.flying) < _DRAWN:
            return self._draw()
        with _quiet():
            trial = self._study.ask(self._space)
        wanted = [trial.params[n] for n in self._space]
        params = min(filter(self._new, self._order), key=lambda p: self._distance(p, wanted))
        if self._numbers(params) == trial.params:
            self._trials[params] = trial
        else:
            self._study.tell(trial, state=_optuna().trial.TrialState.FAIL)
        return params

    def _distance(self, params: Any, wanted: Sequence[int]) -> float:
        """Steps between two points, knobs of few values having longer ones."""
        numbers, sizes = self._numbers(params).values(), map(len, self._values.values())
        rows = zip(numbers, wanted, sizes, strict=True)
        return sum(abs(a - b) / (size - 1) for a, b, size in rows)

    def _learn(self, params: Any, gain: float | None) -> None:
        value = 0.0 if gain is None else gain
        trial = self._trials.pop(params, None)
        if trial is not None:
            self._study.tell(trial, value)
        elif params not in self.known:
            made = _optuna().trial.create_trial(
                params=self._numbers(params), distributions=self._space, value=value
            )
            self._study.add_trial(made)

    def _numbers(self, params: Any) -> dict[str, int]:
        return {n: values.index(getattr(params, n)) for n, values in self._values.items()}


def make(
    points: Sequence[Any],
    default: Any,
    hints: Iterable[Any] = (),
    seed: int = 0,
    limit: int = LIMIT,
) -> Search:
    """The search for a space: of all its points if these are no more than `limit`.

    Raises UsageError where Optuna is needed and absent.
    """
    kind = Exhaustive if len({default, *points}) <= limit else Sampled
    return kind(points, default, hints, seed, limit)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UsageError(
            f"tune: spaces of more than {LIMIT} points are searched with Optuna, which is not "
            "installed. Fix: pip install 'dccompile[tune]'",
            "DC2037",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's warnings of experimental options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
