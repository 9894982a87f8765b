import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dale_ct import EmbeddingStore

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
