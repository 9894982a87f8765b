"""Chunks of slices change memory, not results."""

import pytest
import torch

from common.inferers.slices import SlicesInferer


class MeanOfSlice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) <= 3
        return x.mean((2, 3))


def test_embeddings_are_in_slice_order_whatever_the_chunk():
    volume = torch.randn(1, 7, 1, 5, 4)
    cls = SlicesInferer(slices_per_batch=3, amp_dtype="float32")(volume, MeanOfSlice())
    torch.testing.assert_close(cls, volume.mean((3, 4)))


def test_two_volumes_at_a_time_are_refused():
    with pytest.raises(ValueError, match="inputs must hold one volume, got 2"):
        SlicesInferer(3, "float32")(torch.zeros(2, 7, 1, 5, 4), MeanOfSlice())
