"""Engines of tuning: processes of this machine, and workers of a scheduler that come and go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from dccompile import __version__, registry
from dccompile.cli.main import main
from dccompile.errors import TuningError, UsageError
from dccompile.machine import TARGETS, Machine, cpu_type
from dccompile.tuning import cluster, remote, server
from dccompile.workload import Gemm

CPU, TARGET = cpu_type(), TARGETS["x86-64-v3"]
# a worker of ours whose trials only wait, and which may say that it is another version
_STUB = """
import os, sys, time
import dccompile
address, name, version = sys.argv[1:]
dccompile.__version__ = version or dccompile.__version__
from dccompile.cli.main import main
from dccompile.tuning import remote
def run_here(request):
    time.sleep(request["wait"])
    if request.get("end"):
        os.kill(os.getpid(), 9)
    status = "refused" if name in request.get("refused_by", ()) else "ok"
    return {"status": status, "reason": f"{name} has other files", "number": request["number"]}
remote.run_here = run_here
main(["worker", address, "--name", name])
"""


class Net:
    """A scheduler and its workers, as processes."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"tcp://127.0.0.1:{port}"
        self.processes: list[subprocess.Popen[str]] = []
        listen = ("--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
        options = ("--dashboard-address", "127.0.0.1:0")
        self.scheduler = self.start("-m", "dask", "scheduler", *listen, *options)

    def start(self, *command: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        argv = [sys.executable, *command]
        env = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
        process = subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=env)
        self.processes.append(process)
        return process

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(self.url.rpartition(":")[2]))) == 0

    def stub(self, name: str, version: str = "") -> subprocess.Popen[str]:
        return self.start("-c", _STUB, self.url, name, version)

    def worker(self, name: str) -> subprocess.Popen[str]:
        return self.start("-m", "dccompile", "worker", self.url, "--name", name)

    def dask_worker(self, *options: str) -> subprocess.Popen[str]:
        address = ("--dashboard-address", "127.0.0.1:0", "--no-dashboard")
        more = ("--nthreads", "1", *address, *options)
        return self.start("-m", "dask", "worker", self.url, *more)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    monkeypatch.setattr(remote, "CONNECT_S", 60.0)  # machines that test may be busy
    made = Net()
    try:
        until(made.listens)
        yield made
    finally:
        made.end()


def request() -> dict[str, Any]:
    """A quick trial of a default against itself."""
    work = Gemm(8, 64, 64, "f32", "f32", "f32")
    choice = registry.select(work, TARGET)
    both = choice.params, choice.params
    return server.request(choice.kernel, TARGET.name, work, *both, seconds=0.02, limit=30.0)


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "waited for 60 s"
        time.sleep(0.05)


def trials(
    engine: cluster.Cluster, count: int, wait: float = 0.2, **more: Any
) -> list[Future[dict[str, Any]]]:
    rows = [{"number": n, "wait": wait, **more} for n in range(count)]
    return [engine.submit(row, CPU) for row in rows]


def test_a_worker_that_is_killed_loses_nothing(net: Net) -> None:
    workers = [net.stub(name) for name in "abc"]
    with cluster.Cluster(net.url, [TARGET]) as engine:
        until(lambda: engine.slots(CPU) == 3)
        ended: list[int] = []
        flying = trials(engine, 15)
        for future in flying:
            future.add_done_callback(lambda f: ended.append(f.result()["number"]))
        until(lambda: len(ended) >= 3)
        workers[0].kill()
        results = [future.result(30) for future in flying]
        until(lambda: engine.slots(CPU) == 2)
        left = set(engine.machines()[CPU])
        assert [r["number"] for r in results] == list(range(15))
        assert sorted(ended) == list(range(15))  # each once
        assert {r["status"] for r in results} == {"ok"}
        assert len({r["worker"] for r in results}) == 3
        assert {r["worker"] for r in results[-3:]} <= left

        [deadly] = trials(engine, 1, 0.0, end=True)  # for the two that are left
        assert deadly.result(30)["status"] == "crash"


