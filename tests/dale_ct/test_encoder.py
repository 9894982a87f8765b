import numpy as np
import pytest
import torch

from common.ct.files import ct_file, read_ct
from dale_ct import embed
from dale_ct.encoder import BUNDLES, bundle_folder, encoders, load_encoder


def test_every_encoder_bundle_is_listed():
    known = encoders()
    assert set(known) == {path.parents[1].name for path in BUNDLES.glob("*/configs/inference.json")}
    assert known["dale_ct_2s"].takes == "slices"
    assert known["merlin"].takes == "volumes"
    assert known["ct_fm"].dim == 512


def test_an_unknown_encoder_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"dale_ct_2x.*dale_ct_2s"):
        bundle_folder("dale_ct_2x")


def test_an_encoder_of_volumes_is_refused():
    with pytest.raises(ValueError, match=r"merlin"):
        load_encoder("merlin")


def test_network_and_images_in_ones_own_loop_give_the_embedding(small_bundle, ct_folder):
    path = ct_folder / "a.nii.gz"
    encoder = load_encoder(str(small_bundle), "random")
    images = encoder.images(read_ct(ct_file(path)).hu)
    assert images.shape == (11, 1, 32, 32)
    with torch.inference_mode():
        tokens = encoder.network(images)
    expected = embed(path, str(small_bundle), weights="random").tokens
    np.testing.assert_allclose(tokens, expected.float(), atol=2e-3)


def test_a_second_call_returns_the_same_network(small_bundle):
    assert load_encoder(str(small_bundle), "random") is load_encoder(str(small_bundle), "random")
