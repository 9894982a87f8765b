"""Functions for worker processes are made inside of functions here, so that pickle takes them along."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import dask.system
import distributed.system
import psutil
import pytest
from distributed import Client, Future, KilledWorker

from data_prep import cluster as module
from data_prep.cluster import Tasks, dask_client, default_workers, run_tasks

LOOPBACK = "127.0.0.1:0"


@pytest.fixture(scope="module")
def local() -> Iterator[Client]:
    """Two worker processes, as the commands start them."""
    with dask_client(workers=2) as client:
        yield client


DONE: list[object] = []
MAY_END = threading.Event()


def square(number: int) -> int:
    return number * number


def note(item: object) -> object:
    """Take a while; threads of this process see the same list."""
    DONE.append(item)
    time.sleep(0.05)
    return item


def begin(number: int) -> None:
    """Begin, and end with the first task or when all may."""
    DONE.append(number)
    assert number == 0 or MAY_END.wait(300)


def test_every_item_comes_back_with_its_result(dask, monkeypatch) -> None:
    monkeypatch.setattr(module, "TASKS_AHEAD", 3)
    assert sorted(run_tasks(dask, square, range(20))) == [(n, n * n) for n in range(20)]
    assert list(run_tasks(dask, square, [])) == []


def test_few_tasks_wait_at_the_scheduler(dask, monkeypatch) -> None:
    monkeypatch.setattr(module, "TASKS_AHEAD", 3)
    taken: list[int] = []
    results = run_tasks(dask, square, (taken.append(n) or n for n in range(20)))
    next(results)
    assert len(taken) == 4
    assert len(list(results)) == 19


def test_what_a_task_raises_is_yielded_in_place_of_a_result(dask) -> None:
    def divide(number: int) -> float:
        return 6 / number

    results = dict(run_tasks(dask, divide, [3, 0, 2]))
    assert isinstance(results.pop(0), ZeroDivisionError)
    assert results == {3: 2, 2: 3}


def test_tasks_are_started_while_results_come_and_urgent_ones_go_first() -> None:
    DONE.clear()
    with (
        Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=LOOPBACK) as client,
        Tasks(client) as tasks,
    ):
        for name in "abcdef":
            tasks.start(note, name)
        for name, _ in tasks:
            if name == "a":
                tasks.start(note, "urgent", priority=1)
    assert sorted(DONE) == ["a", "b", "c", "d", "e", "f", "urgent"]
    assert DONE.index("urgent") < 4


def test_tasks_do_not_outlive_their_block(dask) -> None:
    """Those that have begun end; the clock plays no part, so that a busy machine changes nothing."""
    DONE.clear()
    MAY_END.clear()

    def known_tasks() -> int:
        at_workers = sum(dask.run(lambda dask_worker: len(dask_worker.state.tasks)).values())
        return at_workers + dask.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))

    def stop_at_the_first() -> None:
        with Tasks(dask) as tasks:
            for number in range(50):
                tasks.start(begin, number)
            for _ in tasks:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stop_at_the_first()
    while known_tasks() > 4:  # two run and cannot be taken back; the scheduler may know them still
        time.sleep(0.01)
    MAY_END.set()
    while known_tasks():
        time.sleep(0.01)
    assert len(DONE) <= 5


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'data_prep'"), RuntimeError("deserialization of the task graph")]
)
def test_a_cluster_that_cannot_import_the_work_ends_it_in_one_line(error, dask) -> None:
    """A worker says it in its own words, a scheduler in Dask's."""

    def fail(number: int) -> None:
        raise error

    with pytest.raises(ConnectionError, match="cannot import data_prep: .*PYTHONPATH"):
        list(run_tasks(dask, fail, [1]))


# With worker processes


def listening() -> set[tuple[str, int]]:
    """Address and port of all that this process and its children listen to."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_nothing_listens_beyond_this_machine() -> None:
    before = listening()
    with dask_client(workers=1):
        opened = listening() - before
    assert len(opened) >= 2  # scheduler and worker
    assert {ip for ip, _ in opened} == {"127.0.0.1"}


def test_local_workers_share_the_memory_of_the_machine(local) -> None:
    limits = [worker["memory_limit"] for worker in local.scheduler_info()["workers"].values()]
    assert limits == [pytest.approx(distributed.system.MEMORY_LIMIT / 2, rel=0.01)] * 2


def test_only_the_task_that_kills_its_workers_fails(local) -> None:
    def deadly(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return number

    results = dict(run_tasks(local, deadly, range(12)))
    assert isinstance(results.pop(3), KilledWorker)
    assert results == {n: n for n in range(12) if n != 3}


def test_a_lost_workers_tasks_run_again(local, tmp_path) -> None:
    def die_once(number: int) -> int:
        mark = tmp_path / "died"
        if number == 5 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    assert sorted(run_tasks(local, die_once, range(8))) == [(n, n) for n in range(8)]
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize("question", ["exception", "result"])
def test_a_task_whose_result_never_comes_runs_again(dask, monkeypatch, question) -> None:
    """As when its worker is lost between the end of the task and the fetching of its result."""
    asked: list[str] = []
    answer = getattr(Future, question)

    def once_lost(future: Future, timeout: float | None = None) -> object:
        asked.append(future.key)
        if len(asked) == 3:
            raise TimeoutError
        return answer(future, timeout=timeout)

    monkeypatch.setattr(Future, question, once_lost)
    assert sorted(run_tasks(dask, square, range(5))) == [(n, n * n) for n in range(5)]
    assert len(set(asked)) == 6


# With a scheduler of others


def test_a_lost_scheduler_ends_the_work_in_one_line(dask_scheduler, dask_command) -> None:
    def slow(number: int) -> int:
        time.sleep(0.1)
        return number

    address, scheduler = dask_scheduler
    dask_command("worker", address, "--host", "127.0.0.1", "--nthreads", "1")
    with dask_client(address) as client:
        results = run_tasks(client, slow, range(100))
        next(results)
        scheduler.kill()
        with pytest.raises(ConnectionError, match="Lost the Dask scheduler"):
            list(results)


def test_an_address_where_no_scheduler_answers_is_named() -> None:
    with (
        pytest.raises(ConnectionError, match=r"'tcp://127\.0\.0\.1:1'"),
        dask_client("tcp://127.0.0.1:1"),
    ):
        pass


@pytest.mark.parametrize(
    ("cores", "limit_gib", "available_gib", "expected"),
    [(8, 64, 64, 8), (8, 64, 13, 3), (8, 9, 200, 2), (2, 64, 64, 2), (8, 64, 1, 1)],
)
def test_workers_are_as_many_as_cores_and_memory_allow(
    cores, limit_gib, available_gib, expected, monkeypatch
) -> None:
    """4 GiB each; the limits are the container's where there is one."""
    monkeypatch.setattr(dask.system, "CPU_COUNT", cores)
    monkeypatch.setattr(distributed.system, "MEMORY_LIMIT", limit_gib * 2**30)
    memory = psutil.virtual_memory()._replace(available=available_gib * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert default_workers() == expected
