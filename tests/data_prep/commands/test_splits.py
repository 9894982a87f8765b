import random
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep import __main__ as module
from data_prep.splits import read_split

COMMITTED = Path(module.__file__).parent / "split_lists" / "ct_rate_validation_patients.csv"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(module.app, ["splits", *map(str, arguments)], env={"COLUMNS": "200"})


def write_table(path: Path, volumes: list[str]) -> Path:
    path.write_text("\n".join(["VolumeName,Emphysema", *(f"{volume}.nii.gz,0" for volume in volumes)]) + "\n")
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    volumes = [f"train_{patient}_{scan}_1" for patient in range(1, 31) for scan in "ab"]
    return write_table(tmp_path / "labels.csv", volumes)


def test_a_split_is_written_whatever_the_order_of_the_table_and_proven(labels: Path, tmp_path: Path) -> None:
    header, *rows = labels.read_text().splitlines()
    shuffled = tmp_path / "shuffled.csv"
    shuffled.write_text("\n".join([header, *random.Random(0).sample(rows, len(rows))]))
    for table, name in ((labels, "a.csv"), (shuffled, "b.csv")):
        answer = invoke("--labels", table, "--out", tmp_path / name, "--num-val-patients", 7)
        assert answer.exit_code == 0, answer.output
        assert "Proven: no patient is on two sides" in answer.stderr
        assert re.search(r"train +│ +23 +│ +46", answer.stdout), answer.stdout
        assert re.search(r"validation +│ +7 +│ +14", answer.stdout), answer.stdout
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert invoke("--check", tmp_path / "a.csv", "--labels", shuffled).exit_code == 0
    again = invoke("--labels", labels, "--out", tmp_path / "c.csv", "--num-val-patients", 7, "--seed", 43)
    assert again.exit_code == 0
    assert (tmp_path / "c.csv").read_bytes() != (tmp_path / "a.csv").read_bytes()


def test_dense_probes_get_three_sides_of_a_list_of_volumes(tmp_path: Path) -> None:
    listing = tmp_path / "annotated.txt"
    listing.write_text("".join(f"dataset/valid_fixed/valid_{n}_a_1.nii.gz\n" for n in range(1, 21)))
    out = tmp_path / "dense.csv"
    answer = invoke("--volumes", listing, "--dense-probes", "--out", out)
    assert answer.exit_code == 0, answer.output
    sides = [side for _, side in read_split(out)]
    assert [sides.count(side) for side in ("train", "validation", "test")] == [14, 2, 4]


def test_a_patient_on_both_sides_ends_with_status_1(labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "splits.csv"
    invoke("--labels", labels, "--out", out, "--num-val-patients", 7)
    text = out.read_text()
    line = re.search(r"(train_\d+_b_1,train_\d+),train\n", text)
    out.write_text(text.replace(line[0], f"{line[1]},validation\n"))
    answer = invoke("--check", out, "--labels", labels)
    assert answer.exit_code == 1
    assert "Wrong: a patient must be on one side, got 1 on several: 'train_" in answer.stderr
    assert "Proven" not in answer.output


@pytest.mark.parametrize(("last", "status"), [(20_000, 0), (19_999, 1), (20_001, 1)])
def test_the_committed_patients_are_those_of_a_table_with_patients_1_to_20000(
    last: int, status: int, tmp_path: Path
) -> None:
    """One patient too few or too many is another draw: the numbering that was assumed is proven by this."""
    labels = write_table(tmp_path / "labels.csv", [f"train_{n}_a_1" for n in range(last, 0, -1)])
    answer = invoke("--labels", labels, "--out", tmp_path / "splits.csv", "--expect", COMMITTED)
    assert answer.exit_code == status, answer.output
    if status == 0:
        assert "the validation patients are those of" in answer.stderr
    else:
        assert "'validation' must have the patients of the list, got none of" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of --out and --check must be given, got both or none."),
        (("--out", "a.csv", "--check", "b.csv"), "one of --out and --check must be given, got both or none."),
        (("--out", "a.csv"), "--labels or --volumes must say what to split, got none of them."),
        (
            ("--out", "a.csv", "--labels", "x.csv", "--volumes", "y.txt"),
            "at most one of --labels and --volumes must be given, got both.",
        ),
    ],
)
def test_contradictory_options_are_refused(arguments: tuple[str, ...], message: str) -> None:
    answer = invoke(*arguments)
    assert isinstance(answer.exception, ValueError)
    assert str(answer.exception) == message
