"""The JSON files of docs/bring_your_own_encoder.md, run as they stand there."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import timm
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import ViT
from safetensors.torch import save_file

from common.embeddings.store import EmbeddingStore
from common.run.config import executed_config

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "bring_your_own_encoder.md").read_text(encoding="utf-8")
THREE_D, TWO_D = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.S))


@pytest.fixture(scope="module")
def ct(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ct") / "valid_1_a_1.nii.gz"
    hu = np.full((40, 36, 9), -1000, np.int16)
    hu[8:32, 6:30] = np.random.default_rng(0).integers(-100, 200, (24, 24, 9))
    hu[14:20, 10:24] = -850
    nib.save(nib.Nifti1Image(hu, np.diag([-4.0, -4.0, 5.0, 1.0])), path)
    return path


def configs(bundle: str, written: dict, folder: Path) -> list[str]:
    """As the page says: the bundle's config, then the JSON."""
    (folder / "my_encoder.json").write_text(json.dumps(written))
    return [str(REPOSITORY / "bundles" / bundle / "configs" / "inference.json"), "my_encoder.json"]


def test_monais_vit_gives_a_bag_of_its_patches(python_m, ct, tmp_path):
    torch.manual_seed(0)
    options = {name: value for name, value in THREE_D["network_def"].items() if name != "_target_"}
    vit = ViT(**options | {"img_size": THREE_D["size_vox"]}).eval()
    (tmp_path / "models").mkdir()
    save_file(vit.state_dict(), tmp_path / THREE_D["encoder_weights"])
    words = ["--bundle_root", str(REPOSITORY / "bundles" / "merlin"), "--dataset_dir", str(ct)]
    words += ["--output_dir", "out", "--num_workers", "0", "--embedding_dtype", "float32"]
    files = str(configs("merlin", THREE_D, tmp_path))
    result = python_m(["monai.bundle", "run", "--config_file", files, *words], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    store = EmbeddingStore(tmp_path / "out")
    bag = store.read("valid_1_a_1")
    assert bag.tokens.shape == (6 * 6 * 4, 48)
    assert store.identity["encoder"] == "my_vit_3d"
    assert store.identity["encoder_id"].startswith("sha256:")
    assert store.identity["preprocessing"] == "ras_2x2x3mm_96x96x32_-1000..1000HU_0..1_patches"
    # the volume by hand: LPS to RAS; 4 x 4 x 5 mm to 2 x 2 x 3 mm, about the centre
    volume = np.asarray(nib.load(ct).dataobj)[::-1, ::-1].astype(np.float32)
    spaced = torch.nn.functional.interpolate(
        torch.tensor(volume.copy())[None, None], size=(79, 71, 9), mode="trilinear", align_corners=True
    )
    places = torch.arange(14) * 3 / 5
    low, share = places.floor().long(), places - places.floor()
    between = spaced[..., low] * (1 - share) + spaced[..., (low + 1).clamp(max=8)] * share
    values = (between.clamp(-1000, 1000) + 1000) / 2000
    padded = torch.nn.functional.pad(values, (9, 9, 12, 13, 8, 9))
    with torch.no_grad():
        expected = vit(padded)[0][0]
    torch.testing.assert_close(bag.tokens, expected, rtol=0, atol=1e-4)


def test_a_model_of_timm_gives_an_embedding_a_slice(ct, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    options = {name: value for name, value in TWO_D["network_def"].items() if name != "_target_"}
    vit = timm.create_model(**options | {"img_size": 64}).eval()
    (tmp_path / "models").mkdir()
    save_file(vit.state_dict(), tmp_path / TWO_D["encoder_weights"])
    paths = {"bundle_root": str(REPOSITORY / "bundles" / "dale_ct_0"), "dataset_dir": str(ct)}
    embedding = ConfigWorkflow(
        configs("dale_ct_0", TWO_D, tmp_path),
        workflow_type="inference",
        output_dir="out",
        num_workers=0,
        **paths,
    )
    embedding.initialize()
    embedding.run()
    store = EmbeddingStore(tmp_path / "out")
    assert store.read("valid_1_a_1").tokens.shape == (9, 192)
    assert store.identity["encoder"] == "my_vit_2d"
    assert store.identity["preprocessing"] == "cropped_64"


@pytest.mark.parametrize(("bundle", "written"), [("merlin", THREE_D), ("dale_ct_0", TWO_D)])
def test_a_key_that_the_bundle_lacks_is_refused(bundle, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = str(REPOSITORY / "bundles" / bundle)
    command = ["run", "--config_file", str(configs(bundle, written, tmp_path))]
    assert executed_config(root, "inference.json", command)["name"] == written["name"]
    command = ["run", "--config_file", str(configs(bundle, written | {"seeds": 1}, tmp_path))]
    with pytest.raises(ValueError, match="'seeds' in 'my_encoder.json'. Did you mean 'seed'"):
        executed_config(root, "inference.json", command)
