import csv
import random
import re
from pathlib import Path

import numpy as np
import pytest

from common.cohort.cohort import listed_volumes, load_labels, patient_of, read_labels
from data_prep import __main__ as module
from data_prep.sources.rad_chestct import PREFIXES
from data_prep.splits import read_split

COMMITTED = Path(module.__file__).parent / "split_lists" / "ct_rate_validation_patients.csv"


def write_table(path: Path, volumes: list[str]) -> Path:
    path.write_text("\n".join(["VolumeName,Emphysema", *(f"{volume}.nii.gz,0" for volume in volumes)]) + "\n")
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    volumes = [f"train_{patient}_{scan}_1" for patient in range(1, 31) for scan in "ab"]
    return write_table(tmp_path / "labels.csv", volumes)


def test_a_split_is_written_whatever_the_order_of_the_table_and_proven(labels, tmp_path, run_command) -> None:
    header, *rows = labels.read_text().splitlines()
    shuffled = tmp_path / "shuffled.csv"
    shuffled.write_text("\n".join([header, *random.Random(0).sample(rows, len(rows))]))
    for table, name in ((labels, "a.csv"), (shuffled, "b.csv")):
        answer = run_command("splits", "--labels", table, "--out", tmp_path / name, "--num-val-patients", 7)
        assert answer.exit_code == 0, answer.output
        assert "Proven: no patient is on two sides" in answer.stderr
        assert re.search(r"train +│ +23 +│ +46", answer.stdout), answer.stdout
        assert re.search(r"validation +│ +7 +│ +14", answer.stdout), answer.stdout
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert run_command("splits", "--check", tmp_path / "a.csv", "--labels", shuffled).exit_code == 0
    again = run_command(
        "splits", "--labels", labels, "--out", tmp_path / "c.csv", "--num-val-patients", 7, "--seed", 43
    )
    assert again.exit_code == 0
    assert (tmp_path / "c.csv").read_bytes() != (tmp_path / "a.csv").read_bytes()


def test_dense_probes_get_three_sides_of_a_list_of_volumes(tmp_path, run_command) -> None:
    listing = tmp_path / "annotated.txt"
    listing.write_text("".join(f"dataset/valid_fixed/valid_{n}_a_1.nii.gz\n" for n in range(1, 21)))
    out = tmp_path / "dense.csv"
    answer = run_command("splits", "--volumes", listing, "--dense-probes", "--out", out)
    assert answer.exit_code == 0, answer.output
    sides = [side for _, side in read_split(out)]
    assert [sides.count(side) for side in ("train", "validation", "test")] == [14, 2, 4]


def test_a_patient_on_both_sides_ends_with_status_1(labels, tmp_path, run_command) -> None:
    out = tmp_path / "splits.csv"
    run_command("splits", "--labels", labels, "--out", out, "--num-val-patients", 7)
    text = out.read_text()
    line = re.search(r"(train_\d+_b_1,train_\d+),train\n", text)
    out.write_text(text.replace(line[0], f"{line[1]},validation\n"))
    answer = run_command("splits", "--check", out, "--labels", labels)
    assert answer.exit_code == 1
    assert "Wrong: a patient must be on one side, got 1 on several: 'train_" in answer.stderr
    assert "Proven" not in answer.output


@pytest.mark.parametrize(("last", "status"), [(20_000, 0), (19_999, 1), (20_001, 1)])
def test_the_committed_patients_are_those_of_a_table_with_patients_1_to_20000(
    last, status, tmp_path, run_command
) -> None:
    """One patient too few or too many is another draw: the numbering that was assumed is proven by this."""
    labels = write_table(tmp_path / "labels.csv", [f"train_{n}_a_1" for n in range(last, 0, -1)])
    answer = run_command(
        "splits", "--labels", labels, "--out", tmp_path / "splits.csv", "--expect", COMMITTED
    )
    assert answer.exit_code == status, answer.output
    if status == 0:
        assert "the validation patients are those of" in answer.stderr
    else:
        assert "'validation' must have the patients of the list, but" in answer.stderr


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
def test_contradictory_options_are_refused(arguments, message, run_command) -> None:
    answer = run_command("splits", *arguments)
    assert isinstance(answer.exception, ValueError)
    assert str(answer.exception) == message


