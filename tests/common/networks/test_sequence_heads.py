import numpy as np
import pytest
import torch
from torch import nn

from common.embeddings.bag_batches import pad_bags
from common.networks.sequence_heads import HEADS, GatedAttentionHead, SequenceGrid, TransformerHead

DIM, CLASSES = 5, 3
each_kind = pytest.mark.parametrize("kind", HEADS)


def bags_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    bags = []
    for length in lengths:
        slices = torch.randn(length, DIM, dtype=torch.float64, generator=generator)
        z_mm = 2.5 * (torch.arange(length, dtype=torch.float64) - (length - 1) / 2)
        bags.append(torch.cat([slices, z_mm[:, None]], dim=1))
    return bags


def head_of(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return HEADS[kind](DIM, CLASSES).double()


def test_gated_attention_is_its_equation():
    head, (bag,) = head_of("gated_abmil"), bags_of(7)
    weights = {name: tensor.detach().numpy() for name, tensor in head.state_dict().items()}
    slices = bag[:, :DIM].numpy()
    hidden = np.tanh(slices @ weights["value.weight"].T + weights["value.bias"])
    gate = 1 / (1 + np.exp(-(slices @ weights["gate.weight"].T + weights["gate.bias"])))
    scores = (hidden * gate) @ weights["score.weight"][0] + weights["score.bias"]
    attention = np.exp(scores) / np.exp(scores).sum()
    expected = weights["classifier.weight"] @ (attention @ slices) + weights["classifier.bias"]
    logits = head(*pad_bags([bag])).detach().numpy()
    np.testing.assert_allclose(logits, expected[None], atol=1e-12)


@each_kind
def test_padding_never_matters(kind):
    head, bags = head_of(kind), bags_of(3, 8, 1)
    padded, mask = pad_bags(bags)
    padded[~mask] = 1e6
    together = head(padded, mask)
    alone = torch.cat([head(*pad_bags([bag])) for bag in bags])
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)


@each_kind
def test_order_of_the_rows_does_not_matter_as_they_carry_their_place(kind):
    head, (bag,) = head_of(kind), bags_of(8)
    turned = bag[torch.randperm(8, generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(head(*pad_bags([bag])), head(*pad_bags([turned])), atol=1e-10, rtol=0)


def test_the_transformer_sees_where_a_slice_is_and_gated_attention_does_not():
    (bag,) = bags_of(8)
    stretched = bag.clone()
    stretched[:, -1] *= 1.3
    changes = {}
    for kind in HEADS:
        head = head_of(kind)
        logits = head(*pad_bags([bag, stretched])).detach()
        changes[kind] = float((logits[0] - logits[1]).abs().max())
    assert changes["gated_abmil"] == 0
    assert changes["transformer"] > 1e-3


def test_layers_of_the_transformer_start_from_weights_of_their_own():
    first, second = TransformerHead(DIM, CLASSES).layers
    assert len(TransformerHead(DIM, CLASSES).layers) == 2
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert not torch.equal(first.self_attn.out_proj.weight, second.self_attn.out_proj.weight)


def test_every_head_of_the_grid_learns_as_it_would_alone():
    bags, labels = bags_of(3, 8, 5, 6), torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]]).double()
    rates = [1e-2, 1e-3]
    grid = SequenceGrid(list(HEADS), rates, DIM, CLASSES, seed=7).double()
    alone = [grid.probe(index) for index in range(4)]
    optimizer = torch.optim.AdamW(grid.parameter_groups())
    for _ in range(3):
        optimizer.zero_grad()
        logits = grid(grid.fixed_features(bags), bags)
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, labels.expand_as(logits), reduction="none"
        )
        losses.mean(dim=(1, 2)).sum().backward()
        optimizer.step()
    assert grid.names == [(kind, rate) for rate in rates for kind in HEADS]
    for index, (_, rate) in enumerate(grid.names):
        start = {name: tensor.clone() for name, tensor in alone[index].state_dict().items()}
        own = torch.optim.AdamW(alone[index].parameters(), lr=rate)
        for _ in range(3):
            own.zero_grad()
            logits = alone[index](*pad_bags(bags))
            nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
            own.step()
        trained = grid.probe(index).state_dict()
        for name, tensor in alone[index].state_dict().items():
            # Adam turns the rounding of gradients that are 0 (of key biases) into steps of 1e-8
            torch.testing.assert_close(trained[name], tensor, atol=1e-6, rtol=0)
        assert any(not torch.equal(start[name], trained[name]) for name in start)


def test_initial_weights_depend_on_seed_and_kind_only():
    grid = SequenceGrid(list(HEADS), [0.1, 0.2], DIM, CLASSES, seed=7)
    again = SequenceGrid(["transformer"], [0.3], DIM, CLASSES, seed=7)
    other = SequenceGrid(["transformer"], [0.3], DIM, CLASSES, seed=8)
    weights = [grid.probe(1), grid.probe(3), again.probe(0), other.probe(0)]
    first, second, third, fourth = [probe.classifier.weight for probe in weights]
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, fourth)


def test_what_the_grid_does_not_know_is_refused():
    with pytest.raises(
        ValueError, match=r"poolers must be of \['gated_abmil', 'transformer'\], got 'average'"
    ):
        SequenceGrid(["average"], [0.1], DIM, CLASSES, 0)
    with pytest.raises(ValueError, match=r"learning_rates must be given, each once, got \[\]"):
        SequenceGrid(["transformer"], [], DIM, CLASSES, 0)
    with pytest.raises(ValueError, match="poolers must be given, each once"):
        SequenceGrid(["transformer", "transformer"], [0.1], DIM, CLASSES, 0)


def test_the_paper_has_128_hidden_units():
    assert GatedAttentionHead(DIM, CLASSES).score.weight.shape == (1, 128)
