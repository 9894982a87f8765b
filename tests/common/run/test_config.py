"""The executed config is what MONAI runs, a misspelt option is an error, and an error is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.run import config as config_module
from common.run.config import (
    code_version,
    executed_config,
    first_cause,
    knobs_that_bind,
    must_exist,
    plain_knobs,
)

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def execute(tmp_path):
    """Config of a little bundle as a command with further words would run it."""
    content = {"slab_mm": 12.0, "train": {"trainer": {"max_epochs": 3}}, "scales": [0.3, 0.6], "net": None}
    content |= {"compiled": False, "output_dir": "runs"}
    own = tmp_path / "configs" / "train.json"
    own.parent.mkdir()
    own.write_text(json.dumps(content))

    def run(*words: str, files: str | None = str(own)):
        argv = ["monai.bundle", "run", *(["--config_file", files] if files else []), *words]
        return executed_config(str(tmp_path), "train.json", argv)

    return run


def test_overrides_of_the_command_line_are_merged(execute):
    words = ["--slab_mm", "5", "--train::trainer::max_epochs=7", "--scales", "[0.1, 0.2]", "--bundle_root"]
    with pytest.raises(ValueError, match="bundle_root"):  # not a knob of this little bundle
        execute(*words)
    config = execute(*words[:-1])
    assert config["slab_mm"] == 5
    assert config["train"]["trainer"]["max_epochs"] == 7
    assert config["scales"] == [0.1, 0.2]


@pytest.mark.parametrize("words", [("-slab_mm", "5"), ("-slab_mm=5",), ("-compiled", "-slab_mm", "5")])
def test_one_dash_is_as_good_as_two_for_fire(execute, words):
    assert execute(*words)["slab_mm"] == 5
    assert execute("--slab_mm", "-5")["slab_mm"] == -5
    with pytest.raises(ValueError, match="'slab_mn'"):
        execute("-slab_mn", "1")


def test_an_args_file_is_merged_and_checked_and_the_command_line_stronger(execute, tmp_path):
    arguments = tmp_path / "args.json"
    content = {"config_file": str(tmp_path / "configs" / "train.json"), "slab_mm": 6.0, "output_dir": "there"}
    arguments.write_text(json.dumps(content))
    config = execute("--args_file", str(arguments), "--slab_mm", "7", files=None)
    assert (config["slab_mm"], config["output_dir"]) == (7, "there")
    arguments.write_text(json.dumps(content | {"slab_mn": 6.0}))
    with pytest.raises(ValueError, match="'slab_mn' in the command line"):
        execute("--args_file", str(arguments), files=None)
    with pytest.raises(FileNotFoundError, match="args_file.*'nowhere'"):
        execute("--args_file", "nowhere", files=None)


def test_further_config_files_are_merged_and_checked(execute, tmp_path):
    overlay = tmp_path / "demo.json"
    files = f"['{tmp_path / 'configs' / 'train.json'}', '{overlay}']"
    for value in (6.0, None):  # a file can say null, the command line cannot
        overlay.write_text(json.dumps({"slab_mm": value}))
        assert execute(files=files)["slab_mm"] == value
    overlay.write_text(json.dumps({"slab_mn": 6.0}))
    with pytest.raises(ValueError, match=r"'slab_mn' in '.*demo.json'.*'slab_mm'"):
        execute(files=files)
    for content in (b"{", b"\xff", b"[]"):
        overlay.write_bytes(content)
        with pytest.raises(ValueError, match=r"config_file must .* '.*demo.json'"):
            execute(files=files)
    overlay.unlink()
    with pytest.raises(FileNotFoundError, match=r"config_file.*demo.json"):
        execute(files=files)


@pytest.mark.parametrize(
    "knob",
    ["--slab_mn", "--train::trainer::max_epoch", "--scales::2", "--slab_mm::0", "--output_dir::0", "--"],
)
def test_an_unknown_knob_is_named(execute, knob):
    with pytest.raises(ValueError, match=f"'{knob[2:]}' in the command line"):
        execute(knob, "1")


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
        ("net", "None", r"net must be '\$None'.*got None"),  # MONAI ignores it
        ("net", "null", r"net must be '\$None'.*got null"),
    ],
)
def test_another_kind_of_value_is_refused(execute, knob, value, message):
    with pytest.raises(ValueError, match=message):
        execute(f"--{knob}", value)


@pytest.mark.parametrize(
    ("knob", "value", "expected"),
    [
        ("slab_mm", "6", 6),
        ("slab_mm", "$12 / 2", "$12 / 2"),
        ("scales", "@other", "@other"),
        ("net", "3", 3),
        ("net", "$None", "$None"),
        ("output_dir", "[1, 2]", [1, 2]),  # hu_window is the name of one or its four numbers
        ("output_dir", "{[]: 1}", "{[]: 1}"),  # no Python literal
    ],
)
def test_a_value_of_the_same_kind_or_an_expression_is_taken(execute, knob, value, expected):
    assert execute(f"--{knob}", value)[knob] == expected


def test_without_monais_command_line_the_bundles_own_file_counts(execute, tmp_path):
    assert execute()["slab_mm"] == 12.0
    assert executed_config(str(tmp_path), "train.json", ["pytest", "-q"])["slab_mm"] == 12.0


def test_plain_knobs_are_values_not_components_and_some_bind():
    config = {"slab_mm": 12.0, "seed": 1, "loss": {"_target_": "Loss"}, "run": ["$1"], "_desc_": "words"}
    assert plain_knobs(config) == {"slab_mm": 12.0, "seed": 1}
    assert knobs_that_bind(config, free=["seed"]) == {"slab_mm": 12.0}


def test_a_wrong_option_or_path_is_reported_without_importing_torch_or_monai(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.json").write_text('{"slab_mm": 12.0}')
    code = """
