import math

import numpy as np
import pytest
import torch
from scipy.special import erf, expit, softmax
from torch import nn

from common.networks.poolers import (
    PAPER_POOLERS,
    POOLERS,
    GatedAttentionPool,
    LearnedQueryAttentionPool,
    MaxPool,
    MeanPool,
    MeanQueryAttentionPool,
    RadiomicsGatePool,
    TransformerPool,
    build_pooler,
    pad_bags,
    segment_softmax,
)

LENGTHS = (5, 2, 3)
DIM = 7
each_pooler = pytest.mark.parametrize("name", POOLERS)


def ragged(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, DIM, generator=generator, dtype=torch.float64) for length in LENGTHS]


def padded(bags: list[torch.Tensor], padding: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    batch = torch.full((len(bags), max(map(len, bags)), DIM), padding, dtype=torch.float64)
    mask = torch.zeros(batch.shape[:2], dtype=torch.bool)
    for row, bag in enumerate(bags):
        batch[row, : len(bag)] = bag
        mask[row, : len(bag)] = True
    return batch, mask


def attention_by_hand(queries: np.ndarray, bag: np.ndarray) -> np.ndarray:
    """Mean over the queries of sum_s softmax_s(q x_s / sqrt(D)) x_s, element by element."""
    outputs = []
    for query in queries:
        scores = [sum(q * x for q, x in zip(query, row, strict=True)) / math.sqrt(DIM) for row in bag]
        weights = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
        outputs.append(sum(weight * row for weight, row in zip(weights, bag, strict=True)))
    return np.mean(outputs, axis=0)


def gated_attention_by_hand(pooler: GatedAttentionPool, rows: np.ndarray) -> np.ndarray:
    weights = {name: tensor.detach().numpy() for name, tensor in pooler.state_dict().items()}
    value, gate = (rows @ weights[f"{n}.weight"].T + weights[f"{n}.bias"] for n in ("value", "gate"))
    scores = (np.tanh(value) * expit(gate)) @ weights["score.weight"][0] + weights["score.bias"]
    return softmax(scores) @ rows


def radiomics_gate_by_hand(pooler: RadiomicsGatePool, rows: np.ndarray) -> np.ndarray:
    weight, bias = (tensor.detach().numpy() for tensor in pooler.radiomics.parameters())
    gated = rows.copy()
    for organ, row in enumerate(rows):
        for d in range(DIM - 3):
            score = sum(weight[d, n] * row[DIM - 3 + n] for n in range(3)) + bias[d]
            gated[organ, d] = row[d] / (1 + math.exp(-score))
    return gated_attention_by_hand(pooler, gated)


def normed(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def transformer_by_hand(pooler: TransformerPool, rows: np.ndarray) -> np.ndarray:
    weights = {name: tensor.detach().numpy() for name, tensor in pooler.state_dict().items()}
    place = (np.arange(len(rows)) + 0.5) / len(rows)
    waves = 2 ** np.linspace(-5, 2, 128)  # in volumes
    angles = 2 * np.pi * place[:, None] / waves
    x = linear(rows, weights, "entry") + np.concatenate([np.sin(angles), np.cos(angles)], 1)
    for layer in ("layers.0", "layers.1"):
        inner = normed(x, weights, f"{layer}.norm1")
        qkv = (
            inner @ weights[f"{layer}.self_attn.in_proj_weight"].T
            + weights[f"{layer}.self_attn.in_proj_bias"]
        )
        q, k, v = qkv.reshape(len(rows), 3, 4, 64).transpose(1, 2, 0, 3)
        mixed = softmax(q @ k.transpose(0, 2, 1) / 8, axis=-1) @ v
        x = x + linear(
            mixed.transpose(1, 0, 2).reshape(len(rows), 256), weights, f"{layer}.self_attn.out_proj"
        )
        hidden = linear(normed(x, weights, f"{layer}.norm2"), weights, f"{layer}.linear1")
        x = x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, weights, f"{layer}.linear2")
    return linear(normed(x, weights, "norm").mean(0), weights, "exit")


def reference(pooler: nn.Module, bag: torch.Tensor) -> np.ndarray:
    rows = bag.numpy()
    if isinstance(pooler, MeanPool):
        return sum(rows) / len(rows)
    if isinstance(pooler, RadiomicsGatePool):
        return radiomics_gate_by_hand(pooler, rows)
    if isinstance(pooler, GatedAttentionPool):
        return gated_attention_by_hand(pooler, rows)
    if isinstance(pooler, TransformerPool):
        return transformer_by_hand(pooler, rows)
    if isinstance(pooler, MaxPool):
        return np.array([max(column) for column in rows.T])
    if isinstance(pooler, MeanQueryAttentionPool):
        return attention_by_hand((sum(rows) / len(rows))[None], rows)
    return attention_by_hand(pooler.queries.detach().numpy(), rows)


@each_pooler
def test_pooling_equals_the_equation_bag_by_bag(name: str) -> None:
    bags = ragged()
    pooler = build_pooler(name, DIM).double()
    pooled = pooler(*padded(bags)).detach().numpy()
    expected = [reference(pooler, bag) for bag in bags]
    tolerance = 1e-5 if name == "transformer" else 1e-14  # its wave numbers are float32
    np.testing.assert_allclose(pooled, expected, rtol=1e-12, atol=tolerance)


@each_pooler
def test_padding_never_matters(name: str) -> None:
    pooler = build_pooler(name, DIM).double()
    zeros = pooler(*padded(ragged()))
    for padding in (1e3, math.inf, math.nan):
        assert torch.equal(pooler(*padded(ragged(), padding)), zeros)


def test_the_transformer_sees_which_way_up_a_volume_is_and_not_its_spacing() -> None:
    pooler, (bag, *_) = build_pooler("transformer", DIM).double(), ragged()
    upright, turned = pooler(*pad_bags([bag])), pooler(*pad_bags([bag.flip(0)]))
    assert float((upright - turned).detach().abs().max()) > 1e-3
    uniform = torch.ones(1, DIM, dtype=torch.float64)
    few, many = (pooler(*pad_bags([uniform.expand(length, -1)])) for length in (301, 603))
    torch.testing.assert_close(few, many, rtol=0, atol=1e-3)


def test_layers_of_the_transformer_start_from_weights_of_their_own() -> None:
    first, second = TransformerPool(DIM).layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize("name", PAPER_POOLERS)
def test_gradient_with_respect_to_slices_and_queries_is_the_derivative(name: str) -> None:
    pooler = build_pooler(name, DIM).double()
    batch, mask = padded(ragged())
    parameters = list(pooler.parameters())
    assert torch.autograd.gradcheck(
        lambda slices, *queries: torch.func.functional_call(
            pooler, dict(zip(["queries"], queries, strict=False)), (slices, mask)
        ),
        (batch.requires_grad_(), *parameters),
    )


def test_queries_start_with_variance_one_over_dim() -> None:
    torch.manual_seed(0)
    queries = LearnedQueryAttentionPool(1024, num_queries=100).queries
    assert float(queries.detach().pow(2).mean()) == pytest.approx(1 / 1024, rel=0.02)


def test_the_five_poolings_have_the_papers_parameters() -> None:
    counts = {name: sum(p.numel() for p in build_pooler(name, DIM).parameters()) for name in PAPER_POOLERS}
    assert counts == {
        "average": 0,
        "max": 0,
        "learned_attention": DIM,
        "average_attention": 0,
        "multi_learned_attention": 4 * DIM,
    }
    assert GatedAttentionPool(DIM).score.weight.shape == (1, 128)


@each_pooler
def test_mask_of_another_shape_and_an_empty_bag_are_refused(name: str) -> None:
    pooler, (batch, mask) = build_pooler(name, DIM).double(), padded(ragged())
    with pytest.raises(ValueError, match=r"mask .*\(3, 5\), got \(3, 4\)"):
        pooler(batch, torch.ones(3, 4, dtype=torch.bool))
    mask[1] = False
    with pytest.raises(ValueError, match="0 for bag 1"):
        pooler(batch, mask)


def test_pad_bags_pads_behind_and_names_an_empty_bag() -> None:
    found, expected = pad_bags(ragged()), padded(ragged())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    with pytest.raises(ValueError, match="got 0 for bag 1 of the batch"):
        pad_bags([torch.ones(2, DIM), torch.ones(0, DIM)])


def test_impossible_poolers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POOLERS, "bare", lambda dim: nn.Linear(dim, dim))
    with pytest.raises(ValueError, match=r"'bare' .*slice_weights.* Linear"):
        build_pooler("bare", DIM)
    with pytest.raises(ValueError, match="pooler .*'median'"):
        build_pooler("median", DIM)
    with pytest.raises(ValueError, match="num_queries .* 0"):
        LearnedQueryAttentionPool(DIM, num_queries=0)


