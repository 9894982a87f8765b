import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.cohort.cohort import prior_logits
from common.networks import mil_probe
from common.networks.mil_probe import MILProbe, ProbeGrid, Standardizer, load_probe, probe_name, save_probe
from common.networks.poolers import (
    PAPER_POOLERS,
    POOLERS,
    LearnedQueryAttentionPool,
    MeanPool,
    build_pooler,
    pad_bags,
)

RATES = [0.1, 0.03, 0.01, 0.003]
DIM, CLASSES = 7, 3


def grid(**changes: Any) -> ProbeGrid:
    settings = {
        "poolers": list(PAPER_POOLERS),
        "learning_rates": RATES,
        "dim": DIM,
        "num_classes": CLASSES,
        "seed": 5,
    }
    return ProbeGrid(**settings | changes)


def bags(lengths: tuple[int, ...] = (4, 1, 6, 2, 5)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, DIM, generator=generator, dtype=torch.float64) for length in lengths]


class ScaledAttention(LearnedQueryAttentionPool):
    """A learned query on slices whose dimensions are weighed: not what the grid packs."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, num_queries=1)
        self.scale = nn.Parameter(torch.rand(dim))

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(bags * self.scale, mask)


class FrozenProjection(MeanPool):
    """No parameters, and a buffer that is drawn anew for every instance."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(dim, dim))

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(bags, mask) @ self.projection


@pytest.fixture(autouse=True)
def _poolers_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POOLERS, "scaled_attention", ScaledAttention)
    monkeypatch.setitem(POOLERS, "frozen", FrozenProjection)


