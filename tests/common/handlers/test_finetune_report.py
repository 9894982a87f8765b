"""What of the encoder is written; the whole report is in tests/bundles/test_finetuning_runs.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.handlers.finetune_report import FineTuneReport
from common.networks.encoder import Weights, stated_identity
from tests.common.conftest import tiny_vit

LORA = {"r": 2, "lora_alpha": 6}
LAYER = "blocks.0.attn.qkv"
A = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
B = torch.randn(48, 2, generator=torch.Generator().manual_seed(1))


class Encoder(dict):
    """Stands in for an encoder bundle whose network may have been changed in training."""

    def __init__(self, weights: Weights) -> None:
        facts = {"identity": {"name": "tiny", "patch_size_px": 8}, "seed": 0, "weights": weights}
        super().__init__(facts | {"weights_name": "a/model.safetensors", "weights_repo_type": "dataset"})
        self.network: Any = None

    def update(self, parts: dict[str, Any]) -> None:
        self.network = tiny_vit()


def written(tmp_path: Path, mode: str, weights: Weights, learned: dict[str, torch.Tensor]) -> Path:
    report = FineTuneReport(
        output_dir=tmp_path,
        results_csv=tmp_path / "results.csv",
        seed=0,
        settings={},
        encoder=Encoder(weights),
        mode=mode,
        lora=LORA,
        pooler="max",
        protocol="finetune",
        dataset_name="tiny",
        frozen_probe=None,
        num_resamples=1,
        resampling="patients",
    )
    return report._write_encoder(learned)


@pytest.mark.parametrize("name", ["hub:a/b@c0ffee", "base.safetensors"])
def test_an_adapter_states_the_weights_it_belongs_to(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = Weights(Path("base.safetensors"), name, "d1", {})
    learned = {f"{LAYER}.lora_A.default.weight": A, f"{LAYER}.lora_B.default.weight": B}
    path = written(tmp_path, "lora", weights, learned)
    assert load_file(path).keys() == {f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"}
    stated = stated_identity(path)
    assert (stated["name"], stated["finetuned"]) == ("tiny", "lora")
    base = name if name.startswith("hub:") else str(tmp_path / name)  # whoever loads it may stand elsewhere
    of_hub = {"file": "a/model.safetensors", "repo_type": "dataset"}
    assert stated["adapter"] == of_hub | {"base": base, "base_sha256": "d1", "scale": 3.0}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_whole_encoder_holds_what_was_learned_and_what_was_not(mode, tmp_path) -> None:
    lora = {f"{LAYER}.lora_A.default.weight": A, f"{LAYER}.lora_B.default.weight": B}
    learned = lora if mode == "lora" else {f"{LAYER}.weight": torch.ones(48, 16)}
    tensors = load_file(written(tmp_path, mode, Weights(None, "random", None, {}), learned))
    expected = tiny_vit().state_dict()
    expected[f"{LAYER}.weight"] = (
        torch.ones(48, 16) if mode == "full" else expected[f"{LAYER}.weight"] + 3 * B @ A
    )
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, msg=key)
