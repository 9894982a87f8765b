"""``python -m data_prep phantom`` writes what ``write_cohort`` does with the same settings."""

from data_prep.phantom.cohort import Settings, write_cohort

OPTIONS = "--volumes 1 --seed 3 --form v2 --matrix 40 --spacing 6 8 --valid-share 0.4 --rex-share 0.6"


def test_the_command_writes_a_cohort(tmp_path, run_command) -> None:
    arguments = ["phantom", *OPTIONS.split(), "--out", str(tmp_path / "one"), "--processes", "1"]
    answer = run_command(*arguments)
    assert answer.exit_code == 0, answer.output
    assert not (tmp_path / "one/dataset/radiology_text_reports").exists()
    assert run_command(*arguments, "--reports").exit_code == 0
    reports = tmp_path / "one/dataset/radiology_text_reports/train_reports.csv"
    assert "SYNTHETIC" in reports.read_text()
    settings = Settings(seed=3, matrix=40, slice_mm=(6.0, 8.0), valid_share=0.4, rex_share=0.6)
    list(write_cohort(tmp_path / "other", 1, settings, 1))
    files = sorted((tmp_path / "other").rglob("*.nii.gz"))
    assert files
    for file in files:
        assert (tmp_path / "one" / file.relative_to(tmp_path / "other")).read_bytes() == file.read_bytes()
