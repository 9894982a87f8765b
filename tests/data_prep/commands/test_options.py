import pytest


@pytest.mark.parametrize("command", ["ct-rate", "dicom", "nifti", "rad-chestct"])
def test_commands_that_write_shards_have_the_same_options(command, run_command) -> None:
    answer = run_command(command, "--help")
    for option in ("--out", "--slices-per-shard", "--max-rejected", "--workers", "--scheduler"):
        assert option in answer.output


@pytest.mark.parametrize(
    ("option", "value"), [("--workers", "0"), ("--slices-per-shard", "0"), ("--max-rejected", "1.5")]
)
def test_values_out_of_range_are_refused(option, value, run_command) -> None:
    answer = run_command("nifti", ".", "--out", "out", option, value)
    assert answer.exit_code == 2
    assert option in answer.output
