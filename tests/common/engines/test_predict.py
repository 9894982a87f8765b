"""Probabilities are those of the probe on the embeddings; no chest CT, or another encoder's, is refused."""

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from common.embeddings import work
from common.embeddings.store import EmbeddingStore, stored_volumes
from common.engines.predict import predict, validation_quality
from common.networks.mil_probe import MILProbe, save_probe
from common.networks.poolers import build_pooler
from common.reports.results import Predictions, write_predictions
from tests.common.engines.conftest import TINY, data_of, save_ct, trunk

BUNDLES = Path(__file__).resolve().parents[3] / "bundles"
BUNDLE = BUNDLES / "dale_ct_2s"
CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]
CARD = {
    "pooler": "average",
    "dim": 24,
    "class_names": CLASSES,
    "thresholds": [0.0, 0.5, 1.0],
    "encoder": "dale_ct_2s",
    "encoder_id": "random:42:layer_scale=1",
    "preprocessing": "cropped_32",
    "slice_order": "feet_to_head",
    "token_kind": "slice",
}


def probe_dir(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    card = CARD | changes
    save_probe(folder, MILProbe(build_pooler("average", card["dim"]), card["dim"], 3), card)
    return folder


def run(cts: Path, tmp_path: Path, **changes: Any) -> dict[str, list[dict[str, Any]]]:
    probe = probe_dir(tmp_path / "probe", **changes)
    return predict(BUNDLE, probe, cts, tmp_path / "out", encoder_knobs=TINY)


def test_probabilities_are_the_probes_on_the_stored_embeddings(
    cts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = run(cts, tmp_path)
    assert list(predictions) == ["p1", "p2"]
    torch.manual_seed(1)
    linear = MILProbe(build_pooler("average", 24), 24, 3).classifier
    for volume, rows in predictions.items():
        mean = EmbeddingStore(tmp_path / "out" / "embeddings").read(volume).tokens.mean(0)
        expected = 1 / (1 + np.exp(-(linear.weight @ mean + linear.bias).detach().numpy()))
        np.testing.assert_allclose([row["probability"] for row in rows], expected, rtol=1e-5)
        assert [row["class"] for row in rows] == CLASSES
        assert [row["call"] for row in rows] == [1, int(expected[1] >= 0.5), 0]
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == predictions
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["volume"], row["class"]) for row in rows] == [(v, c) for v in ("p1", "p2") for c in CLASSES]
    assert float(rows[1]["threshold"]) == 0.5
    shown = capsys.readouterr().out
    assert "p2\n" in shown
    assert "positive" in shown
    assert "2 volumes in" in shown


def test_a_page_shows_slices_probabilities_weights_and_maps(cts: Path, tmp_path: Path) -> None:
    probe = probe_dir(tmp_path / "probe")
    predictions = predict(BUNDLE, probe, cts, tmp_path / "out", encoder_knobs=TINY, num_pages=1)
    shown = [path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".html"]
    assert shown == ["p1.html"]
    data = data_of(tmp_path / "out" / "p1.html")
    assert data["num_slices"] == 23
    assert data["z_mm"][:3] == [0, 8, 16]
    assert data["attention"] == pytest.approx([1 / 23] * 23, abs=1e-5)  # the probe averages
    assert [place for place, _ in data["tiles"]] == [1, 5, 9, 13, 17, 21]
    assert [(finding["name"], finding["called"]) for finding in data["findings"]] == [
        (row["class"], bool(row["call"])) for row in predictions["p1"]
    ]
    assert data["warnings"] == []
    assert data["map_shape"] == [4, 4]
    assert [len(base64.b64decode(one)) for one in data["maps"]] == [16] * 23
    # the body is 52 px wide from column 8, and 44 px from row 16, so that its square begins at row 12
    assert data["map_box"] == [8 / 64, 12 / 64, 52 / 64, 52 / 64]
    assert "Not evidence for a finding" in data["map_note"]


