import json
import shutil

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from common.ct.files import ct_file, read_ct
from common.embeddings.encoder_bundle import open_encoder_bundle
from common.networks import encoder as networks
from common.transforms.hounsfield import HU_WINDOWS
from dale_ct import embed, embed_to_store
from dale_ct.encoder import BUNDLES, bundle_folder, encoders, load_encoder


def test_every_encoder_bundle_is_listed():
    known = encoders()
    inference = {path.parents[1].name for path in BUNDLES.glob("*/configs/inference.json")}
    assert set(known) == inference - {"eval_ct_rate"}
    assert known["dale_ct_2s"].takes == "slices"
    assert known["merlin"].takes == "volumes"
    assert known["ct_fm"].dim == 512


def test_an_unknown_encoder_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"dale_ct_2x.*dale_ct_2s"):
        bundle_folder("dale_ct_2x")
    with pytest.raises(ValueError, match="eval_ct_rate"):  # has an inference.json, and is no encoder
        bundle_folder("eval_ct_rate")


@pytest.mark.parametrize(
    "option", [{"strategy": "raw_144"}, {"patch_tokens": True}, {"hu_window": (1, 2, 3, 4)}]
)
def test_what_is_of_slices_is_refused_for_an_encoder_of_volumes(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"{name}.*merlin"):
        load_encoder("merlin", "random", **option)


def test_network_and_images_in_ones_own_loop_give_the_embedding(small_bundle, ct_folder):
    path = ct_folder / "a.nii.gz"
    encoder = load_encoder(str(small_bundle), "random")
    images = encoder.images(read_ct(ct_file(path)).hu)
    assert images.shape == (11, 1, 32, 32)
    with torch.inference_mode():
        tokens = encoder.network(images)
    expected = embed(path, str(small_bundle), weights="random").tokens
    np.testing.assert_allclose(tokens, expected.float(), atol=2e-3)


def test_a_second_call_returns_the_same_network_for_any_strategy(small_bundle):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load_encoder(str(small_bundle), "random")
    assert torch.equal(torch.rand(1), expected)  # the caller's random numbers are the caller's
    assert (
        load_encoder(encoder=str(small_bundle), weights="random", strategy="raw_16").network is first.network
    )


@pytest.fixture
def weights(small_bundle, tmp_path) -> str:
    """A file of the weights that the bundle's seed draws."""
    identity = {"slice_axes": "yx", "hu_window": list(HU_WINDOWS["ct_rate"])}
    network = load_encoder(str(small_bundle), "random").network
    networks.save_encoder(network.state_dict(), tmp_path / "drawn.safetensors", identity)
    return str(tmp_path / "drawn.safetensors")


def test_weights_are_loaded_once_until_their_file_changes(
    small_bundle, weights, ct_folder, tmp_path, monkeypatch
):
    loads, load = [], networks.load_encoder
    monkeypatch.setattr(networks, "load_encoder", lambda **given: loads.append(given) or load(**given))
    path, bundle = ct_folder / "a.nii.gz", str(small_bundle)
    first, second = (embed(path, bundle, weights=weights) for _ in range(2))
    store = embed_to_store(path, tmp_path / "store", bundle, weights=weights)
    assert len(loads) == 1
    expected = embed(path, bundle, weights="random").tokens
    for tokens in (first.tokens, second.tokens, store.read("a").tokens):
        assert torch.equal(tokens, expected)
    tensors = load_file(weights)
    tensors["norm.bias"] += 1
    networks.save_encoder(tensors, weights, networks.stated_identity(weights))
    assert not torch.equal(embed(path, bundle, weights=weights).tokens, expected)


def test_values_that_no_file_holds_are_made_with_the_network(small_bundle, weights, monkeypatch):
    create = timm.create_model

    def with_buffer(**options):
        network = create(**options)
        network.register_buffer("scale", torch.full((3,), 3.25), persistent=False)
        return network

    monkeypatch.setattr(timm, "create_model", with_buffer)
    assert load_encoder(str(small_bundle), weights).network.scale.tolist() == [3.25] * 3


def test_what_a_bundle_says_of_its_slices_counts(small_bundle, tmp_path):
    folder = tmp_path / "dale_ct_2s"
    shutil.copytree(small_bundle, folder)
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"slice_axes": "xy", "hu_window": "dale_ct_0_l"}))
    given = load_encoder(str(folder), "random").given
    assert (given.slice_axes, given.window) == ("xy", HU_WINDOWS["dale_ct_0_l"])
    path.write_text(
        json.dumps(config | {"depth": "$1 + int(math.pi)", "imports": [*config["imports"], "$import math"]})
    )
    assert len(load_encoder(str(folder), "random").network.blocks) == 4


@pytest.mark.parametrize("name", [name for name, facts in encoders().items() if facts.takes == "slices"])
def test_parts_are_those_that_monai_makes(name):
    knobs = {"encoder_weights": None, "embed_dim": 24, "num_heads": 2, "depth": 1, "seed": 7}
    knobs |= {
        "patch_size_px": 8,
        "img_size_px": 32,
        "device": torch.device("cpu"),
        "hu_window": "dale_ct_0_l",
    }
    monais, ours = (
        open_encoder_bundle(BUNDLES / name, (), knobs, with_monai) for with_monai in (True, False)
    )
    for part in ("weights", "input", "window", "axes", "identity", "embedding_identity", "facts", "compiled"):
        if part in monais:
            assert ours[part] == monais[part], part
    expected = monais.network.state_dict()
    found = ours.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_values_beyond_a_ct_are_clipped_and_a_missing_device_is_named(small_bundle):
    encoder = load_encoder(str(small_bundle), "random")
    hu = torch.full((1, 40, 40), -1000.0)
    hu[0, 10:30, 10:30] = 40_000.0
    assert torch.equal(encoder.images(hu), encoder.images(hu.clamp(max=30_000)))
    with pytest.raises(ValueError, match="cuda:99"):
        load_encoder(str(small_bundle), "random", "cuda:99")
