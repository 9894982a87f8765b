"""What a release holds runs from an empty folder, with nothing of this repository on the path."""

import functools
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
import torch
from monai.bundle import scripts

from common.embeddings.encoder_bundle import open_encoder_bundle
from common.embeddings.store import EmbeddingStore
from common.networks.encoder import save_encoder
from common.shards.writer import VolumeSlices, write_shard
from common.transforms.hounsfield import HU_WINDOWS

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLES = sorted(path.parents[1].name for path in (REPOSITORY / "bundles").glob("*/configs/metadata.json"))
SMALL = {"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
TINY = ("--img_size_px", "32", "--embed_dim", "24", "--depth", "1", "--num_heads", "2")


def pack(out: Path, *names: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "bundles/pack.py",
        *names,
        "--out",
        str(out),
        "--url",
        "https://example.org/v0",
    ]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("release") / "dist"
    result = pack(out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def url(dist: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(dist)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def monai(python_m: Callable[..., subprocess.CompletedProcess]) -> Callable[..., None]:
    """Run MONAI's command line without this repository on the path."""

    def run(*words: str, cwd: Path) -> None:
        result = python_m(["monai.bundle", *words], cwd)
        assert result.returncode == 0, result.stderr[-3000:]

    return run


@pytest.fixture(scope="module")
def downloaded(
    monai: Callable[..., None], dist: Path, url: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """DALE-CT-2S as MONAI's own command downloads it."""
    folder = tmp_path_factory.mktemp("downloaded")
    name = next(dist.glob("dale_ct_2s_v*.zip")).name
    monai("download", "--name", "dale_ct_2s", "--url", f"{url}/{name}", "--bundle_dir", ".", cwd=folder)
    return folder / "dale_ct_2s"


def test_the_same_files_make_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    assert pack(tmp_path, "dale_ct_0").returncode == 0
    (again,) = tmp_path.glob("*.zip")
    assert again.read_bytes() == (dist / again.name).read_bytes()


def test_every_bundle_is_listed_with_its_checksum(dist: Path) -> None:
    info = json.loads((dist / "model_info.json").read_text())
    sums = dict(line.split("  ")[::-1] for line in (dist / "SHA256SUMS").read_text().splitlines())
    assert sorted(name.partition("_v")[0] for name in info) == [name for name in BUNDLES if "_v" not in name]
    assert sums.keys() == {path.name for path in dist.glob("*.zip")}
    for name, entry in info.items():
        digest = hashlib.sha256((dist / f"{name}.zip").read_bytes()).hexdigest()
        assert entry == {"checksum": digest, "source": f"https://example.org/v0/{name}.zip"}
        assert sums[f"{name}.zip"] == digest


def test_a_bundle_travels_with_code_licence_and_card_and_without_runs(dist: Path) -> None:
    (path,) = dist.glob("dale_ct_2s_v*.zip")
    names = set(zipfile.ZipFile(path).namelist())
    wanted = {
        "LICENSE",
        "configs/metadata.json",
        "configs/train.json",
        "docs/README.md",
        "common/losses/lejepa.py",
    }
    wanted |= {"common/labels/totalsegmentator.csv", "docs/data_license.txt"}
    wanted |= {"golden.json", "large_files.yml"}
    assert {f"dale_ct_2s/{name}" for name in wanted} <= names
    assert not [name for name in names if "__pycache__" in name or "/runs/" in name]
    card = zipfile.ZipFile(path).read("dale_ct_2s/docs/README.md").decode()
    assert "](../.." not in card


def test_a_folder_for_the_hub_has_its_card_in_front(dist: Path) -> None:
    folder = dist / "huggingface" / "dale_ct_2s"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: monai\nlicense: apache-2.0\n")
    assert "## How it was trained" in card
    assert (folder / "configs" / "metadata.json").is_file()
    assert (folder / "common" / "networks" / "encoder.py").is_file()


def test_an_unknown_bundle_is_named(tmp_path: Path) -> None:
    result = pack(tmp_path, "dale_ct_3")
    assert result.returncode == 1
    assert "names must be bundles, got 'dale_ct_3'. Known: " in result.stderr


@pytest.mark.parametrize(
    ("name", "version"), [("dale_ct_0", None), ("dale_ct_1s", None), ("dale_ct_1s_v2", "0.1.0")]
)
def test_a_release_by_name_is_found_as_monai_looks_for_it(
    name: str, version: str | None, dist: Path, url: str, tmp_path, monkeypatch
) -> None:
    """GitHub's two addresses lead to this machine; everything else is MONAI's own."""
    seen = []

    def release_url(owner: str, repo: str, tag_name: str, filename: str) -> str:
        seen.append((owner, repo, tag_name, filename))
        return f"{url}/{filename}"

    get = requests.get

    def local_get(address: str, **options: object) -> requests.Response:
        assert address == "https://raw.githubusercontent.com/owner/repo/v0.1.0/models/model_info.json"
        return get(f"{url}/model_info.json", **options)

    monkeypatch.setattr(scripts, "_get_git_release_url", release_url)
    monkeypatch.setattr(requests, "get", local_get)
    where = {"source": "github", "repo": "owner/repo/v0.1.0", "bundle_dir": str(tmp_path)}
    scripts.download(name=name, version=version, **where)
    assert seen == [("owner", "repo", "v0.1.0", next(dist.glob(f"{name}_v0*.zip")).name)]
    assert (tmp_path / name / "configs" / "train.json").is_file()


@pytest.mark.parametrize("name", BUNDLES)
def test_a_packed_bundle_passes_what_the_model_zoo_verifies(dist: Path, name: str, tmp_path: Path) -> None:
    """As its verify_bundle.py; the network's checks are in test_volume_runs.py and test_torchscript.py."""
    folder = dist / "huggingface" / name
    assert (folder / "LICENSE").is_file()
    assert (folder / "large_files.yml").is_file() == (not name.startswith(("eval_", "finetune_", "report_")))
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
    schema = shutil.copy(Path(__file__).parent / "meta_schema.json", tmp_path)
    scripts.verify_metadata(meta_file=str(folder / "configs" / "metadata.json"), filepath=str(schema))
    for path in (REPOSITORY / "bundles" / name / "configs").iterdir():
        assert (folder / "configs" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", BUNDLES)
def test_the_paths_of_a_packed_card_hold_where_it_lies(dist: Path, name: str) -> None:
    folder = dist / "huggingface" / name
    card = (folder / "docs" / "README.md").read_text()
    assert f"bundles/{name}" not in card
    named = re.findall(r"--config_file \"?\[?'?([\w./]+\.json)", card)
    assert named
    for path in named:
        assert (folder / path).resolve().is_relative_to(folder.parent)
        assert (folder / path).is_file(), path
    roots = re.findall(r"--(?:bundle_root|encoder_bundle) (\S+)", card)
    assert all((folder / root / "configs" / "metadata.json").is_file() for root in roots), roots


@pytest.fixture
def trained(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict]:
    """A small encoder with weights of its own, packed, in a folder of the name it has there."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    bundle = shutil.copytree(small_bundle, tmp_path / "made" / "dale_ct_2s")
    network = open_encoder_bundle(bundle, knobs={"encoder_weights": None, "seed": 3}).network
    identity = {"slice_axes": "yx", "hu_window": list(HU_WINDOWS["ct_rate"]), "patch_size_px": 8}
    save_encoder(network.state_dict(), bundle / "models" / "model.safetensors", identity)
    spec = importlib.util.spec_from_file_location("pack", REPOSITORY / "bundles" / "pack.py")
    packer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packer)
    files = packer.contents(bundle)
    (tmp_path / "served").mkdir()
    packer.write_zip(tmp_path / "served" / "dale_ct_2s_v0.2.0.zip", "dale_ct_2s", files)
    packer.write_hub_folder(tmp_path / "here" / "dale_ct_2s", files)
    return tmp_path, network.state_dict()


def test_weights_are_not_given_away_under_the_licence_of_the_code(trained: tuple[Path, dict]) -> None:
    card = (trained[0] / "here" / "dale_ct_2s" / "README.md").read_text(encoding="utf-8")
    assert "license: cc-by-nc-sa-4.0\n" in card.partition("\n---\n")[0] + "\n"


@pytest.mark.parametrize("workflow_type", ["inference", "train"])
def test_monais_load_gives_the_network_with_its_weights(
    trained: tuple[Path, dict], workflow_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = trained
    monkeypatch.chdir(folder)
    knobs = {"bundle_root": "here/dale_ct_2s", **SMALL}
    network = scripts.load("dale_ct_2s", bundle_dir="here", workflow_type=workflow_type, args_file=knobs)
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_the_cards_python_makes_a_workflow_that_embeds(
    trained: tuple[Path, dict], ct_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trained
    card = (folder / "here" / "dale_ct_2s" / "docs" / "README.md").read_text()
    (block,) = re.findall(r"```python\nfrom monai.bundle(.*?)```", card, re.S)
    monkeypatch.chdir(folder / "here")
    shutil.copy(ct_folder / "a.nii.gz", "ct.nii.gz")
    names: dict = {}
    exec(f"from monai.bundle{block}", names)
    assert names["workflow"].network_def.embed_dim == 24
    store = EmbeddingStore("embeddings")
    assert store.read("ct").tokens.shape == (11, 24)
    assert store.identity["encoder_id"].startswith("sha256:")


@pytest.mark.slow
def test_the_network_gives_what_the_metadata_say(monai: Callable[..., None], downloaded: Path) -> None:
    files = ("--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json")
    monai("verify_net_in_out", "--net_id", "network_def", *files, "--device", "cpu", cwd=downloaded)


@pytest.mark.slow
def test_a_ct_is_embedded_from_the_downloaded_folder(
    monai: Callable[..., None], downloaded: Path, tmp_path: Path
) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, (40, 40, 6)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([-0.8, -0.8, 3.0, 1.0])), tmp_path / "ct.nii.gz")
    words = ("run", "--config_file", "configs/inference.json", "--dataset_dir", str(tmp_path / "ct.nii.gz"))
    out = (
        "--output_dir",
        str(tmp_path / "embeddings"),
        "--encoder_weights",
        "$None",
        "--strategies",
        "['cropped_32']",
    )
    monai(*words, *out, *TINY, cwd=downloaded)
    assert list((tmp_path / "embeddings").glob("*.safetensors"))


@pytest.mark.slow
def test_two_steps_are_trained_from_the_downloaded_folder(
    monai: Callable[..., None], downloaded: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    volume = VolumeSlices(
        volume="train_1_a_1",
        ct=rng.integers(-1000, 1000, (6, 40, 48)).astype(np.int16),
        ts=rng.integers(0, 118, (6, 128, 128)).astype(np.uint8),
        rex=None,
        spacing_mm=(0.8, 0.8, 3.0),
        original_shape=(48, 40, 6),
        original_axcodes="LPS",
        labels={"Lung nodule": 1},
        split="train",
    )
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "train-000000.tar", [volume])
    paths = ("--dataset_dir", str(tmp_path / "shards"), "--output_dir", str(tmp_path / "run"))
    paths += ("--tracking_uri", f"sqlite:///{tmp_path}/mlflow.db")
    paths += ("--encoder_weights", str(tmp_path / "model.safetensors"))
    small = ("--global_size_px", "32", "--local_size_px", "16", "--num_directions", "16", "--batch_size", "2")
    small += ("--max_steps", "2", "--warmup_steps", "1", "--num_workers", "0", "--projector_hidden_dim", "16")
    monai("run", "--config_file", "configs/train.json", *paths, *small, *TINY, cwd=downloaded)
    assert (tmp_path / "model.safetensors").is_file()
