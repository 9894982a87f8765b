import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.engines import each_preprocessing as module
from common.reports.results import ResultRow, add_rows


def folders(root: Path, *strategies: str) -> list[str]:
    for side in ("train", "valid"):
        for strategy in strategies:
            (root / side / strategy).mkdir(parents=True)
    return ["--train-embeddings-dir", f"{root}/train/{{}}", "--test-embeddings-dir", f"{root}/valid/{{}}"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; one with the word "broken" fails, others add a row as a run does."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        if "broken" in command:
            return subprocess.CompletedProcess(command, 3)
        folder = Path(command[command.index("--train_embeddings_dir") + 1])
        row = ResultRow("dale_ct_2s", f"preprocessing_{folder.name}", "ct_rate", "macro_auroc", 0.75)
        add_rows(command[command.index("--results_csv") + 1], [row])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    return seen


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(module.app, [*map(str, arguments)], env={"COLUMNS": "160"})


def test_all_seven_run_with_the_same_knobs_and_end_in_one_table(tmp_path, commands):
    given = folders(tmp_path, *module.TABLE_VI)
    answer = invoke(*given, "--results-csv", tmp_path / "results.csv", "--max_steps", 7, "--dataset_dir", "x")
    assert answer.exit_code == 0, answer.output
    assert len(commands) == len(set(module.TABLE_VI)) == 7
    for strategy, command in zip(module.TABLE_VI, commands, strict=True):
        assert command[:4] == [sys.executable, "-m", "monai.bundle", "run"]
        assert command[command.index("--test_embeddings_dir") + 1] == f"{tmp_path}/valid/{strategy}"
        assert command[-4:] == ["--max_steps", "7", "--dataset_dir", "x"]
        assert command[command.index("--config_file") + 1] == "bundles/eval_preprocessing/configs/train.json"
        assert f"preprocessing_{strategy}" in answer.output


def test_some_strategies_and_other_configs_can_be_named(tmp_path, commands):
    given = folders(tmp_path, "raw_96", "cropped_96")
    named = ["--strategy", "cropped_96", "--strategy", "raw_96", "--results-csv", tmp_path / "results.csv"]
    answer = invoke(*given, *named, "--config_file", "['a.json','b.json']")
    assert answer.exit_code == 0, answer.output
    assert [Path(command[command.index("--train_embeddings_dir") + 1]).name for command in commands] == [
        "cropped_96",
        "raw_96",
    ]
    assert all(command.count("--config_file") == 1 for command in commands)


def test_a_failing_run_ends_the_sweep_and_is_named(tmp_path, commands):
    given = folders(tmp_path, "raw_144", "raw_256")
    named = ["--strategy", "raw_144", "--strategy", "raw_256", "--results-csv", tmp_path / "results.csv"]
    answer = invoke(*given, *named, "--x", "broken")
    assert answer.exit_code == 3
    assert len(commands) == 1
    assert "'raw_144' failed" in answer.output


def test_folders_are_looked_for_before_the_first_run(tmp_path, commands):
    answer = invoke(*folders(tmp_path, "raw_144"))
    assert isinstance(answer.exception, FileNotFoundError)
    assert f"'raw_256' in '{tmp_path}/train/raw_256' (--train_embeddings_dir)" in str(answer.exception)
    answer = invoke("--train-embeddings-dir", tmp_path, "--test-embeddings-dir", f"{tmp_path}/{{}}")
    assert "train_embeddings_dir must contain {} in place of the strategy" in str(answer.exception)
    assert commands == []
