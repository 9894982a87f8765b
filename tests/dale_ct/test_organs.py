import pytest
import torch
from typer.testing import CliRunner

from common.ct.files import ct_file, read_ct, read_grid
from common.embeddings.bags import EmbeddingBags
from common.embeddings.organ_tokens import organ_radiomics, organ_tokens
from common.embeddings.store import EmbeddingStore
from common.networks.poolers import GatedAttentionPool, pad_bags
from common.transforms.dense_labels import patch_shares
from dale_ct import embed
from dale_ct.cli import app
from dale_ct.organs import embed_organs
from data_prep.phantom.cohort import Settings, write_cohort
from data_prep.sources.totalsegmentator import read_full_label_map


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    list(write_cohort(folder, 2, Settings(seed=2, matrix=96, slice_mm=(20, 20)), num_processes=1))
    return folder / "dataset"


def test_organs_of_a_folder_are_bags_that_a_probe_reads(small_bundle, cohort, tmp_path):
    bundle = str(small_bundle)
    store = embed_organs(cohort / "train_fixed", cohort / "ts_seg", tmp_path / "o", bundle, weights="random")
    assert store.identity["token_kind"] == "organ"
    assert store.identity["preprocessing"] == "cropped_32_organs"
    for path in sorted((cohort / "train_fixed").rglob("*.nii.gz")):
        volume = path.name.removesuffix(".nii.gz")
        whole = embed(path, bundle, weights="random", patch_tokens=True)
        (label_map,) = (cohort / "ts_seg").rglob(path.name)
        ids = read_full_label_map(label_map, read_grid(ct_file(path)))
        grid = whole.metadata["patch_grid"][0]
        shares = patch_shares(ids, tuple(whole.metadata["box"]), grid, 118)
        names, expected = organ_tokens(whole.patches, shares)
        found = store.read(volume)
        assert found.metadata["organs"] == names
        assert {"heart", "liver", "spine", "other"} <= set(names)
        torch.testing.assert_close(found.tokens, expected.half())
    (tmp_path / "labels.csv").write_text(
        "VolumeName,sick\n" + "".join(f"{volume},1\n" for volume in store.volumes)
    )
    bags = EmbeddingBags(tmp_path / "o", tmp_path / "labels.csv", ["sick"])
    padded, mask = pad_bags([bags[index]["tokens"].float() for index in range(len(bags))])
    assert GatedAttentionPool(store.identity["dim"])(padded, mask).shape == (2, store.identity["dim"])
    before = store.checksums(store.volumes)
    again = embed_organs(cohort / "train_fixed", cohort / "ts_seg", tmp_path / "o", bundle, weights="random")
    assert again.checksums(again.volumes) == before


def test_radiomics_follow_the_token_of_their_organ(small_bundle, cohort, tmp_path):
    path = min((cohort / "train_fixed").rglob("*.nii.gz"))
    (label_map,) = (cohort / "ts_seg").rglob(path.name)
    (plain, more) = (
        embed_organs(path, label_map, tmp_path / f"o{on}", str(small_bundle), radiomics=on, weights="random")
        for on in (False, True)
    )
    assert more.identity["preprocessing"] == "cropped_32_organs_radiomics"
    (volume,) = more.volumes
    before, after = plain.read(volume), more.read(volume)
    assert after.metadata["organs"] == before.metadata["organs"]
    assert torch.equal(after.tokens[:, :-3], before.tokens)
    ct = read_ct(ct_file(path))
    top, left, side = after.metadata["box"]
    ids = read_full_label_map(label_map, read_grid(ct_file(path)))
    hu, ids = (whole[:, top : top + side, left : left + side] for whole in (ct.hu, ids))
    torch.testing.assert_close(after.tokens[:, -3:], organ_radiomics(hu, ids, ct.spacing_mm).half())
    result = CliRunner().invoke(app, ["embed", str(path), "--radiomics", "--out", str(tmp_path / "no")])
    assert result.exit_code == 2


def test_one_ct_takes_one_label_map(small_bundle, cohort, tmp_path):
    path = next((cohort / "train_fixed").rglob("*.nii.gz"))
    (label_map,) = (cohort / "ts_seg").rglob(path.name)
    renamed = tmp_path / "map.nii.gz"
    renamed.write_bytes(label_map.read_bytes())
    options = ["--encoder", small_bundle, "--weights", "random", "--out", tmp_path / "one"]
    result = CliRunner().invoke(app, [str(word) for word in ["embed", path, "--organs", renamed, *options]])
    assert result.exit_code == 0, result.output
    assert EmbeddingStore(tmp_path / "one").volumes == [path.name.removesuffix(".nii.gz")]


def test_a_missing_map_a_map_of_another_ct_and_an_encoder_of_volumes_are_named(
    small_bundle, small_volume_bundle, cohort, ct_folder, tmp_path
):
    bundle = str(small_bundle)
    with pytest.raises(FileNotFoundError, match=r"No label map of 'a' in .*ts_seg"):
        embed_organs(ct_folder, cohort / "ts_seg", tmp_path / "o", bundle, weights="random")
    other = next((cohort / "ts_seg").rglob("*.nii.gz"))
    with pytest.raises(ValueError, match="No CT of .* can be used: "):
        embed_organs(ct_folder / "a.nii.gz", other, tmp_path / "o", bundle, weights="random")
    with pytest.raises(ValueError, match="patch_tokens must be left out"):
        embed_organs(ct_folder, other, tmp_path / "o", str(small_volume_bundle), weights="random")