def read_together(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    """Read the bags of a batch as a GPU does, or one by one as a CPU does."""
    monkeypatch.setattr(
        mil_probe, "_read_together", lambda bags, device: [bags] if together else [[bag] for bag in bags]
    )


def scramble(network: nn.Module) -> None:
    """Give every probe other weights, as after training."""
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_grid_names_every_pair_once_rates_first() -> None:
    names = grid().names
    assert len(set(names)) == 20
    assert probe_name(*names[0]) == "average/lr_0.1"
    assert names[7] == ("learned_attention", 0.03)


@pytest.mark.parametrize(
    "poolers",
    [
        list(PAPER_POOLERS),
        ["average", "max"],
        ["learned_attention"],
        ["multi_learned_attention", "max"],
        ["gated_abmil"],
        ["transformer", "average", "scaled_attention", "radiomics_gate", "gated_abmil"],
        ["frozen", "learned_attention", "average_attention"],
    ],
)
def test_any_choice_of_poolers_makes_a_grid(poolers: list[str]) -> None:
    network = grid(poolers=poolers, learning_rates=[0.1, 0.2, 0.3]).double()
    scramble(network)
    logits = network(network.fixed_features(bags()), bags())
    for index, (name, _) in enumerate(network.names):
        assert name == poolers[index % len(poolers)]
        torch.testing.assert_close(
            network.probe(index)(*pad_bags(bags())), logits[index], rtol=1e-12, atol=1e-12
        )


def test_gradient_of_the_summed_loss_is_each_probes_own() -> None:
    network = grid().double()
    scramble(network)
    targets = (torch.arange(15).reshape(5, CLASSES) % 2).double()
    loss = nn.functional.binary_cross_entropy_with_logits
    logits = network(network.fixed_features(bags()), bags())
    sum(loss(of_probe, targets) for of_probe in logits).backward()
    for index, (name, _) in enumerate(network.names):
        alone = network.probe(index)
        loss(alone(*pad_bags(bags())), targets).backward()
        rate, place = divmod(index, 5)
        torch.testing.assert_close(network.weights[rate].grad[place], alone.classifier.weight.grad)
        torch.testing.assert_close(network.biases[rate].grad[place], alone.classifier.bias.grad)
        own = {"learned_attention": slice(0, 1), "multi_learned_attention": slice(1, 5)}.get(name)
        if own is not None:
            torch.testing.assert_close(network.queries[rate].grad[own], alone.pooler.queries.grad)


def test_initial_weights_depend_on_seed_and_pooler_only() -> None:
    network, other = grid(), grid(poolers=["multi_learned_attention", "average"], learning_rates=[7.0])
    for index, (name, _) in enumerate(network.names):
        torch.manual_seed(5)
        alone = MILProbe(build_pooler(name, DIM), DIM, CLASSES)
        for key, tensor in network.probe(index).state_dict().items():
            assert torch.equal(tensor, alone.state_dict()[key])
    assert torch.equal(other.probe(0).pooler.queries, network.probe(4).pooler.queries)
    assert not torch.equal(grid(seed=6).weights[0], network.weights[0])


def test_making_a_grid_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    grid()
    assert torch.equal(torch.rand(1), expected)


def test_each_learning_rate_is_a_parameter_group_and_none_is_forgotten() -> None:
    network = grid()
    groups = network.parameter_groups()
    assert [group["lr"] for group in groups] == RATES
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    assert sum(p.numel() for p in network.parameters()) == 4 * (5 * (DIM * CLASSES + CLASSES) + 5 * DIM)


def test_poolers_with_weights_learn_as_they_would_alone_at_each_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    names, rates = (
        ["gated_abmil", "average", "radiomics_gate", "scaled_attention", "learned_attention"],
        [0.3, 0.02],
    )
    targets = (torch.arange(15).reshape(5, CLASSES) % 2).double()
    loss = nn.functional.binary_cross_entropy_with_logits
    for at_once in (False, True):
        read_together(monkeypatch, at_once)
        network = grid(poolers=names, learning_rates=rates).double()
        alone = [network.probe(index).train() for index in range(10)]
        fixed = network.fixed_features(bags())
        optimizer = torch.optim.SGD(network.parameter_groups(), momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            sum(loss(of_probe, targets) for of_probe in network(fixed, bags())).backward()
            optimizer.step()
        for index, (name, rate) in enumerate(network.names):
            probe, together = alone[index], network.probe(index)
            start = {key: tensor.clone() for key, tensor in probe.state_dict().items()}
            optimizer = torch.optim.SGD(probe.parameters(), lr=rate, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                loss(probe(*pad_bags(bags())), targets).backward()
                optimizer.step()
            for key, tensor in together.state_dict().items():
                torch.testing.assert_close(tensor, probe.state_dict()[key], rtol=1e-9, atol=1e-11)
            moved = {key for key, tensor in start.items() if not torch.equal(tensor, probe.state_dict()[key])}
            assert any(key.startswith("pooler.") for key in moved) == (name != "average")


def test_a_step_on_a_gpu_reads_no_value_of_the_device() -> None:
    network = grid(poolers=list(POOLERS))
    with FakeTensorMode(allow_non_fake_inputs=True):  # raises where a value would be read
        network = network.to("cuda")
        on_gpu = [torch.empty(length, DIM, device="cuda", dtype=torch.float16) for length in (4, 1, 6)]
        features = network.fixed_features(on_gpu)
        logits = network(features, on_gpu)
        padded, mask = pad_bags(on_gpu)
    assert {each.device.type for each in (features, logits, padded, mask)} == {"cuda"}
    assert logits.shape == (4 * len(POOLERS), 3, CLASSES)


@pytest.mark.parametrize("together", [False, True])
def test_a_diverged_probe_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    read_together(monkeypatch, together)
    network = grid(learning_rates=[0.1, 0.2]).double()
    broken = grid(learning_rates=[0.1, 0.2]).double()
    with torch.no_grad():
        broken.queries[1][2, 3] = math.nan
    for each in (network, broken):
        logits = each(each.fixed_features(bags()), bags())
        nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
    assert torch.isnan(broken.weights[1].grad[4]).all()
    assert torch.equal(broken.weights[1].grad[:4], network.weights[1].grad[:4])
    assert torch.equal(broken.queries[0].grad, network.queries[0].grad)
    assert torch.equal(broken.queries[1].grad[0], network.queries[1].grad[0])


def test_half_precision_bags_are_read_in_the_probes_precision() -> None:
    network = grid()
    halves = [bag.half() for bag in bags()]
    logits = network(network.fixed_features(halves), halves)
    singles = [bag.float() for bag in halves]
    assert torch.equal(logits, network(network.fixed_features(singles), singles))


@pytest.mark.parametrize("poolers", [["learned_attention"], ["max"], ["gated_abmil"], list(PAPER_POOLERS)])
def test_empty_bag_is_refused(poolers: list[str]) -> None:
    network, with_empty = grid(poolers=poolers).double(), [*bags(), torch.zeros(0, DIM).double()]
    message = "bags must hold at least one slice, got 0 for bag 5 of the batch"
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(6, len(network.fixed_poolers), DIM).double(), with_empty)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"poolers": []}, r"poolers .* \[\]"),
        ({"poolers": ["max", "max"]}, r"poolers .*\['max', 'max'\]"),
        ({"learning_rates": [0.1, 0.1]}, r"learning_rates .*\[0.1, 0.1\]"),
        ({"poolers": ["median"]}, "pooler .*'median'"),
    ],
)
def test_impossible_grid_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(**changes)


