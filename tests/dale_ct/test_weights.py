"""Weights of every origin go into a bundle strictly, and out of it into timm."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from common.embeddings.encoder_bundle import open_encoder_bundle
from common.networks.encoder import load_encoder, stated_identity
from common.transforms.hounsfield import HU_WINDOWS, normalize_hu
from common.transforms.render_views import resize_square
from dale_ct.cli import weights_app as app
from dale_ct.weights import export_weights, import_weights, read_weights
from tests.loopback_hub import COMMIT

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


PAPER = {"slice_axes": "yx", "window": "ct_rate"}
RELEASED = {"slice_axes": "xy", "window": "dale_ct_0_l"}


def encoder_of(bundle: Path, seed: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    return open_encoder_bundle(bundle, knobs={"encoder_weights": None})["network_def"]


def released(bundle: Path, tmp_path: Path, **stated: Any) -> str:
    """Weights as others publish them, with what their metadata state."""
    path = tmp_path / "released.safetensors"
    save_file(encoder_of(bundle).state_dict(), path, {"identity": json.dumps(stated)} if stated else None)
    return str(path)


def test_timm_weights_are_imported_with_all_facts_that_their_use_needs(bundle: Path, tmp_path: Path) -> None:
    source = released(bundle, tmp_path)
    path = import_weights(source, bundle, **RELEASED)
    opened = open_encoder_bundle(bundle)
    identity = opened["identity"]
    encoder = load_encoder(opened["network_def"], path, identity)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(encoder.eval()(image), encoder_of(bundle).eval()(image), rtol=0, atol=0)
    assert [file.name for file in (bundle / "models").iterdir()] == ["model.safetensors"]
    sizes = {"patch_size_px": 8, "img_size_px": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    shown = {"slice_axes": "xy", "hu_window": [-940.8, 923.1, -25.03, 246.87]}
    assert stated_identity(path) == identity == {"name": "dale_ct_2s"} | sizes | shown


def test_what_no_source_states_must_be_told_and_nothing_is_assumed(bundle: Path, tmp_path: Path) -> None:
    source = released(bundle, tmp_path)
    with pytest.raises(ValueError, match="does not state its slice_axes. Pass --slice_axes"):
        import_weights(source, bundle, window="ct_rate")
    with pytest.raises(ValueError, match="does not state its hu_window. Pass --hu_window"):
        import_weights(source, bundle, slice_axes="xy")
    with pytest.raises(KeyError, match="hu_window must be one of .* got 'ct_rat'"):
        import_weights(source, bundle, slice_axes="xy", window="ct_rat")
    assert not (bundle / "models" / "model.safetensors").exists()


@pytest.mark.parametrize("where", ["metadata", "config.json"])
def test_what_the_source_states_needs_no_option_and_admits_no_other(where, bundle, tmp_path) -> None:
    shown = {"slice_axes": "xy", "hu_window": [-900, 800, -50, 300]}
    if where == "metadata":
        source = released(bundle, tmp_path, name="theirs", **shown)
    else:
        source = released(bundle, tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "identity": shown}))
    path = import_weights(source, bundle)
    assert stated_identity(path) | shown == stated_identity(path)
    assert stated_identity(path)["name"] == "dale_ct_2s"
    assert import_weights(source, bundle, slice_axes="xy", window=[-900, 800, -50, 300]) == path
    with pytest.raises(ValueError, match="slice_axes .*'xy'.*'yx'. Drop --slice_axes"):
        import_weights(source, bundle, slice_axes="yx")
    with pytest.raises(ValueError, match=r"hu_window .*\[-900.*\[-997.0.*Drop --hu_window"):
        import_weights(source, bundle, window="ct_rate")


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_the_release_that_a_bundle_names_needs_no_option(revision: str, bundle, tmp_path, hub) -> None:
    content = Path(released(bundle, tmp_path)).read_bytes()
    for name in ("DALE-CT-2S", "DALE-CT-0-L"):
        hub.files[f"Kentucky-Open-Science/{name}", "model.safetensors"] = content
    stated = stated_identity(import_weights(f"hub:Kentucky-Open-Science/DALE-CT-2S{revision}", bundle))
    assert (stated["slice_axes"], stated["hu_window"]) == ("xy", [-997, 888, -142.39, 360.97])
    with pytest.raises(ValueError, match="DALE-CT-0-L.* does not state its slice_axes"):
        import_weights(f"hub:Kentucky-Open-Science/DALE-CT-0-L{revision}", bundle)


def test_what_stands_beside_weights_on_the_hub_is_read(bundle: Path, tmp_path: Path, hub) -> None:
    shown = {"slice_axes": "yx", "hu_window": [-900, 800, -50, 300]}
    hub.files["someone/encoder", "model.safetensors"] = Path(released(bundle, tmp_path)).read_bytes()
    hub.files["someone/encoder", "config.json"] = json.dumps({"identity": shown}).encode()
    stated = stated_identity(import_weights("hub:someone/encoder", bundle))
    assert stated | shown == stated


def test_the_encoder_of_a_checkpoint_is_imported(bundle: Path, tmp_path: Path) -> None:
    encoder = encoder_of(bundle)
    network = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    state = {"network": network | {"projector.0.weight": torch.zeros(3)}, "iteration": 5, "knobs": {}}
    torch.save(state, tmp_path / "step_00000005.pt")
    path = import_weights(str(tmp_path / "step_00000005.pt"), bundle, **PAPER)
    assert torch.equal(load_file(path)["cls_token"], encoder.state_dict()["cls_token"])
    state["knobs"] = {"hu_window": "dale_ct_0_l", "seed": 3}
    teacher = {f"encoder.{name}": weight + 1 for name, weight in encoder.state_dict().items()}
    torch.save(state | {"teacher": teacher}, tmp_path / "step_00000005.pt")  # of DINOv2: what training saves
    path = import_weights(str(tmp_path / "step_00000005.pt"), bundle)
    assert torch.equal(load_file(path)["cls_token"], encoder.state_dict()["cls_token"] + 1)
    assert stated_identity(path)["hu_window"] == [-940.8, 923.1, -25.03, 246.87]
    assert stated_identity(path)["slice_axes"] == "yx"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 36}, "embed_dim of '.*other.*' must be 24 .*, got 36"),
        ({"patch_size": 4}, "patch_size_px of '.*other.*' must be 8 as this bundle states, got 4"),
        ({"img_size": 48}, "img_size_px of '.*other.*' must be 32 as this bundle states, got 48"),
        ({"depth": 3}, "depth of '.*other.*' must be 2 as this bundle states, got 3"),
    ],
)
def test_weights_of_another_network_are_refused_and_change_nothing(change, message, bundle, tmp_path) -> None:
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8} | change
    other = timm.create_model("vit_large_patch14_dinov2", in_chans=1, num_classes=0, **sizes)
    save_file(encoder_of(bundle).state_dict(), tmp_path / "right.safetensors")
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    path = import_weights(str(tmp_path / "right.safetensors"), bundle, **PAPER)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        import_weights(str(tmp_path / "other.safetensors"), bundle, **PAPER)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_sources_that_are_not_there_or_not_whole_are_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source must be a file of weights or hub:<owner>/<name>"):
        read_weights(str(tmp_path / "none.safetensors"))
    with pytest.raises(FileNotFoundError, match="nobody/nothing.*HF_HUB_OFFLINE.*nothing/resolve/main/model"):
        read_weights("hub:nobody/nothing@main")  # tests have no network
    (tmp_path / "half.safetensors").write_bytes(b"half")
    (tmp_path / "half.pt").write_bytes(b"half")
    for name in ("half.safetensors", "half.pt"):
        with pytest.raises(ValueError, match="source must be whole weights, got"):
            read_weights(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="configs/inference.json"):
        import_weights("x", tmp_path)
    with pytest.raises(ValueError, match="slice_axes must be 'yx' or 'xy', got 'zy'"):
        import_weights(released(bundle, tmp_path), bundle, slice_axes="zy", window="ct_rate")


def test_an_exported_encoder_loads_in_timm_and_says_what_it_expects(bundle: Path, tmp_path: Path) -> None:
    import_weights(released(bundle, tmp_path), bundle, slice_axes="xy", window="ct_rate")
    results = tmp_path / "results.csv"
    results.write_text(
        "encoder,protocol,dataset,metric,value,low,high,n,seeds,commit,config_hash\n"
        "dale_ct_2s,mil_probe,ct_rate,macro_auroc,0.75,0.7,0.8,120,42,abc,def\n"
        "other,mil_probe,ct_rate,macro_auroc,0.99,,,120,42,abc,def\n"
    )
    out = export_weights(bundle, tmp_path / "out", [results])
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(loaded.eval()(image), encoder_of(bundle).eval()(image), rtol=0, atol=0)
    assert json.loads((out / "config.json").read_text())["identity"]["slice_axes"] == "xy"
    assert stated_identity(out / "model.safetensors")["slice_axes"] == "xy"
    assert loaded.pretrained_cfg["mean"] == pytest.approx([0.453374], abs=1e-5)
    assert loaded.pretrained_cfg["std"] == pytest.approx([0.191496], abs=1e-5)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| mil_probe | ct_rate | AUROC | 0.7500 | 0.7000 to 0.8000 | 120 |" in card
    assert "0.99" not in card


def test_the_commands_do_the_same(bundle: Path, tmp_path: Path) -> None:
    command = ["import", released(bundle, tmp_path), "--bundle", str(bundle)]
    assert CliRunner().invoke(app, command).exit_code != 0
    command += ["--slice-axes", "xy", "--hu-window", "-940.8,923.1,-25.03,246.87"]
    assert CliRunner().invoke(app, command).exit_code == 0
    stated = stated_identity(bundle / "models" / "model.safetensors")
    assert (stated["slice_axes"], stated["hu_window"]) == ("xy", [-940.8, 923.1, -25.03, 246.87])
    command = ["onnx", "--bundle", str(bundle), "--out", str(tmp_path / "encoder.onnx"), "--size-px", "32"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (tmp_path / "encoder.onnx").is_file()
    command = ["export", "--bundle", str(bundle), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_timms_own_transform_prepares_slices_as_ours(bundle: Path, tmp_path: Path) -> None:
    import_weights(released(bundle, tmp_path), bundle, **RELEASED)
    out = export_weights(bundle, tmp_path / "out", [])
    cfg = timm.create_model(f"local-dir:{out}", pretrained=True).pretrained_cfg
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    rng = np.random.default_rng(0)
    window = HU_WINDOWS["dale_ct_0_l"]
    for side in (32, 57, 83):
        hu = rng.normal(-300, 600, (side, side)).clip(-1024, 3071)
        clipped = hu.clip(window.min_hu, window.max_hu)
        scaled = (clipped - window.min_hu) / (window.max_hu - window.min_hu)
        theirs = transform(Image.fromarray(scaled.astype(np.float32)))
        ours = normalize_hu(torch.from_numpy(resize_square(clipped, 32)), window)[None]
        assert theirs.shape == (1, 32, 32)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3)
