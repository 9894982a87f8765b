"""Weights of every origin go into a bundle strictly, and out of it into timm."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from common.networks.encoder import load_encoder
from common.weights import app, bundle_encoder, export_weights, image_side_px, import_weights, read_weights

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size_px": 32, "patch_size_px": 8}
SMALL |= {"layer_scale_init": 1.0, "strategies": ["cropped_32"]}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """DALE-CT-2S with a small network."""
    folder = tmp_path / "bundle"
    source = REPOSITORY / "bundles" / "dale_ct_2s"
    shutil.copytree(source / "configs", folder / "configs")
    shutil.copytree(source / "docs", folder / "docs")
    (folder / "common").symlink_to(REPOSITORY / "common")
    path = folder / "configs" / "inference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SMALL))
    return folder


def encoder_of(bundle: Path, seed: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    return bundle_encoder(bundle)[0]


def test_timm_weights_are_imported_with_the_facts_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    released = encoder_of(bundle)
    save_file(released.state_dict(), tmp_path / "released.safetensors")
    path = import_weights(str(tmp_path / "released.safetensors"), bundle)
    encoder, identity, _ = bundle_encoder(bundle)
    load_encoder(encoder, path, identity)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(encoder.eval()(image), released.eval()(image), rtol=0, atol=0)
    assert [file.name for file in (bundle / "models").iterdir()] == ["model.safetensors"]


def test_weights_for_transposed_slices_are_refused_by_a_bundle_of_upright_ones(bundle, tmp_path) -> None:
    save_file(encoder_of(bundle).state_dict(), tmp_path / "released.safetensors")
    path = import_weights(str(tmp_path / "released.safetensors"), bundle, slice_axes="xy")
    encoder, identity, _ = bundle_encoder(bundle)
    with pytest.raises(ValueError, match="slice_axes of '.*' must be 'yx' as this bundle states, got 'xy'"):
        load_encoder(encoder, path, identity)
    load_encoder(encoder, path, identity | {"slice_axes": "xy"})
    with pytest.raises(ValueError, match="must be 'yx' as this bundle states, got 'xy'"):
        export_weights(bundle, tmp_path / "out", [])
    out = export_weights(bundle, tmp_path / "out", [], slice_axes="xy")
    assert json.loads((out / "config.json").read_text())["identity"]["slice_axes"] == "xy"
    with pytest.raises(ValueError, match="slice_axes must be 'yx' or 'xy', got 'zz'"):
        bundle_encoder(bundle, "zz")


def test_the_encoder_of_a_checkpoint_is_imported(bundle: Path, tmp_path: Path) -> None:
    encoder = encoder_of(bundle)
    network = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    state = {"network": network | {"projector.0.weight": torch.zeros(3)}, "iteration": 5, "knobs": {}}
    torch.save(state, tmp_path / "step_00000005.pt")
    path = import_weights(str(tmp_path / "step_00000005.pt"), bundle)
    assert torch.equal(load_file(path)["cls_token"], encoder.state_dict()["cls_token"])
    teacher = {f"encoder.{name}": weight + 1 for name, weight in encoder.state_dict().items()}
    torch.save(state | {"teacher": teacher}, tmp_path / "step_00000005.pt")  # of DINOv2: what training saves
    path = import_weights(str(tmp_path / "step_00000005.pt"), bundle)
    assert torch.equal(load_file(path)["cls_token"], encoder.state_dict()["cls_token"] + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 36}, r"proj.bias must have shape \(24,\), got \(36,\) for '.*other"),
        ({"patch_size": 4}, r"must have shape .*, got .* for '.*other"),
        ({"depth": 3}, r"exactly the encoder's keys, got missing \[\], extra \['blocks.2.attn.proj.bias'"),
    ],
)
def test_weights_of_another_network_are_refused_and_change_nothing(change, message, bundle, tmp_path) -> None:
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8} | change
    other = timm.create_model("vit_large_patch14_dinov2", in_chans=1, num_classes=0, **sizes)
    save_file(encoder_of(bundle).state_dict(), tmp_path / "right.safetensors")
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    path = import_weights(str(tmp_path / "right.safetensors"), bundle)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        import_weights(str(tmp_path / "other.safetensors"), bundle)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_sources_that_are_not_there_or_not_whole_are_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source must be a file of weights or hub:<owner>/<name>"):
        read_weights(str(tmp_path / "none.safetensors"))
    with pytest.raises(FileNotFoundError, match="must be on the hub or in its cache .* log in with `hf auth"):
        read_weights("hub:nobody/nothing@main")  # tests have no network
    (tmp_path / "half.safetensors").write_bytes(b"half")
    (tmp_path / "half.pt").write_bytes(b"half")
    for name in ("half.safetensors", "half.pt"):
        with pytest.raises(ValueError, match="source must be whole weights, got"):
            read_weights(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"bundle must have configs/inference.json, got none in"):
        import_weights("x", tmp_path)
    with pytest.raises(ValueError, match="slice_axes must be 'yx' or 'xy', got 'zy'"):
        import_weights("x", bundle, slice_axes="zy")


def test_an_exported_encoder_loads_in_timm_and_says_what_it_expects(bundle: Path, tmp_path: Path) -> None:
    released = encoder_of(bundle)
    save_file(released.state_dict(), tmp_path / "released.safetensors")
    import_weights(str(tmp_path / "released.safetensors"), bundle)
    results = tmp_path / "results.csv"
    results.write_text(
        "encoder,protocol,dataset,metric,value,low,high,n,seeds,commit,config_hash\n"
        "dale_ct_2s,mil_probe,ct_rate,macro_auroc,0.75,0.7,0.8,120,42,abc,def\n"
        "other,mil_probe,ct_rate,macro_auroc,0.99,,,120,42,abc,def\n"
    )
    out = export_weights(bundle, tmp_path / "out", [results])
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(loaded.eval()(image), released.eval()(image), rtol=0, atol=0)
    assert loaded.pretrained_cfg["mean"] == pytest.approx([0.453374], abs=1e-5)
    assert loaded.pretrained_cfg["std"] == pytest.approx([0.191496], abs=1e-5)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| mil_probe | ct_rate | AUROC | 0.7500 | 0.7000 to 0.8000 | 120 |" in card
    assert "0.99" not in card


def test_the_commands_do_the_same(bundle: Path, tmp_path: Path) -> None:
    save_file(encoder_of(bundle).state_dict(), tmp_path / "released.safetensors")
    command = ["import", str(tmp_path / "released.safetensors"), "--bundle", str(bundle)]
    assert CliRunner().invoke(app, command).exit_code == 0
    command = ["export", "--bundle", str(bundle), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("strategy", "patch", "side"), [("cropped_252", 14, 252), ("raw_full", 14, 504), ("tiled_5cut", 16, 256)]
)
def test_the_side_of_images_is_that_of_the_first_strategy(strategy: str, patch: int, side: int) -> None:
    assert image_side_px({"strategies": [strategy, "raw_112"], "patch_size_px": patch}) == side
