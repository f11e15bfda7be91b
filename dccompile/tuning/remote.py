"""What runs in a worker of a cluster, and what it shares with jobs that send it trials."""

from __future__ import annotations

import re
from typing import Any

from ..errors import UsageError
from ..machine import cpu_type, host_features
from .server import run_here, versions

RESOURCE = "measure"  # a worker has one unit: it measures one trial at a time
CONNECT_S = 10.0  # for the scheduler to answer


def check_url(url: str) -> str:
    """A scheduler's address; raises UsageError for what is none."""
    form = re.fullmatch(r"(tcp|tls)://[^/\s]+:(\d{1,5})", url)
    if form is None or not 0 < int(form[2]) < 65536:
        raise UsageError(
            f"scheduler '{url}': allowed is tcp://HOST:PORT or tls://HOST:PORT. "
            "Fix: give the address that 'dask scheduler' prints",
            "DC2033",
        )
    return url


def import_distributed() -> Any:
    """The package; its log is kept to what is critical unless dask's configuration sets it.

    Raises UsageError where it is not installed.
    """
    try:
        import dask

        quiet = {name: "critical" for name in ("distributed", "distributed.client")}
        levels = {} if dask.config.get("logging", None) else {"logging": quiet}
        with dask.config.set(levels):  # read when distributed is imported first
            import distributed
    except ModuleNotFoundError as error:
        raise UsageError(
            f"workers of a cluster need the package {error.name}, which is not installed. "
            "Fix: pip install 'dccompile[cluster]'",
            "DC2034",
        ) from None
    return distributed


def describe(dask_worker: Any) -> dict[str, Any]:
    """What a job asks a worker before it sends it trials; runs there."""
    return {
        **versions(),
        "cpu": cpu_type(),
        "features": sorted(host_features()),
        "measure": dask_worker.state.total_resources.get(RESOURCE, 0),
    }


def run_trial(request: dict[str, Any]) -> dict[str, Any]:
    """A trial, with the address of the worker that this is."""
    return {**run_here(request), "worker": import_distributed().get_worker().address}
