import pytest
import timm
import torch

from common.networks.encoder import cls_and_patches
from common.networks.grey_to_rgb import takes_grey
from common.transforms.hounsfield import HU_WINDOWS, normalize_hu

WINDOW = HU_WINDOWS["ct_rate"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANNELS = ([-900.0, 100.0], [-160.0, 240.0], [0.0, 800.0])


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=1).eval()


@pytest.mark.parametrize("channel_windows", [None, CHANNELS])
def test_channels_are_windows_of_the_grey_slice(vit, channel_windows):
    hu = torch.randint(-1024, 1500, (2, 1, 32, 32), generator=torch.Generator().manual_seed(1)).float()
    channels = []
    windows = channel_windows or [(WINDOW.min_hu, WINDOW.max_hu)] * 3
    for (low, high), mean, std in zip(windows, MEAN, STD, strict=True):
        channels.append(((hu.clamp(low, high) - low) / (high - low) - mean) / std)
    with torch.no_grad():
        expected = cls_and_patches(vit, torch.cat(channels, 1))
        before = vit.state_dict().keys()
        found = takes_grey(vit, WINDOW, MEAN, STD, channel_windows)
        assert found.state_dict().keys() == before
        for one, other in zip(cls_and_patches(found, normalize_hu(hu, WINDOW)), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"mean": (0.5,)}, "3 entries, got 3, 1, 3"),
        (
            {"channel_windows": [[-1024.0, 0.0]] * 3},
            r"within \[-997.0, 888.0\] HU, got \[-1024.0, 0.0\]",
        ),
        ({"channel_windows": [[5.0, 5.0]] * 3}, "must rise"),
    ],
)
def test_channels_that_cannot_be_made_are_refused(vit, given, named):
    with pytest.raises(ValueError, match=named):
        takes_grey(vit, **{"window": WINDOW, "mean": MEAN, "std": STD} | given)
