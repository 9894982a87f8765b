"""The executed config is what MONAI runs, and a misspelt knob is an error."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.run.config import executed_config, exit_if_stopped, first_cause, knobs_that_bind, plain_knobs


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


REPOSITORY = Path(__file__).resolve().parents[3]
WRAPPED = """
from common.run.config import short_errors
short_errors()
try:
    raise {error}
except Exception as inner:
    raise RuntimeError("Failed to instantiate component") from inner
"""


def stderr_of(error: str, **environment: str) -> str:
    script = WRAPPED.format(error=error)
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    ).stderr


@pytest.mark.parametrize("error", ["ValueError('slab_mm must be positive.')", "KeyError('no such window.')"])
def test_a_wrapped_user_error_is_one_line(error):
    kind, message = error[:-1].split("(")
    assert stderr_of(error) == f"{kind}: {message[1:-1]} (DALE_CT_TRACEBACK=1 shows where.)\n"


def test_other_errors_and_those_asked_for_keep_their_traceback():
    assert "Traceback" in stderr_of("ZeroDivisionError('ours')")
    assert "Traceback" in stderr_of("ValueError('mend me')", DALE_CT_TRACEBACK="1")


def test_the_line_is_ours_and_not_the_librarys_that_ours_was_raised_from():
    ours = ValueError("'a.tar' is damaged at slice 3.")
    ours.__cause__ = ValueError("Blosc2 frame")
    wrapped = RuntimeError("Failed to instantiate component")
    wrapped.__cause__ = ours
    assert first_cause(wrapped) is ours


def test_an_error_that_is_the_users_nowhere_is_none():
    error = RuntimeError("Failed to instantiate component")
    error.__cause__ = ZeroDivisionError()
    assert first_cause(error) is None


def test_a_components_other_error_is_shown_without_what_monai_wraps_around_it():
    script = WRAPPED.format(error="ZeroDivisionError('in the component')")
    inner = "raise RuntimeError(\"Failed to instantiate component 'x' with keywords: a\") from inner"
    outer = "raise RuntimeError('Failed to evaluate ConfigExpression') from outer"
    script = script.replace(
        'raise RuntimeError("Failed to instantiate component") from inner',
        f"""try:
        {inner}
    except RuntimeError as outer:
        {outer}""",
    )
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    ).stderr
    assert said.count("Traceback") == 1
    assert said.rstrip().endswith("ZeroDivisionError: in the component")
    assert "Failed to" not in said


@pytest.mark.parametrize(
    "error", ["PermissionError(13, 'Permission denied', '/a')", "BlockingIOError('in use')"]
)
def test_an_error_of_the_system_is_one_line(error):
    (line,) = stderr_of(error).splitlines()
    assert line.startswith(error.split("(")[0])
    assert "/a" in line or "in use" in line


ROOT = Path(__file__).resolve().parents[3]
START = "import os, signal, sys, time; from common.run.config import short_errors; short_errors();"


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", START + code], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "status", "word"), [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM")])
def test_a_stop_is_one_line_with_the_shells_status_after_what_must_be_tidied_up(name, status, word):
    code = f"\ntry:\n    os.kill(os.getpid(), signal.{name}); time.sleep(9)\nfinally:\n    print('tidied')"
    ended = run(code)
    assert ended.returncode == status
    assert ended.stdout == "tidied\n"
    (line,) = ended.stderr.split("\n")[1:-1]
    assert f"Stopped by {word}." in line
    assert "Traceback" in run(code, DALE_CT_TRACEBACK="1").stderr


def test_a_stop_passes_what_handles_exceptions():
    code = "\ntry:\n    os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\nexcept Exception: print('kept')"
    assert (run(code).returncode, run(code).stdout) == (143, "")


def test_a_second_signal_does_not_wait():
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    code = f"\ntry:\n    {kill}; time.sleep(9)\nfinally:\n    {kill}; print('late')"
    assert (run(code).returncode, run(code).stdout) == (130, "")


def test_forked_workers_ignore_ctrl_c_and_end_at_sigterm():
    code = """
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGINT)
    print('alive', flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print('late', flush=True)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code).stdout == "alive\n143\n"


def test_a_run_that_was_stopped_ends_with_its_status_and_another_goes_on():
    exit_if_stopped(SimpleNamespace(state=SimpleNamespace(iteration=3)))
    with pytest.raises(SystemExit) as left:
        exit_if_stopped(SimpleNamespace(state=SimpleNamespace(exit_status=143)))
    assert left.value.code == 143