def test_a_page_says_how_good_the_probe_is_and_what_it_was_trained_on(
    cts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "SYNTHETIC: <b>drawn</b> patients"
    probe = probe_dir(tmp_path / "probe", note=note, validation_macro_auprc=0.8125, pooler="average")
    rng = np.random.default_rng(0)
    labels = np.stack([np.arange(9) % 2, np.arange(9) % 3 == 0, np.zeros(9)], axis=1).astype(float)
    scores = rng.random((9, 3))
    volumes = [f"v{number}" for number in range(9)]
    write_predictions(
        probe / "validation_predictions.csv",
        Predictions("dale_ct_2s", volumes, CLASSES, scores, np.array([0.0, 0.5, 1.0]), labels),
    )
    predict(BUNDLE, probe, cts / "p1.nii.gz", tmp_path / "out", encoder_knobs=TINY)
    data = data_of(tmp_path / "out" / "p1.html")
    assert data["warnings"] == [note]
    assert note in capsys.readouterr().out
    assert "average pooling, macro AUPRC 0.812" in data["origin"]
    for place in range(2):
        quality = data["findings"][place]["quality"]
        assert quality["auroc"] == pytest.approx(roc_auc_score(labels[:, place], scores[:, place]))
        assert quality["auprc"] == pytest.approx(average_precision_score(labels[:, place], scores[:, place]))
        assert (quality["positives"], quality["volumes"]) == ([4, 3][place], 9)
    none = {"auroc": None, "auprc": None, "positives": 0, "volumes": 9}  # no volume has the label
    assert data["findings"][2]["quality"] == none
    assert validation_quality(tmp_path) == {}


@pytest.mark.parametrize("flips", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_the_patients_right_is_left_on_the_page_however_the_file_is_stored(
    flips: tuple[int, ...], tmp_path: Path
) -> None:
    """A plate on the patient's right shoulder, in front, at the head."""
    hu = trunk(0, 23)
    hu[18:, 18:22, 10:16] = 3000
    array, affine = hu.transpose(2, 1, 0), np.diag([-6.0, -6.0, 8.0, 1.0])
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
        affine[:3, axis] *= -1
        array = np.flip(array, axis)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "ct.nii.gz")
    predict(
        BUNDLE, probe_dir(tmp_path / "probe"), tmp_path / "ct.nii.gz", tmp_path / "out", encoder_knobs=TINY
    )
    slices = data_of(tmp_path / "out" / "ct.html")["windows"]["mediastinum"]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2])))) for one in slices]
    assert np.mean(pictures[20][19:21, 11:15]) > 240
    assert np.mean(pictures[20][19:21, -15:-11]) < 240
    assert np.mean(pictures[2][19:21, 11:15]) < 240


def test_tiles_and_encoders_without_cls_attention_have_no_maps(cts: Path, tmp_path: Path) -> None:
    tiled = probe_dir(tmp_path / "tiled", dim=5 * 24, preprocessing="tiled_5cut")
    predict(BUNDLE, tiled, cts / "p1.nii.gz", tmp_path / "a", encoder_knobs=TINY)
    network = {"_target_": "timm.create_model", "model_name": "resnet10t", "in_chans": 1, "num_classes": 0}
    (tmp_path / "cnn.json").write_text(json.dumps({"network_def": network}))
    cnn = probe_dir(tmp_path / "cnn", dim=512)
    predict(
        BUNDLE,
        cnn,
        cts / "p1.nii.gz",
        tmp_path / "b",
        encoder_configs=[str(tmp_path / "cnn.json")],
        encoder_knobs=TINY,
    )
    for out in ("a", "b"):
        data = data_of(tmp_path / out / "p1.html")
        assert data["maps"] is None
        assert len(data["attention"]) == 23


