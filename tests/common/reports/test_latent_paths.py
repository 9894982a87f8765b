from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from common.embeddings.store import EmbeddingStore, EmbeddingStoreWriter
from common.reports.latent_paths import chosen_paths, draw_path, heights, principal_plane


def test_the_plane_keeps_the_distances_of_a_flat_path() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((7, 2)))[0]
    flat = rng.standard_normal((13, 2)) * [5, 1]
    places, share = principal_plane(flat @ basis.T + 3)
    assert share == pytest.approx(1)
    for one, other in ((0, 5), (3, 12)):
        expected = np.linalg.norm(flat[one] - flat[other])
        assert np.linalg.norm(places[one] - places[other]) == pytest.approx(expected)
    assert np.abs(places.mean(0)).max() < 1e-9
    assert places[:, 0].var() > places[:, 1].var()
    assert (places[0] <= 0).all()


def test_share_is_that_of_the_two_largest_eigenvalues() -> None:
    tokens = np.random.default_rng(1).standard_normal((40, 5)) * [4, 3, 2, 1, 1]
    values = np.sort(np.linalg.eigvalsh(np.cov(tokens.T)))[::-1]
    assert principal_plane(tokens)[1] == pytest.approx(values[:2].sum() / values.sum())


def test_a_path_is_drawn_in_the_plane_with_its_heights() -> None:
    tokens, z_mm = np.random.default_rng(2).standard_normal((9, 4)), np.arange(9) * 2.5 + 10
    axes = Figure().subplots()
    share = draw_path(axes, tokens, z_mm)
    places, expected = principal_plane(tokens)
    (points,) = axes.collections
    np.testing.assert_allclose(points.get_offsets(), places)
    np.testing.assert_allclose(points.get_array(), np.arange(9) / 8)
    assert share == expected
    assert heights(np.array([3.0])).tolist() == [0]  # a single slice


def test_encoders_that_share_a_name_go_by_their_folders(write_paths: Callable[..., Path]) -> None:
    folders = [write_paths("line"), write_paths("tangle")]
    paths = chosen_paths([EmbeddingStore(folder) for folder in folders], ["valid_2_a_1"])
    assert list(paths) == ["line", "tangle"]
    tokens, z_mm = paths["line"]["valid_2_a_1"]
    assert len(tokens) == len(z_mm) > 16
    twice = chosen_paths([EmbeddingStore(folder) for folder in (folders[0], *folders)], ["valid_2_a_1"])
    assert list(twice) == [str(folders[0]), "tangle"]  # named alike: here they are even the same folder


def test_embeddings_without_slices_are_refused(tmp_path: Path) -> None:
    identity = dict.fromkeys(("encoder", "encoder_id", "preprocessing", "slice_order"), "3d")
    with EmbeddingStoreWriter(tmp_path, identity | {"token_kind": "grid"}, "float32") as writer:
        writer.add("p1", torch.zeros(4, 3), (1, 1, 1))
    with pytest.raises(ValueError, match="'p1'"):
        chosen_paths([EmbeddingStore(tmp_path)], ["p1"])
