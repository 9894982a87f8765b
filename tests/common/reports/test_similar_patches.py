from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from common.reports.ct_tokens import open_encoder, read_images
from common.reports.similar_patches import cls_attention, main, similarity_to
from common.transforms.hounsfield import normalize_hu


def test_attention_reproduces_what_the_last_block_does(ct_path: Path, bundle: Path, small_json: Path) -> None:
    encoder = open_encoder(bundle, "random", [small_json], 32)
    hu = read_images(ct_path, 32).hu[:3]
    maps = cls_attention(encoder, hu)
    assert maps.shape == (3, 3, 4, 4)
    # the block's own output for CLS is the same mean of its values
    block, seen = encoder.network.blocks[-1].attn, {}
    block.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs[0], output=output))
    with torch.no_grad():
        encoder.network.forward_features(normalize_hu(hu, encoder.window))
        values = block.qkv(seen["inputs"]).unflatten(-1, (3, 3, 8))[:, :, 2]  # (S, T, N, 8)
        weights = torch.cat([1 - maps.flatten(2).sum(-1, keepdim=True), maps.flatten(2)], -1)
        mixed = torch.einsum("snt,stnd->snd", weights, values).flatten(1)
        torch.testing.assert_close(block.proj(mixed), seen["output"][:, 0], rtol=1e-4, atol=1e-5)


def test_similarity_is_the_cosine() -> None:
    patches = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    values = similarity_to(patches, 1, 2)
    assert values[1, 2] == pytest.approx(1)
    one, other = patches[1, 2].numpy(), patches[2, 0].numpy()
    assert values[2, 0] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), abs=1e-6)
    with pytest.raises(ValueError, match=r"patch must lie in a grid of 3 x 3, got \(3, 0\)"):
        similarity_to(patches, 3, 0)


def test_command_draws_a_picture(ct_path: Path, options: list[str], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    where = ["--out", str(tmp_path / "a.png"), "--patch", "1", "1", "--slices", "4", "--slices", "6"]
    answer = CliRunner().invoke(app, [str(ct_path), *where, *options])
    assert answer.exit_code == 0, answer.output
    assert Image.open(tmp_path / "a.png").height > 800
