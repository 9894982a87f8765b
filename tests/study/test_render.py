import csv
from pathlib import Path

import pytest

from common.reports.results import ResultRow, add_rows
from study import render
from study.run import write_record


def row(encoder: str, protocol: str, metric: str, *numbers: float, dataset: str = "ct_rate") -> ResultRow:
    return ResultRow(encoder, protocol, dataset, metric, *numbers)._replace(n=120, commit="abc")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished study of a few rows, and a page of its own."""
    folder = tmp_path / "study"
    rows = [
        row("dale_ct_2s", "mil_probe", "macro_auroc", 0.601, 0.5238, 0.6693),
        row("dale_ct_2s", "mil_probe", "macro_auprc", 0.25),
        row("dale_ct_0", "mil_probe", "macro_auprc", 0.2),
        row("dale_ct_0", "dense_patch", "macro_auprc", 0.1, dataset="totalsegmentator"),
        row("dale_ct_0", "dense_patch_standardized", "macro_auprc", 0.04, dataset="totalsegmentator"),
        row("pixels", "mil_probe", "macro_auprc", 0.22),
        row("pixels", "mil_probe_standardized", "macro_auprc", 0.29, 0.2, 0.4),
        row("pixels", "latent_geometry", "continuity_cosine", 0.498),
        row("lesion_areas", "retrained_standardized", "macro_auroc", 0.9, dataset="rad_chestct"),
        row("dale_ct_0", "retrained-frozen", "macro_auroc", -0.107, -0.2, 0.01, dataset="rad_chestct"),
        row("dale_ct_2s", "preprocessing_raw_48", "macro_auroc", 0.8),
        row("dale_ct_2s", "preprocessing_raw_48", "slices_per_second", 349.2),
        row("dale_ct_0", "latent_geometry", "continuity_cosine", 1.5, 1.25, 1.75),
        row("pixels", "robustness_hu_offset_7", "macro_auroc_change", -0.04, -0.1, 0.02),
        row("pixels", "robustness_hu_offset_7", "token_cosine", 0.9),
        row("2s_wide_knots", "mil_probe", "macro_auroc", 0.5),
    ]
    add_rows(folder / "results" / "all.csv", rows)
    (folder / "differences").mkdir()
    tables = {
        "table_iii": ("class,metric", "macro,auprc", "Emphysema,auprc"),
        "table_i": ("measure", "patch totalsegmentator auprc"),
    }
    for name, (columns, *lines) in tables.items():
        with (folder / "differences" / f"{name}.csv").open("w") as file:
            file.write(f"encoder,reference,{columns},difference,low,high,p\n")
            file.writelines(f"dale_ct_0,dale_ct_2s,{line},-0.05,-0.1,0.02,0.1\n" for line in lines)
    write_record("train dale_ct_0", "key", 90, folder)
    write_record("table I dale_ct_0", "key", 30, folder)
    (folder / "eval_slab_depth").mkdir()
    for name in render.PICTURES:
        (folder / name).write_bytes(b"picture")
    monkeypatch.setattr(render, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(render, "PAGE", tmp_path / "results.md")
    (tmp_path / "kept").mkdir()
    earlier = [
        row("dale_ct_2s", "mil_probe", "macro_auprc", 0.31),
        row("dale_ct_1s", "frozen", "macro_auroc", 0.5),
    ]
    add_rows(tmp_path / "kept" / "earlier_training.csv", earlier)
    return folder


def test_the_committed_page_is_what_its_rows_give():
    assert render.Page().write() == render.PAGE.read_text(encoding="utf-8")


def test_tables_hold_our_values_their_intervals_and_the_papers(study, tmp_path):
    names = ("TABLE_I", "TABLE_III", "TABLE_IV", "TABLE_V", "TABLE_VI", "ABLATIONS", "TIMES", "COMMITS")
    names += ("TWO_TRAININGS", "TABLE_III_STANDARDIZED", "ROBUSTNESS")
    (tmp_path / "kept" / "results.md.template").write_text("\n\n".join(f"@{name}@" for name in names))
    render.main(study)
    page = (tmp_path / "results.md").read_text()
    assert (
        "| patches, organs | `dale_ct_0` |  | .100 |  | .040 | -.050 (-.100 to +.020) | .9546 / .2938 |"
        in page
    )
    assert "| `dale_ct_2s` | .601 (.524 to .669) | .250 |  |  |  |  | .8333 / .5544 |" in page
    assert "| `dale_ct_0` |  | .200 |  |  |  | -.050 (-.100 to +.020) | .8254 / .5438 |" in page
    assert "| `dale_ct_0` | retrained-frozen | -.107 (-.200 to +.010) |" in page
    assert "| `continuity_cosine` | 1.500 (1.250 to 1.750) |  |  |  | .498 |  |  | 1.6844 and .4263 |" in page
    assert "| `pixels` |  | .220 |" in page
    assert "| `pixels` |  | .290 (.200 to .400) |" in page
    assert "| `lesion_areas` | retrained_standardized | .900 |" in page
    assert "| hu offset 7 | `pixels` | -.040 (-.100 to +.020) |  | .900 |" in page
    assert "| hu offset 7 | `dale_ct_2s` |" not in page
    assert "| raw 48 | .800 |  |  | 349 |  |" in page
    assert "| SIGReg: 27 knots on ±5, not 17 on ±3 | .500 |" in page
    assert "| all | 2 | 2.0 |" in page
    assert "abc" in page
    assert "| `dale_ct_2s` | .310 / .250 |  |  |  |" in page
    assert "`dale_ct_1s`" not in page.partition("earlier / this")[2]  # of one training only
    assert (tmp_path / "kept" / "figure_2.png").read_bytes() == b"picture"
    with (tmp_path / "kept" / "differences.csv").open(newline="") as file:
        assert [line["measure"] for line in csv.DictReader(file)] == [
            "patch totalsegmentator auprc",
            "table_iii auprc",
        ]


def test_check_finds_a_page_that_was_edited(study, tmp_path):
    (tmp_path / "kept" / "results.md.template").write_text("@TABLE_III@")
    render.main(study)
    render.main(check=True)
    (tmp_path / "results.md").write_text("by hand")
    with pytest.raises(SystemExit, match="out of date"):
        render.main(check=True)


def test_a_study_that_has_not_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"study must hold done/\*\.json, got none in"):
        render.keep(tmp_path)
