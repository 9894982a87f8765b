"""Files go to a real store, once, while the caller does other things."""

import logging
import threading
import time

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from common.handlers.mlflow_uploads import Uploads


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
