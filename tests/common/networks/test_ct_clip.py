"""CTViT against a plain reading of its description in NumPy, float64."""

import numpy as np
import pytest
import torch
from scipy.special import erf

from common.networks.ct_clip import CTCLIPImageEncoder, CTViT

DIM, HEADS, HEAD, GRID, PATCH, CODES = 6, 2, 4, (2, 3, 5), (2, 4, 4), 40


def tower(tokens: str = "before_codes") -> CTViT:
    torch.manual_seed(0)
    net = CTViT(
        dim=DIM,
        patch_size=PATCH[1],
        temporal_patch_size=PATCH[0],
        spatial_depth=2,
        temporal_depth=1,
        num_heads=HEADS,
        dim_head=HEAD,
        codebook_size=CODES,
        tokens=tokens,
    )
    net = net.double().eval()
    net.load_state_dict({name: 0.4 * torch.randn_like(tensor) for name, tensor in net.state_dict().items()})
    return net


def volume() -> torch.Tensor:
    sides = [tokens * patch for tokens, patch in zip(GRID, PATCH, strict=True)]
    return torch.randn(1, 1, *sides, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Reference:
    """The tower in NumPy, one token, head and offset at a time."""

    def __init__(self, net: CTViT) -> None:
        self.w = {name: tensor.numpy() for name, tensor in net.state_dict().items()}

    def norm(self, x, scale, shift):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift

    def bias(self):
        _, rows, columns = GRID
        places = [(r, c) for r in range(rows) for c in range(columns)]
        bias = np.empty((HEADS, len(places), len(places)))
        for i, one in enumerate(places):
            for j, other in enumerate(places):
                x = np.subtract(one, other).astype(float)
                x = np.sign(x) * np.log(np.abs(x) + 1)
                for layer in ("0.0", "1.0"):
                    x = x @ self.w[f"spatial_rel_pos_bias.net.{layer}.weight"].T
                    x = x + self.w[f"spatial_rel_pos_bias.net.{layer}.bias"]
                    x = np.where(x > 0, x, 0.1 * x)
                last = self.w["spatial_rel_pos_bias.net.2.weight"], self.w["spatial_rel_pos_bias.net.2.bias"]
                bias[:, i, j] = x @ last[0].T + last[1]
        return bias

    def convolved(self, sequences, key):
        """Sequences (n, length, D) whose flat order is read as the grid (T, H, W)."""
        grid = sequences.reshape(*GRID, DIM)
        padded = np.pad(grid, ((2, 0), (1, 1), (1, 1), (0, 0)))
        kernel = self.w[f"{key}.0.dsconv.weight"][:, 0]  # (D, 3, 3, 3)
        out = np.zeros_like(grid)
        for t, h, w in np.ndindex(3, 3, 3):
            part = padded[t : t + GRID[0], h : h + GRID[1], w : w + GRID[2]]
            out += part * kernel[:, t, h, w]
        return (out + self.w[f"{key}.0.dsconv.bias"]).reshape(sequences.shape)

    def attended(self, x, key, bias):
        """One sequence (length, D)."""
        w = {name: self.w[f"{key}.1.{name}"] for name in ("q_scale", "k_scale")}
        normed = self.norm(x, self.w[f"{key}.1.norm.gamma"], self.w[f"{key}.1.norm.beta"])
        q = normed @ self.w[f"{key}.1.to_q.weight"].T
        k, v = np.split(x @ self.w[f"{key}.1.to_kv.weight"].T, 2, axis=1)
        heads = []
        for head in range(HEADS):
            dims = slice(head * HEAD, (head + 1) * HEAD)
            query, keys = (
                part[:, dims] / np.linalg.norm(part[:, dims], axis=1, keepdims=True) for part in (q, k)
            )
            scores = 8 * (query * w["q_scale"]) @ (keys * w["k_scale"]).T
            scores = np.exp(scores + (0 if bias is None else bias[head]))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, dims])
        return np.concatenate(heads, axis=1) @ self.w[f"{key}.1.to_out.weight"].T

    def transformed(self, sequences, name, depth, bias):
        for layer in range(depth):
            key = f"{name}.layers.{layer}"
            sequences = sequences + self.convolved(sequences, key)
            sequences = sequences + np.stack([self.attended(x, key, bias) for x in sequences])
            hidden = self.norm(sequences, self.w[f"{key}.3.0.weight"], self.w[f"{key}.3.0.bias"])
            values, gate = np.split(hidden @ self.w[f"{key}.3.1.weight"].T, 2, axis=-1)
            hidden = values * gate * (1 + erf(gate / np.sqrt(2))) / 2
            sequences = sequences + hidden @ self.w[f"{key}.3.4.weight"].T
        return self.norm(sequences, self.w[f"{name}.norm_out.gamma"], self.w[f"{name}.norm_out.beta"])

    def __call__(self, image):
        tokens = np.empty((*GRID, DIM))
        for t, h, w in np.ndindex(*GRID):
            cut = tuple(slice(i * p, (i + 1) * p) for i, p in zip((t, h, w), PATCH, strict=True))
            x = self.norm(image[cut].ravel(), self.w["to_patch_emb.1.weight"], self.w["to_patch_emb.1.bias"])
            x = x @ self.w["to_patch_emb.2.weight"].T + self.w["to_patch_emb.2.bias"]
            tokens[t, h, w] = self.norm(x, self.w["to_patch_emb.3.weight"], self.w["to_patch_emb.3.bias"])
        slabs = tokens.reshape(GRID[0], -1, DIM)
        slabs = self.transformed(slabs, "enc_spatial_transformer", 2, self.bias())
        columns = slabs.transpose(1, 0, 2)
        columns = self.transformed(columns, "enc_temporal_transformer", 1, None)
        return columns.transpose(1, 0, 2).reshape(*GRID, DIM)


def test_ctvit_is_its_description():
    net = tower()
    grid = net(volume())
    assert grid.shape == (1, DIM, *GRID)
    expected = Reference(net)(volume()[0, 0].numpy())
    np.testing.assert_allclose(grid[0].permute(1, 2, 3, 0).detach(), expected, rtol=0, atol=1e-9)


def test_after_the_codebook_a_token_is_the_code_of_largest_cosine():
    before, after = tower(), tower("codes")
    codes = after.state_dict()["vq._codebook.embed"][0].numpy()
    tokens = before(volume())[0].flatten(1).T.detach().numpy()
    cosines = tokens @ codes.T / np.linalg.norm(codes, axis=1)
    expected = codes[cosines.argmax(1)]
    assert len(np.unique(cosines.argmax(1))) > 3
    np.testing.assert_allclose(after(volume())[0].flatten(1).T.detach(), expected, rtol=0, atol=1e-12)


def test_the_pooled_vector_projects_the_mean_slab():
    net = CTCLIPImageEncoder(tower(), grid_size=GRID[1:], dim=DIM, latent_dim=7).double()
    grid = net(volume())
    mean = grid[0].mean(1).permute(1, 2, 0).flatten().detach().numpy()  # rows, columns, width
    expected = net.to_visual_latent.weight.detach().numpy() @ mean
    np.testing.assert_allclose(net.pool(grid)[0].detach(), expected, atol=1e-12)


def test_volumes_that_patches_do_not_tile_are_refused():
    with pytest.raises(ValueError, match=r"multiples of the patch \(2, 4, 4\), got \(4, 12, 18\)"):
        tower()(torch.zeros(1, 1, 4, 12, 18, dtype=torch.float64))


def test_tokens_are_one_of_two():
    with pytest.raises(ValueError, match="tokens must be 'codes' or 'before_codes', got 'code'"):
        tower("code")
