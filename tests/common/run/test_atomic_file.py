import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.run.atomic_file import atomic_file


def test_the_name_appears_when_everything_is_written(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "a.bin").exists()
        file.write(b" and half")
    assert (tmp_path / "a.bin").read_bytes() == b"half and half"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("older")
    with pytest.raises(TypeError, match="must be str"), atomic_file(tmp_path / "a.txt", "w") as file:
        file.write(b"newer")
    assert (tmp_path / "a.txt").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_options_are_those_of_open(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.txt", "w", newline="\r\n", encoding="utf-16-le") as file:
        file.write("x\n")
    assert (tmp_path / "a.txt").read_bytes() == b"x\0\r\0\n\0"


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from common.run.atomic_file import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code, str(tmp_path / "a.bin")]
    killed = subprocess.run(command, cwd=root, check=False, env={**os.environ, "PYTHONPATH": str(root)})
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.partial"]
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"whole")
    assert (tmp_path / "a.bin").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_writers_of_one_file_wait_for_one_another(tmp_path: Path) -> None:
    def write(letter: str) -> None:
        with atomic_file(tmp_path / "a.txt", "w") as file:
            for _ in range(50):
                file.write(letter * 1000)
                file.flush()
        assert set((tmp_path / "a.txt").read_text()) < set("abcdef")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, "abcdef"))
    text = (tmp_path / "a.txt").read_text()
    assert len(text) == 50_000
    assert len(set(text)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
