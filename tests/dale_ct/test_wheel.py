"""The package as ``pip install .`` gives it, in an environment of its own, the repository out of sight."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from dale_ct import EmbeddingStore

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Programs of an environment with the wheel, and the pinned packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    written_by_runs = shutil.ignore_patterns("runs", "models", "embeddings")
    for package in ("common", "dale_ct", "data_prep", "bundles"):
        ignored = written_by_runs if package == "bundles" else None
        shutil.copytree(REPOSITORY / package, source / package, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv")
    programs = folder / "venv" / "bin"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "pinned.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    subprocess.run(
        [*pip, "--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    shutil.rmtree(source)
    return programs


def run(words: list, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        words,
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_installed_command_embeds_from_any_folder(installed, small_bundle, ct_folder, tmp_path):
    words = [
        "embed",
        ct_folder / "a.nii.gz",
        "--encoder",
        small_bundle,
        "--weights",
        "random",
        "--out",
        "store",
    ]
    run([installed / "dale-ct", *words], tmp_path)
    assert EmbeddingStore(tmp_path / "store").read("a").tokens.shape == (11, 24)


@pytest.mark.slow
def test_the_installed_package_brings_the_bundles(installed, tmp_path):
    listed = "import dale_ct, dale_ct.encoder as e; print(e.BUNDLES, *dale_ct.encoders())"
    bundles, *names = run([installed / "python", "-c", listed], tmp_path).split()
    assert Path(bundles).is_relative_to(installed.parent)
    assert {"dale_ct_0", "dale_ct_1s", "dale_ct_2s", "dinov2_ct", "merlin"} <= set(names)
    assert (Path(bundles) / "eval_ct_rate" / "configs" / "predict.json").is_file()
