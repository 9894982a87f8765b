"""Published weights: what of them is read, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.networks.published_weights import load_published


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4))


def published() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)).state_dict()
    inner = {f"model.image.{name}": tensor for name, tensor in inner.items()}
    return inner | {"model.image.head.weight": torch.ones(2), "model.text.0.weight": torch.ones(5)}


OPTIONS = {"prefixes": {"model.image.": ""}, "ignored": ["head.*"], "summed": ["0.weight"]}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_networks_part_is_loaded_strictly_under_its_own_names(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    save_file(published(), path) if suffix == ".safetensors" else torch.save(published(), path)
    loaded = load_published(network(), path, **OPTIONS)
    assert not loaded.training
    theirs = published()
    torch.testing.assert_close(loaded[0].weight, theirs["model.image.0.weight"].sum(1, keepdim=True))
    torch.testing.assert_close(loaded[0].bias, theirs["model.image.0.bias"])
    # one channel with the kernels' sum is three equal channels
    signal = torch.randn(2, 1, 9)
    three = nn.functional.conv1d(
        signal.repeat(1, 3, 1), theirs["model.image.0.weight"], theirs["model.image.0.bias"]
    )
    torch.testing.assert_close(loaded[0](signal), three)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.image.1.bias": None}, r'Missing.*"1\.bias"'),
        ({"model.image.extra": torch.ones(1)}, r'Unexpected.*"extra"'),
        ({"model.image.1.bias": torch.ones(3)}, r"1\.bias.*\[3\].*\[4\]"),
    ],
)
def test_weights_of_another_network_are_refused(change, message, tmp_path):
    tensors = {name: tensor for name, tensor in (published() | change).items() if tensor is not None}
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        load_published(network(), tmp_path / "model.pt", **OPTIONS)


def test_nothing_but_tensors_is_read(tmp_path):
    torch.save({"model.image.0.weight": Path("x")}, tmp_path / "code.pt")
    torch.save({"state_dict": published()}, tmp_path / "nested.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    (tmp_path / "cut.pt").write_bytes(b"12")
    for name in ("code.pt", "cut.pt", "cut.safetensors"):
        with pytest.raises(ValueError, match="encoder_weights must be a whole file of tensors, got"):
            load_published(network(), tmp_path / name, **OPTIONS)
    with pytest.raises(ValueError, match="must be a dictionary of tensors, got another content"):
        load_published(network(), tmp_path / "nested.pt", **OPTIONS)
    with pytest.raises(FileNotFoundError, match="must be a file, got '.*none.pt', which does not exist"):
        load_published(network(), tmp_path / "none.pt", **OPTIONS)


def test_null_keeps_random_weights_and_says_so(caplog):
    net = network()
    assert load_published(net, None, **OPTIONS) is net
    assert not net.training
    assert "random initial weights" in caplog.text
