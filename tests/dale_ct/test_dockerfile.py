"""Every line of the Dockerfile, run by a shell in place of Docker: a folder stands for /, and pip is offline.

The environment that stands for the base image already has the pinned packages, which pip finds and checks.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from dale_ct import EmbeddingStore

REPOSITORY = Path(__file__).resolve().parents[2]
SHELL = {
    "ARG": "export {}",
    "ENV": "export {}",
    "WORKDIR": "mkdir -p {0}; cd {0}",
    "COPY": "cp -r $CONTEXT/{}",
    "RUN": "( {} )",
    "USER": ": {}",
}
AS_USER = (
    "chown {0} .; exec setpriv --reuid={0} --regid={0} --clear-groups"  # . as that user's own mounted there
)


def lines_of(name: str) -> list[str]:
    return [line for line in (REPOSITORY / name).read_text().splitlines() if line and line[0] != "#"]


def is_sent(path: Path) -> bool:
    """Whether Docker puts a path into the build context: of the patterns that fit it, the last one counts."""
    names = [name.as_posix() for name in (path, *path.parents[:-1])]
    sent = True
    for line in lines_of(".dockerignore"):
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, name) for name in names):
            sent = line[0] == "!"
    return sent


def left_out(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not is_sent(Path(folder, name).relative_to(REPOSITORY))]


def write_argparse(folder: Path) -> None:
    """Write an empty wheel of argparse: required, but never installed for pip, as it is Python's own."""
    folder.mkdir()
    metadata = "Metadata-Version: 2.1\nName: argparse\nVersion: 1.4.0\n"
    files = {"METADATA": metadata, "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n", "RECORD": ""}
    with ZipFile(folder / "argparse-1.4.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"argparse-1.4.0.dist-info/{name}", text)


@pytest.mark.slow
def test_every_line_runs_and_the_entry_point_embeds_a_ct_as_an_ordinary_user(small_bundle, ct_folder):
    assert is_sent(Path("bundles/dale_ct_2s/configs/train.json"))
    for path in (
        "bundles/x/models/model.safetensors",
        "common/__pycache__/a.pyc",
        "data/ct.nii.gz",
        ".git/config",
    ):
        assert not is_sent(Path(path)), path
    base, *instructions = (line.split(" ", 1) for line in lines_of("Dockerfile"))
    assert base == ["FROM", "python:{}.{}-slim".format(*sys.version_info)]
    *instructions, (keyword, entry) = instructions
    assert keyword == "ENTRYPOINT"
    with tempfile.TemporaryDirectory(dir="/tmp") as root:  # others cannot enter tmp_path
        Path(root).chmod(0o755)
        venv.create(f"{root}/usr")
        (packages,) = Path(root, "usr", "lib").glob("python*/site-packages")
        (packages / "pinned.pth").write_text(sysconfig.get_paths()["purelib"])
        write_argparse(Path(root, "wheels"))
        shutil.copytree(REPOSITORY, f"{root}/context", ignore=left_out)
        data = Path(root, "data")  # mounted
        shutil.copytree(small_bundle, data / "bundle")
        shutil.copy(ct_folder / "a.nii.gz", data)
        below_root = [
            (word, re.sub(r"(?<![\w.:/])/(?=\w)", f"{root}/", words)) for word, words in instructions
        ]
        script = [SHELL[word].format(words) for word, words in below_root]
        user = int(dict(instructions)["USER"].split(":")[0])
        assert user > 0
        script += ["rm -r ../source", AS_USER.format(user) if os.geteuid() == 0 else "exec"]
        script[-1] += f" {json.loads(entry)[0]} embed a.nii.gz --encoder bundle --weights random"
        environment = {"PATH": f"{root}/usr/bin:/usr/bin:/bin", "CONTEXT": f"{root}/context"}
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"{root}/wheels", "OMP_NUM_THREADS": "1"}
        command = ["bash", "-euxc", "\n".join(script)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        assert EmbeddingStore(data / "embeddings").read("a").tokens.shape == (11, 24)
