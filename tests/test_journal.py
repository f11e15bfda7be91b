"""The journal of trials: whole lines, whoever is killed while writing, however many write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from dccompile.errors import TuningError
from dccompile.machine import TARGETS
from dccompile.tuning.journal import Journal
from dccompile.tuning.tasks import Task
from dccompile.workload import Gemm

TARGET, KERNEL = "x86-64-v3", "gemm_u8s8s32_avx2"
# appends lines `first` .. `last` of one writer, and says of each when it is written
_WRITER = """
import sys
from pathlib import Path
from dccompile.tuning.journal import Journal
folder, writer, first, last, pad = sys.argv[1:]
journal = Journal(Path(folder))
for n in range(int(first), int(last)):
    trial = {"key": writer, "n": n, "params": {}, "status": "ok", "reason": "x" * int(pad)}
    journal.append("x86-64-v3", "gemm_u8s8s32_avx2", trial)
    print(n, flush=True)
"""


def trial(key="k", status="ok", **more):
    return {"key": key, "params": {"mr": 1}, "status": status, **more}


def writer(folder, name, first, last, pad=0, limit=None):
    def bound():
        import resource

        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, *map(str, (folder, name, first, last, pad))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=bound,
    )


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "logs")


def test_what_was_appended_is_read(journal):
    lines = [trial(n=n, unknown={"of": ["a", "later", None, "version"]}) for n in range(3)]
    for line in lines:
        journal.append(TARGET, KERNEL, line)
    assert journal.read(TARGET, KERNEL) == lines
    assert journal.read("x86-64-v4", KERNEL) == journal.read(TARGET, "other") == []
    raw = journal.path(TARGET, KERNEL).read_bytes()
    assert raw.count(b"\n") == 3 and raw.endswith(b"\n")


def test_git_ignores_it(journal, tmp_path):
    journal.append(TARGET, KERNEL, trial())
    assert journal.path(TARGET, KERNEL).is_relative_to(tmp_path / "logs" / "losers")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    status = ["git", "status", "--porcelain", "--untracked-files=all"]
    assert subprocess.run(status, cwd=tmp_path, check=True, capture_output=True).stdout == b""


def test_a_torn_line_is_ended_by_the_next(journal):
    journal.append(TARGET, KERNEL, trial(n=0))
    path = journal.path(TARGET, KERNEL)
    with path.open("ab") as file:
        file.write(json.dumps(trial(n=1)).encode()[:-9])
    assert [t["n"] for t in journal.read(TARGET, KERNEL)] == [0]
    journal.append(TARGET, KERNEL, trial(n=2))
    assert [t["n"] for t in journal.read(TARGET, KERNEL)] == [0, 2]
    assert journal.broken[TARGET, KERNEL] == 1


def test_a_line_that_lacks_only_its_end_is_not_lost(journal):
    journal.append(TARGET, KERNEL, trial(n=0))
    path = journal.path(TARGET, KERNEL)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    journal.append(TARGET, KERNEL, trial(n=1))
    assert [t["n"] for t in journal.read(TARGET, KERNEL)] == [0, 1]
    assert journal.broken[TARGET, KERNEL] == 0


@pytest.mark.parametrize(
    "line",
    ["[]", "null", "{", '{"key":1,"params":{},"status":"ok"}', '{"key":"k","status":"ok"}',
     '{"key":"k","params":[],"status":"ok"}', '{"key":"k","params":{}}', "\\xff\\0", "[" * 10**5],
)  # fmt: skip
def test_broken_lines_are_counted(journal, line):
    journal.append(TARGET, KERNEL, trial(n=0))
    with journal.path(TARGET, KERNEL).open("ab") as file:
        file.write(line.encode().decode("unicode_escape").encode("latin-1") + b"\n\n")
    journal.append(TARGET, KERNEL, trial(n=1))
    assert [t["n"] for t in journal.read(TARGET, KERNEL)] == [0, 1]
    assert journal.broken[TARGET, KERNEL] == 1


def test_killed_while_appending(journal):
    child = writer(journal.folder, "child", 0, 10**6, pad=3000)
    said = [child.stdout.readline() for _ in range(20)]
    child.send_signal(signal.SIGKILL)
    rest, _ = child.communicate()
    last = int((said + rest.split())[-1])
    got = [t["n"] for t in journal.read(TARGET, KERNEL)]
    assert got[: last + 1] == list(range(last + 1))
    assert len(got) <= last + 2  # one may be written and not told of
    assert journal.broken[TARGET, KERNEL] == 0
    journal.append(TARGET, KERNEL, trial(n=-1))  # the lock went with the child
    assert journal.read(TARGET, KERNEL)[-1]["n"] == -1


def test_two_writers(journal):
    children = [writer(journal.folder, name, 0, 1000, pad=200) for name in "ab"]
    for child in children:
        assert child.communicate()[1] == "" and child.returncode == 0
    got = journal.read(TARGET, KERNEL)
    assert journal.broken[TARGET, KERNEL] == 0
    for name in "ab":
        assert [t["n"] for t in got if t["key"] == name] == list(range(1000))


def test_a_full_disk(journal):
    child = writer(journal.folder, "child", 0, 10**6, pad=300, limit=10_000)
    out, err = child.communicate()
    assert "DC7011" in err or "cannot be written" in err
    whole = len(out.split())
    journal.append(TARGET, KERNEL, trial(n=-1))
    assert [t["n"] for t in journal.read(TARGET, KERNEL)] == [*range(whole), -1]
    assert journal.broken[TARGET, KERNEL] == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file")
    with pytest.raises(TuningError, match=r"cannot be written .*Fix: name a folder") as error:
        journal.append(TARGET, KERNEL, trial())
    assert error.value.code == "DC7011" and error.value.exit_code == 7


def test_a_journal_that_cannot_be_read(journal):
    journal.path(TARGET, KERNEL).mkdir(parents=True)
    with pytest.raises(TuningError, match="cannot be read") as error:
        journal.read(TARGET, KERNEL)
    assert error.value.code == "DC7011"


# ---- what need not be run again ----


@dataclass(frozen=True)
class Params:
    mr: int
    nr: int
    wide: bool = False


@pytest.fixture
def task():
    kernel = SimpleNamespace(name=KERNEL, Params=Params)
    work = Gemm(64, 256, 64, "u8", "s8", "u8", zero_point=3)
    return Task(kernel, TARGETS[TARGET], work.representative())


HERE = {"cpu": "amd-25-17", "schedule": "12345678", "tvm": "0.27"}


def put(journal, task, params, status="ok", **more):
    entry = {"key": task.key, "params": params, "status": status, **HERE, **more}
    journal.append(task.target.name, task.kernel.name, entry)


def test_done(journal, task):
    first, second, third = ({"mr": mr, "nr": 1, "wide": False} for mr in (1, 2, 3))
    put(journal, task, first, ratio=0.5)
    put(journal, task, second, "crash")
    put(journal, task, first, ratio=0.6)
    put(journal, task, third, "timeout")
    found = journal.done(task, **HERE)
    expected = [Params(**p) for p in (second, first, third)]
    assert list(found) == expected
    assert found[expected[1]]["ratio"] == 0.6


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "intel-6-143"},
        {"schedule": "87654321"},
        {"tvm": "0.28"},
        {"key": "another"},
        {"status": "refused"},
        {"params": {"mr": 1, "nr": 1}},
        {"params": {"mr": 1, "nr": 1, "wide": False, "more": 1}},
        {"params": {"mr": [1], "nr": 1, "wide": False}},
        {"params": {"mr": {}, "nr": 1, "wide": False}},
        {"cpu": None},
    ],
)
def test_not_done(journal, task, other):
    put(journal, task, **{"params": {"mr": 1, "nr": 1, "wide": False}, **other})
    assert journal.done(task, **HERE) == {}


def test_no_journal_is_an_empty_one(journal, task):
    assert journal.done(task, **HERE) == {}
    assert not os.path.exists(journal.folder)
