"""3D encoders over volumes: the order of tokens, windows cut by loops, and what is refused."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from common.inferers.volumes import VolumeInferer, WindowsInferer


class Patches(nn.Module):
    """The mean and the maximum of each patch of 2 x 3 x 4 voxels."""

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        mean = nn.functional.avg_pool3d(volumes, (2, 3, 4))
        return torch.cat([mean, nn.functional.max_pool3d(volumes, (2, 3, 4))], dim=1)


def test_the_grid_is_the_networks():
    volume = torch.randn(1, 1, 4, 9, 8)
    grid, patches = VolumeInferer("float32")(MetaTensor(volume), Patches())
    assert type(grid) is torch.Tensor
    assert patches is None
    assert grid.shape == (1, 2, 2, 3, 2)
    for i, j, k in np.ndindex(2, 3, 2):
        patch = volume[0, 0, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3, 4 * k : 4 * k + 4]
        torch.testing.assert_close(grid[0, :, i, j, k], torch.stack([patch.mean(), patch.max()]))


def test_a_sequence_and_the_first_of_a_tuple_are_tokens():
    class Sequence(nn.Module):
        def forward(self, volumes):
            return volumes.reshape(1, 4, 18), ["hidden states"]

    volume = torch.randn(1, 1, 4, 9, 2)
    grid, _ = VolumeInferer("float32")(volume, Sequence())
    torch.testing.assert_close(grid[..., 0, 0].mT, volume.reshape(1, 4, 18))
    assert grid.shape == (1, 18, 4, 1, 1)


@pytest.mark.parametrize("windows_per_batch", [1, 5, 100])
def test_windows_are_a_loop_over_the_padded_volume(windows_per_batch):
    volume = torch.randn(1, 1, 12, 20, 17)
    window, step = (8, 12, 16), (4, 6, 8)  # overlap one half
    inferer = WindowsInferer(window, 0.5, windows_per_batch, "float32")
    grid, _ = inferer(volume, Patches())
    padded = nn.functional.pad(volume, (0, 7, 0, 4, 0, 0))[0, 0]
    counts = [(side - w) // s + 1 for side, w, s in zip(padded.shape, window, step, strict=True)]
    assert list(grid.shape[2:]) == counts == [2, 3, 2]
    for place in np.ndindex(*counts):
        cut = tuple(slice(i * s, i * s + w) for i, s, w in zip(place, step, window, strict=True))
        expected = Patches()(padded[cut][None, None])[0].mean((1, 2, 3))
        torch.testing.assert_close(grid[0, :, *place], expected)


def test_ct_fms_windows_step_by_9_and_48_voxels():
    starts = [
        start
        for _, start in WindowsInferer((24, 128, 128), 0.625, 1, "float32").splitter(
            torch.zeros(1, 1, 34, 176, 128)
        )
    ]
    assert starts == [(z, y, 0) for z in (0, 9, 18) for y in (0, 48)]


def test_autocast_is_off_or_bfloat16():
    seen = []

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 1)

        def forward(self, volumes):
            out = self.conv(volumes)
            seen.append(out.dtype)
            return out

    for amp_dtype in ("float32", "bfloat16"):
        for inferer in (VolumeInferer(amp_dtype), WindowsInferer((2, 2, 2), 0.0, 3, amp_dtype)):
            grid, _ = inferer(torch.randn(1, 1, 2, 2, 2), Probe())
            assert grid.dtype == torch.float32
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(ValueError, match="inputs must hold one volume, got 2. Set the loader's batch_size"):
        VolumeInferer("float32")(torch.zeros(2, 1, 4, 3, 4), Patches())
    with pytest.raises(ValueError, match=r"network must return .* \(1, 5\)"):
        VolumeInferer("float32")(torch.zeros(1, 1, 5, 1, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r"window \(8, 4, 4\), got \(4, 9, 8\)"):
        WindowsInferer((8, 4, 4), 0.5, 1, "float32")(torch.zeros(1, 1, 4, 9, 8), Patches())


@pytest.mark.parametrize(
    "inferer",
    [VolumeInferer("float32"), WindowsInferer((8, 12, 16), 0.5, 3, "float32")],
    ids=["whole", "windows"],
)
def test_a_gpu_is_asked_for_no_value(fake_gpu, inferer):
    (volume,) = fake_gpu.holds(torch.zeros(1, 1, 12, 20, 17))
    with fake_gpu.mode:
        grid, _ = inferer(volume, Patches())
    assert grid.device.type == "cuda"


def test_windows_that_do_not_fit_together_go_one_by_one_and_a_volume_cannot(caplog):
    class Large(Patches):
        def forward(self, volumes):
            if volumes.numel() > 200:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(volumes)

    volume = torch.randn(1, 1, 8, 6, 8)
    infer = WindowsInferer((4, 6, 8), overlap=0.5, windows_per_batch=2, amp_dtype="float32")
    expected, _ = infer(volume, Patches())
    torch.testing.assert_close(infer(volume, Large())[0], expected)
    assert [record.args for record in caplog.records] == [(2, 1)]
    with pytest.raises(ValueError, match=r"cpu.*\(1, 8, 6, 8\)"):
        VolumeInferer("float32")(volume, Large())
