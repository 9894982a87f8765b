"""Each command draws what it was asked for, and refuses what does not fit before long work."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from common.reports import slice_grid
from common.reports.commands import app
from common.reports.results import ResultRow, add_rows
from common.reports.slice_grid import Row

pytestmark = pytest.mark.usefixtures("any_values")

REPOSITORY = Path(__file__).resolve().parents[3]
HEAVY = {"torch", "monai", "matplotlib", "numpy"}


@pytest.mark.parametrize("name", ["levels", "patches", "paths", "results"])
def test_every_command_has_help_with_an_example(name: str) -> None:
    answer = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"})
    assert answer.exit_code == 0
    assert f"Example: dale-ct show {name} " in answer.output
    assert ("PNG to write" in answer.output) == (name != "results")


def test_help_imports_nothing_heavy() -> None:
    words = "import sys, common.reports.commands; print(*{name.split('.')[0] for name in sys.modules})"
    answer = subprocess.run(
        [sys.executable, "-c", words], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(answer.stdout.split())


def height(path: Path) -> int:
    return Image.open(path).height


def test_patches_have_a_row_for_each_thing_that_is_shown(
    ct_path: Path, draw: Callable[..., Result], probes: Path, tmp_path: Path
) -> None:
    named = ["--probes", probes, "--name", "liver", "--name", "heart"]
    for rows, words in (
        (4, []),
        (2, ["--show", "components", "--slices", 4, "--slices", 6]),
        (3, named),
        (4, [*named, "--show", "attention"]),
    ):
        out = tmp_path / "new" / f"{len(words)}.png"
        answer = draw("patches", ct_path, "--out", out, *words)
        assert answer.exit_code == 0, answer.output
        assert height(out) == pytest.approx(120 * (2.6 * rows + 0.5), abs=2)


def test_likeness_is_to_the_patch_and_in_the_slices_that_were_asked_for(
    ct_path: Path, draw: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Row] = []
    ours = slice_grid.slice_grid
    monkeypatch.setattr(
        slice_grid, "slice_grid", lambda rows, title: (drawn.extend(rows), ours(rows, title))[1]
    )
    words = ["--show", "likeness", "--patch", 3, 1, "--slices", 6, "--slices", 2]
    answer = draw("patches", ct_path, "--out", tmp_path / "a.png", *words)
    assert answer.exit_code == 0, answer.output
    slices, likeness = drawn
    assert [title.split(",")[0] for title in slices.titles] == ["slice 6", "slice 2"]
    assert likeness.mark == (3, 1)
    np.testing.assert_allclose(likeness.values[:, 3, 1], 1, rtol=1e-5)


def test_what_does_not_fit_is_refused(ct_path: Path, draw: Callable[..., Result], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "a.png"]
    for words, said in (
        (["--name", "liver"], "--name and --probes go together"),
        (["--size-px", 30], "cropped_24"),
        (["--patch", 4, 0], "got (4, 0)"),
        (["--slices", 9], "0 to 8 in this scan, got 9"),
        (["--show", "tokens"], "tokens"),
    ):
        answer = draw("patches", ct_path, *out, *words)
        assert answer.exit_code
        assert said in answer.output + str(answer.exception)
    missing = draw("patches", tmp_path / "none.nii.gz", *out)
    assert "none.nii.gz" in re.sub(r"[\s│]", "", missing.output)
    assert not (tmp_path / "a.png").exists()


def test_levels_draw_a_row_per_scan_and_say_how_far_off(
    ct_path: Path, draw: Callable[..., Result], tmp_path: Path
) -> None:
    out = tmp_path / "a.png"
    answer = draw("levels", ct_path, ct_path, ct_path, "--out", out, "--slices", 2)
    assert answer.exit_code == 0, answer.output
    assert answer.output.count("scan_1: cos 1.000, r ") == 3
    assert height(out) == pytest.approx(120 * (2.6 * 3 + 0.5), abs=2)


def test_paths_are_drawn_for_the_volumes_of_all_folders(
    write_paths: Callable[..., Path], tmp_path: Path
) -> None:
    line, tangle = str(write_paths("line")), str(write_paths("tangle"))
    out = tmp_path / "a.png"
    for rows, volumes in ((1, ["--volume", "valid_2_a_1"]), (3, [])):
        answer = CliRunner().invoke(app, ["paths", line, tangle, "--out", str(out), *volumes])
        assert answer.exit_code == 0, answer.output
        assert height(out) == pytest.approx(120 * (3.7 * rows + 0.6), abs=2)
    other = str(write_paths("circle", split="train"))
    assert other in str(CliRunner().invoke(app, ["paths", line, other, "--out", str(out)]).exception)


def test_results_of_several_tables_are_printed_together(tmp_path: Path) -> None:
    for encoder, dataset in (("dale_ct_2s", "ct_rate"), ("merlin", "rad_chestct")):
        rows = [ResultRow(encoder, "mil_probe", dataset, "macro_auroc", 0.8333, n=3002)]
        add_rows(tmp_path / f"{dataset}.csv", rows)
    answer = CliRunner().invoke(app, ["results", *map(str, sorted(tmp_path.glob("*.csv")))])
    assert answer.exit_code == 0, answer.output
    lines = [line.split() for line in answer.output.splitlines()]
    assert ["dale_ct_2s", "mil_probe", "ct_rate", "0.8333", "3002"] in lines
    assert ["merlin", "mil_probe", "rad_chestct", "0.8333", "3002"] in lines