@pytest.mark.parametrize("name", POOLERS)
def test_saved_probe_comes_back_with_its_card(tmp_path: Path, name: str) -> None:
    probe = MILProbe(build_pooler(name, DIM), DIM, CLASSES).eval()
    card = {"pooler": name, "dim": DIM, "class_names": ["a", "b", "c"], "thresholds": [0.1, 0.2, 0.3]}
    save_probe(tmp_path / "new", probe, card)
    loaded, loaded_card = load_probe(tmp_path / "new")
    assert loaded_card == card
    singles = [bag.float() for bag in bags()]
    assert torch.equal(loaded(*pad_bags(singles)), probe(*pad_bags(singles)))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["probe.json", "probe.safetensors"]


def test_standardizer_measures_all_tokens_once_and_silences_what_never_changes() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal([0.0, 1e4, -3.0, 0.1], [1.0, 1e-2, 1e3, 0.0], (5000, 4)).astype(np.float32)
    parts = np.split(tokens, [1, 1, 17, 3000])  # one of them empty
    standardizer = Standardizer(
        (torch.from_numpy(part) for part in parts), dim=4
    )  # a second pass finds nothing
    wide = tokens.astype(np.float64)
    np.testing.assert_allclose(standardizer.mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(standardizer.std[:3], wide.std(0)[:3], rtol=1e-6)
    new = torch.tensor([[1.0, 1e4, 5.0, 0.1], [0.0, 0.0, 0.0, 1e6]])
    assert standardizer(new)[:, 3].tolist() == [0.0, 0.0]
    expected = (new[:, :3].double() - standardizer.mean[:3]) / torch.from_numpy(wide.std(0)[:3])
    torch.testing.assert_close(standardizer(new)[:, :3].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_standardizing_probes_are_plain_ones_on_standardized_bags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, together: bool
) -> None:
    read_together(monkeypatch, together)
    raw = [bag * torch.linspace(1, 50, DIM).double() - 7 for bag in bags()]
    for bag in raw:
        bag[:, 2] = 4.0  # constant
    joined = torch.cat(raw).numpy()
    std = joined.std(0)
    std[2] = np.inf
    by_hand = [torch.from_numpy((bag.numpy() - joined.mean(0)) / std) for bag in raw]
    names = ["max", *POOLERS.keys() - {"frozen", "max"}]
    plain = grid(poolers=names, learning_rates=[0.1, 0.2])
    standardizing = grid(poolers=names, learning_rates=[0.1, 0.2], standardizer=Standardizer(raw, DIM))
    scramble(plain)
    scramble(standardizing)
    plain, standardizing = plain.double(), standardizing.double()
    expected = plain(plain.fixed_features(by_hand), by_hand)
    logits = standardizing(standardizing.fixed_features(raw), raw)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # statistics are float32
    singles = [bag.float() for bag in raw]
    for index, (name, _) in enumerate(standardizing.names):
        probe = standardizing.probe(index).float()
        card = {"pooler": name, "dim": DIM, "class_names": ["a", "b", "c"]}
        save_probe(tmp_path / str(index), probe, card)
        loaded, _ = load_probe(tmp_path / str(index))
        assert torch.equal(loaded(*pad_bags(singles)), probe(*pad_bags(singles)))
        torch.testing.assert_close(loaded(*pad_bags(singles)).double(), expected[index], rtol=1e-3, atol=1e-3)
        weights = plain.probe(index).pooler.slice_weights(by_hand[0])
        torch.testing.assert_close(loaded.slice_weights(singles[0]).double(), weights, rtol=1e-3, atol=1e-3)


def test_a_grid_that_starts_at_the_prior_has_the_loss_of_the_constant_prediction() -> None:
    labels = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 1], [1, 0, 1], [1, 0, 1.0]])
    network = grid(prior_logits=prior_logits(labels.mean(0), 1.0)).double()
    logits = network(network.fixed_features(bags()), bags())
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.double().expand_as(logits))
    rates = np.array([0.8, 1e-5, 0.8])  # a class without a positive may still occur
    constant = -(labels.numpy() * np.log(rates) + (1 - labels.numpy()) * np.log(1 - rates)).mean()
    assert loss.item() == pytest.approx(constant, rel=1e-5)
    loss.backward()
    assert all(float(weight.grad.abs().max()) > 0 for weight in network.weights)


def test_missing_probe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No 'probe.safetensors'"):
        load_probe(tmp_path)
