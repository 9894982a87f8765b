from ast import literal_eval
from pathlib import Path

import pytest

from study.plan import ABLATIONS, CEILING, FLOORS, SIZES, TABLE_ENCODERS, TRAINED
from study.run import keys_of
from study.stages import REPOSITORY, Stage, all_stages, bundle, prep


@pytest.fixture(params=SIZES)
def stages(request: pytest.FixtureRequest) -> list[Stage]:
    return all_stages(SIZES[request.param], Path("study/out/test"), "bfloat16")


def test_stages_are_named_once_and_need_only_what_comes_before(stages):
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    for place, stage in enumerate(stages):
        assert set(stage.needs) <= set(names[:place])


def test_every_encoder_goes_through_its_tables(stages):
    names = {stage.name for stage in stages}
    assert {f"train {name}" for name in TRAINED | ABLATIONS} <= names
    for table in ("I", "III"):
        assert {f"table {table} {name}" for name in (*FLOORS, *TRAINED, *ABLATIONS)} <= names
    assert {f"table IV {name}" for name in TABLE_ENCODERS} <= names
    assert set(TABLE_ENCODERS) == {*FLOORS, *TRAINED, CEILING}
    assert f"table III {CEILING}" in names
    assert f"table I {CEILING}" not in names  # it has no patches


def test_floors_are_read_at_the_grid_of_the_labels_plainly_and_standardized(stages):
    by_name = {stage.name: stage.commands for stage in stages}
    embed, plain, standardized = by_name["table I pixels"]
    grid = next(words[words.index("--grid") + 1] for words in by_name["site a"] if "--grid" in words)
    strategy = embed[embed.index("--strategies") + 1]
    assert strategy == str([f"cropped_{32 * int(grid)}"])
    assert "--standardize" not in plain
    assert standardized[standardized.index("--standardize") + 1] == "True"
    (table_v,) = by_name["table V"]
    assert all(name in table_v[table_v.index("--floor_embeddings_dirs") + 1] for name in FLOORS)


def test_every_encoder_and_floor_meets_changed_scans_as_it_was_embedded(stages):
    by_name = {stage.name: stage.commands for stage in stages}
    for name in (*FLOORS, *TRAINED):
        (command,) = by_name[f"robustness {name}"]
        embed = by_name[f"table III {name}"][0]
        (config,) = literal_eval(command[command.index("--encoder_configs") + 1])
        assert config in embed[embed.index("--config_file") + 1]
        knobs = literal_eval(command[command.index("--encoder_knobs") + 1])
        for knob in ("name", "encoder_weights", "amp_dtype"):
            assert embed[embed.index(f"--{knob}") + 1] == str(knobs[knob] or "$None")


def test_every_config_file_is_there(stages):
    files = [
        word.strip("[]'")
        for stage in stages
        for command in stage.commands
        for place, words in enumerate(command)
        if command[place - 1] in ("--config_file", "--config-file")
        for word in words.split("', '")
    ]
    assert len(files) > 100
    assert all((REPOSITORY / file).is_file() for file in files)


def test_no_results_of_two_stages_share_a_folder(stages):
    outputs = [
        words[words.index("--output_dir") + 1]
        for stage in stages
        for words in stage.commands
        if "--output_dir" in words
    ]
    # the chosen strategies of Table VI are written into one folder a split, each under its own name
    assert len(set(outputs)) == len(outputs)


def test_a_changed_command_is_run_again_with_all_that_builds_on_it_and_nothing_else():
    stages = all_stages(SIZES["small"], Path("out"), "float32")
    changed = [
        stage._replace(commands=[[*stage.commands[0], "--lr", "1"]])
        if stage.name == "train dale_ct_0"
        else stage
        for stage in stages
    ]
    before, after = keys_of(stages), keys_of(changed)
    assert {name for name in before if before[name] != after[name]} == {
        "train dale_ct_0",
        "table I dale_ct_0",
        "table III dale_ct_0",
        "table IV dale_ct_0",
        "robustness dale_ct_0",
        "table V",
        "curves",
        "differences",
    }


def test_knobs_and_flags_are_written_as_their_commands_want_them():
    assert bundle("bundles/x", ["a.json", "b.json"], lr=0.1, ct_dir=None)[1:] == [
        *("run", "--config_file", "['a.json', 'b.json']"),
        *("--bundle_root", "bundles/x", "--lr", "0.1", "--ct_dir", "$None"),
    ]
    assert prep("phantom", spacing_mm=(4, 6), out=Path("a")) == [
        *("data_prep", "phantom", "--spacing-mm", "4", "6", "--out", "a"),
    ]
