"""A command in a fork is what it would be in a process of its own."""

import os

SHOWN = """
import os, sys
print(__name__, sys.argv[1:], os.getcwd(), os.environ["COLOUR"], sep="|")
print(sys.path[0], helper := __import__("helper").WORD, file=sys.stderr)
"""


def test_a_command_has_its_words_folder_environment_and_path(python_m, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "shown.py").write_text(SHOWN)
    (tmp_path / "own" / "helper.py").write_text("WORD = 'found'")
    result = python_m(["shown", "--a", "b c"], tmp_path, COLOUR="red", PYTHONPATH=str(tmp_path / "own"))
    assert (result.returncode, result.stderr) == (0, f"{tmp_path} found\n")
    assert result.stdout == f"__main__|['--a', 'b c']|{tmp_path}|red\n"


def test_a_command_ends_as_it_would_alone_and_the_next_one_knows_nothing_of_it(python_m, tmp_path):
    (tmp_path / "ends.py").write_text("import os, sys, timm; timm.spoilt = 1; sys.exit(3)")
    (tmp_path / "fails.py").write_text("import timm; raise ValueError(hasattr(timm, 'spoilt'))")
    (tmp_path / "killed.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert python_m(["ends"], tmp_path).returncode == 3
    failed = python_m(["fails"], tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.endswith("ValueError: False\n")
    assert failed.stdout == ""
    assert python_m(["killed"], tmp_path).returncode == -9
    assert python_m(["json.tool", os.devnull], tmp_path).returncode == 1
