"""``python -m monai.bundle run`` on the inference config: however a CT is stored, its embeddings agree."""

import csv
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import timm
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from safetensors.torch import save_file

from common.embeddings.store import EmbeddingStore, stored_volumes
from common.networks.encoder import save_encoder
from common.networks.mil_probe import MILProbe, save_probe
from common.networks.poolers import build_pooler

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLE = REPOSITORY / "bundles" / "dale_ct_2s"
TINY = {
    **{"strategies": "['cropped_32']", "img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 2},
    **{"num_heads": 2, "amp_dtype": "float32", "embedding_dtype": "float32"},
    **{"encoder_weights": "$None", "slices_per_batch": 5, "num_workers": 2},
}


def command(ct: Path, out: Path, **knobs) -> list[str]:
    settings = {"bundle_root": BUNDLE, "dataset_dir": ct, "output_dir": out, **TINY, **knobs}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["monai.bundle", "run", "--config_file", str(BUNDLE / "configs" / "inference.json"), *words]


@pytest.fixture(scope="module")
def run(python_m_on) -> Callable[..., subprocess.CompletedProcess]:
    def embed(ct: Path, out: Path, ranks: int = 1, **knobs: object) -> subprocess.CompletedProcess:
        return python_m_on(ranks, command(ct, out, **knobs), out.parent)

    return embed


def stored_as(image: nib.Nifti1Image, axcodes: str) -> nib.Nifti1Image:
    """The same scan with its voxels in another order."""
    change = ornt_transform(io_orientation(image.affine), axcodes2ornt(axcodes))
    data = nib.apply_orientation(np.asarray(image.dataobj), change)
    return nib.Nifti1Image(data, image.affine @ inv_ornt_aff(change, image.shape))


@pytest.fixture(scope="module")
def embedded(run, tmp_path_factory) -> Path:
    """Embeddings of one asymmetric scan, stored in four orientations and as npz, and of no scan."""
    folder = tmp_path_factory.mktemp("embedded")
    rng = np.random.default_rng(0)
    hu = np.full((48, 44, 11), -1000, np.int16)
    hu[6:44, 6:40] = rng.integers(-100, 200, (38, 34, 11)).astype(np.int16)
    hu[12:20, 10:30, 2:9] = -850
    image = nib.Nifti1Image(hu, np.diag([-0.8, -0.8, 0.8, 1.0]))  # LPS
    (folder / "ct").mkdir()
    for axcodes in ("LPS", "RAS", "LAS", "SPL"):
        nib.save(stored_as(image, axcodes), folder / "ct" / f"{axcodes}.nii.gz")
    np.savez_compressed(folder / "ct" / "IPL.npz", ct=np.asarray(stored_as(image, "IPL").dataobj))
    (folder / "ct" / "damaged.nii.gz").write_bytes(b"not a scan")
    result = run(folder / "ct", folder / "out", max_rejected=0.2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"Done: embeddings of 5 volumes in '{folder / 'out'}'" in result.stdout + result.stderr
    return folder


def test_every_slice_has_an_embedding_with_its_place_in_mm(embedded):
    store = EmbeddingStore(embedded / "out")
    embedding = store.read("LPS")
    assert embedding.tokens.shape == (11, 24)
    np.testing.assert_allclose(embedding.z_mm, 0.8 * np.arange(11), rtol=1e-6)
    assert embedding.metadata["spacing_mm"] == pytest.approx([0.8, 0.8, 0.8])
    assert store.identity["encoder"] == "dale_ct_2s"
    assert store.identity["encoder_id"] == "random:42:layer_scale=1"
    assert store.identity["preprocessing"] == "cropped_32"
    assert float(embedding.tokens.std(0).max()) > 0.05  # slices differ; with LayerScale 1e-5 by 1e-4 at most


@pytest.mark.parametrize("axcodes", ["RAS", "LAS", "SPL", "IPL"])
def test_the_orientation_of_storage_does_not_change_a_token(embedded, axcodes):
    stored, canonical = (EmbeddingStore(embedded / "out").read(name) for name in (axcodes, "LPS"))
    np.testing.assert_allclose(stored.tokens, canonical.tokens, rtol=0, atol=1e-6)
    np.testing.assert_allclose(stored.z_mm, canonical.z_mm, rtol=1e-6)


def test_a_damaged_file_is_listed_and_fails_a_second_run_that_has_nothing_else_to_do(run, embedded):
    with (embedded / "out" / "rejected.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["volume"], row["reason"]) == ("damaged", "unreadable")
    before = {path.name: path.stat().st_mtime_ns for path in (embedded / "out").glob("*.safetensors")}
    result = run(embedded / "ct", embedded / "out")
    assert result.returncode != 0
    assert "16.67% of the volumes were rejected, more than" in result.stderr.strip().splitlines()[-1]
    after = {path.name: path.stat().st_mtime_ns for path in (embedded / "out").glob("*.safetensors")}
    assert after == before


def test_another_picture_plane_gives_other_tokens(run, embedded, tmp_path):
    result = run(embedded / "ct" / "LPS.nii.gz", tmp_path / "xy", slice_axes="xy", patch_tokens=True)
    assert result.returncode == 0, result.stderr[-3000:]
    store = EmbeddingStore(tmp_path / "xy")
    canonical = EmbeddingStore(embedded / "out").read("LPS")
    assert float((store.read("LPS").tokens - canonical.tokens).abs().max()) > 1e-3
    assert store.read_patches("LPS").shape == (11, 16, 24)
    assert store.read("LPS").metadata["slice_axes"] == "xy"


def test_weights_that_state_their_slices_are_shown_them_without_an_option(run, embedded, tmp_path):
    torch.manual_seed(42)  # as the random weights of the other runs
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 1.0}
    encoder = timm.create_model("vit_large_patch14_dinov2", in_chans=1, num_classes=0, **sizes)
    weights, plain = tmp_path / "model.safetensors", tmp_path / "plain.safetensors"
    identity = {"name": "dale_ct_2s", "slice_axes": "xy", "hu_window": [-940.8, 923.1, -25.03, 246.87]}
    save_encoder(encoder.state_dict(), weights, identity)
    save_file(encoder.state_dict(), plain)
    ct, told = embedded / "ct" / "LPS.nii.gz", {"slice_axes": "xy", "hu_window": "dale_ct_0_l"}
    results = [run(ct, tmp_path / "stated", encoder_weights=weights)]
    results.append(run(ct, tmp_path / "told", encoder_weights=plain, **told))
    for result in results:
        assert result.returncode == 0, result.stderr[-3000:]
    stated, asked = (EmbeddingStore(tmp_path / name) for name in ("stated", "told"))
    np.testing.assert_array_equal(stated.read("LPS").tokens, asked.read("LPS").tokens)
    canonical = EmbeddingStore(embedded / "out").read("LPS")
    assert float((stated.read("LPS").tokens - canonical.tokens).abs().max()) > 1e-2
    assert stated.identity["encoder_id"].endswith(":xy:-940.8,923.1,-25.03,246.87")
    assert stated.read("LPS").metadata["slice_axes"] == "xy"
    for knobs, message in (
        ({"encoder_weights": weights, "slice_axes": "yx"}, "Drop --slice_axes"),
        ({"encoder_weights": weights, "hu_window": "ct_rate"}, "Drop --hu_window"),
        ({"encoder_weights": plain}, "does not state its slice_axes. Pass --slice_axes"),
    ):
        result = run(ct, tmp_path / "refused", **knobs)
        assert result.returncode != 0
        assert message in result.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("refused/*.safetensors"))


@pytest.mark.parametrize("knob", [{"slice_axes": "xy"}, {"hu_window": [-1000, 1000, 0, 500]}])
def test_another_plane_or_window_does_not_go_into_the_same_store(run, embedded, knob):
    result = run(embedded / "ct" / "LPS.nii.gz", embedded / "out", **knob)
    assert result.returncode != 0
    assert "must be 'random:42:layer_scale=1' as in" in result.stderr.strip().splitlines()[-1]


KILLED = """
import os, runpy, signal, sys
from common.embeddings import store

store.PART_BYTES = 1  # a part for each volume
Writer = store.EmbeddingStoreWriter
write = Writer.close

def write_twice(writer):
    write(writer)
    Writer.close = lambda writer: write(writer) or os.kill(os.getpid(), signal.SIGKILL)

Writer.close = write_twice
sys.argv = {words!r}
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


@pytest.mark.two_ranks
def test_two_ranks_finish_a_killed_run_to_what_one_process_gives(run, embedded, tmp_path):
    out = tmp_path / "out"
    words = command(embedded / "ct", out)
    program = KILLED.format(words=words)
    killed = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert stored_volumes(out) == {"IPL", "LAS"}
    result = run(embedded / "ct", out, ranks=2, max_rejected=0.2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list(out.glob("*.safetensors"))) == 4  # two before, one of each rank
    ours, theirs = EmbeddingStore(out), EmbeddingStore(embedded / "out")
    assert ours.volumes == theirs.volumes
    assert ours.identity == theirs.identity
    for name in ours.volumes:
        np.testing.assert_allclose(ours.view(name), theirs.view(name), rtol=0, atol=1e-6)
    assert [ours.read(name).metadata for name in ours.volumes] == [
        theirs.read(name).metadata for name in theirs.volumes
    ]
    assert (out / "rejected.csv").read_text() == (embedded / "out" / "rejected.csv").read_text()


def test_a_zipped_series_is_embedded(run, tmp_path, write_series):
    hu = np.random.default_rng(0).integers(-1000, 1000, (5, 17, 19)).astype(np.int16)
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        for path in write_series(tmp_path / "series", hu):
            archive.write(path, path.name)
    result = run(tmp_path / "scan.zip", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    assert EmbeddingStore(tmp_path / "out").read("1_2_840_99_7").tokens.shape == (5, 24)


@pytest.fixture
def predict_words(embedded, tmp_path) -> Callable[..., list[str]]:
    """Words of a command that predicts with a probe of one class."""
    card = {"pooler": "max", "dim": 24, "class_names": ["Emphysema"], "thresholds": [0.0]}
    identity = {
        key: value for key, value in EmbeddingStore(embedded / "out").identity.items() if key != "dtype"
    }
    save_probe(tmp_path / "probe", MILProbe(build_pooler("max", 24), 24, 1), card | identity)
    tiny = {name: value for name, value in TINY.items() if name != "strategies"}
    bundle = REPOSITORY / "bundles" / "eval_ct_rate"
    words = [
        *("monai.bundle", "run"),
        *("--config_file", str(bundle / "configs" / "predict.json"), "--bundle_root", str(bundle)),
        *("--encoder_bundle", str(BUNDLE), "--probe_dir", "probe", "--output_dir", "out"),
        *("--encoder_knobs", str(tiny)),
    ]
    return lambda ct, *further: [*words, "--dataset_dir", str(ct), *further]


def test_predict_is_one_command_that_refuses_what_is_no_chest_unless_forced(
    python_m, embedded, predict_words, tmp_path
):
    words = predict_words(embedded / "ct" / "LPS.nii.gz")
    refused = python_m(words, tmp_path)
    assert refused.returncode != 0
    assert "'LPS' is refused, not a chest CT: too few slices" in refused.stderr.strip().splitlines()[-1]
    result = python_m([*words, "--force", "True"], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Emphysema" in result.stdout
    with (tmp_path / "out" / "predictions.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["volume"], row["class"], row["call"]) == ("LPS", "Emphysema", "1")
    assert 0 < float(row["probability"]) < 1
    assert (tmp_path / "out" / "LPS.html").stat().st_size > 10_000


@pytest.fixture
def many(embedded, tmp_path) -> Path:
    """The scan a hundred times, which takes some seconds to embed."""
    (tmp_path / "ct").mkdir()
    for index in range(100):
        (tmp_path / "ct" / f"ct_{index:03d}.nii.gz").symlink_to(embedded / "ct" / "LPS.nii.gz")
    return tmp_path / "ct"


def test_an_embedding_run_stopped_by_ctrl_c_keeps_what_it_has_and_resumes(stop_and_resume, many, tmp_path):
    resumed = stop_and_resume(
        command(many, tmp_path / "out"), re.compile(r" [1-9]\d?/100").search, tmp_path / "out"
    )
    assert int(re.search(r"(\d+) of 100 volumes are to be embedded", resumed).group(1)) < 100
    store = EmbeddingStore(tmp_path / "out")
    assert len(store) == 100
    assert all(store.read(volume).tokens.shape == (11, 24) for volume in store.volumes)


def test_a_prediction_stopped_by_ctrl_c_writes_no_result_and_resumes(
    stop_and_resume, predict_words, many, tmp_path
):
    words = predict_words(many, "--force", "True", "--num_pages", "1")

    def embeds(said: str) -> bool:
        assert not (tmp_path / "out" / "predictions.csv").exists()
        return re.search(r" [1-9]\d?/100", said) is not None

    stop_and_resume(words, embeds, tmp_path / "out")
    with (tmp_path / "out" / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 100


@pytest.mark.real_ct
def test_real_cts_of_every_format_are_embedded_in_z_order_with_their_spacing(run, real_ct_dir, tmp_path):
    result = run(real_ct_dir, tmp_path / "out", max_rejected=0.4)
    assert result.returncode == 0, result.stderr[-3000:]
    store = EmbeddingStore(tmp_path / "out")
    assert len(store) == 7
    assert [volume for volume in store.volumes if volume.startswith("series_")]  # DICOM
    small = store.read("totalseg_example_ct_sm_3mm")
    assert small.tokens.shape == (30, 24)
    np.testing.assert_allclose(np.diff(small.z_mm), 3.0, rtol=1e-4)
    with (tmp_path / "out" / "rejected.csv").open() as file:
        assert {row["reason"] for row in csv.DictReader(file)} == {"not in HU"}  # the organ masks
