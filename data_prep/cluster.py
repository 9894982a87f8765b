"""Many independent tasks on Dask: workers on this machine, or a scheduler that others have joined."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

if TYPE_CHECKING:  # distributed takes 0.7 s to import; --help must not wait for it
    from dask.typing import Key
    from distributed import Client, Future

logger = logging.getLogger(__name__)

ShowProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKER_MEMORY_BYTES = 4 * 2**30
"""Memory needed per local worker: three times 512 x 512 x 1,500 voxels of 16 bits, and masks."""

ALLOWED_DEATHS = 1
"""A task that kills more workers runs once more alone, to tell it from one that ran beside the cause."""

TASKS_AHEAD = 1000
"""Tasks queued at the scheduler: enough for as many workers, and few enough to submit in a second."""

RESULT_WITHIN_S = 120
"""Seconds in which the result of a finished task must be here; else it runs again."""

_SCHEDULER_LACKS_IT = "deserialization of the task graph"

# A worker's process must outlive Ctrl-C, which goes to all processes of a terminal: its client stops it.
_IGNORE_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def default_workers() -> int:
    """Return the number of workers that this machine or container has cores and memory for, at least one."""
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    memory = min(MEMORY_LIMIT, psutil.virtual_memory().available)
    return max(1, min(CPU_COUNT, memory // WORKER_MEMORY_BYTES))


@contextmanager
def dask_client(scheduler: str | None = None, workers: int | None = None) -> Iterator[Client]:
    """Connect to a running scheduler, or start workers on this machine and stop them at the end.

    Local workers share the machine's memory equally; one that exceeds its share is killed and restarted.
    Nothing of a local cluster listens beyond 127.0.0.1.

    Args:
        scheduler: address such as ``tcp://10.0.0.1:8786``; None starts a cluster here.
        workers: number of local workers; by default what the machine has cores and memory for.

    Raises:
        ConnectionError: if no scheduler answers at the address.
    """
    from distributed import Client, LocalCluster

    for name in ("distributed", "distributed.client"):  # tasks report what concerns the user
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=20)  # s; one that has just been started takes some
        except (OSError, TimeoutError, ValueError) as error:
            raise ConnectionError(
                f"No Dask scheduler answers at '{scheduler}' ({error}). Start one with: dask scheduler"
            ) from error
        with client:
            if not client.scheduler_info()["workers"]:
                logger.warning("No worker has joined '%s' yet: work starts as soon as one does.", scheduler)
            yield client
        return
    cluster = LocalCluster(
        n_workers=workers or default_workers(),
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address=None,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0", "allowed_failures": ALLOWED_DEATHS},
        silence_logs="CRITICAL",
        preload=[_IGNORE_CTRL_C],
    )
    with cluster, Client(cluster) as client:
        yield client


class Tasks:
    """Tasks on a cluster; more may be started while results arrive, and none is left when the block ends.

    A task that killed several workers is held back until no other runs and then runs alone: only if workers
    die again is it the cause. Other tasks of a lost worker run again elsewhere.

    Args:
        client: Dask cluster.

    Example:
        >>> from distributed import Client
        >>> with Client(processes=False, n_workers=1, dashboard_address=None) as client:
        ...     with Tasks(client) as tasks:
        ...         tasks.start(abs, -3)
        ...         list(tasks)
        [(-3, 3)]
    """

    def __init__(self, client: Client) -> None:
        from distributed import as_completed

        self._client = client
        self._futures = as_completed()
        self._started: dict[Key, tuple[Future[Any], Callable[[Any], Any], Any]] = {}
        self._suspects: list[tuple[Callable[[Any], Any], Any]] = []
        self._alone: Key = ""

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.cancel([future for future, _, _ in self._started.values()])

    def start(self, function: Callable[[Item], Any], item: Item, priority: int = 0) -> None:
        """Start a task; higher priorities go first, equal ones in the order of their start."""
        self._submit(function, item, priority)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield each item with its result, or with what its task raised, as it arrives.

        Raises:
            ConnectionError: if the scheduler is lost, or it or a worker cannot import the function.
        """
        from distributed import KilledWorker

        while True:
            for future in self._futures:
                _, function, item = self._started.pop(future.key)
                if future.cancelled():
                    raise ConnectionError("Lost the Dask scheduler. Run the same command again: it resumes.")
                try:
                    error = future.exception(timeout=RESULT_WITHIN_S)
                    result = future.result(timeout=RESULT_WITHIN_S) if error is None else error
                except TimeoutError:  # the worker was lost with its result, and Dask may wait for ever
                    future.cancel()
                    self._submit(function, item, priority=0)
                    continue
                if isinstance(error, KilledWorker) and future.key != self._alone:
                    self._suspects.append((function, item))
                    continue
                if isinstance(error, ImportError) or _SCHEDULER_LACKS_IT in str(error):
                    said = " ".join(str(error).split())
                    raise ConnectionError(
                        f"The Dask scheduler or a worker cannot import data_prep: {said}. Start them in this "
                        "environment, with PYTHONPATH set to the repository's folder."
                    ) from error
                yield item, result
            if not self._suspects:
                return
            self._alone = self._submit(*self._suspects.pop(0), priority=0)

    def _submit(self, function: Callable[[Any], Any], item: object, priority: int) -> Key:
        future = self._client.submit(function, item, pure=False, priority=priority)
        self._started[future.key] = (future, function, item)
        self._futures.add(future)
        return future.key


def run_tasks(
    client: Client, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result | BaseException]]:
    """Run a function on every item, one task each, and yield results as they arrive.

    Tasks start in the order of the items. What a task raises is yielded in place of its result, and so is
    ``distributed.KilledWorker`` for a task that kills workers; a lost worker's tasks run again.

    Args:
        client: Dask cluster.
        function: function that workers can import.
        items: its arguments.

    Raises:
        ConnectionError: if the scheduler is lost, or it or a worker cannot import the function.
    """
    waiting = iter(items)
    with Tasks(client) as tasks:
        for item in islice(waiting, TASKS_AHEAD):
            tasks.start(function, item)
        for item, result in tasks:
            for following in islice(waiting, 1):
                tasks.start(function, following)
            yield item, result
