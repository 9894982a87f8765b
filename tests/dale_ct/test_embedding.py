import resource
from pathlib import Path

import numpy as np
import pytest
import torch

import dale_ct
from common.ct.files import ct_file, read_ct
from common.embeddings.ct_batches import SliceBatches
from common.networks.encoder import SlicesInferer
from dale_ct.embedding import embed, embed_to_store
from dale_ct.encoder import load_encoder

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def store_of_the_bundle(python_m, tmp_path):
    """Return ``run(bundle, ct, *words)``: embeddings that the bundle's own command writes."""

    def run(bundle: Path, ct: Path, *words: str) -> dale_ct.EmbeddingStore:
        command = ["monai.bundle", "run", "--config_file", bundle / "configs" / "inference.json"]
        command += ["--bundle_root", bundle, "--dataset_dir", ct, "--output_dir", tmp_path / "bundle"]
        command += ["--encoder_weights", "$None", "--num_workers", "0", *words]
        result = python_m(command, tmp_path, PYTHONPATH=str(REPOSITORY))
        assert result.returncode == 0, result.stderr
        return dale_ct.EmbeddingStore(tmp_path / "bundle")

    return run


def test_one_call_gives_the_grid_that_an_encoder_of_volumes_gives(
    store_of_the_bundle, small_volume_bundle, ct_folder, tmp_path
):
    expected = store_of_the_bundle(small_volume_bundle, ct_folder)
    options = {"encoder": str(small_volume_bundle), "weights": "random"}
    store = embed_to_store(ct_folder, tmp_path / "store", **options)
    found = embed(ct_folder / "a.nii.gz", **options)
    assert found.tokens.shape == (4 * 5 * 3, 36)
    assert found.metadata["grid_shape"] == [4, 5, 3]
    assert found.metadata["axcodes"] == "RAS"
    assert found.z_mm is None
    assert store.identity == expected.identity
    assert found.metadata == store.read("a").metadata == expected.read("a").metadata
    assert torch.equal(found.tokens, expected.read("a").tokens)
    assert store.checksums(["a", "b"]) == expected.checksums(["a", "b"])
    # and in a loop of one's own
    encoder = load_encoder(**options)
    ct = read_ct(ct_file(ct_folder / "a.nii.gz"))
    with torch.inference_mode():
        grid, _ = encoder.inferer(encoder.image(ct.hu, ct.spacing_mm), encoder.network)
    assert torch.equal(grid[0].flatten(1).T.half(), found.tokens)


def test_one_call_gives_what_the_bundle_gives(store_of_the_bundle, small_bundle, ct_folder, tmp_path):
    store_of_the_bundle = store_of_the_bundle(small_bundle, ct_folder, "--patch_tokens", "True")
    options = {"encoder": str(small_bundle), "weights": "random", "patch_tokens": True}
    found = embed(ct_folder, **options)
    store = embed_to_store(ct_folder, tmp_path / "store", **options)
    assert store.identity == store_of_the_bundle.identity
    assert set(found) == set(store.volumes) == {"a", "b"}
    for volume, embedding in found.items():
        expected, written = store_of_the_bundle.read(volume), store.read(volume)
        assert embedding.metadata == expected.metadata == written.metadata
        assert torch.equal(embedding.tokens, expected.tokens)
        assert torch.equal(written.tokens, expected.tokens)
        assert torch.equal(embedding.z_mm, expected.z_mm)
        assert torch.equal(embedding.patches, store_of_the_bundle.read_patches(volume))


def test_one_ct_gives_one_embedding(small_bundle, ct_folder):
    embedding = embed(ct_folder / "b.nii.gz", str(small_bundle), weights="random")
    assert embedding.tokens.shape == (5, 24)
    assert embedding.z_mm.tolist() == [0, 3, 6, 9, 12]
    assert embedding.patches is None


