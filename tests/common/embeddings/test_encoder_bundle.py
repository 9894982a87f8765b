"""A bundle opens as the command line would open it: its files and knobs merged, its parts built on demand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.embeddings.encoder_bundle import EncoderBundle, open_encoder_bundle
from common.networks.encoder import save_encoder
from common.transforms.hounsfield import HU_WINDOWS

INPUT = {"slice_axes": "yx", "hu_window": [-997.0, 888.0, -142.39, 360.97]}
BUNDLES = Path(__file__).resolve().parents[3] / "bundles"
SMALL = {"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


@pytest.fixture
def small_json(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


def opened(small_json: Path, **knobs: object) -> EncoderBundle:
    return open_encoder_bundle(BUNDLES / "dale_ct_2s", [small_json], {"encoder_weights": None} | knobs)


def test_parts_are_those_of_files_and_knobs(small_json: Path) -> None:
    bundle = opened(small_json, slice_axes="xy", strategies=["raw_40", "tiled_5cut"], hu_window="dale_ct_0_l")
    assert (bundle.name, bundle.slice_axes, bundle.patch_size_px) == ("dale_ct_2s", "xy", 8)
    assert [strategy.name for strategy in bundle.strategies] == ["raw_40", "tiled_5cut"]
    assert bundle.side_px == 40
    assert bundle.window == HU_WINDOWS["dale_ct_0_l"]
    assert bundle["amp_dtype"] == "bfloat16"
    assert bundle.parser["network_def"]["depth"] == "@depth"
    numbers = ",".join(map(str, HU_WINDOWS["dale_ct_0_l"]))
    assert bundle["embedding_identity"]["encoder_id"] == f"random:42:layer_scale=1:xy:{numbers}"
    bundle.update({"strategies": ["cropped_24"]})
    assert bundle.side_px == 24


@pytest.mark.parametrize("name", ["dale_ct_0", "dale_ct_1s", "dale_ct_2s", "dinov2_ct"])
def test_every_bundle_of_a_slice_encoder_opens(name: str) -> None:
    bundle = open_encoder_bundle(BUNDLES / name)
    assert bundle.name == name
    assert bundle.side_px % bundle.patch_size_px == 0


def test_random_weights_are_those_of_the_seed_and_stay(small_json: Path) -> None:
    one = opened(small_json)
    torch.manual_seed(7)
    other, third = opened(small_json), opened(small_json, seed=3)
    weight = one.network.patch_embed.proj.weight
    torch.testing.assert_close(other.network.patch_embed.proj.weight, weight)
    assert not torch.equal(third.network.patch_embed.proj.weight, weight)
    assert one.network is one.network
    assert not one.network.training


def test_weights_of_a_file_are_loaded_and_those_that_do_not_fit_refused(
    small_json: Path, tmp_path: Path
) -> None:
    stored = opened(small_json, seed=3).network.state_dict()
    path = tmp_path / "a.safetensors"
    save_encoder(stored, path, INPUT | {"patch_size_px": 8})
    loaded = opened(small_json, encoder_weights=str(path)).network
    torch.testing.assert_close(loaded.state_dict()["cls_token"], stored["cls_token"])
    save_encoder(stored, path, INPUT | {"patch_size_px": 16})
    with pytest.raises(ValueError, match="patch_size_px .* 8 .* 16"):  # ours, not MONAI's around it
        _ = opened(small_json, encoder_weights=str(path)).network


def test_sources_are_those_of_the_data(
    small_json: Path, tmp_path: Path, save_nifti: Callable[..., Path]
) -> None:
    hu = np.full((9, 9, 3), -1000, np.int16)
    save_nifti(tmp_path / "ct" / "p1.nii.gz", hu, np.diag([0.7, 0.7, 2, 1]))
    found, rejected = opened(small_json, dataset_dir=str(tmp_path / "ct"))["sources"]
    assert [source.volume for source in found] == ["p1"]
    assert rejected == []


def test_what_the_bundle_does_not_have_is_refused(small_json: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        open_encoder_bundle(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        open_encoder_bundle(BUNDLES / "dale_ct_2s", [tmp_path / "none.json"])
    with pytest.raises(ValueError, match=r"slice_axis.*slice_axes"):
        opened(small_json, slice_axis="xy")
    small_json.write_text('{"num_head": 3}')
    with pytest.raises(ValueError, match=r"num_head.*small\.json.*num_heads"):
        opened(small_json)
    volumes = open_encoder_bundle(BUNDLES / "merlin")
    assert "strategies" not in volumes
    with pytest.raises(KeyError, match="merlin.*axes"):
        _ = volumes.slice_axes