CT_RATE_NAMES = [label.name for label in load_labels("ct_rate")]


def write_random_labels(path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        ",".join([f"train_{patient}_a_{recon}.nii.gz", *map(str, rng.integers(0, 2, 18))])
        for patient in range(1, 101)
        for recon in (1, 2)
    ]
    path.write_text("\n".join([",".join(["VolumeName", *CT_RATE_NAMES]), *rows]) + "\n")
    return path


def test_a_label_table_and_a_skip_list_are_written_and_the_match_is_shown(tmp_path, run_command) -> None:
    labels, out, others = (
        write_random_labels(tmp_path / "labels.csv"),
        tmp_path / "subset.csv",
        tmp_path / "rest.txt",
    )
    answer = run_command("subset", "--labels", labels, "--patients", 30, "--out", out, "--skip-list", others)
    assert answer.exit_code == 0, answer.output
    assert "60 of 200 volumes, 30 patients" in answer.stdout
    everyone, chosen = read_labels(labels, CT_RATE_NAMES), read_labels(out, CT_RATE_NAMES)
    assert len({patient_of(volume) for volume in chosen}) == 30
    assert listed_volumes(others) == everyone.keys() - chosen.keys()
    shares = [100 * np.mean([values[4] for values in table.values()]) for table in (everyone, chosen)]
    line = re.search(rf"{CT_RATE_NAMES[4]} +│ +([\d.]+) % │ +([\d.]+) %", answer.stdout)
    assert [float(line[1]), float(line[2])] == [round(float(share), 2) for share in shares]
    largest = re.search(r"largest difference +│ +│ +│ +([\d.]+) │ +([\d.]+)", answer.stdout)
    assert 0 < float(largest[1]) < float(largest[2])


def test_a_class_that_the_table_lacks_is_a_mistake(tmp_path, run_command) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("VolumeName,Emphysema\ntrain_1_a_1,0\n")
    answer = run_command("subset", "--labels", labels, "--out", tmp_path / "subset.csv")
    assert "labels_csv must have the column 'Medical material'" in str(answer.exception)
    assert not (tmp_path / "subset.csv").exists()


RAD_NAMES = [label.name for label in load_labels("rad_chestct")]
COLUMNS = [f"{part}*{place}" for parts in PREFIXES.values() for part in parts for place in ("left", "right")]


def write_tables(root: Path, splits: tuple[tuple[str, str], ...]) -> dict[str, dict[str, int]]:
    rng, written = np.random.default_rng(0), {}
    for prefix, split in splits:
        path = root / "tables" / f"img{split}_Abnormality_and_Location_Labels.csv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["NoteAcc_DEID", *COLUMNS])
            for number in range(3):
                values = (rng.random(len(COLUMNS)) < 0.1).astype(int).tolist()
                written[f"{prefix}{number:05d}"] = dict(zip(COLUMNS, values, strict=True))
                table.writerow([f"{prefix}{number:05d}", *values])
    return written


def test_a_class_is_positive_if_any_part_is_at_any_place(tmp_path, run_command) -> None:
    written = write_tables(tmp_path, (("trn", "train"), ("val", "valid"), ("tst", "test")))
    out = tmp_path / "new" / "labels.csv"
    answer = run_command("rad-labels", "--root", tmp_path, "--out", out)
    assert answer.exit_code == 0, answer.output
    assert "9 volumes in" in answer.output
    labels = read_labels(out, RAD_NAMES)
    assert list(labels) == list(written)
    for volume, columns in written.items():
        for c, name in enumerate(RAD_NAMES):
            positive = any(
                columns[f"{part}*{place}"] for part in PREFIXES[name] for place in ("left", "right")
            )
            assert labels[volume][c] == positive, (volume, name)
    assert {0, 1} == {int(value) for own in labels.values() for value in own}


def test_a_missing_table_is_named(tmp_path, run_command) -> None:
    write_tables(tmp_path, (("trn", "train"), ("tst", "test")))
    answer = run_command("rad-labels", "--root", tmp_path, "--out", tmp_path / "labels.csv")
    assert "No 'imgvalid_Abnormality_and_Location_Labels.csv'" in str(answer.exception)
    assert not (tmp_path / "labels.csv").exists()
