"""The closed form counts what torch counts when it runs the network."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.metrics.flops import peak_bf16_flops, training_flops


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_large_patch14_dinov2", {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}),
        ("vit_base_patch14_reg4_dinov2", {"patch_size": 14, "depth": 1}),
        ("vit_giant_patch14_dinov2", {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    ],
    ids=["tiny", "registers", "SwiGLU"],
)
def test_the_count_is_three_times_torchs_own_count_of_a_forward_pass(name, options):
    encoder = timm.create_model(
        name, in_chans=1, num_classes=0, dynamic_img_size=True, img_size=56, **options
    )
    expected = 0
    for size_px, views in {56: 2, 112: 3}.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.zeros(views, 1, size_px, size_px))
        expected += 3 * counter.get_total_flops()
    assert training_flops(encoder, {56: 2, 112: 3}) == expected


def test_a_cpu_has_no_stated_peak():
    assert peak_bf16_flops(torch.device("cpu")) is None


def test_a_gpu_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_bf16_flops(torch.device("cuda")) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce 8800")
    assert peak_bf16_flops(torch.device("cuda")) is None
