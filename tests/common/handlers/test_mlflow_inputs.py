"""Fields of MLflow's dataset column, of a folder and of a file."""

import json

from common.handlers.mlflow_inputs import dataset_input


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
