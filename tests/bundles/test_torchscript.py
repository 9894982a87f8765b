"""MONAI's ``ckpt_export`` on the encoder bundles: where docs/export.md says it works, and where not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle.scripts import ckpt_export

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SMALL_VIT = {"img_size_px": 48, "patch_size_px": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL_VIT |= {"layer_scale_init": 1.0}
SCRIPTED = {
    "dale_ct_0": (SMALL_VIT, (1, 32, 32)),
    "dinov2_ct": (SMALL_VIT, (1, 32, 40)),
    "merlin": (
        {"network_def::layers": [1, 1, 1, 1], "network_def::block_planes": [2, 3, 4, 5]},
        (1, 32, 48, 40),
    ),
}
TRACED = {"ct_fm": ({"network_def::init_filters": 4}, (1, 16, 32, 48))}
REFUSED = {
    "ct_clip": {},
    "colipri": {"network_def::backbone::depth": 1},
}

pytestmark = [
    # PyTorch has deprecated TorchScript as a whole
    pytest.mark.filterwarnings("ignore"),
]


def network_of(bundle: str, knobs: dict[str, Any]) -> torch.nn.Module:
    """Build a bundle's network as ``ckpt_export`` does, with random weights."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / bundle / "configs" / "inference.json"))
    for name, value in (knobs | {"bundle_root": str(BUNDLES / bundle)}).items():
        parser[name] = value
    torch.manual_seed(0)
    return parser.get_parsed_content("network_def").eval()


def export(bundle: str, knobs: dict[str, Any], folder: Path, **how: Any) -> torch.nn.Module:
    """Export a network through MONAI; return the network."""
    network = network_of(bundle, knobs)
    torch.save(network.state_dict(), folder / "model.pt")
    ckpt_export(
        net_id="network_def",
        filepath=str(folder / "model.ts"),
        ckpt_file=str(folder / "model.pt"),
        meta_file=str(BUNDLES / bundle / "configs" / "metadata.json"),
        config_file=str(BUNDLES / bundle / "configs" / "inference.json"),
        bundle_root=str(BUNDLES / bundle),
        **how,
        **knobs,
    )
    return network


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours[0] - ours[1]).abs().max() > 1e-4  # inputs differ, so that equality means something


@pytest.mark.parametrize("bundle", SCRIPTED)
def test_a_scripted_encoder_gives_the_same_for_another_number_of_inputs(bundle: str, tmp_path: Path) -> None:
    knobs, shape = SCRIPTED[bundle]
    network = export(bundle, knobs, tmp_path)
    files = {"metadata.json": "", "inference.json": ""}
    exported = torch.jit.load(tmp_path / "model.ts", _extra_files=files)
    assert json.loads(files["metadata.json"])["name"]
    image = torch.randn(3, *shape)
    with torch.no_grad():
        same(exported(image), network(image))


def test_a_traced_window_encoder_gives_the_same_for_another_number_of_windows(tmp_path: Path) -> None:
    knobs, shape = TRACED["ct_fm"]
    network = export("ct_fm", knobs, tmp_path, use_trace=True, input_shape=(1, *shape))
    windows = torch.randn(3, *shape)
    with torch.no_grad():
        same(torch.jit.load(tmp_path / "model.ts")(windows), network(windows))


@pytest.mark.slow
@pytest.mark.parametrize("bundle", REFUSED)
def test_what_the_page_calls_impossible_is_refused(bundle: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot statically infer"):
        export(bundle, REFUSED[bundle], tmp_path)
    assert not (tmp_path / "model.ts").exists()
