from pathlib import Path

import pytest
import torch

from common.networks.dense_probe import DenseProbes, load_dense_probe
from common.networks.mil_probe import Standardizer, save_probe

TASKS = {"rex": 3, "ts": 4}


def test_every_probe_alone_gives_its_part_of_the_logits() -> None:
    probes = DenseProbes(TASKS, [0.1, 0.01], dim=5, seed=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in probes.parameters():
            parameter.add_(torch.randn_like(parameter))
    tokens = torch.randn(2, 11, 5)
    logits = probes(tokens)
    for kind in range(2):
        for rate in range(2):
            for columns in probes.columns.values():
                alone = probes.layer(kind, rate, columns)(tokens[kind])
                torch.testing.assert_close(logits[kind, rate][:, columns], alone)


def test_learning_rates_start_alike_and_have_a_group_each() -> None:
    probes = DenseProbes(TASKS, [0.1, 0.01, 0.3], dim=5, seed=3)
    groups = probes.parameter_groups()
    assert [group["lr"] for group in groups] == [0.1, 0.01, 0.3]
    assert all(torch.equal(groups[0]["params"][0], group["params"][0]) for group in groups)
    again = DenseProbes(TASKS, [0.5], dim=5, seed=3)
    assert torch.equal(again.weights[0], probes.weights[0])
    assert float(probes.weights[0].detach().abs().max()) <= 5**-0.5


def test_standardizing_is_folded_into_probes_that_work_alone() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 400, 5) * torch.tensor([1.0, 30.0, 0.0, 1e-2, 1.0]) + 3
    standardizing = DenseProbes(TASKS, [0.1, 0.2], 5, 3, [Standardizer([of_kind], 5) for of_kind in tokens])
    plain = DenseProbes(TASKS, [0.1, 0.2], 5, 3)
    wide = tokens.double()
    std = wide.std(1, keepdim=True, correction=0)
    by_hand = torch.where(std > 0, (wide - wide.mean(1, keepdim=True)) / std, 0).float()
    expected = plain(by_hand)
    torch.testing.assert_close(standardizing(tokens), expected, rtol=1e-4, atol=1e-4)
    for kind in range(2):
        alone = standardizing.layer(kind, 1, slice(3, 7))
        torch.testing.assert_close(alone(tokens[kind]), expected[kind, 1][:, 3:7], rtol=1e-3, atol=1e-3)


def test_probes_that_start_at_the_prior_predict_it_for_any_token() -> None:
    prior = torch.arange(14.0).reshape(2, 7) - 6
    probes = DenseProbes(TASKS, [0.1, 0.2], 5, 3, prior_logits=prior.numpy())
    assert torch.equal(probes(torch.randn(2, 11, 5)), prior[:, None, None].expand(2, 2, 11, 7))


def test_a_saved_probe_is_loaded(tmp_path: Path) -> None:
    layer = torch.nn.Linear(5, 3)
    save_probe(tmp_path / "out", layer, {"class_names": ["a", "b", "c"]}, "patch_rex")
    loaded, card = load_dense_probe(tmp_path / "out", "patch", "rex")
    assert torch.equal(loaded.weight, layer.weight)
    assert torch.equal(loaded.bias, layer.bias)
    assert card == {"class_names": ["a", "b", "c"]}
    with pytest.raises(FileNotFoundError, match="No 'cls_rex.safetensors'"):
        load_dense_probe(tmp_path / "out", "cls", "rex")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="tasks must be given, each with its number of classes, got {}"):
        DenseProbes({}, [0.1], 5, 0)
    with pytest.raises(ValueError, match=r"learning_rates must be given, each once, got \[0.1, 0.1\]"):
        DenseProbes(TASKS, [0.1, 0.1], 5, 0)
