import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import __main__ as module

REPOSITORY = Path(__file__).resolve().parents[2]


COMMANDS = sorted(module.COMMANDS)


def test_commands_are_listed_with_what_they_do(run_command) -> None:
    answer = run_command("--help")
    assert answer.exit_code == 0
    for command in COMMANDS:
        assert re.search(rf"{command} +[A-Z]", answer.output), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_is_accepted(command, run_command) -> None:
    answer = run_command(command, "--help")
    assert answer.exit_code == 0
    example = re.search(rf"Example: python -m data_prep {command} (.*)", answer.output)
    assert example is not None
    for option in re.findall(r"--[a-z-]+", example[1]):
        assert answer.output.count(option) > 1, f"{option} is in the example and not among the options"


def test_help_does_not_wait_for_heavy_packages() -> None:
    code = "import sys, data_prep.__main__; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "numpy",
        "torch",
        "distributed",
        "pandas",
        "matplotlib",
        "SimpleITK",
        "totalsegmentator",
        "huggingface_hub",
    }
    assert not heavy & set(loaded)


def test_mistakes_end_in_one_line(tmp_path, mistake) -> None:
    assert "No volume in NIfTI" in mistake("nifti", tmp_path, "--out", tmp_path / "out")
    words = ("ct-rate", "--root", ".", "--split", "train", "--out", tmp_path / "out")
    said = mistake(*words, "--rexgroundingct", "x.json")
    assert "--rexgroundingct and --rexgroundingct-masks must be given together, got one of them." in said
    assert not (tmp_path / "out").exists()
