"""Run a 3D encoder over a volume: whole, or window by window."""

# B = 1 volume, D width of a token, E of the pooled vector, G0 G1 G2 grid, T = G0 G1 G2 tokens

from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowSplitter
from torch import nn


class VolumeInferer(Inferer):
    """Encode one volume in one pass and give the tokens of its grid in row-major order.

    The network returns a grid ``(1, D, G0, G1, G2)``, or a sequence ``(1, T, D)`` without places; of a tuple
    the first entry counts. A network with a method ``pool`` also gives a vector, from its grid; for any other
    it is the mean token.

    Args:
        amp_dtype: "bfloat16" for autocast, "float32" for none.

    Shape:
        Input ``(1, 1, ...)``, one volume. Output, float32: ``tokens (1, T, D)``, ``grid (1, 3)`` (T, 1, 1 for
        a sequence), ``pooled (1, E)``.

    Raises:
        ValueError: if more than one volume comes at a time, or the network's output is neither a grid nor a
            sequence.
    """

    def __init__(self, amp_dtype: str) -> None:
        super().__init__()
        self.amp_dtype = amp_dtype

    def __call__(self, inputs: torch.Tensor, network: nn.Module) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Encode; see the class."""
        volume = _one_volume(inputs)
        with torch.autocast(volume.device.type, torch.bfloat16, enabled=self.amp_dtype == "bfloat16"):
            grid = _feature_grid(network(volume))
            pooled = network.pool(grid) if hasattr(network, "pool") else grid.flatten(2).mean(2)  # type: ignore[operator]
        return _bag(grid, pooled)


class WindowsInferer(Inferer):
    """Encode one volume window by window: a token is the mean of a window's grid.

    Windows start at the first voxel and every ``round(side x (1 - overlap))`` voxels after; the volume's end
    is padded with zeros until the last one is whole.

    Args:
        window_size: sides of a window, in voxels; no side of the volume may be smaller.
        overlap: share of a side that neighbours have in common.
        windows_per_batch: windows encoded at a time; bounds the memory whatever the volume's size.
        amp_dtype: "bfloat16" for autocast, "float32" for none.

    Shape:
        As :class:`VolumeInferer`, with ``grid`` the windows along each axis and ``pooled (1, D)`` the mean
        window.

    Raises:
        ValueError: as :class:`VolumeInferer`, or if the volume is smaller than a window.
    """

    def __init__(
        self, window_size: Sequence[int], overlap: float, windows_per_batch: int, amp_dtype: str
    ) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.splitter = SlidingWindowSplitter(self.window_size, overlap)
        self.windows_per_batch = windows_per_batch
        self.amp_dtype = amp_dtype

    def __call__(self, inputs: torch.Tensor, network: nn.Module) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Encode; see the class."""
        volume = _one_volume(inputs)
        if any(side < window for side, window in zip(volume.shape[2:], self.window_size, strict=True)):
            raise ValueError(
                f"volume sides must be at least the window {self.window_size}, "
                f"got {tuple(volume.shape[2:])}. Pad the volume in the preprocessing."
            )
        tokens: list[torch.Tensor] = []
        batch: list[torch.Tensor] = []
        starts: list[Sequence[int]] = []
        for window, start in self.splitter(volume):
            starts.append(start)
            batch.append(window)
            if len(batch) == self.windows_per_batch:
                tokens.append(self._encode(batch, network))
                batch = []
        if batch:
            tokens.append(self._encode(batch, network))
        counts = [len(set(axis)) for axis in zip(*starts, strict=True)]
        grid = torch.cat(tokens).T.reshape(1, -1, *counts)
        return _bag(grid, grid.flatten(2).mean(2))

    def _encode(self, windows: list[torch.Tensor], network: nn.Module) -> torch.Tensor:
        with torch.autocast(windows[0].device.type, torch.bfloat16, enabled=self.amp_dtype == "bfloat16"):
            return _feature_grid(network(torch.cat(windows))).flatten(2).mean(2).float()


def _one_volume(inputs: torch.Tensor) -> torch.Tensor:
    if len(inputs) != 1:
        raise ValueError(f"inputs must hold one volume, got {len(inputs)}. Set the loader's batch_size to 1.")
    return inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs


def _feature_grid(output: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Bring what a network returns into the form ``(B, D, G0, G1, G2)``."""
    tokens = output if isinstance(output, torch.Tensor) else output[0]
    if tokens.ndim == 3:
        return tokens.transpose(1, 2)[..., None, None]
    if tokens.ndim == 5:
        return tokens
    raise ValueError(
        "the network must return a grid (B, D, G0, G1, G2) or a sequence (B, T, D), "
        f"got {tuple(tokens.shape)}."
    )


def _bag(grid: torch.Tensor, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "tokens": grid.flatten(2).transpose(1, 2).float(),
        "grid": torch.tensor([grid.shape[2:]]),
        "pooled": pooled.float(),
    }
