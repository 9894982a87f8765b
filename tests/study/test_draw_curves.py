from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from study.draw_curves import PANELS, main


@pytest.fixture
def store(tmp_path: Path) -> str:
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("pretraining", artifact_location=str(tmp_path))
    for name in ("a", "b"):
        run = client.create_run(experiment, run_name=name)
        for step in range(3):
            for metric in PANELS:
                client.log_metric(run.info.run_id, metric, step * 0.5, step=step)
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_curves_of_runs_are_drawn(store, tmp_path):
    main(store, ["a", "b"], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_a_run_that_is_not_there_is_named_with_those_that_are(store, tmp_path):
    with pytest.raises(SystemExit, match=r"run must be one of \['a', 'b'\], got 'c'"):
        main(store, ["a", "c"], tmp_path / "curves.png")
