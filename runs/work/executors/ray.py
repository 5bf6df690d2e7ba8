"""Workers as actors of a Ray cluster: Ray finds them machines and GPUs, and starts them anew where they die.

Files go through the store and none through Ray's object store, so that it has nothing to spill.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from moepress.errors import MoepressError, UnsupportedError
from moepress.runs.progress import note

_WATCH_SECONDS, _GRACE_SECONDS = 2.0, 10.0


def work_on_ray(
    work: Callable[[int], Any],
    count: int | None,
    watch: Callable[[], bool],
    *,
    cpus: float,
    gpus: float,
    address: str | None = None,
) -> int:
    """Run workers on a Ray cluster until all is done.

    Args:
        work: what a worker does, given its number; importable on the cluster's machines.
        count: how many workers; None for as many as the cluster has room for.
        watch: asked now and then whether all is done; workers that have not returned some seconds later are ended.
        cpus, gpus: what Ray sets aside for each.
        address: of the cluster; None for that of RAY_ADDRESS or of this machine, and where there is none a new one of
            this machine alone, which ends with this process.

    Returns:
        How many workers there were.

    Raises:
        UnsupportedError: Ray is not installed.
        MoepressError: the cluster has no room for a single worker, or a worker's own error.
    """
    ray = _ray()
    _connect(ray, address)
    try:
        total = ray.cluster_resources()
        room = min(total.get("CPU", 0) / cpus if cpus else 1e9, total.get("GPU", 0) / gpus if gpus else 1e9)
        wanted = count or int(room)
        if wanted < 1 or room < 1:
            raise MoepressError(
                f"The Ray cluster has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs, and a worker "
                f"wants {cpus:g} and {gpus:g}; give fewer --threads, or add machines."
            )
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(_Actor)
        actors = [actor.remote() for _ in range(wanted)]
        _wait(ray, [each.work.remote(work, number) for number, each in enumerate(actors)], watch)
        return wanted
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError("Ray is not installed; install it with: pip install 'moepress[ray]'.") from error
    return ray


class _Actor:
    """Runs in a process of its own on some machine of the cluster."""

    def work(self, work: Callable[[int], Any], number: int) -> Any:
        """A worker, until all tasks are done; begun anew where the process died, since its leases are over then."""
        return work(number)


def _connect(ray: Any, address: str | None) -> None:
    named = address or os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address or "auto", logging_level="ERROR", log_to_driver=False)
    except ConnectionError as error:
        if named is not None:
            raise MoepressError(
                f"No Ray cluster answers at {named}; see `ray status` there, and RAY_AUTH_MODE if it wants a token."
            ) from error
        note("No Ray cluster runs on this machine: one of this machine alone is started, and ends with this command.")
        ray.init(logging_level="ERROR", log_to_driver=False, include_dashboard=False)


def _wait(ray: Any, futures: Sequence[Any], watch: Callable[[], bool]) -> None:
    pending, until = list(futures), float("inf")
    try:
        while pending and time.monotonic() < until:
            returned, pending = ray.wait(pending, num_returns=len(pending), timeout=_WATCH_SECONDS)
            ray.get(returned)  # raises what a worker has
            if watch() and until == float("inf"):
                until = time.monotonic() + _GRACE_SECONDS
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MoepressError):
            raise cause from error
        raise MoepressError(f"A worker on Ray failed: {cause}; repeat the command: what is done stays.") from error
    except ray.exceptions.RayError as error:
        what = type(error).__name__
        raise MoepressError(
            f"The Ray cluster failed ({what}); start it again and repeat the command: what is done stays."
        ) from error