def test_what_is_no_chest_ct_is_refused_listed_and_not_embedded(
    cts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_ct(cts / "slab.nii.gz", trunk(0, 5))
    (cts / "broken.nii.gz").write_bytes(b"no scan")
    assert list(run(cts, tmp_path)) == ["p1", "p2"]
    out = tmp_path / "out"
    assert EmbeddingStore(out / "embeddings").volumes == ["p1", "p2"]
    with (out / "rejected.csv").open() as file:
        rejected = {row["volume"]: row for row in csv.DictReader(file)}
    assert list(rejected) == ["broken", "slab"]
    assert rejected["slab"]["reason"] == "not a chest CT"
    assert rejected["slab"]["detail"].startswith("too few slices for a chest (slices: 5, expected")
    shown = capsys.readouterr().out
    assert "2 volumes were refused, see" in shown
    assert "  slab: not a chest CT: too few slices for a chest (slices: 5" in shown
    (cts / "slab.nii.gz").unlink()
    (cts / "broken.nii.gz").unlink()
    run(cts, tmp_path)
    assert not (out / "rejected.csv").exists()


def test_where_nothing_is_left_the_reason_is_the_error(cts: Path, tmp_path: Path) -> None:
    save_ct(tmp_path / "slab.nii.gz", trunk(0, 24), spacing_mm=1.0)
    message = r"slab.nii.gz': 'slab' is refused, not a chest CT: too short .*: 24 mm, .* Pass --force True"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "slab.nii.gz", tmp_path)
    assert stored_volumes(tmp_path / "out" / "embeddings") == set()
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_force_goes_on_and_says_so_on_the_page_and_the_terminal(
    cts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_ct(cts / "slab.nii.gz", trunk(0, 24), spacing_mm=1.0)
    probe = probe_dir(tmp_path / "probe")
    assert list(predict(BUNDLE, probe, cts, tmp_path / "out", encoder_knobs=TINY, force=True)) == [
        "p1",
        "p2",
        "slab",
    ]
    shown = capsys.readouterr().out
    assert (
        "1 volumes were used in spite of doubts:\n  slab: This does not look like a chest CT: too short"
        in shown
    )
    (warning,) = data_of(tmp_path / "out" / "slab.html")["warnings"]
    assert warning.startswith("This does not look like a chest CT: too short for a whole chest")
    assert data_of(tmp_path / "out" / "p1.html")["warnings"] == []
    assert not (tmp_path / "out" / "rejected.csv").exists()


def test_blank_slices_take_no_part_in_the_result_and_the_page_says_so(cts: Path, tmp_path: Path) -> None:
    whole = predict(
        BUNDLE, probe_dir(tmp_path / "probe"), cts / "p1.nii.gz", tmp_path / "a", encoder_knobs=TINY
    )
    hu = trunk(0, 23)
    blanks = np.full((2, 64, 64), -1024, np.int16)
    save_ct(tmp_path / "p1.nii.gz", np.concatenate([blanks[:1], hu, blanks]))
    padded = predict(BUNDLE, tmp_path / "probe", tmp_path / "p1.nii.gz", tmp_path / "b", encoder_knobs=TINY)
    np.testing.assert_allclose(
        [row["probability"] for row in padded["p1"]], [row["probability"] for row in whole["p1"]], rtol=1e-5
    )
    data = data_of(tmp_path / "b" / "p1.html")
    assert data["attention"] == pytest.approx([0, *[1 / 23] * 23, 0, 0], abs=1e-5)
    assert data["warnings"] == ["3 of 26 slices are blank and take no part in the result: 1, 25, 26."]
    store = EmbeddingStore(tmp_path / "b" / "embeddings")
    assert store.read("p1").metadata["blank_slices"] == [0, 24, 25]
    assert len(store.read("p1").tokens) == 26
    assert list(store.doubts()) == ["p1"]
    assert EmbeddingStore(tmp_path / "a" / "embeddings").doubts() == {}


def test_a_volume_is_read_once_and_again_for_its_page(
    cts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read_ct = work.read_ct
    monkeypatch.setattr(work, "read_ct", lambda file: reads.append(file.volume) or read_ct(file))
    probe = probe_dir(tmp_path / "probe")
    first = predict(BUNDLE, probe, cts, tmp_path / "out", encoder_knobs=TINY, num_pages=1)
    assert sorted(reads) == ["p1", "p1", "p2"]
    reads.clear()
    save_ct(cts / "p3.nii.gz", trunk(2, 25))
    again = predict(BUNDLE, probe, cts, tmp_path / "out", encoder_knobs=TINY, num_pages=0)
    assert sorted(reads) == ["p1", "p2", "p3"]
    assert {volume: again[volume] for volume in first} == first


def test_the_python_call_of_the_documentation_runs_as_written(
    cts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (BUNDLES / "eval_ct_rate" / "docs" / "README.md").read_text(encoding="utf-8")
    (call,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(call.split("\n")) == 3 + 2  # the blank line and the last end
    # its files, with an encoder that is small
    config = tmp_path / "bundles" / "dale_ct_2s" / "configs" / "inference.json"
    config.parent.mkdir(parents=True)
    whole = json.loads((BUNDLE / "configs" / "inference.json").read_text())
    config.write_text(json.dumps(whole | TINY))
    probe_dir(tmp_path / "bundles" / "eval_ct_rate" / "runs" / "dale_ct_2s")
    shutil.copy(cts / "p1.nii.gz", tmp_path / "ct.nii.gz")
    monkeypatch.chdir(tmp_path)
    exec(call)
    assert Path("results/ct/ct.html").is_file()
    assert EmbeddingStore("results/ct/embeddings").volumes == ["ct"]


def test_another_file_of_the_same_name_is_refused(cts: Path, tmp_path: Path) -> None:
    first = run(cts, tmp_path)
    (cts / "p2.nii.gz").replace(cts / "p1.nii.gz")
    with pytest.raises(ValueError, match="'p1' was embedded .* from another file"):
        run(cts, tmp_path)
    again = predict(BUNDLE, tmp_path / "probe", cts, tmp_path / "other", encoder_knobs=TINY)
    np.testing.assert_allclose(
        [row["probability"] for row in again["p1"]], [row["probability"] for row in first["p2"]], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "dinov2_ct"}, "encoder .*'dinov2_ct'.*'dale_ct_2s'. Pass"),
        ({"encoder_id": "sha256:0"}, "encoder_id .*'sha256:0'.*'random:42"),
        ({"dim": 25}, "dim .* 25 .* 24"),
        ({"preprocessing": "cropped_full_2"}, "strategy must be one of .*, got 'cropped_full_2'"),
    ],
)
def test_a_probe_of_other_embeddings_is_refused(
    cts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(cts, tmp_path, **changes)


def test_what_is_missing_is_named(cts: Path, tmp_path: Path) -> None:
    probe = probe_dir(tmp_path / "probe")
    for bundle, folder in ((None, probe), (BUNDLE, None)):
        with pytest.raises(ValueError, match="--encoder_bundle and --probe_dir"):
            predict(bundle, folder, cts, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}'.*configs/inference.json"):
        predict(tmp_path, probe, cts, tmp_path)
    with pytest.raises(FileNotFoundError, match="none'"):
        predict(BUNDLE, probe, tmp_path / "none", tmp_path, encoder_knobs=TINY)
    with pytest.raises(ValueError, match="patch_px"):
        predict(BUNDLE, probe, cts, tmp_path, encoder_knobs={"patch_px": 8})
