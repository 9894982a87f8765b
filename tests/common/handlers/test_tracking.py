"""One MLflow run per training run, in a real SQLite store; its pace; and the bar over all its steps."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from ignite.engine import Engine, Events
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from common.handlers.tracking import MLflowRun, Progress, Throughput, Uploads, dataset_input
from common.run.process import Stopped

CONFIG = {"slab_mm": 12.0, "seed": 1, "loss": {"_target_": "Loss"}, "run": ["$1"], "_desc_": "words"}
LOST = RuntimeError("the loss went away")


def starting_at(step: int, process) -> Engine:
    engine = Engine(process)
    if step:
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "iteration", step))
    return engine


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def recorder(store, folder, name, **options) -> MLflowRun:
    own = {"tracking_uri": store, "experiment": "pretraining", "run_name": name, "output_dir": folder}
    return MLflowRun(**own, config=CONFIG, log_every=2, **{"artifacts": [], "datasets": {}, **options})


def run(store, folder, name, steps=5, start=0, fail_at=None, stop_at=None, error=LOST):
    def step(engine, _):
        if engine.state.iteration == fail_at:
            raise error
        if engine.state.iteration == stop_at:
            engine.state.exit_status = 143
            engine.terminate()
        return [{"loss": torch.tensor(engine.state.iteration / 2), "undefined": torch.tensor(float("nan"))}]

    engine = starting_at(start, step)
    handler = recorder(
        *(store, folder, name),
        optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25),
        artifacts=["*.png", "checkpoints/*.pt"],
        datasets={"training": Path(__file__).parent, "test": Path(__file__)},
    )
    handler.attach(engine)
    engine.run([0] * steps, max_epochs=1, epoch_length=steps)
    return handler.run_id


def runs(store):
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("pretraining")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_knobs_terms_and_files_are_recorded(store, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "views.png").write_bytes(b"png")
    (tmp_path / "checkpoints" / "step_00000004.pt").write_bytes(b"weights")
    run_id = run(store, tmp_path, "whole")
    record = runs(store)["whole"]
    assert record.info.status == "FINISHED"
    assert record.data.params == {"slab_mm": "12.0", "seed": "1"}
    assert record.data.metrics["loss"] == 2.5  # of the last step
    assert record.data.metrics["lr"] == 0.25
    assert "undefined" not in record.data.metrics
    client = MlflowClient(store)
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [1, 2, 4, 5]
    names = {item.path for item in client.list_artifacts(run_id)}
    assert {"executed_config.json", "views.png", "checkpoints"} <= names
    database = Path(store.removeprefix("sqlite:///"))
    assert list(database.parent.glob("mlartifacts/*/artifacts/checkpoints/step_00000004.pt"))


def test_a_crash_ends_the_run_failed_and_the_next_is_a_run_of_its_own(store, tmp_path):
    with pytest.raises(RuntimeError, match="the loss went away"):
        run(store, tmp_path / "a", "crashed", fail_at=3)
    run(store, tmp_path / "b", "next")
    assert runs(store)["crashed"].info.status == "FAILED"
    assert "the loss went away" in runs(store)["crashed"].data.tags["error"]
    assert runs(store)["next"].info.status == "FINISHED"
    assert runs(store)["crashed"].info.run_id != runs(store)["next"].info.run_id


def test_a_crash_of_another_rank_ends_the_run_failed(store, tmp_path, monkeypatch):
    engine = Engine(lambda engine, batch: [{"loss": 1.0}])
    waiting = recorder(store, tmp_path, "waiting")
    waiting.attach(engine)
    waiting._start(engine)  # and then rank 0 waits in a collective
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    with pytest.raises(RuntimeError, match="the loss went away"):
        run(store, tmp_path, "waiting", fail_at=1)
    assert runs(store)["waiting"].info.status == "RUNNING"  # the one known may be of before
    with pytest.raises(RuntimeError, match="the loss went away"):
        run(store, tmp_path, "waiting", fail_at=3)
    assert runs(store)["waiting"].info.status == "FAILED"
    assert "the loss went away" in runs(store)["waiting"].data.tags["error"]
    assert "loss" not in runs(store)["waiting"].data.metrics


def test_a_resumed_run_whose_record_is_gone_gets_another(store, tmp_path, caplog):
    first = run(store, tmp_path, "lost")
    memory = tmp_path / "mlflow_run.json"
    memory.write_text(memory.read_text().replace(first, "0" * 32))
    second = run(store, tmp_path, "lost", steps=6, start=2)
    assert second not in (first, "0" * 32)
    assert "no longer has this run" in caplog.text
    assert runs(store)["lost"].info.status == "FINISHED"


def test_a_resumed_run_goes_on_in_its_own_record(store, tmp_path):
    with pytest.raises(RuntimeError, match="the loss went away"):
        run(store, tmp_path, "resumed", fail_at=3)
    first = runs(store)["resumed"].info.run_id
    assert "the loss went away" in runs(store)["resumed"].data.tags["error"]
    run(store, tmp_path, "resumed", steps=6, start=2)
    assert runs(store)["resumed"].info.run_id == first
    assert runs(store)["resumed"].info.status == "FINISHED"
    assert "error" not in runs(store)["resumed"].data.tags


def test_a_run_left_by_ctrl_c_is_killed_and_is_no_error(store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(store, tmp_path, "left", fail_at=3, error=Stopped(signal.SIGINT))
    assert runs(store)["left"].info.status == "KILLED"
    assert "error" not in runs(store)["left"].data.tags


def test_a_run_says_what_it_read_and_what_ran(store, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["monai/bundle/__main__.py", "run", "--config_file", "b/configs/train.json"]
    )
    run(store, tmp_path, "described")
    record = runs(store)["described"]
    datasets = {item.tags[0].value: item.dataset.name for item in record.inputs.dataset_inputs}
    assert datasets == {"training": "common/handlers", "test": "handlers/test_tracking.py"}
    tags = record.data.tags
    assert tags["mlflow.source.name"] == "b/configs/train.json"
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", tags["mlflow.source.git.commit"])
    assert tags["mlflow.user"]


def test_steps_recorded_before_a_kill_are_not_recorded_again(store, tmp_path):
    with pytest.raises(RuntimeError, match="the loss went away"):
        run(store, tmp_path, "twice", steps=8, fail_at=5)
    run_id = run(store, tmp_path, "twice", steps=8, start=1)  # the last checkpoint was of step 1
    history = MlflowClient(store).get_metric_history(run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 4, 6, 8]


def test_a_run_begun_anew_in_the_same_folder_is_a_new_record(store, tmp_path):
    assert run(store, tmp_path, "again") != run(store, tmp_path, "again")


def test_a_run_asked_to_stop_is_killed_not_finished(store, tmp_path):
    run(store, tmp_path, "stopped", stop_at=3)
    assert runs(store)["stopped"].info.status == "KILLED"


def test_what_handlers_measure_after_the_last_step_is_recorded_once(store, tmp_path):
    engine = Engine(lambda engine, batch: [{"loss": 1.0}])
    engine.add_event_handler(Events.COMPLETED, lambda e: e.state.metrics.update(test_macro_auroc=0.75))
    handler = recorder(store, tmp_path, "tested")
    handler.attach(engine)
    engine.run([0] * 4, max_epochs=1, epoch_length=4)
    history = MlflowClient(store).get_metric_history
    assert [metric.step for metric in history(handler.run_id, "loss")] == [1, 2, 4]
    assert [metric.value for metric in history(handler.run_id, "test_macro_auroc")] == [0.75]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server with a database and an artifact store, on this machine alone."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            if requests.get(f"{address}/health", timeout=5).ok:
                break
        except requests.ConnectionError:
            time.sleep(0.2)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()


@pytest.mark.slow
def test_a_server_gets_curves_and_files_over_http(server: str, tmp_path: Path) -> None:
    (tmp_path / "views.png").write_bytes(b"png")
    run_id = run(server, tmp_path, "remote")
    client = MlflowClient(server)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [1, 2, 4, 5]
    assert Path(client.download_artifacts(run_id, "views.png", str(tmp_path / "got"))).read_bytes() == b"png"


def test_a_folder_is_its_files_by_name_and_size(tmp_path):
    folder = tmp_path / "ct_rate" / "shards"
    folder.mkdir(parents=True)
    (folder / "a.tar").write_bytes(b"12345")
    (folder / "b.tar").write_bytes(b"123")
    (folder / ".lock").write_bytes(b"who")
    (folder / ".parts").mkdir()
    first = dataset_input(folder, "training")
    assert first.dataset.name == "ct_rate/shards"
    assert json.loads(first.dataset.profile) == {"files": 2, "bytes": 8}
    assert json.loads(first.dataset.source) == {"uri": folder.as_uri()}
    assert [(tag.key, tag.value) for tag in first.tags] == [("mlflow.data.context", "training")]
    (folder / ".lock").write_bytes(b"another")
    assert dataset_input(folder, "test").dataset.digest == first.dataset.digest
    (folder / "b.tar").write_bytes(b"1234")
    assert dataset_input(folder, "test").dataset.digest != first.dataset.digest


def test_a_file_is_one(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"123")
    described = dataset_input(tmp_path / "list.csv", "test").dataset
    assert json.loads(described.profile) == {"files": 1, "bytes": 3}


class CountingClient(MlflowClient):
    """Counts uploads; each may be made to wait or to fail."""

    def __init__(self, store):
        super().__init__(store)
        self.sent, self.gate, self.error = [], threading.Event(), None
        self.gate.set()

    def log_artifact(self, run_id, path, artifact_path=None):
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        super().log_artifact(run_id, path, artifact_path)
        self.sent.append(path.rsplit("/", 1)[-1])


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    client = CountingClient(f"sqlite:///{folder}/mlflow.db")
    client.experiment = client.create_experiment("e", (folder / "files").as_uri())
    return client


@pytest.fixture
def upload(client, tmp_path):
    client.sent.clear()
    client.error = None
    run_id = client.create_run(client.experiment).info.run_id
    return lambda of=run_id: Uploads(client, of, tmp_path, ["*.csv", "checkpoints/*.pt"])


def test_files_are_sent_once_also_after_a_resume_and_again_when_they_changed(client, upload, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_2.pt").write_bytes(b"weights")
    (tmp_path / "a.csv").write_text("1")
    (tmp_path / "a.txt").write_text("not of the patterns")
    first = upload()
    for _ in range(3):
        first.start()
    first.wait(60)
    assert sorted(client.sent) == ["a.csv", "step_2.pt"]
    assert {item.path for item in client.list_artifacts(first.run_id)} == {"a.csv", "checkpoints"}
    (tmp_path / "b.csv").write_text("2")
    second = upload()
    second.start()
    second.wait(60)
    assert client.sent[2:] == ["b.csv"]
    time.sleep(0.01)
    (tmp_path / "a.csv").write_text("3")
    third = upload()
    third.start()
    third.wait(60)
    assert client.sent[3:] == ["a.csv"]
    other = upload(client.create_run(client.experiment).info.run_id)  # another run knows none of it
    other.start()
    other.wait(60)
    assert len(client.sent[4:]) == 3


def test_the_caller_does_not_wait_while_a_file_is_sent_and_at_the_end_not_for_ever(
    client, upload, tmp_path, caplog
):
    (tmp_path / "a.csv").write_text("1")
    client.gate.clear()
    uploads = upload()
    uploads.start()  # would hang here
    uploads.wait(0.05)
    assert client.sent == []
    assert "are left undone" in caplog.text
    client.gate.set()
    uploads.thread.join(60)
    assert client.sent == ["a.csv"]


@pytest.mark.parametrize("error", [MlflowException("503\nbusy"), ConnectionError("503\nbusy")])
def test_a_failure_is_one_line_and_a_resumed_run_tries_again(client, upload, tmp_path, caplog, error):
    caplog.set_level(logging.WARNING, "common")
    (tmp_path / "a.csv").write_text("1")
    client.error = error
    uploads = upload()
    uploads.start()
    uploads.wait(60)
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "a.csv") in line
    assert "503 busy" in line
    client.error = None
    again = upload()
    again.start()
    again.wait(60)
    assert client.sent == ["a.csv"]


def test_a_checkpoint_that_is_gone_by_then_is_no_failure(client, upload, tmp_path, caplog):
    (tmp_path / "a.csv").write_text("1")
    (tmp_path / "b.csv").write_text("2")
    client.gate.clear()
    uploads = upload()
    uploads.start()
    (tmp_path / "b.csv").unlink()
    client.gate.set()
    uploads.wait(60)
    assert client.sent == ["a.csv"]
    assert caplog.text == ""


@pytest.mark.parametrize(("start", "parts"), [(0, ["5/5", "loss=0.5"]), (3, ["3/5", "5/5"])])
def test_the_bar_reaches_the_last_step_and_a_resumed_run_starts_at_its_own(capsys, start, parts):
    engine = starting_at(start, lambda engine, batch: [{"loss": 0.5}])
    Progress(log_every=2, names=["loss", "absent"]).attach(engine)
    engine.run([0] * 5, max_epochs=1, epoch_length=5)
    shown = capsys.readouterr().err
    assert all(part in shown for part in parts)


STEP_S, WAIT_S = 0.02, 0.01


def slow_batches():
    while True:
        time.sleep(WAIT_S)
        yield 0


def paces(steps: int, start: int = 0, **options) -> list[dict[str, float]]:
    """Metrics after each step of a run."""
    engine, seen = starting_at(start, lambda engine, batch: time.sleep(STEP_S)), []
    options |= {"log_every": 4, "items_per_step": 10, "rate_name": "views_per_second"}
    Throughput(device=torch.device("cpu"), **options).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(dict(e.state.metrics)))
    engine.run(slow_batches(), max_epochs=1, epoch_length=steps)
    return seen


def test_rate_and_wait_are_those_of_the_steps_since_the_last_measurement():
    measured = paces(steps=8)
    last = measured[-1]
    # the machine may be slower than asked to be, never faster
    assert 0 < last["views_per_second"] <= 10 / (STEP_S + WAIT_S)
    assert 0.9 * WAIT_S * last["views_per_second"] / 10 <= last["data_wait_share"] < 1
    assert last.keys() == {"views_per_second", "data_wait_share"}
    assert len({metrics["views_per_second"] for metrics in measured}) == 3  # steps 1, 4 and 8


def test_a_resumed_run_counts_its_own_steps_only():
    assert paces(steps=8, start=6)[-1]["views_per_second"] <= 10 / (STEP_S + WAIT_S)


def test_mfu_is_the_share_of_the_peak():
    last = paces(steps=4, flops_per_step=3e9, peak_flops=1e12)[-1]
    assert last["mfu"] == pytest.approx(last["views_per_second"] / 10 * 3e9 / 1e12)
