import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dale_ct import EmbeddingStore
from data_prep.phantom.cohort import Settings, write_cohort

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def dale_ct(python_m, tmp_path):
    """Run ``dale-ct`` with words in a folder of its own."""
    return lambda *words: python_m(["dale_ct.cli", *words], tmp_path, PYTHONPATH=str(REPOSITORY))


def test_embed_writes_a_store_and_says_what_monai_would_be_told(
    dale_ct, python_m, small_bundle, ct_folder, tmp_path
):
    result = dale_ct("embed", ct_folder, "--encoder", small_bundle, "--weights", "random", "--out", "ours")
    assert result.returncode == 0, result.stderr
    (command,) = [line for line in result.stderr.splitlines() if line.startswith("$ python -m monai.bundle")]
    words = shlex.split(command.removeprefix("$ python -m "))
    words[words.index("ours")] = "theirs"
    told = python_m(words, tmp_path, PYTHONPATH=str(REPOSITORY))
    assert told.returncode == 0, told.stderr
    ours, theirs = EmbeddingStore(tmp_path / "ours"), EmbeddingStore(tmp_path / "theirs")
    assert ours.identity == theirs.identity
    assert ours.checksums(ours.volumes) == theirs.checksums(ours.volumes)
    assert "Done: embeddings of 2 volumes in 'ours'" in " ".join(result.stderr.split())
    # another CT of the name, and a store without the patch tokens that are asked for
    shutil.copy(ct_folder / "b.nii.gz", tmp_path / "a.nii.gz")
    options = ["--encoder", small_bundle, "--weights", "random", "--out", "ours"]
    for words, named in ((["a.nii.gz"], "another 'a'"), ([ct_folder, "--patch-tokens"], "no patch tokens")):
        result = dale_ct("embed", *words, *options)
        assert result.returncode == 2
        assert named in " ".join(result.stderr.split())


def test_predict_without_a_probe_shows_what_needs_none_beside_a_synthetic_scan(
    dale_ct, python_m, small_bundle, ct_folder, tmp_path
):
    options = ["--encoder", small_bundle, "--weights", "random", "--force"]
    result = dale_ct("predict", ct_folder, *options, "--out", "ours")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("No trained probe comes along") == 1
    assert "dale-ct probe /data/ct_rate" in result.stderr
    (command,) = [line for line in result.stderr.splitlines() if line.startswith("$ python -m monai.bundle")]
    words = shlex.split(command.removeprefix("$ python -m "))
    words[words.index("ours")] = "theirs"
    told = python_m(words, tmp_path, PYTHONPATH=str(REPOSITORY))
    assert told.returncode == 0, told.stderr
    ours, theirs = (
        json.loads((tmp_path / name / "overview.json").read_text()) for name in ("ours", "theirs")
    )
    assert ours == theirs
    assert {name: len(facts["levels"]) for name, facts in ours["volumes"].items()} == {"a": 11, "b": 5}
    assert ours["volumes"]["a"]["reference"]["name"] == "SYNTHETIC_reference"
    assert sorted(path.name for path in (tmp_path / "ours").glob("*.html")) == ["a.html", "b.html"]
    assert not (tmp_path / "ours" / "predictions.csv").exists()
    assert EmbeddingStore(tmp_path / "ours" / "embeddings").volumes == ["a", "b"]
    result = dale_ct("predict", ct_folder, *options, "--series", "b", "--out", "one")
    assert result.returncode == 0, result.stderr
    assert EmbeddingStore(tmp_path / "one" / "embeddings").volumes == ["b"]


def test_probe_embeds_both_splits_and_trains_what_predict_takes(dale_ct, small_bundle, tmp_path):
    cohort = tmp_path / "ct_rate"
    drawn = Settings(seed=3, matrix=32, slice_mm=(14.0, 14.0), valid_share=0.4)
    assert len(list(write_cohort(cohort, 16, drawn, num_processes=1))) == 16
    knobs = {"num_val_patients": 3, "max_steps": 4, "val_interval": 2, "num_seeds": 1, "num_resamples": 5}
    more = [word for name, value in knobs.items() for word in (f"--{name}", value)]
    more += ["--tracking_uri", f"sqlite:///{tmp_path}/mlflow.db", "--note", "drawn patients"]
    result = dale_ct("probe", cohort, "--encoder", small_bundle, "--weights", "random", "--out", "p", *more)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("$ python -m monai.bundle run") == 3
    assert "0.8333 (arXiv v1), 0.8247 (arXiv v2)" in result.stderr
    assert json.loads((tmp_path / "p" / "probe.json").read_text())["note"] == "drawn patients"
    assert (tmp_path / "p" / "results.csv").is_file()
    (ct, *_) = sorted((cohort / "dataset" / "valid_fixed").rglob("*.nii.gz"))
    options = ["--encoder", small_bundle, "--weights", "random", "--probe", "p", "--force"]
    result = dale_ct("predict", ct, *options)
    assert result.returncode == 0, result.stderr
    assert "For research, not for diagnosis." in result.stdout
    (page,) = (tmp_path / "predictions").glob("*.html")
    assert '"warnings": ["drawn patients"' in page.read_text(encoding="utf-8")
    # what is not there is told before anything is embedded
    result = dale_ct("probe", tmp_path, "--encoder", small_bundle)
    assert result.returncode != 0
    assert "train_fixed" in result.stderr


