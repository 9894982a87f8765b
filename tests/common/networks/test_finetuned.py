"""An encoder and a probe as one network: memory by chunks, gradients as of all slices at once."""

import copy
import re
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.networks.finetuned import MODES, FineTunedProbe, base_of, finetuned_probe, let_learn, merged_lora
from common.networks.mil_probe import ProbeGrid
from common.run.process import sha256_of
from tests.common.conftest import tiny_vit

LORA = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["qkv"]}
IMAGES = torch.randn(7, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def network(mode: str, slices_per_chunk: int = 3, amp_dtype: str = "float32", **lora) -> FineTunedProbe:
    torch.manual_seed(0)
    return finetuned_probe(
        tiny_vit(),
        mode=mode,
        num_blocks=1,
        lora=LORA | lora,
        pooler="learned_attention",
        num_classes=4,
        seed=1,
        slices_per_chunk=slices_per_chunk,
        amp_dtype=amp_dtype,
    )


def gradients(of: nn.Module, images: torch.Tensor = IMAGES) -> dict[str, torch.Tensor]:
    of(images).square().sum().backward()
    return {name: weight.grad for name, weight in of.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("mode", MODES)
def test_chunks_have_the_gradient_of_the_whole_and_reach_what_learns(mode):
    whole, parts = network(mode, len(IMAGES)), network(mode, 2)
    expected, found = gradients(whole), gradients(parts)
    learning = {name for name, weight in parts.named_parameters() if weight.requires_grad}
    assert found.keys() == expected.keys() == learning
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    of_encoder = [name for name in found if name.startswith("encoder.")]
    wanted = {"probe": "^$", "lora": "lora_", "last_blocks": r"blocks\.1\.|encoder\.norm\.", "full": "."}
    assert all(re.search(wanted[mode], name) for name in of_encoder)
    assert bool(of_encoder) == (mode != "probe")


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it and alive, and the most that were so at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return found


def test_a_long_bag_learns_in_the_memory_of_a_chunk():
    """600 slices within half a MB, a tenth of what they take at once; the gradient is the same."""
    images = torch.randn(600, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found, peaks = [], []
    for slices_per_chunk in (600, 16):
        of = network("full", slices_per_chunk)
        with AllocatedBytes() as allocated:
            found.append(gradients(of, images))
        peaks.append(allocated.peak)
    assert peaks[1] < 5e5 < 5e6 < peaks[0], peaks
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_probe_begins_as_that_of_the_grid():
    grid = ProbeGrid(poolers=["learned_attention"], learning_rates=[0.1], dim=16, num_classes=4, seed=1)
    for name, weight in grid.probe(0).state_dict().items():
        torch.testing.assert_close(network("full").probe.state_dict()[name], weight, rtol=0, atol=0)


def test_dropout_is_the_same_in_both_passes():
    """Otherwise the gradient would not be that of the loss: finite differences with the seed held tell."""
    of = network("lora", 3, lora_dropout=0.5).double().train()
    images = IMAGES.double()
    with torch.no_grad():
        for name, weight in of.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(2))

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return of(images).square().sum()

    loss().backward()
    name, weight = next((n, w) for n, w in of.named_parameters() if "lora_A" in n)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        weight += 1e-6 * direction
        ahead = loss()
        weight -= 2e-6 * direction
        slope = (ahead - loss()) / 2e-6
    assert float(slope) == pytest.approx(float((weight.grad * direction).sum()), rel=1e-5), name


def test_merged_updates_give_the_outputs_of_the_adapted_encoder():
    torch.manual_seed(0)
    base = tiny_vit().eval()
    adapted = copy.deepcopy(base)
    let_learn(adapted, "lora", 0, LORA)
    learned = {n: w.detach() for n, w in adapted.named_parameters() if w.requires_grad}
    for weight in learned.values():
        weight.normal_(std=0.3)
    before = base(IMAGES)
    plain = {name.replace(".default.", "."): weight for name, weight in learned.items()}
    base.load_state_dict(merged_lora(base.state_dict(), plain, LORA["lora_alpha"] / LORA["r"]))
    torch.testing.assert_close(base(IMAGES), adapted.eval()(IMAGES), rtol=1e-5, atol=1e-5)
    assert (before - base(IMAGES)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mode": "half"}, "half"),
        ({"mode": "last_blocks", "num_blocks": 3}, "between 1 and 2, got 3"),
        ({"slices_per_chunk": 0}, "slices_per_chunk"),
        ({"amp_dtype": "float16"}, "float16"),
    ],
)
def test_wrong_settings_are_refused(changes, told):
    settings = {"mode": "full", "num_blocks": 1, "lora": LORA, "pooler": "max", "num_classes": 2, "seed": 0}
    with pytest.raises(ValueError, match=told):
        finetuned_probe(tiny_vit(), **(settings | {"slices_per_chunk": 2, "amp_dtype": "float32"} | changes))


def test_an_adapter_finds_its_base_and_knows_it_from_another(tmp_path):
    base, moved = tmp_path / "base.safetensors", tmp_path / "elsewhere" / "base.safetensors"
    save_file({"a": torch.ones(1)}, base)
    stated = {"base": str(base), "base_sha256": sha256_of(base)}
    assert base_of(tmp_path / "adapter.safetensors", stated) == base
    moved.parent.mkdir()
    base.rename(moved)
    assert base_of(moved.parent / "adapter.safetensors", stated) == moved
    with pytest.raises(FileNotFoundError, match=r"base\.safetensors"):
        base_of(tmp_path / "adapter.safetensors", stated)
    save_file({"a": torch.zeros(1)}, base)
    with pytest.raises(ValueError, match=stated["base_sha256"]):
        base_of(tmp_path / "adapter.safetensors", stated)


def test_an_adapter_of_another_encoder_is_refused():
    adapter = {"blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 5)}
    adapter["blocks.0.attn.qkv.lora_B.weight"] = torch.ones(48, 2)
    with pytest.raises(ValueError, match=r"\(48, 5\).*\(48, 16\)"):
        merged_lora(tiny_vit().state_dict(), adapter, 1.0)
