"""Where trials run: cores of this machine (`Local`) or workers of dask.distributed (`Cluster`).

Both say what types of machine there are (`machines`), how many trials one type runs at once
(`slots`), and run a trial (`submit`: a request and a result as in `server`). A worker measures one
trial at a time: it has one unit of the resource ``measure``. When a worker dies its trial goes to
another of the same type; every `submit` gives one result, whatever happens to workers.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ..errors import TuningError, UsageError
from ..machine import Machine, available_cores, cpu_type
from . import remote
from .server import Server, versions

PATIENCE_S = 60.0  # for a worker to come back once the last of its type has gone
_POLL_S = 0.5  # between looks at which workers there are
_CLOSE_S = 2.0  # for the scheduler to take leave
_PROBE_S = 30.0  # for a worker to say what it is

Request = dict[str, Any]
Result = dict[str, Any]


class Local:
    """Trials on `count` cores of this machine, one server process pinned to each.

    `cpu` is what records of them name as their machine, by default this CPU's type.
    Raises UsageError for more than the cores that may be used.
    """

    def __init__(self, count: int, cpu: str | None = None) -> None:
        cores = sorted(os.sched_getaffinity(0))[: available_cores()]
        if not 1 <= count <= len(cores):
            raise UsageError(
                f"--workers {count}: this process may use {len(cores)} cores, a worker needs one. "
                f"Fix: ask for 1 to {len(cores)}",
                "DC2033",
            )
        self.cpu = cpu or cpu_type()
        self._servers = {f"core {core}": Server(core) for core in cores[:count]}
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in self._servers:
            self._free.put(name)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="trial")

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the servers when their trials end; trials not begun are cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for server in self._servers.values():
            server.close()
        self._pool.shutdown(wait=True)

    def machines(self) -> dict[str, list[str]]:
        """Workers by type of machine: here one type."""
        return {self.cpu: list(self._servers)}

    def slots(self, cpu: str) -> int:
        """How many trials this type of machine runs at once."""
        return len(self._servers) if cpu == self.cpu else 0

    def submit(self, request: Request, cpu: str) -> Future[Result]:
        """Runs a trial on a core that is free; the result names it as `worker`."""
        if cpu != self.cpu:
            raise ValueError(f"a trial for {cpu}, this machine is {self.cpu}")
        return self._pool.submit(self._run, request)

    def _run(self, request: Request) -> Result:
        name = self._free.get()
        try:
            return {**self._servers[name].run(request), "cpu": self.cpu, "worker": name}
        finally:
            self._free.put(name)


class Cluster:
    """Trials on the workers of a dask.distributed scheduler, e.g. ``tcp://host:8786``.

    Workers may come and go. One counts if it has this job's versions of dccompile and TVM, what
    all `targets` need, and one unit of the resource ``measure``; `refused` says by name what is
    wrong with the others. Anybody who reaches the scheduler can run code on its workers: use it in
    a network that is trusted, or with dask's TLS.

    Entering raises UsageError where dask.distributed is missing, TuningError where no scheduler
    answers (DC7030) or no worker fits (DC7031). The future of a trial raises TuningError when the
    scheduler ends (DC7030), when all workers of its type have refused it (DC7031), or when none has
    been there for `patience` seconds (DC7033).
    """

    def __init__(
        self, url: str, targets: Iterable[Machine] = (), *, patience: float = PATIENCE_S
    ) -> None:
        self.url, self.patience = remote.check_url(url), patience
        self.refused: list[str] = []
        self._targets = list(targets)
        self._versions = versions()
        self._workers: dict[str, str] = {}  # address: cpu; replaced, never changed: threads read it
        self._rejected: set[str] = set()
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._tasks: set[asyncio.Task[Any]] = set()  # the watch and the trials

    def __enter__(self) -> Cluster:
        self._distributed = remote.import_distributed()
        self._loop = asyncio.new_event_loop()
        # what dask's own tasks leave behind when a connection ends; errors of trials are in futures
        self._loop.set_exception_handler(lambda *_: None)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        connected = self._call(self._connect())
        try:
            connected.result()
        except BaseException:
            connected.cancel()
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the scheduler; trials not ended are cancelled there. The workers stay."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._call(self._disconnect()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        thread.join()
        self._loop.close()

    def machines(self) -> dict[str, list[str]]:
        """Addresses of the workers that fit, by type of machine, as of now."""
        found: dict[str, list[str]] = {}
        for address, cpu in sorted(self._workers.items()):
            found.setdefault(cpu, []).append(address)
        return found

    def slots(self, cpu: str) -> int:
        """How many trials this type of machine runs at once, as of now."""
        return list(self._workers.values()).count(cpu)

    def submit(self, request: Request, cpu: str) -> Future[Result]:
        """Runs a trial on a worker of this type; the result names its address as `worker`."""
        return self._call(self._trial(request, cpu))

    # ---- on the loop's thread ----

    def _call(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _connect(self) -> None:
        client = self._distributed.Client(
            self.url, asynchronous=True, timeout=remote.CONNECT_S, set_as_default=False
        )
        try:
            self._client = await asyncio.wait_for(client, remote.CONNECT_S)  # the handshake too
        except Exception as error:  # of the connection, the handshake, or what answered instead
            await _close(client)
            raise TuningError(
                f"--workers {self.url}: no scheduler answered in {remote.CONNECT_S:g} s "
                f"({type(error).__name__}). Fix: start one with 'dask scheduler', or see whether "
                "the address is right and can be reached",
                "DC7030",
            ) from error
        end = self._loop.time() + remote.CONNECT_S
        await self._look()
        while not self._workers and self._loop.time() < end:  # others may just be starting
            await asyncio.sleep(_POLL_S)
            await self._look()
        if not self._workers:
            raise self._nobody()
        self._tasks.add(self._loop.create_task(self._watch()))

    async def _disconnect(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client is not None:
            await _close(self._client)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                await self._look()
            except Exception:  # of many types while a connection ends
                if self._client.status != "running":
                    self._workers = {}  # trials find that the scheduler has gone

    async def _look(self) -> None:
        """Finds out what workers there are; asks new ones what they are."""
        there = await self._client.nthreads()
        known = {address: w for address, w in self._workers.items() if address in there}
        new = [a for a in there if a not in known and a not in self._rejected]
        answers = await asyncio.gather(*(self._probe(address) for address in new))
        for address, answer in zip(new, answers, strict=True):
            if isinstance(answer, OSError):
                continue  # has gone meanwhile
            if reason := self._unfit(answer):
                self._refuse(address, reason)
            else:
                known[address] = answer["cpu"]
        self._workers = {a: w for a, w in known.items() if a not in self._rejected}

    async def _probe(self, address: str) -> Any:
        """What a worker says it is, or what went wrong there."""
        answers = self._client.run(remote.describe, workers=[address], on_error="return")
        try:
            return (await asyncio.wait_for(answers, _PROBE_S))[address]
        except asyncio.TimeoutError:
            return f"no answer in {_PROBE_S:g} s"

    def _unfit(self, answer: Any) -> str | None:
        """Why a worker cannot measure for this job."""
        if isinstance(answer, str):
            return answer
        if isinstance(answer, BaseException):
            return f"{type(answer).__name__}: {answer}, this job needs dccompile[cluster] there"
        for name, own in self._versions.items():
            if answer.get(name) != own:
                return f"{name} {answer.get(name) or 'missing'}, this job runs {own}"
        for target in self._targets:
            if lacks := [f for f in target.features if f not in answer["features"]]:
                return f"lacks {', '.join(lacks)}, which target {target.name} needs"
        if answer["measure"] != 1:
            return f"resource {remote.RESOURCE}={answer['measure']:g}, allowed is 1"
        return None

    def _refuse(self, address: str, reason: str) -> None:
        self._rejected.add(address)
        self._workers = {a: w for a, w in self._workers.items() if a != address}
        self.refused.append(f"worker {address}: {reason}")

    def _nobody(self) -> TuningError:
        reasons = "; ".join(self.refused) or "it has none"
        return TuningError(
            f"--workers {self.url}: no worker fits ({reasons}). "
            f"Fix: start one with 'dccompile worker {self.url}' of dccompile "
            f"{self._versions['dccompile']} on a machine that runs the target",
            "DC7031",
        )

    async def _trial(self, request: Request, cpu: str) -> Result:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        while True:
            workers = await self._workers_of(cpu)
            result = await self._attempt(request, workers)
            if result is not None and result["status"] != "refused":
                return result
            if result is None:
                continue
            if result["worker"] in self._workers:
                self._refuse(result["worker"], result["reason"])
            if not self.slots(cpu):
                raise self._nobody()

    async def _workers_of(self, cpu: str) -> list[str]:
        end = self._loop.time() + self.patience
        while not (workers := self.machines().get(cpu)):
            if self._client.status != "running":
                raise self._lost()
            if self._loop.time() > end:
                raise TuningError(
                    f"--workers {self.url}: no worker of type {cpu} for {self.patience:g} s. Fix: "
                    f"start one there with 'dccompile worker {self.url}' and run the job again",
                    "DC7033",
                )
            await asyncio.sleep(_POLL_S)
        return workers

    async def _attempt(self, request: Request, workers: list[str]) -> Result | None:
        """The result of one of these workers; None when all of them have gone without one."""
        future = self._client.submit(
            remote.run_trial, request, workers=workers, resources={remote.RESOURCE: 1}, pure=False
        )
        answer = asyncio.ensure_future(future.result())
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=_POLL_S)
                if not answer.done() and not set(workers) & set(self._workers):
                    return None
            return dict(answer.result())
        except self._distributed.KilledWorker as error:
            last = error.last_worker.address
            return {"status": "crash", "reason": f"workers died of it, at last {last}"}
        except self._distributed.CancelledError:  # dask's own, when its connection ends
            raise self._lost() from None
        finally:
            if not answer.done():
                answer.cancel()
                if self._client.status == "running":
                    await future.cancel()

    def _lost(self) -> TuningError:
        return TuningError(
            f"--workers {self.url}: the scheduler has gone. Fix: start it again, then run the "
            "same job: it goes on where it stopped",
            "DC7030",
        )


async def _close(client: Any) -> None:
    """Closes a client whose scheduler may have gone."""
    with suppress(Exception):
        await asyncio.wait_for(client.close(), _CLOSE_S)
