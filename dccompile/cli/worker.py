"""``dccompile worker``: measures trials that tuning jobs send through a dask.distributed scheduler.

A dask worker with one thread and one unit of the resource ``measure``, without nanny: what can
crash runs in processes of its own, and when the worker itself dies the scheduler sees that its
connection ends and gives the trial to another.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from ..console import Progress
from ..environment import versions
from ..errors import TuningError, UsageError
from ..machine import cpu_type, host
from ..tuning.remote import CONNECT_S, RESOURCE, check_url, import_distributed

_CLOSE_S = 5.0  # for telling the scheduler


def worker(options: argparse.Namespace) -> int:
    """Works until Ctrl-C, SIGTERM, or the end of the scheduler; all of them are an end in order."""
    url = check_url(options.scheduler)
    distributed = import_distributed()
    found = versions()
    if found["tvm"] is None:
        raise UsageError(
            "worker: TVM is not installed, trials need it. Fix: pip install 'dccompile[cluster]'",
            "DC2034",
        )
    name = options.name or f"{socket.gethostname()}-{os.getpid()}"
    target = host().name
    progress = Progress(options.quiet)  # not entered: a bar that moves would disturb trials

    def started(address: str) -> None:
        software = f"dccompile {found['dccompile']}, TVM {found['tvm']}"
        progress.note(f"worker {name} at {address}: {software}, {cpu_type()}, {target}")

    reason = asyncio.run(_serve(distributed, url, name, started))
    progress.note(f"worker {name}: {reason}")
    return 0


async def _serve(distributed: Any, url: str, name: str, started: Callable[[str], None]) -> str:
    """Why it ended."""
    import dask

    # its sampling every 10 ms would disturb what is measured
    dask.config.set({"distributed.worker.profile.enabled": False})
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stopping = loop.create_task(stop.wait())
    made = distributed.Worker(
        url,
        name=name,
        host=_own_address(url),
        nthreads=1,
        resources={RESOURCE: 1},
        memory_limit=0,  # the memory of trials is not this process's
        dashboard_address="127.0.0.1:0",
        death_timeout=CONNECT_S,
    )
    starting = asyncio.ensure_future(made.start())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        return "stopped"
    try:
        starting.result()
    except (asyncio.TimeoutError, OSError) as error:
        raise TuningError(
            f"worker {name}: no scheduler answered at {url} in {CONNECT_S:g} s "
            f"({type(error).__name__}). Fix: start one with 'dask scheduler'",
            "DC7030",
        ) from error
    except Exception as error:  # the scheduler's answer is the cause
        cause = error.__cause__ or error
        raise UsageError(
            f"worker {name}: {url} does not take it ({cause}). "
            "Fix: give another --name if this one is taken",
            "DC2035",
        ) from error
    made.http_server.stop()  # nobody asks this port
    started(made.address)
    ending = asyncio.ensure_future(made.finished())
    await asyncio.wait({ending, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if ending.done():
        return f"the scheduler at {url} has gone"
    await made.close(timeout=_CLOSE_S, executor_wait=False, nanny=False)
    return "stopped"


def _own_address(url: str) -> str:
    """Of this machine as the scheduler sees it: no other network can reach the worker."""
    from distributed.utils import get_ip

    host, _, port = url.partition("://")[2].rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UsageError(
            f"scheduler '{url}': {error.strerror or error}. "
            "Fix: give a host that is known here, or its IP address",
            "DC2033",
        ) from None
    return str(get_ip(host.strip("[]"), int(port)))
