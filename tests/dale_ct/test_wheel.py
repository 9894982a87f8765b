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
TINY = {"global_size_px": 32, "local_size_px": 16, "num_local": 3, "img_size_px": 32, "patch_size_px": 8}
TINY |= {"embed_dim": 24, "depth": 1, "num_heads": 2, "projector_hidden_dim": 16, "projection_dim": 11}
TINY |= {"num_directions": 32, "batch_size": 4, "max_steps": 2, "warmup_steps": 1, "num_workers": 0}
TINY |= {"amp_dtype": "float32", "layer_scale_init": 0.1}


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


@pytest.mark.slow
def test_training_writes_into_the_current_folder_and_not_into_the_package(installed, noise_shards, tmp_path):
    (bundles,) = (installed.parent / "lib").glob("python*/site-packages/bundles")
    before = sorted(bundles.rglob("*"))
    words = [installed / "dale-ct", "train", "dale_ct_2s", "--dataset_dir", noise_shards]
    run([*words, *[word for name, value in TINY.items() for word in (f"--{name}", str(value))]], tmp_path)
    assert (tmp_path / "dale_ct_2s" / "models" / "model.safetensors").is_file()
    assert list((tmp_path / "dale_ct_2s" / "runs" / "checkpoints").glob("step_*.pt"))
    assert sorted(bundles.rglob("*")) == before


@pytest.mark.slow
def test_folders_of_the_users_with_the_names_of_ours(installed, tmp_path):
    for name in ("common", "bundles"):
        (tmp_path / name).mkdir()
    (tmp_path / "common" / "__init__.py").write_text("")
    assert "colipri" in run([installed / "dale-ct", "encoders"], tmp_path)
    call = [installed / "python", "-c", "import dale_ct"]
    result = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert str(tmp_path / "common") in result.stderr.splitlines()[-1]
    (tmp_path / "common" / "__init__.py").unlink()  # a folder without it hides no package
    run(call, tmp_path)
