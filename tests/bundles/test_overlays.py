"""Every overlay is a reading of the paper that trains, and changes what it says and nothing else."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from safetensors.torch import save_file

from common.cohort.cohort import load_labels, prior_logits
from common.losses.visreg import VISReg
from common.shards.writer import VolumeSlices, write_shard
from tests.noise_volume import noise_volume

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
OVERLAYS = sorted(path.stem for path in (BUNDLES / "_overlays").glob("*.json"))
BUNDLE_OF = {"released": "dale_ct_2s", "natural_rex": "dale_ct_2s"}
SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 2, "layer_scale_init": 0.1}
SMALL |= {"projector_hidden_dim": 16, "projection_dim": 11, "num_directions": 32, "num_workers": 0}
SMALL |= {"batch_size": 3, "max_steps": 2, "warmup_steps": 0, "log_every": 1, "amp_dtype": "float32"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")

    def volume(index: int, annotated: bool) -> VolumeSlices:
        fields = {"spacing_mm": (0.8, 0.8, 4.0), "labels": {"Lung nodule": index % 2}}
        return noise_volume(f"train_{index}_a_1", 5, (64, 64), rex=annotated, **fields)

    write_shard(folder / "train-000000.tar", [volume(index, False) for index in range(3)])
    write_shard(folder / "train-rex-000000.tar", [volume(3, True)])
    return folder


def trained(name: str, shards: Path, out: Path, **changes: object) -> ConfigWorkflow:
    """Train two steps of a bundle, the network small but for what the overlay, if it is one, sets."""
    overlays = [str(BUNDLES / "_overlays" / f"{name}.json")] if name in OVERLAYS else []
    bundle = BUNDLES / (BUNDLE_OF.get(name, "dale_ct_0") if overlays else name)
    workflow = ConfigWorkflow(
        [str(bundle / "configs" / "train.json"), *overlays],
        workflow_type="train",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(shards),
        output_dir=str(out),
        encoder_weights=str(out / "model.safetensors"),
        tracking_uri=f"sqlite:///{out}/mlflow.db",
        **SMALL | changes,
    )
    workflow.initialize()
    workflow.run()
    return workflow


@pytest.fixture(autouse=True)
def _excepthook_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "vit_b14_dinov2"])
def test_it_trains(name: str, shards: Path, tmp_path: Path) -> None:
    workflow = trained(name, shards, tmp_path)
    output = workflow.parser.get_parsed_content("train::trainer").state.output[0]
    assert torch.isfinite(output["loss"])
    overlay = json.loads((BUNDLES / "_overlays" / f"{name}.json").read_text())
    kept = {key: value for key, value in overlay.items() if key not in SMALL and key != "_desc_"}
    assert {key: workflow.parser.config[key] for key in kept} == kept


def test_the_second_version_of_1s_trains_without_an_overlay(shards: Path, tmp_path: Path) -> None:
    trainer = trained("dale_ct_1s_v2", shards, tmp_path).parser.get_parsed_content("train::trainer")
    assert torch.isfinite(trainer.state.output[0]["loss"])
    assert trainer.state.output[0]["aux"] > 0


@pytest.mark.parametrize("name", ["dale_ct_1s", "dale_ct_1s_v2", "dale_ct_2s"])
def test_every_read_out_starts_at_the_priors_of_its_label_list(name: str, tmp_path: Path) -> None:
    lists = {"ts": "totalsegmentator", "rex": "rexgroundingct"}
    labels = load_labels(lists["ts"])
    rows = (
        "index,name,code,pos_weight,frequency",
        *(f"{x.index},{x.name},,{1 + x.index},.25" for x in labels),
    )
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    parser = ConfigParser(json.loads((BUNDLES / name / "configs" / "train.json").read_text()))
    parser.update({**SMALL, "bundle_root": str(BUNDLES / name), "ts_labels": str(tmp_path / "mine.csv")})
    head = parser.get_parsed_content("auxiliary_head")
    expected = {"ts": np.log((1 + np.arange(118)) / 3)}
    if name == "dale_ct_2s":
        expected["rex"] = prior_logits([1 / 800] * 14, 800)
    assert {source: readout.bias.tolist() for source, readout in head.readouts.items()} == {
        source: pytest.approx(logits.tolist(), rel=1e-5, abs=1e-6) for source, logits in expected.items()
    }


def test_an_overlay_names_only_what_the_recipe_has_and_says_what_it_is() -> None:
    recipe = json.loads((BUNDLES / "_recipes" / "lejepa_train.json").read_text())
    for name in OVERLAYS:
        overlay = json.loads((BUNDLES / "_overlays" / f"{name}.json").read_text())
        assert len(overlay["_desc_"]) > 40, name
        assert set(overlay) <= set(recipe), name


def test_visreg_takes_the_place_of_sigreg(shards: Path, tmp_path: Path) -> None:
    trainer = trained("visreg", shards, tmp_path).parser.get_parsed_content("train::trainer")
    assert isinstance(trainer.loss_function.regularizer, VISReg)
    assert "visreg" in trainer.state.output[0]
    assert "sigreg" not in trainer.state.output[0]


def test_the_released_read_out_is_never_trained(shards: Path, tmp_path: Path) -> None:
    network = trained("released", shards, tmp_path).parser.get_parsed_content("pretraining_model")
    assert not any(parameter.requires_grad for parameter in network.auxiliary_head.parameters())
    assert all(parameter.grad is None for parameter in network.auxiliary_head.parameters())
    assert all(parameter.requires_grad for parameter in network.encoder.parameters())


def test_a_single_slice_is_the_whole_slab(shards: Path, tmp_path: Path) -> None:
    dataset = trained("single_slice", shards, tmp_path).parser.get_parsed_content("train::dataset")
    assert {dataset.slab_of(position)[2] for position in range(40)} == {1}


def test_the_sizes_are_those_of_the_family() -> None:
    published = {"vit_s": "vit_small", "vit_b": "vit_base", "vit_h": "vit_huge"}
    for name, family in published.items():
        overlay = json.loads((BUNDLES / "_overlays" / f"{name}.json").read_text())
        with torch.device("meta"):
            vit = timm.create_model(
                f"{family}_patch14_224" if name == "vit_h" else f"{family}_patch14_dinov2"
            )
        assert overlay["embed_dim"] == vit.embed_dim
        assert overlay["depth"] == len(vit.blocks)
        assert overlay["num_heads"] == vit.blocks[0].attn.num_heads


def test_table_v_starts_from_weights_of_timm_fitted_to_one_channel(shards: Path, tmp_path: Path) -> None:
    name = "vit_base_patch14_reg4_dinov2.lvd142m"
    overlay = json.loads((BUNDLES / "_overlays" / "vit_b14_dinov2.json").read_text())
    assert overlay["initial_weights"] == "hub"
    assert overlay["vit"] == name
    torch.manual_seed(7)
    published = timm.create_model(name, num_classes=0, img_size=518)
    save_file(published.state_dict(), tmp_path / "dinov2.safetensors")
    workflow = trained(
        "vit_b14_dinov2",
        shards,
        tmp_path,
        initial_weights=str(tmp_path / "dinov2.safetensors"),
        **{knob: overlay[knob] for knob in ("embed_dim", "depth", "num_heads")},
        layer_scale_init=1e-5,
        lr=1e-12,
        final_lr=1e-12,
        max_steps=1,
        num_local=1,
        batch_size=2,
    )
    encoder = workflow.parser.get_parsed_content("network_def")
    ours, theirs = encoder.state_dict(), published.state_dict()
    torch.testing.assert_close(
        ours["patch_embed.proj.weight"], theirs["patch_embed.proj.weight"].sum(1, keepdim=True)
    )
    for key in ("blocks.11.mlp.fc2.weight", "reg_token", "cls_token", "pos_embed", "norm.weight"):
        torch.testing.assert_close(ours[key], theirs[key], msg=key)
