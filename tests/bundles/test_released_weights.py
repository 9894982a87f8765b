"""Every encoder of slices finds the authors' release by itself and shows it the slices that it expects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save

from common.embeddings.encoder_bundle import EncoderBundle, open_encoder_bundle
from common.embeddings.store import EmbeddingStore
from common.networks.timm_keys import to_timm_keys
from tests.loopback_hub import COMMIT, LoopbackHub
from tests.released_weights import RELEASES, random_weights, shapes_of

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "amp_dtype": "float32"}

each_bundle = pytest.mark.parametrize("bundle", RELEASES)


@pytest.fixture
def released(hub: LoopbackHub) -> LoopbackHub:
    """All releases, 24 wide and 2 blocks deep."""
    for bundle, (repository, _) in RELEASES.items():
        weights = random_weights(shapes_of(bundle, dim=24, depth=2))
        hub.files[repository, "model.safetensors"] = save(weights)
    return hub


def opened(bundle: str, folder: Path, **knobs: object) -> EncoderBundle:
    """The small bundle; its own weights would be in the folder."""
    own = {"bundle_weights": str(folder / "model.safetensors"), "device": "cpu"}
    return open_encoder_bundle(BUNDLES / bundle, knobs=SMALL | own | knobs)


def test_every_encoder_of_slices_has_a_release():
    with_window = [
        path for path in BUNDLES.glob("*/configs/inference.json") if "hu_window" in path.read_text()
    ]
    assert sorted(RELEASES) == sorted(path.parents[1].name for path in with_window)


@each_bundle
def test_every_name_and_shape_of_the_release_has_its_place_in_the_whole_network(bundle):
    knobs = json.loads((BUNDLES / bundle / "configs" / "inference.json").read_text())
    written = {name: value for name, value in knobs["network_def"].items() if not name.startswith("_")}
    arguments = {name: knobs[value[1:]] if str(value)[0] == "@" else value for name, value in written.items()}
    with torch.device("meta"):
        network = timm.create_model(**arguments)
        weights = {name: torch.empty(shape) for name, shape in shapes_of(bundle).items()}
        ours = to_timm_keys(weights)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }


@each_bundle
def test_a_bundle_loads_its_release_without_an_option(bundle, released, tmp_path):
    encoder = opened(bundle, tmp_path)
    repository, window = RELEASES[bundle]
    assert (encoder.slice_axes, tuple(encoder.window)) == ("xy", window)
    expected = to_timm_keys(random_weights(shapes_of(bundle, dim=24, depth=2)))
    loaded = encoder.network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert encoder.network.num_prefix_tokens == (5 if bundle == "dinov2_ct" else 1)
    identity = encoder["embedding_identity"]
    assert identity["weights"] == f"hub:{repository}@{COMMIT}"
    assert identity["encoder_id"].startswith("sha256:")


@pytest.mark.parametrize(
    ("bundle", "knobs", "option"),
    [
        ("dale_ct_2s", {"slice_axes": "yx"}, "slice_axes"),
        ("dale_ct_2s", {"hu_window": "dale_ct_0_l"}, "hu_window"),
        ("dale_ct_0_l", {"hu_window": "ct_rate"}, "hu_window"),
        ("dinov2_ct", {"slice_axes": "yx"}, "slice_axes"),
    ],
)
def test_an_option_that_contradicts_the_release_is_refused_by_name(bundle, knobs, option, released, tmp_path):
    with pytest.raises(ValueError, match=f"{option} .*{RELEASES[bundle][0]}.*Drop --{option}"):
        opened(bundle, tmp_path, **knobs)["input"]


@pytest.mark.parametrize(
    ("bundle", "other", "name"),
    [
        ("dale_ct_2s", "dale_ct_1s", "patch_embed.proj.weight"),
        ("dale_ct_1s", "dale_ct_2s", "pos_embed"),
        ("dale_ct_1s", "dinov2_ct", "reg_token"),
        ("dinov2_ct", "dale_ct_1s", "reg_token"),
    ],
)
def test_the_release_of_another_architecture_is_refused_by_name(bundle, other, name, released, tmp_path):
    with pytest.raises(ValueError, match=f"do not fit the network.*{name}"):
        _ = opened(bundle, tmp_path, weights_repo=RELEASES[other][0]).network


def test_a_release_of_another_bundle_needs_that_bundle_or_its_facts(released, tmp_path):
    asked = f"hub:{RELEASES['dale_ct_0_l'][0]}"
    with pytest.raises(ValueError, match="DALE-CT-0-L@.* does not state its slice_axes"):
        opened("dale_ct_0", tmp_path, encoder_weights=asked)["input"]
    told = {"slice_axes": "xy", "hu_window": "dale_ct_0_l"}
    assert opened("dale_ct_0", tmp_path, encoder_weights=asked, **told).window == RELEASES["dale_ct_0_l"][1]


def test_a_run_downloads_the_release_and_its_store_says_so(released, tmp_path):
    """As users type it, in a process of its own: what it says, writes, and asks of the hub."""
    hu = np.random.default_rng(0).integers(-900, 300, (40, 44, 6)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([-8.0, -8.0, 15.0, 1.0])), tmp_path / "ct.nii.gz")
    words = ["-m", "monai.bundle", "run", "--config_file", BUNDLES / "dale_ct_2s/configs/inference.json"]
    knobs = SMALL | {"bundle_root": BUNDLES / "dale_ct_2s", "bundle_weights": tmp_path / "model.safetensors"}
    knobs |= {"dataset_dir": tmp_path / "ct.nii.gz", "output_dir": tmp_path / "out", "num_workers": 0}
    words += [word for name, value in knobs.items() for word in (f"--{name}", value)]
    own = {"HF_ENDPOINT": released.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=os.environ | own | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    result = run()
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stderr.splitlines() if "SHA-256" in line]
    repository, window = RELEASES["dale_ct_2s"]
    assert all(word in line for word in (repository, COMMIT, "CC-BY-NC-SA-4.0"))
    identity = EmbeddingStore(tmp_path / "out").identity
    assert identity["weights"] == f"hub:{repository}@{COMMIT}"
    assert identity["encoder_id"] == f"sha256:{line.rsplit(' ', 1)[1][:16]}:xy"
    assert EmbeddingStore(tmp_path / "out").read("ct").tokens.shape == (6, 24)
    assert {path.removeprefix("/cdn") for _, path, _ in released.asked} == {
        f"/{repository}/resolve/main/model.safetensors"
    }
    assert not any("torch" in agent for *_, agent in released.asked)

    released.close()
    own |= {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    result = run()
    assert result.returncode != 0
    assert f"{repository}/resolve/main/model.safetensors and save it as" in result.stderr.splitlines()[-1]
