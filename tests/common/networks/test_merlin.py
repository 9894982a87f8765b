"""Merlin's encoder against a 3D network inflated by hand from torchvision's 2D one."""

import torch
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet

from common.networks.merlin import merlin_resnet
from common.networks.published_weights import own_part


def inflated(weights: dict[str, torch.Tensor], volume: torch.Tensor) -> torch.Tensor:
    """The published forward pass: channel repeated, temporal kernels of 3, temporal strides but the first."""

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        stats = (weights[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *stats)

    x = functional.conv3d(
        volume.repeat(1, 3, 1, 1, 1), weights["conv1.weight"], stride=(1, 2, 2), padding=(1, 3, 3)
    )
    x = functional.max_pool3d(norm(x, "bn1").relu(), kernel_size=3, stride=2, padding=1)
    for stage in range(1, 5):
        for block in range(
            sum(key.startswith(f"layer{stage}.") and key.endswith("conv1.weight") for key in weights)
        ):
            key, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = norm(functional.conv3d(x, weights[f"{key}.conv1.weight"]), f"{key}.bn1").relu()
            out = functional.conv3d(out, weights[f"{key}.conv2.weight"], stride=stride, padding=1)
            out = norm(out, f"{key}.bn2").relu()
            out = norm(functional.conv3d(out, weights[f"{key}.conv3.weight"]), f"{key}.bn3")
            if f"{key}.downsample.0.weight" in weights:
                x = functional.conv3d(x, weights[f"{key}.downsample.0.weight"], stride=stride)
                x = norm(x, f"{key}.downsample.1")
            x = (out + x).relu()
    return x


def inflated_weights(network: ResNet) -> dict[str, torch.Tensor]:
    """Random weights of the shapes that inflation gives: one more axis, of 3 where the kernel is not 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, tensor in network.state_dict().items():
        if key.startswith("fc.") or key.endswith("num_batches_tracked"):
            continue
        shape = list(tensor.shape)
        if len(shape) == 4:
            shape.insert(2, 1 if shape[2] == 1 else 3)
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 1
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[key] = random.abs() + 0.5 if key.endswith("running_var") else random * fan_in**-0.5
    return weights


def test_monais_network_is_the_inflated_one_and_loads_its_keys_strictly():
    layers = [1, 2, 2, 1]
    published = inflated_weights(ResNet(Bottleneck, layers))
    ours = merlin_resnet(layers, [64, 128, 256, 512]).double().eval()
    counters = {
        key: tensor for key, tensor in ours.state_dict().items() if key.endswith("num_batches_tracked")
    }
    ours.load_state_dict(own_part(published, {"": ""}, summed=["conv1.weight"]) | counters, strict=True)
    volume = torch.randn(1, 1, 20, 40, 52, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = inflated(published, volume)
    assert expected.shape == (1, 2048, 2, 2, 2)
    torch.testing.assert_close(ours(volume), expected, rtol=1e-9, atol=1e-9)