@pytest.mark.parametrize("name", sorted(POOLERS.keys() - {"max", "transformer", "radiomics_gate"}))
def test_slice_weights_add_up_to_one_and_give_the_pooling(name: str) -> None:
    pooler = build_pooler(name, DIM).double()
    for bag in ragged():
        weights = pooler.slice_weights(bag).detach()
        assert weights.shape == (len(bag),)
        assert float(weights.sum()) == pytest.approx(1.0)
        np.testing.assert_allclose((weights @ bag).numpy(), reference(pooler, bag), rtol=1e-12)


def test_slice_weights_of_the_radiomics_gate_are_the_attention_on_gated_tokens() -> None:
    pooler, (bag, *_) = build_pooler("radiomics_gate", DIM).double(), ragged()
    gates = torch.sigmoid(bag[:, -3:] @ pooler.radiomics.weight.T + pooler.radiomics.bias)
    gated = torch.cat([bag[:, :-3] * gates, bag[:, -3:]], 1)
    pooled = (pooler.slice_weights(bag) @ gated).detach().numpy()
    np.testing.assert_allclose(pooled, reference(pooler, bag), rtol=1e-12)


def test_slice_weights_of_the_maximum_are_shares_of_the_dimensions() -> None:
    bag = torch.tensor([[1.0, 5.0, 0.0], [2.0, 1.0, 3.0], [0.0, 0.0, 2.0]])
    assert MaxPool().slice_weights(bag).tolist() == pytest.approx([1 / 3, 2 / 3, 0.0])


@pytest.mark.parametrize("lengths", [(5, 2, 3), (4,), (1, 1)])
def test_softmax_of_packed_bags_is_that_of_each_bag(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([part.softmax(1) for part in scores.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(segment_softmax(scores, lengths), expected, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda packed: segment_softmax(packed, lengths), scores)
