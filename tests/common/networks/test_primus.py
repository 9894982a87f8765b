"""Primus against the package it is described by, its positions and COLIPRI's pooler against loops."""

import math

import numpy as np
import pytest
import torch

from common.networks.primus import COLIPRIImageEncoder, Primus, rotary_positions


def small_primus() -> Primus:
    return Primus(embed_dim=72, depth=3, num_heads=2, patch_size=4, layer_scale_init=0.1).eval()


def test_primus_is_the_packages_and_loads_its_keys_strictly():
    primus = pytest.importorskip("dynamic_network_architectures.architectures.primus")
    torch.manual_seed(0)
    theirs = primus.Primus(
        input_channels=1,
        embed_dim=72,
        patch_embed_size=(4, 4, 4),
        num_classes=2,
        eva_depth=3,
        eva_numheads=2,
        input_shape=(8, 12, 16),
        use_abs_pos_embed=False,
        drop_path_rate=0.2,
        init_values=0.1,
        scale_attn_inner=True,
    )
    theirs.up_projection = torch.nn.Identity()  # as COLIPRI uses it
    theirs = theirs.eval().double()
    weights = {name: 0.2 * torch.randn_like(tensor) for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    ours = small_primus().double()
    ours.load_state_dict(weights, strict=True)
    volumes = torch.randn(2, 1, 8, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(volumes), theirs(volumes), rtol=0, atol=1e-9)


def test_positions_are_angles_of_the_place_along_each_axis():
    grid, bands = (2, 3, 4), 5
    positions = rotary_positions(grid, bands)
    assert positions.shape == (24, 2 * 2 * 3 * bands)
    for token, place in enumerate(np.ndindex(*grid)):
        angles = [place[axis] / 10_000 ** (band / bands) for axis in range(3) for band in range(bands)]
        both = [value for angle in angles for value in (angle, angle)]
        expected = [math.sin(angle) for angle in both] + [math.cos(angle) for angle in both]
        np.testing.assert_allclose(positions[token], expected, rtol=0, atol=1e-6)


def colipri(tokens: str) -> COLIPRIImageEncoder:
    torch.manual_seed(0)
    return COLIPRIImageEncoder(small_primus(), embed_dim=72, latent_dim=24, num_pool_heads=3, tokens=tokens)


@pytest.mark.parametrize(("tokens", "width"), [("backbone", 72), ("projected", 24)])
def test_the_pooled_vector_is_attention_of_the_mean_token(tokens, width):
    encoder = colipri(tokens).eval().double()
    grid = encoder(torch.randn(2, 1, 8, 4, 12, dtype=torch.float64))
    assert grid.shape == (2, width, 2, 1, 3)
    projected = grid if width == 24 else encoder.projector(grid)
    attn = encoder.pooler["attn"]
    rows = projected.flatten(2).transpose(1, 2).detach().numpy()
    weight, bias = attn.in_proj_weight.detach().numpy(), attn.in_proj_bias.detach().numpy()
    for volume, pooled in zip(rows, encoder.pool(grid).detach().numpy(), strict=True):
        query, keys, values = (
            part @ weight[24 * i : 24 * (i + 1)].T + bias[24 * i : 24 * (i + 1)]
            for i, part in enumerate((volume.mean(0), volume, volume))
        )
        heads = []
        for head in range(3):
            dims = slice(8 * head, 8 * (head + 1))
            scores = np.exp(keys[:, dims] @ query[dims] / math.sqrt(8))
            heads.append(scores / scores.sum() @ values[:, dims])
        out = np.concatenate(heads) @ attn.out_proj.weight.detach().numpy().T
        np.testing.assert_allclose(pooled, out + attn.out_proj.bias.detach().numpy(), atol=1e-10)


def test_projected_or_not_the_pooled_vector_is_the_same():
    volume = torch.randn(1, 1, 8, 8, 4)
    plain, projected = colipri("backbone").eval(), colipri("projected").eval()
    torch.testing.assert_close(plain.pool(plain(volume)), projected.pool(projected(volume)))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of 6 x num_heads.*got 64 for 4 heads"):
        Primus(embed_dim=64, depth=1, num_heads=4, patch_size=4, layer_scale_init=0.1)
    with pytest.raises(ValueError, match="tokens must be 'backbone' or 'projected', got 'projector'"):
        colipri("projector")
    with pytest.raises(ValueError, match=r"multiples of patch_size 4, got \(8, 6, 4\)"):
        small_primus()(torch.zeros(1, 1, 8, 6, 4))
