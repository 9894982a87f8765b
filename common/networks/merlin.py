"""Merlin's image encoder: a ResNet-152 inflated to 3D, which MONAI's ResNet is."""

from collections import OrderedDict
from collections.abc import Sequence

from monai.networks.nets import ResNet
from torch import nn


def merlin_resnet(layers: Sequence[int], block_planes: Sequence[int]) -> nn.Sequential:
    """Build the convolutions of Merlin's image encoder, without pooling and heads, under the published keys.

    Inflating repeats a 2D network's weights along the slices: kernels of 7 become 3 x 7 x 7, those of 3
    become 3 x 3 x 3, strides but the first's act along the slices too. MONAI's ResNet with the first kernel
    and stride given is the same network. The published weights see the volume repeated in three channels,
    which one channel with the three kernels' sum equals.

    Source: Merlin, arXiv:2406.06512, and its package (MIT).

    Args:
        layers: blocks of each stage; Merlin's are 3, 8, 36, 3.
        block_planes: width of each stage, a fourth of its output; Merlin's are 64, 128, 256, 512.

    Shape:
        ``(B, 1, slices, X, Y)`` to ``(B, 4 * last plane, slices / 16, X / 32, Y / 32)``, rounded up.
    """
    network = ResNet(
        block="bottleneck",
        layers=list(layers),
        block_inplanes=list(block_planes),
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_size=(3, 7, 7),  # type: ignore[arg-type]
        conv1_t_stride=(1, 2, 2),  # type: ignore[arg-type]
        shortcut_type="B",
        bias_downsample=False,
        feed_forward=False,
    )
    return nn.Sequential(
        OrderedDict((name, part) for name, part in network.named_children() if name != "avgpool")
    )