import sys
from common.run.config import executed_config, must_exist
argv = sys.argv[1:]
for call in (lambda: executed_config(argv[0], "train.json", argv), lambda: must_exist(a="nowhere")):
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        print(error)
print([name for name in ("torch", "monai", "ignite") if name in sys.modules])
"""
    config = str(tmp_path / "configs" / "train.json")
    words = [sys.executable, "-c", code, str(tmp_path), "--config_file", config, "--slab_mn", "3"]
    said = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    unknown, missing, imported = said.splitlines()
    assert "slab_mn" in unknown
    assert "nowhere" in missing
    assert imported == "[]"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Git in a folder that holds the module."""
    (tmp_path / "config.py").touch()
    monkeypatch.setattr(config_module, "__file__", str(tmp_path / "config.py"))

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    git("init", "-q")
    return git


def test_version_is_the_commit_and_says_when_files_differ(checkout, tmp_path):
    checkout("add", ".")
    checkout("commit", "-q", "-m", "x")
    head = checkout("rev-parse", "HEAD")
    assert code_version() == head[:12]
    (tmp_path / "config.py").write_text("changed")
    assert code_version() == f"{head[:12]}-dirty"


def test_version_of_code_that_git_does_not_know_and_without_git_is_unknown(checkout, tmp_path, monkeypatch):
    (tmp_path / "other.txt").touch()
    checkout("add", "other.txt")
    checkout("commit", "-q", "-m", "x")
    assert code_version() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert code_version() == "unknown"


WRAPPED = """
from common.run.config import short_errors
short_errors()
try:
    raise {error}
except Exception as inner:
    raise RuntimeError("Failed to instantiate component") from inner
"""


def stderr_of(script: str, **environment: str) -> str:
    command = [sys.executable, "-c", script]
    env = os.environ | environment
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True).stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("ValueError('slab_mm must be positive.')", "ValueError: slab_mm must be positive."),
        ("KeyError('no such window.')", "KeyError: no such window."),
        ("PermissionError(13, 'denied', '/a')", "PermissionError: [Errno 13] denied: '/a'"),
        ("BlockingIOError('in use')", "BlockingIOError: in use"),
        (
            "type('OutOfMemoryError', (RuntimeError,), {})('CUDA')",
            "OutOfMemoryError: CUDA Lower --batch_size, or use a larger GPU.",
        ),
    ],
)
def test_a_wrapped_user_error_is_one_line(error, line):
    assert stderr_of(WRAPPED.format(error=error)) == f"{line} (DALE_CT_TRACEBACK=1 shows where.)\n"


def test_other_errors_and_those_asked_for_keep_their_traceback():
    assert "Traceback" in stderr_of(WRAPPED.format(error="ZeroDivisionError('ours')"))
    assert "Traceback" in stderr_of(WRAPPED.format(error="ValueError('fix me')"), DALE_CT_TRACEBACK="1")


def test_a_components_other_error_is_shown_without_what_monai_wraps_around_it():
    script = WRAPPED.format(error="ZeroDivisionError('in the component')").replace(
        'raise RuntimeError("Failed to instantiate component") from inner',
        """try:
        raise RuntimeError("Failed to instantiate component 'x' with keywords: a") from inner
    except RuntimeError as outer:
        raise RuntimeError('Failed to evaluate ConfigExpression') from outer""",
    )
    shown = stderr_of(script)
    assert shown.count("Traceback") == 1
    assert shown.rstrip().endswith("ZeroDivisionError: in the component")
    assert "Failed to" not in shown


def test_the_first_cause_is_ours_and_not_the_librarys_that_ours_was_raised_from():
    ours = ValueError("'a.tar' is damaged at slice 3.")
    ours.__cause__ = ValueError("Blosc2 frame")
    wrapped = RuntimeError("Failed to instantiate component")
    wrapped.__cause__ = ours
    assert first_cause(wrapped) is ours
    wrapped.__cause__ = ZeroDivisionError()
    assert first_cause(wrapped) is None


def test_a_path_that_does_not_exist_is_named_with_its_option(tmp_path):
    (tmp_path / "list.txt").write_text("")
    must_exist(dataset_dir=tmp_path, subset_csv=None, skip_list=str(tmp_path / "list.txt"))
    with pytest.raises(FileNotFoundError, match=f"skip_list: '{tmp_path / 'no.txt'}'.*--skip_list"):
        must_exist(dataset_dir=tmp_path, subset_csv=None, skip_list=tmp_path / "no.txt")
