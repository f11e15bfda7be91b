"""Which parameters a tuning job tries next: the searches of small and of large spaces."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest

from dccompile.errors import UsageError
from dccompile.tuning import search


@dataclass(frozen=True)
class Knobs:
    mr: int
    nr: int
    ahead: bool = False


SMALL = [Knobs(mr, nr) for mr in (1, 2, 4, 6) for nr in (1, 2, 4)]
LARGE = [
    Knobs(*values)
    for values in itertools.product((1, 2, 3, 4, 6, 8, 12, 24), (1, 2, 3, 4, 8), (False, True))
    if values[0] * values[1] <= 24
]
DEFAULT = Knobs(2, 2)


def speed(knobs: Knobs) -> float:
    """Best at 6 x 4 with `ahead`; rows beyond a multiple of 48 are for nothing."""
    waste = -(-48 // knobs.mr) * knobs.mr / 48
    return (1.02 if knobs.ahead else 1.0) / (1 / knobs.mr + 1 / knobs.nr + 0.2) / waste


def drain(found: search.Search) -> list[Knobs]:
    """Asks and tells until nothing is left; what was asked."""
    asked = []
    while (knobs := found.ask()) is not None:
        asked.append(knobs)
        found.tell(knobs, speed(knobs) / speed(DEFAULT))
    return asked


def best(found: search.Search) -> tuple[Knobs, float]:
    """The largest gain that a search knows of."""
    known = [(knobs, gain) for knobs, gain in found.known.items() if gain is not None]
    return max(known, key=lambda row: row[1])


@pytest.fixture(params=[SMALL, LARGE], ids=["small", "large"])
def space(request):
    return request.param


def test_sizes_decide_the_kind():
    at_limit = LARGE[: search.LIMIT]
    assert isinstance(search.make(at_limit, at_limit[3]), search.Exhaustive)
    assert isinstance(search.make(LARGE, DEFAULT), search.Sampled)
    assert isinstance(search.make(SMALL, DEFAULT, limit=5), search.Sampled)


def test_small_spaces_are_tried_as_a_whole():
    found = search.make(SMALL, DEFAULT)
    asked = drain(found)
    assert sorted(map(str, asked)) == sorted(str(p) for p in SMALL if p != DEFAULT)
    assert best(found)[0] == max(SMALL, key=speed)


def test_the_most_promising_are_first():
    order = list(reversed(SMALL))
    assert drain(search.make(order, DEFAULT)) == [p for p in order if p != DEFAULT]
    sampled = search.make(LARGE, DEFAULT)
    assert [sampled.ask() for _ in range(3)] == LARGE[:3]


def test_large_spaces_are_tried_up_to_the_limit():
    asked = drain(search.make(LARGE, DEFAULT))
    assert len(asked) == search.LIMIT - 1  # the default is known
    assert len(set(asked)) == len(asked) and set(asked) <= set(LARGE) - {DEFAULT}


@pytest.mark.parametrize("seed", range(5))
def test_large_spaces_give_up_what_is_good(seed):
    found = search.make(list(reversed(LARGE)), DEFAULT, seed=seed)
    drain(found)
    assert best(found)[1] >= 0.97 * max(map(speed, LARGE)) / speed(DEFAULT)


def test_hints_come_first(space):
    other = Knobs(5, 5)  # a record of another version of the space
    hints = [space[-1], other, space[-2], space[-1], DEFAULT]
    found = search.make(space, DEFAULT, hints)
    assert [found.ask(), found.ask()] == [space[-1], space[-2]]
    assert other not in drain(found)


def test_what_is_under_way_is_not_asked_again(space):
    found = search.make(space, DEFAULT)
    left = found.left
    asked = []
    while (knobs := found.ask()) is not None:
        asked.append(knobs)
    assert len(set(asked)) == len(asked) == left and found.left == 0
    found.tell(asked[0], 2.0)
    assert found.ask() is None
    assert best(found) == (asked[0], 2.0)


def test_two_at_once_never_meet():
    found = search.make(LARGE, DEFAULT, seed=3)
    flying, asked = [], []
    while (knobs := found.ask()) is not None or flying:
        flying += [knobs] if knobs is not None else []
        asked += [knobs] if knobs is not None else []
        if len(flying) == 3 or knobs is None:
            done = flying.pop(0)
            found.tell(done, speed(done))
    assert len(set(asked)) == len(asked) == search.LIMIT - 1


def test_a_resumed_search_goes_on_where_it_stopped(space):
    first = search.make(space, DEFAULT, seed=1)
    known = []
    for _ in range(7):
        knobs = first.ask()
        first.tell(knobs, speed(knobs))
        known.append(knobs)
    again = search.make(space, DEFAULT, seed=1)
    for knobs in known:
        again.tell(knobs, speed(knobs))
    assert again.left == first.left
    assert not set(drain(again)) & set(known)
    assert len(again.known) == min(search.LIMIT, len(space))


def test_what_is_no_point_is_ignored_when_told(space):
    found = search.make(space, DEFAULT)
    left = found.left
    found.tell(Knobs(77, 1), 5.0)
    assert found.left == left and best(found) == (DEFAULT, 1.0)


def test_failures_count_and_never_win(space):
    found = search.make(space, DEFAULT)
    for index in range(found.left):
        knobs = found.ask()
        assert knobs is not None
        found.tell(knobs, None if index % 2 else 0.9)
    assert found.ask() is None
    assert best(found) == (DEFAULT, 1.0)
    assert len(found.known) == min(search.LIMIT, len(space))


def test_the_default_joins_a_space_that_lacks_it(space):
    default = Knobs(7, 7)
    found = search.make(space, default)
    assert default not in drain(found)
    assert default in found.known


def test_a_space_of_the_default_alone_asks_nothing():
    assert search.make([DEFAULT], DEFAULT).ask() is None
    assert search.make([], DEFAULT).ask() is None


def test_the_seed_decides():
    orders = [drain(search.make(LARGE, DEFAULT, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_optuna_is_silent(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drain(search.make(LARGE, DEFAULT))
    assert capfd.readouterr() == ("", "")


def test_optuna_is_imported_for_large_spaces_only():
    code = "import sys; from dccompile.tuning import search; assert 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_optuna_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    search.make(SMALL, DEFAULT)
    with pytest.raises(UsageError, match=r"Fix: pip install 'dccompile\[tune\]'") as error:
        search.make(LARGE, DEFAULT)
    assert error.value.code == "DC2037"