def test_the_papers_numbers_are_those_of_the_readme():
    about = json.loads((REPOSITORY / "bundles" / "eval_ct_rate" / "configs" / "metadata.json").read_text())
    numbers = about["paper_macro_auroc"]
    rows = [
        [cell.strip() for cell in line.split("|")[1:4]]
        for line in (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
        if re.match(r"\| `d", line)
    ]
    shown = {cells[0].strip("`"): [cell for cell in cells[1:] if cell != "–"] for cells in rows}
    slices = {
        name: [f"{auroc:.4f}"[1:] for auroc in of.values()] for name, of in numbers.items() if name[0] == "d"
    }
    assert slices == {name: values for name, values in shown.items() if name in slices}
    assert len(slices) == 6
    with (REPOSITORY / "docs" / "paper_results.csv").open() as file:
        table = {row["encoder"]: float(row["auroc"]) for row in csv.DictReader(file) if row["table"] == "III"}
    assert {name: of["arXiv v1"] for name, of in numbers.items() if "arXiv v1" in of} == {
        name: table[name] for name in numbers if name in table
    }


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["embed", "nowhere.nii.gz"], "nowhere.nii.gz"),
        (["embed", ".", "--encoder", "dale_ct_2x"], "dale_ct_2s"),
        (["embed", "no.txt", "--weights", "random"], "no.txt"),
        (["embed", "no.nii", "--weights", "random"], "no.nii"),
        (
            ["embed", "no.nii"],
            "https://huggingface.co/Kentucky-Open-Science/DALE-CT-2S/resolve/",
        ),  # no network
        (["predict", ".", "--probe", ".", "--encoder", "dale_ct_2x"], "dale_ct_2s"),
        (["train", "dale_ct"], "dale_ct_0"),
        (
            ["embed", ".", "--encoder", "dale_ct_2s", "--hu-window", "ct_rat", "--weights", "random"],
            "No volumes",
        ),
        (["weights", "onnx", "--bundle", "nowhere", "--out", "x.onnx"], "nowhere"),
    ],
)
def test_a_mistake_is_told_in_one_line(dale_ct, words, named, tmp_path):
    if words[1].startswith("no."):
        (tmp_path / words[1]).write_text("no CT")
    result = dale_ct(*words)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error:")
    assert named in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words", [["--help"], ["embed", "-h"], ["--version"], ["encoders"], ["data", "--help"]]
)
def test_help_and_lists_answer(dale_ct, words):
    result = dale_ct(*words)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_command_line_itself_imports_nothing_heavy():
    words = "import sys, dale_ct.cli; print(*{name.split('.')[0] for name in sys.modules})"
    answer = subprocess.run(
        [sys.executable, "-c", words], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"torch", "monai", "numpy", "matplotlib"} & set(answer.stdout.split())


def test_the_doctor_looks_at_every_part(dale_ct):
    result = dale_ct("doctor", "--no-online")
    for part in ("Python", "torch", "GPU", "Memory", "Disk", "MLflow"):
        assert part in result.stdout


def test_ctrl_c_ends_with_one_line_and_the_same_command_goes_on(
    stop_and_resume, small_bundle, ct_folder, tmp_path
):
    for number in range(400):
        (ct_folder / f"c{number}.nii.gz").hardlink_to(ct_folder / "b.nii.gz")
    words = ["embed", ct_folder, "--encoder", small_bundle, "--weights", "random", "--out", tmp_path / "out"]
    said = stop_and_resume(
        ["dale_ct.cli", *words], lambda text: re.search(r"[1-9]\d*/402", text), tmp_path / "out"
    )
    assert "Done: embeddings of 402 volumes" in " ".join(said.split())
    assert len(EmbeddingStore(tmp_path / "out")) == 402


def test_report_stands_for_the_bundles_command_and_names_a_folder_that_is_no_model(
    dale_ct, small_bundle, ct_folder
):
    result = dale_ct("report", ct_folder, "--model", ct_folder, "--encoder", small_bundle, "--series", "a")
    assert result.returncode != 0
    assert f"--report_dir {ct_folder}" in result.stderr
    assert "--series a" in result.stderr
    assert "No 'report.safetensors' in" in result.stderr
