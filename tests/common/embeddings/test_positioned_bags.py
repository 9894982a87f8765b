import re

import numpy as np
import pytest
import torch

from common.embeddings.bags import EmbeddingBags
from common.embeddings.positioned_bags import PositionedBags

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_last_column_is_the_place_from_the_middle_of_the_volume(write_cohort, dtype):
    folder, labels_csv = write_cohort("train", 5, dtype=dtype)
    plain, bags = (kind(folder, labels_csv, CLASSES) for kind in (EmbeddingBags, PositionedBags))
    assert bags.identity == plain.identity
    assert bags.identity["dim"] == 7
    assert bags.volumes == plain.volumes
    for index in range(5):
        tokens = bags[index]["tokens"]
        assert tokens.dtype == dtype
        torch.testing.assert_close(tokens[:, :-1], plain[index]["tokens"], atol=0, rtol=0)
        length = len(tokens)  # slices 1.5 mm apart
        expected = 1.5 * (np.arange(length) - (length - 1) / 2)
        np.testing.assert_array_equal(tokens[:, -1].float().numpy(), expected)


def test_the_volumes_asked_for_are_loaded_in_their_order(write_cohort):
    folder, labels_csv = write_cohort("train", 5)
    bags = PositionedBags(folder, labels_csv, CLASSES, ["train_2_a_1", "train_1_a_1"])
    assert bags.volumes == ["train_2_a_1", "train_1_a_1"]
    assert [bags[place]["tokens"].shape for place in (0, 1)] == [(int(length), 8) for length in bags.lengths]


def test_embeddings_without_positions_are_refused(tmp_path, write_cohort):
    _, labels_csv = write_cohort("train", 2)
    folder = tmp_path / "arrays"
    folder.mkdir()
    for volume in ("train_1_a_1", "train_1_b_1"):
        np.save(folder / f"{volume}.npy", np.ones((3, 7), dtype=np.float32))
    message = re.escape(f"hold embeddings of slices with positions, got none in '{folder}'.")
    with pytest.raises(ValueError, match=message):
        PositionedBags(folder, labels_csv, CLASSES)
