"""The executed config is what MONAI runs, and a misspelt knob is an error."""

import json

import pytest

from common.run.executed_config import executed_config, knobs_that_bind, plain_knobs


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "configs").mkdir()
    content = {"slab_mm": 12.0, "train": {"trainer": {"max_epochs": 3}}, "scales": [0.3, 0.6], "net": None}
    content |= {"compiled": False, "output_dir": "runs"}
    (tmp_path / "configs" / "train.json").write_text(json.dumps(content))
    return tmp_path


def command(bundle, *words):
    return ["monai.bundle", "run", "--config_file", str(bundle / "configs" / "train.json"), *words]


def test_overrides_of_the_command_line_are_merged(bundle):
    words = ["--slab_mm", "5", "--train::trainer::max_epochs=7", "--scales", "[0.1, 0.2]", "--bundle_root"]
    with pytest.raises(ValueError, match="bundle_root"):  # not a knob of this little bundle
        executed_config(str(bundle), "train.json", command(bundle, *words))
    config = executed_config(str(bundle), "train.json", command(bundle, *words[:-1]))
    assert config["slab_mm"] == 5
    assert config["train"]["trainer"]["max_epochs"] == 7
    assert config["scales"] == [0.1, 0.2]


@pytest.mark.parametrize("words", [("-slab_mm", "5"), ("-slab_mm=5",), ("-compiled", "-slab_mm", "5")])
def test_one_dash_is_as_good_as_two_for_fire(bundle, words):
    assert executed_config(str(bundle), "train.json", command(bundle, *words))["slab_mm"] == 5
    negative = executed_config(str(bundle), "train.json", command(bundle, "--slab_mm", "-5"))
    assert negative["slab_mm"] == -5
    with pytest.raises(ValueError, match="got 'slab_mn' in the command line"):
        executed_config(str(bundle), "train.json", command(bundle, "-slab_mn", "1"))


def test_an_args_file_is_merged_and_checked_and_the_command_line_stronger(bundle):
    content = {"config_file": str(bundle / "configs" / "train.json"), "slab_mm": 6.0, "output_dir": "there"}
    (bundle / "args.json").write_text(json.dumps(content))
    argv = ["monai.bundle", "run", "--args_file", str(bundle / "args.json"), "--slab_mm", "7"]
    config = executed_config(str(bundle), "train.json", argv)
    assert (config["slab_mm"], config["output_dir"]) == (7, "there")
    (bundle / "args.json").write_text(json.dumps(content | {"slab_mn": 6.0}))
    with pytest.raises(ValueError, match="got 'slab_mn' in the command line"):
        executed_config(str(bundle), "train.json", argv)
    with pytest.raises(FileNotFoundError, match="args_file must be a JSON file, got 'nowhere'"):
        executed_config(str(bundle), "train.json", ["monai.bundle", "run", "--args_file", "nowhere"])


def test_further_config_files_are_merged_and_checked(bundle):
    overlay = bundle / "demo.json"
    overlay.write_text(json.dumps({"slab_mm": 6.0}))
    files = f"['{bundle / 'configs' / 'train.json'}', '{overlay}']"
    argv = ["monai.bundle", "run", "--config_file", files]
    assert executed_config(str(bundle), "train.json", argv)["slab_mm"] == 6.0
    overlay.write_text(json.dumps({"slab_mm": None}))  # a file can say null, the command line cannot
    assert executed_config(str(bundle), "train.json", argv)["slab_mm"] is None
    overlay.write_text(json.dumps({"slab_mn": 6.0}))
    with pytest.raises(ValueError, match=r"got 'slab_mn' in '.*demo.json'. Did you mean 'slab_mm'"):
        executed_config(str(bundle), "train.json", argv)