def test_workers_that_do_not_fit_are_refused_by_name(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.stub("old", "0.0.9")
    net.dask_worker("--no-nanny")
    for name in "ab":
        net.stub(name)
    with cluster.Cluster(net.url) as engine:
        until(lambda: engine.slots(CPU) == 2 and len(engine.refused) == 2)
        assert all(text.startswith("worker tcp://127.0.0.1:") for text in engine.refused)
        reasons = sorted(text.partition(": ")[2] for text in engine.refused)
        own = f"dccompile 0.0.9, this job runs {__version__}"
        assert reasons == [own, "resource measure=0, allowed is 1"]

        results = [f.result(30) for f in trials(engine, 6, 0.05, refused_by=["a"])]
        assert [(r["number"], r["status"]) for r in results] == [(n, "ok") for n in range(6)]
        assert engine.slots(CPU) == 1 and "a has other files" in engine.refused[-1]
        [future] = trials(engine, 1, refused_by=["b"])
        with pytest.raises(TuningError, match=r"a has other files.*b has other files") as caught:
            future.result(30)
        assert caught.value.code == "DC7031"
    monkeypatch.setattr(remote, "CONNECT_S", 4.0)
    alien = cluster.Cluster(net.url, [Machine("alien", ("avx2", "tentacles"), "alien")])
    with pytest.raises(TuningError, match="lacks tentacles, which target alien needs") as caught:
        alien.__enter__()
    assert caught.value.code == "DC7031" and len(alien.refused) == 4


def test_workers_come_and_go_and_end_with_their_scheduler(net: Net) -> None:
    first, second = net.stub("first"), net.stub("second")
    with cluster.Cluster(net.url, patience=10) as engine:
        until(lambda: engine.slots(CPU) == 2)
        flying = trials(engine, 2, 0.5)
        for process, number in ((first, signal.SIGINT), (second, signal.SIGTERM)):
            process.send_signal(number)
            text, log = process.communicate(timeout=30)
            assert process.returncode == 0 and text == ""
            assert log.splitlines()[-1].endswith(": stopped"), log
        third = net.stub("third")  # takes over what both had
        assert [f.result(30)["number"] for f in flying] == [0, 1]
        text, log = net.worker("third").communicate(timeout=30)
        assert text == "" and "DC2035: worker third: " in log and "Fix: give another --name" in log

        engine.patience = 0.5
        [other] = [engine.submit({}, "amd-0-0")]
        with pytest.raises(TuningError, match=r"no worker of type amd-0-0 for 0\.5 s") as caught:
            other.result(30)
        assert caught.value.code == "DC7033"

        flying = trials(engine, 2, 3.0)
        net.scheduler.kill()
        for future in flying:
            with pytest.raises(TuningError, match="the scheduler has gone") as caught:
                future.result(30)
            assert caught.value.code == "DC7030"
    text, log = third.communicate(timeout=30)
    assert third.returncode == 0 and text == ""
    assert "has gone" in log.splitlines()[-1], log


@pytest.mark.slow
def test_a_job_of_which_a_worker_is_killed(net: Net, tmp_path: Path) -> None:
    """Two workers of ours, one by dask's own command: every trial is in the journal, once."""
    first, _, _ = net.worker("a"), net.worker("b"), net.dask_worker("--resources", "measure=1")

    def journal() -> list[dict[str, Any]]:
        files = sorted(tmp_path.glob("losers/*/*.jsonl"))
        return [json.loads(line) for path in files for line in path.read_text().splitlines()]

    with cluster.Cluster(net.url, [TARGET]) as engine:
        until(lambda: engine.slots(CPU) == 3)
    what = ("--kernels", "gemm_f32f32f32_avx2", "--task", "* 6x*", "--target", TARGET.name)
    where = ("--workers", net.url, "--log", str(tmp_path), "--json")
    job = net.start("-m", "dccompile", "tune", *what, *where)
    until(lambda: len(journal()) >= 4 or job.poll() is not None)
    first.kill()
    text, log = job.communicate(timeout=120)
    assert job.returncode == 0, log
    rows = journal()
    trials = [json.dumps([r["key"], r["params"], r.get("final", False)]) for r in rows]
    assert len(trials) == len(set(trials)) == json.loads(text)["trials"]
    assert {r["status"] for r in rows} == {"ok"}
    assert len({r["worker"] for r in rows}) >= 2
    spaces: dict[str, set[str]] = {}
    for row in rows:
        spaces.setdefault(row["key"], set()).add(json.dumps(row["params"]))
    winners = (tmp_path / TARGET.name / "gemm_f32f32f32_avx2.jsonl").read_text()
    tried = [json.loads(line)["tried"] for line in winners.splitlines()]
    assert sorted(tried) == sorted(len(space) for space in spaces.values())
    assert len(tried) == 4


def test_this_machine_as_engine() -> None:
    with cluster.Local(1) as engine:
        assert engine.machines() == {CPU: [f"core {min(os.sched_getaffinity(0))}"]}
        assert engine.slots(CPU) == 1 and engine.slots("amd-0-0") == 0
        flying = [engine.submit(request(), CPU) for _ in range(2)]
        flying.append(engine.submit({**request(), "schedule": "00000000"}, CPU))
        results = [future.result(60) for future in flying]
    assert [r["status"] for r in results] == ["ok", "ok", "refused"]
    assert {r["worker"] for r in results} == set(engine.machines()[CPU])
    cores = len(os.sched_getaffinity(0))
    for count in (0, cores + 1):
        with pytest.raises(UsageError, match=f"--workers {count}: this process may use") as caught:
            cluster.Local(count)
        assert caught.value.code == "DC2033"


def test_no_scheduler(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(remote, "CONNECT_S", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        for listens in (False, True):
            if listens:
                mute.listen()
            with pytest.raises(TuningError, match=r"no scheduler answered in 0\.5 s") as caught:
                cluster.Cluster(url).__enter__()
            assert caught.value.code == "DC7030"
    assert capfd.readouterr() == ("", "")


def test_a_scheduler_on_an_unknown_host(capsys: Any) -> None:
    assert main(["worker", "tcp://no-such-host.invalid:8786"]) == 2
    assert "error DC2033: scheduler 'tcp://no-such-host.invalid:8786'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["host:8786", "tcp://host", "http://host:80", "tcp://:1", "tcp://h:65536"]
)
def test_addresses_that_are_none(url: str, capsys: Any) -> None:
    with pytest.raises(UsageError, match=r"allowed is tcp://HOST:PORT"):
        cluster.Cluster(url)
    assert main(["worker", url]) == 2
    assert "DC2033" in capsys.readouterr().err


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r"pip install 'dccompile\[cluster\]'"):
        cluster.Cluster("tcp://127.0.0.1:1").__enter__()