def test_a_broken_ct_is_told_and_the_others_are_embedded(small_bundle, ct_folder, caplog):
    (ct_folder / "c.nii").write_bytes(b"no NIfTI")
    found = embed(ct_folder, str(small_bundle), weights="random")
    assert set(found) == {"a", "b"}
    assert "'c'" in caplog.text
    with pytest.raises(ValueError, match=r"'c'"):
        embed(ct_folder / "c.nii", str(small_bundle), weights="random")


def test_a_second_run_adds_what_is_new(small_bundle, ct_folder, tmp_path):
    options = {"encoder": str(small_bundle), "weights": "random"}
    embed_to_store(ct_folder / "a.nii.gz", tmp_path / "store", **options)
    embed_to_store(ct_folder, tmp_path / "store", **options)
    assert len(dale_ct.EmbeddingStore(tmp_path / "store")) == 2


def test_batches_shrink_to_what_fits_into_the_gpu(small_bundle, ct_folder, caplog):
    options = {"encoder": str(small_bundle), "weights": "random", "patch_tokens": True}
    whole = embed(ct_folder / "a.nii.gz", **options)

    def too_much(_, inputs):
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = load_encoder(str(small_bundle), "random").network.patch_embed.register_forward_pre_hook(too_much)
    shrunk = embed(ct_folder / "a.nii.gz", **options)
    hook.remove()
    np.testing.assert_allclose(shrunk.tokens.float(), whole.tokens.float(), atol=1e-3)
    np.testing.assert_allclose(shrunk.patches.float(), whole.patches.float(), atol=1e-3)
    assert [record.args for record in caplog.records if "memory" in record.msg] == [(7, 1)]


def test_a_store_is_whole_after_a_stop(small_bundle, ct_folder, tmp_path, monkeypatch):
    begin = SliceBatches.__iter__

    def stopped(self):
        yield next(begin(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(SliceBatches, "__iter__", stopped)
    options = {"encoder": str(small_bundle), "weights": "random", "num_workers": 0}
    with pytest.raises(KeyboardInterrupt):
        embed_to_store(ct_folder / "b.nii.gz", tmp_path / "store", **options)
    monkeypatch.undo()
    assert len(embed_to_store(ct_folder, tmp_path / "store", **options)) == 2


def test_tiles_have_no_patch_tokens(small_bundle, ct_folder):
    with pytest.raises(ValueError, match=r"patch_tokens.*tiled_5cut"):
        embed(ct_folder, str(small_bundle), weights="random", strategy="tiled_5cut", patch_tokens=True)


def test_embeddings_that_are_not_finite_are_rejected(small_bundle, ct_folder, monkeypatch):
    encode = SlicesInferer.__call__

    def overflowing(self, images, network, **options):
        cls, patches = encode(self, images, network, **options)
        return cls * 1e6, patches

    monkeypatch.setattr(SlicesInferer, "__call__", overflowing)
    with pytest.raises(ValueError, match="'b'"):
        embed(ct_folder / "b.nii.gz", str(small_bundle), weights="random")


def test_one_of_several_cts_is_chosen_by_name(small_bundle, ct_folder, tmp_path):
    options = {"encoder": str(small_bundle), "weights": "random", "series": "b"}
    assert embed(ct_folder, **options).tokens.shape == (5, 24)
    assert embed_to_store(ct_folder, tmp_path / "store", **options).volumes == ["b"]
    with pytest.raises(ValueError, match=r"series.*'c'.*a, b"):
        embed(ct_folder, **options | {"series": "c"})


def test_a_full_disk_is_named_and_nothing_half_written_stays(small_bundle, ct_folder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"encoder": str(small_bundle), "weights": "random"}
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (200, limits[1])
        )  # the kernel refuses more, as of a full disk
        with pytest.raises(OSError, match=str(tmp_path / "store")):
            embed_to_store(ct_folder, tmp_path / "store", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "store").glob("*.safetensors*"))
    assert len(embed_to_store(ct_folder, tmp_path / "store", **options)) == 2
