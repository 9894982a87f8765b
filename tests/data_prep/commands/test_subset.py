import re
from pathlib import Path

import numpy as np
from typer.testing import CliRunner, Result

from common.cohort.cohort import listed_volumes, load_labels, patient_of, read_labels
from data_prep import __main__ as module

NAMES = [label.name for label in load_labels("ct_rate")]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(module.app, ["subset", *map(str, arguments)], env={"COLUMNS": "200"})


def write_table(path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        ",".join([f"train_{patient}_a_{recon}.nii.gz", *map(str, rng.integers(0, 2, 18))])
        for patient in range(1, 101)
        for recon in (1, 2)
    ]
    path.write_text("\n".join([",".join(["VolumeName", *NAMES]), *rows]) + "\n")
    return path


def test_a_label_table_and_a_skip_list_are_written_and_the_match_is_shown(tmp_path: Path) -> None:
    labels, out, others = write_table(tmp_path / "labels.csv"), tmp_path / "subset.csv", tmp_path / "rest.txt"
    answer = invoke("--labels", labels, "--patients", 30, "--out", out, "--skip-list", others)
    assert answer.exit_code == 0, answer.output
    assert "60 of 200 volumes, 30 patients" in answer.stdout
    everyone, chosen = read_labels(labels, NAMES), read_labels(out, NAMES)
    assert len({patient_of(volume) for volume in chosen}) == 30
    assert listed_volumes(others) == everyone.keys() - chosen.keys()
    shares = [100 * np.mean([values[4] for values in table.values()]) for table in (everyone, chosen)]
    line = re.search(rf"{NAMES[4]} +│ +([\d.]+) % │ +([\d.]+) %", answer.stdout)
    assert [float(line[1]), float(line[2])] == [round(float(share), 2) for share in shares]
    largest = re.search(r"largest difference +│ +│ +│ +([\d.]+) │ +([\d.]+)", answer.stdout)
    assert 0 < float(largest[1]) < float(largest[2])


def test_a_class_that_the_table_lacks_is_a_mistake(tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("VolumeName,Emphysema\ntrain_1_a_1,0\n")
    answer = invoke("--labels", labels, "--out", tmp_path / "subset.csv")
    assert "labels_csv must have the column 'Medical material'" in str(answer.exception)
    assert not (tmp_path / "subset.csv").exists()