@pytest.mark.parametrize(
    "knob",
    ["--slab_mn", "--train::trainer::max_epoch", "--scales::2", "--slab_mm::0", "--output_dir::0", "--"],
)
def test_an_unknown_knob_is_named_with_the_nearest_one(bundle, knob):
    with pytest.raises(ValueError, match=f"got '{knob[2:]}' in the command line"):
        executed_config(str(bundle), "train.json", command(bundle, knob, "1"))


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("slab_mm", "thick", r"slab_mm must be a number such as 12.0, got 'thick' in the command line"),
        ("slab_mm", "", "slab_mm must be a number such as 12.0, got ''"),
        ("slab_mm", "True", "slab_mm must be a number such as 12.0, got True"),
        ("slab_mm", "[12.0]", r"slab_mm must be a number such as 12.0, got \[12.0\]"),
        ("train::trainer::max_epochs", "2.5", "max_epochs must be a whole number such as 3, got 2.5"),
        ("scales", "0.3", r"scales must be a list such as \[0.3, 0.6\], got 0.3"),
        ("compiled", "no", "compiled must be True or False such as False, got 'no'"),
        ("output_dir", "7", "output_dir must be text such as 'runs', got 7"),
    ],
)
def test_another_kind_of_value_is_refused(bundle, knob, value, message):
    with pytest.raises(ValueError, match=message):
        executed_config(str(bundle), "train.json", command(bundle, f"--{knob}", value))


@pytest.mark.parametrize(
    ("knob", "value", "expected"),
    [
        ("slab_mm", "6", 6),
        ("slab_mm", "$12 / 2", "$12 / 2"),
        ("scales", "@other", "@other"),
        ("net", "3", 3),
        ("output_dir", "[1, 2]", [1, 2]),  # hu_window is the name of one or its four numbers
    ],
)
def test_a_value_of_the_same_kind_or_an_expression_is_taken(bundle, knob, value, expected):
    assert executed_config(str(bundle), "train.json", command(bundle, f"--{knob}", value))[knob] == expected


@pytest.mark.parametrize("word", ["None", "null"])
def test_a_bare_none_which_monai_ignores_is_refused(bundle, word):
    with pytest.raises(ValueError, match=r"net must be '\$None' \(quoted\) to be null"):
        executed_config(str(bundle), "train.json", command(bundle, "--net", word))
    assert executed_config(str(bundle), "train.json", command(bundle, "--net", "$None"))["net"] == "$None"


def test_without_monais_command_line_the_bundles_own_file_counts(bundle):
    assert executed_config(str(bundle), "train.json", ["pytest", "-q"])["slab_mm"] == 12.0


def test_binding_knobs_leave_out_components_and_what_may_change():
    config = {"seed": 1, "output_dir": "x", "net": {"_target_": "Net"}, "run": ["$1"], "_desc_": ""}
    assert knobs_that_bind(config, free=["output_dir"]) == {"seed": 1}


def test_plain_knobs_are_values_not_components():
    config = {"slab_mm": 12.0, "seed": 1, "loss": {"_target_": "Loss"}, "run": ["$1"], "_desc_": "words"}
    assert plain_knobs(config) == {"slab_mm": 12.0, "seed": 1}


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_a_further_config_file_that_is_none_is_named(bundle, content):
    overlay = bundle / "demo.json"
    overlay.write_bytes(content)
    argv = command(bundle)[:-1] + [f"['{bundle / 'configs' / 'train.json'}', '{overlay}']"]
    with pytest.raises(ValueError, match=r"config_file must .* '.*demo.json'"):
        executed_config(str(bundle), "train.json", argv)
    overlay.unlink()
    with pytest.raises(FileNotFoundError, match=r"config_file must be a JSON file, got '.*demo.json'"):
        executed_config(str(bundle), "train.json", argv)


def test_a_value_that_is_no_python_is_text(bundle):
    config = executed_config(str(bundle), "train.json", command(bundle, "--output_dir", "{[]: 1}"))
    assert config["output_dir"] == "{[]: 1}"
