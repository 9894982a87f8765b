"""In one process the global batch is the local one; tests/distributed has the same claims for two."""

import torch

from common.run.distributed import global_mean_weights, num_ranks, sum_over_ranks


def test_one_process_is_one_rank() -> None:
    assert num_ranks() == 1


def test_sum_over_one_rank_is_the_tensor_with_its_gradient() -> None:
    tensor = torch.tensor([2.0, -3.0, 5.0], requires_grad=True)
    total = sum_over_ranks(tensor)
    torch.testing.assert_close(total, tensor)
    (total * torch.tensor([7.0, 11.0, 13.0])).sum().backward()
    torch.testing.assert_close(tensor.grad, torch.tensor([7.0, 11.0, 13.0]))


def test_global_mean_weights_give_the_mean_of_the_included_samples() -> None:
    values = torch.tensor([2.0, 100.0, 4.0, 9.0, 100.0], dtype=torch.float64)
    weights = global_mean_weights(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close((weights * values).sum(), torch.tensor(5.0, dtype=torch.float64))


def test_global_mean_weights_are_zero_without_an_included_sample() -> None:
    assert global_mean_weights(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
