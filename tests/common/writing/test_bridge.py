"""Bridges, against attention written out for one query after the other."""

import pytest
import torch

from common.networks.mil_probe import Standardizer
from common.networks.poolers import pad_bags
from common.writing.bridge import Bridge, GatedReader

SIZES = {"lm_dim": 10, "num_tokens": 8, "num_zones": 4, "width": 16, "num_layers": 2}


def bridge(kind: str, **changed: object) -> Bridge:
    torch.manual_seed(0)
    standardizer = Standardizer([2 * torch.randn(50, 6) + 1], 6)
    return Bridge(standardizer=standardizer, kind=kind, num_heads=2, **(SIZES | changed)).double()  # type: ignore[arg-type]


def bags(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 6, generator=generator, dtype=torch.float64) for length in lengths]


@pytest.mark.parametrize("kind", ["zones", "perceiver"])
def test_bags_of_any_length_become_as_many_words_and_padding_never_matters(kind) -> None:
    network, found = bridge(kind), bags(1, 3, 40)
    together = network(*pad_bags(found))
    assert together.shape == (3, 8, 10)
    for words, bag in zip(together, found, strict=True):
        torch.testing.assert_close(network(*pad_bags([bag]))[0], words)


def test_a_query_depends_on_the_tokens_of_its_zone_alone() -> None:
    (bag,) = bags(12)
    for kind in ("zones", "perceiver"):
        network = bridge(kind)
        inputs = bag.clone().requires_grad_()
        words = network(*pad_bags([inputs]))[0]
        for query in range(8):
            (gradient,) = torch.autograd.grad(words[query].sum(), inputs, retain_graph=True)
            seen = gradient.abs().sum(1) > 0
            zone = query // 2
            expected = [kind == "perceiver" or token // 3 == zone for token in range(12)]
            assert seen.tolist() == expected


@pytest.mark.parametrize(("length", "seen"), [(1, [1, 1, 1, 1]), (2, [1, 1, 1, 1]), (5, [2, 2, 2, 2])])
def test_short_bags_leave_no_zone_empty(length, seen) -> None:
    visible = bridge("zones").visible(torch.ones(1, length, dtype=torch.bool))[0]
    assert visible.sum(1)[::2].tolist() == seen
    assert visible.any(0).all()


def test_values_are_those_of_attention_written_out() -> None:
    network, (bag,) = bridge("zones", num_layers=1), bags(8)
    (layer,) = network.layers
    place = (torch.arange(8) + 0.5) / 8
    angles = place[:, None].double() * network.wave_numbers
    tokens = network.entry(bag) + torch.cat([angles.sin(), angles.cos()], -1)
    found = network(*pad_bags([bag]))[0]
    weights = torch.zeros(8, dtype=torch.float64)
    for number, query in enumerate(network.queries):
        zone = range(2 * (number // 2), 2 * (number // 2) + 2)
        asked = layer.to_query(layer.norm_queries(query))
        read = []
        for head in (slice(0, 8), slice(8, 16)):
            keys = layer.to_key_value(layer.norm_tokens(tokens))[list(zone), :16][:, head]
            values = layer.to_key_value(layer.norm_tokens(tokens))[list(zone), 16:][:, head]
            share = (keys @ asked[head] / 8**0.5).softmax(0)
            read.append(share @ values)
            weights[list(zone)] += share.detach() / 16
        query = query + layer.to_out(torch.cat(read))
        query = query + layer.think(layer.norm(query))
        torch.testing.assert_close(found[number], network.exit(query))
    torch.testing.assert_close(network.token_weights(bag), weights)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="bridge must be one of.*'cross'"):
        bridge("cross")
    with pytest.raises(ValueError, match="num_zones, got 8 and 3"):
        bridge("zones", num_zones=3)
    with pytest.raises(ValueError, match="bridge_width.*got 18"):
        bridge("zones", width=18)
    with pytest.raises(ValueError, match="6 wide.*got 7"):
        bridge("zones")(*pad_bags([torch.ones(3, 7)]))


def test_a_gate_lets_nothing_through_at_first_and_then_its_share() -> None:
    torch.manual_seed(0)
    reader, words, soft = GatedReader(8, 2), torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    assert torch.equal(reader(words, soft), words)
    reader.gate.data.fill_(0.5)
    queries = words + reader.read(words, soft, None) - words
    torch.testing.assert_close(reader(words, soft), words + 0.46211716 * (queries - words))
    assert reader(words.bfloat16(), soft).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="10 wide cannot be read by 3"):
        GatedReader(10, 3)
