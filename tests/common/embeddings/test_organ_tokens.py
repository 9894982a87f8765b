import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from common.cohort.cohort import load_labels
from common.embeddings.organ_tokens import ORGANS, OTHER, dim_with_radiomics, organ_radiomics, organ_tokens

NAMES = [label.name for label in load_labels("totalsegmentator")]


@pytest.fixture
def drawn():
    """Patch tokens of 3 slices of 2 x 2 patches, and shares of four classes that add to 1."""
    rng = np.random.default_rng(0)
    patches = torch.from_numpy(rng.normal(size=(3, 4, 5)).astype(np.float32))
    shares = np.zeros((12, len(NAMES)), np.float32)
    classes = [NAMES.index(name) for name in ("background", "liver", "rib_left_3", "rib_right_11")]
    shares[:, classes] = rng.dirichlet(np.ones(4), 12)
    shares[:5, classes[1]] = 0
    return patches, shares


@pytest.mark.parametrize("slice_axes", ["yx", "xy"])
def test_tokens_are_means_weighted_by_the_share_of_each_patch(drawn, slice_axes):
    patches, shares = drawn
    names, tokens = organ_tokens(patches, csr_matrix(shares), slice_axes)
    assert names == ["liver", "thoracic_cage", OTHER]
    members = {"liver": ["liver"], "thoracic_cage": ["rib_left_3", "rib_right_11"], OTHER: ["background"]}
    for name, token in zip(names, tokens, strict=True):
        total, weight = np.zeros(5), 0.0
        for z in range(3):
            for row in range(2):
                for column in range(2):
                    place = row * 2 + column if slice_axes == "yx" else column * 2 + row  # of the token
                    share = sum(shares[z * 4 + row * 2 + column, NAMES.index(one)] for one in members[name])
                    total += share * patches[z, place].numpy()
                    weight += share
        np.testing.assert_allclose(token, total / weight, rtol=1e-5)


def test_every_class_belongs_to_one_organ(drawn):
    patches, _ = drawn
    for place, name in enumerate(NAMES):
        alone = np.zeros((12, len(NAMES)), np.float32)
        alone[7, place] = 1
        names, tokens = organ_tokens(patches, csr_matrix(alone))
        assert len(names) == 1, name
        torch.testing.assert_close(tokens[0], patches[1, 3])
    found = {organ for organ, starts in ORGANS.items() if organ == OTHER or starts}
    assert found == set(ORGANS)


def test_radiomics_are_volume_mean_and_deviation_of_each_organs_voxels():
    rng = np.random.default_rng(0)
    hu = rng.integers(-1024, 1500, (3, 8, 8)).astype(np.int16)
    classes = [NAMES.index(name) for name in ("background", "liver", "rib_left_3", "rib_right_11")]
    ids = rng.choice(classes, (3, 8, 8)).astype(np.uint8)
    found = organ_radiomics(hu, ids, (0.7, 0.8, 3.0))
    masks = [ids == classes[1], (ids == classes[2]) | (ids == classes[3]), ids == 0]
    expected = [
        [np.log(mask.sum() * 0.7 * 0.8 * 3 / 1000), hu[mask].mean() / 100, hu[mask].std() / 100]
        for mask in masks
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_tokens_without_radiomics_are_refused_for_the_gate():
    assert dim_with_radiomics({"preprocessing": "cropped_512_organs_radiomics", "dim": 1027}) == 1027
    with pytest.raises(ValueError, match="got preprocessing 'cropped_512_organs'.*--radiomics"):
        dim_with_radiomics({"preprocessing": "cropped_512_organs", "dim": 1024})


def test_what_does_not_belong_together_is_refused(drawn):
    patches, shares = drawn
    with pytest.raises(ValueError, match="3 x 4 patches, got 8"):
        organ_tokens(patches, csr_matrix(shares[:8]))
    with pytest.raises(ValueError, match="class 5 in two"):
        organ_tokens(patches, csr_matrix(shares), organs={"a": ("liver",), "b": ("liv",)})
