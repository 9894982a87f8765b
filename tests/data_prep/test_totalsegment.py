import gzip
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
import torch

from common.ct.npz import npz_affine
from data_prep.totalsegment import (
    Outcome,
    find_cts,
    part_of,
    segment_all,
    totalsegmentator_ready,
)

SHAPE_XYZ = (19, 17, 5)
AFFINE = np.array([[-0.7, 0, 0, 5], [0, -0.8, 0, 7], [0, 0, 1.5, -100], [0, 0, 0, 1.0]])


class Segmenter:
    """Stands in for TotalSegmentator, which needs weights: takes what it takes, and says what it was given.

    Args:
        signature: of the real function.
    """

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature = signature
        self.calls: list[dict[str, Any]] = []
        self.answer: Callable[[nib.Nifti1Image], nib.Nifti1Image] = organs

    def __call__(self, *args: Any, **kwargs: Any) -> nib.Nifti1Image:
        self.calls.append(self.signature.bind(*args, **kwargs).arguments)
        return self.answer(self.calls[-1]["input"])


def organs(image: nib.Nifti1Image, top: int = 117) -> nib.Nifti1Image:
    """Ids that differ from voxel to voxel, in the image's own order, under a header like the real one."""
    from totalsegmentator.nifti_ext_header import add_label_map_to_nifti

    ids = (np.arange(np.prod(image.shape)).reshape(image.shape) % (top + 1)).astype(np.uint8)
    return add_label_map_to_nifti(nib.Nifti1Image(ids, image.affine, image.header), {51: "heart"})


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch) -> Segmenter:
    from totalsegmentator import python_api

    fake = Segmenter(inspect.signature(python_api.totalsegmentator))
    monkeypatch.setattr(python_api, "totalsegmentator", fake)
    return fake


def ct(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).permutation(np.prod(SHAPE_XYZ)).reshape(SHAPE_XYZ)
    return values.astype(np.int16) - 1000


def run(folder: Path, out: Path, fast: bool = False) -> Outcome:
    out.mkdir(exist_ok=True)
    sources, rejected = find_cts(folder)
    assert rejected == []
    return segment_all(sources, out, device="cpu", fast=fast, progress=lambda *_: None)


def reasons(outcome: Outcome) -> dict[str, tuple[str, str]]:
    return {item.volume: (item.reason, item.detail) for item in outcome.rejected}


@pytest.mark.parametrize("fast", [False, True])
def test_the_real_function_is_called_as_it_wants_to_be(fast, segmenter, tmp_path, save_nifti) -> None:
    """The arguments were bound to the real signature when they came in."""
    save_nifti(tmp_path / "in" / "scan.nii.gz", ct(), AFFINE)
    assert run(tmp_path / "in", tmp_path / "out", fast) == Outcome(1, 0, [])
    (call,) = segmenter.calls
    image = call.pop("input")
    assert call == {
        **{"output": None, "ml": True, "task": "total", "fast": fast},
        **{"device": "cpu", "quiet": True},
    }
    assert isinstance(image, nib.Nifti1Image)
    np.testing.assert_array_equal(np.asarray(image.dataobj), ct())


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "LAS", "SPL"])
def test_the_label_map_lies_on_the_voxels_of_the_ct_as_stored(
    axcodes, segmenter, tmp_path, save_nifti
) -> None:
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    stored = nib.Nifti1Image(ct(), AFFINE).as_reoriented(turn)
    save_nifti(tmp_path / "in" / "scan.nii", np.asarray(stored.dataobj), stored.affine)
    run(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(segmenter.calls[0]["input"].dataobj), np.asarray(stored.dataobj))
    label_map = nib.load(tmp_path / "out" / "scan.nii.gz")
    np.testing.assert_allclose(label_map.affine, stored.affine, atol=1e-4)
    assert label_map.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(label_map.affine) == tuple(axcodes)
    expected = np.arange(np.prod(SHAPE_XYZ)).reshape(stored.shape) % 118
    np.testing.assert_array_equal(np.asarray(label_map.dataobj), expected)
    assert "heart" in str(label_map.header.extensions[0].get_content())


def test_rad_chestct_is_shown_the_right_way_round(segmenter, tmp_path) -> None:
    volume = ct().transpose(2, 1, 0)
    (tmp_path / "in").mkdir()
    np.savez_compressed(tmp_path / "in" / "val00007.npz", ct=volume)
    assert run(tmp_path / "in", tmp_path / "out") == Outcome(1, 0, [])
    image = segmenter.calls[0]["input"]
    np.testing.assert_array_equal(np.asarray(image.dataobj), volume)
    np.testing.assert_allclose(image.affine, npz_affine(0.8), atol=1e-6)
    label_map = nib.load(tmp_path / "out" / "val00007.nii.gz")
    assert (label_map.shape, nib.aff2axcodes(label_map.affine)) == (volume.shape, ("I", "P", "L"))
    assert run(tmp_path / "in", tmp_path / "out") == Outcome(0, 1, [])


def test_finished_label_maps_are_kept(segmenter, tmp_path, save_nifti) -> None:
    for n, name in enumerate(("a", "b", "c")):
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", ct(n), AFFINE)
    assert run(tmp_path / "in", tmp_path / "out") == Outcome(3, 0, [])
    before = (tmp_path / "out" / "a.nii.gz").read_bytes()
    (tmp_path / "out" / "b.nii.gz").write_bytes(b"")
    save_nifti(tmp_path / "in" / "c.nii.gz", ct(2)[:, :, :4], AFFINE)  # another CT of the same name
    shown: list[tuple[str, int, int]] = []
    sources, _ = find_cts(tmp_path / "in")
    again = segment_all(
        sources, tmp_path / "out", device="cpu", fast=False, progress=lambda *done: shown.append(done)
    )
    assert again == Outcome(2, 1, [])
    assert shown == [("segmented", n, 3) for n in (1, 2, 3)]
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == before
    assert [nib.load(tmp_path / "out" / f"{name}.nii.gz").shape[2] for name in "abc"] == [5, 5, 4]
    assert len(segmenter.calls) == 5


def test_an_interrupted_volume_leaves_nothing(segmenter, tmp_path, save_nifti) -> None:
    save_nifti(tmp_path / "in" / "scan.nii.gz", ct(), AFFINE)

    def interrupt(_: nib.Nifti1Image) -> nib.Nifti1Image:
        raise KeyboardInterrupt

    segmenter.answer = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def moved(image: nib.Nifti1Image) -> nib.Nifti1Image:
    affine = image.affine.copy()
    affine[2, 3] += 1
    return nib.Nifti1Image(np.ones(image.shape, np.uint8), affine)


def out_of_memory(_: nib.Nifti1Image) -> nib.Nifti1Image:
    raise RuntimeError("CUDA out of memory.\nTried to allocate 2.00 GiB")


def cut(image: nib.Nifti1Image) -> nib.Nifti1Image:
    return organs(image.slicer[:, :, :4])


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        (out_of_memory, "totalsegmentator", "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        (moved, "mask", "label map must lie on the CT's grid of shape (19, 17, 5), got (19, 17, 5)"),
        (cut, "mask", "label map must lie on the CT's grid of shape (19, 17, 5), got (19, 17, 4)"),
        (lambda image: organs(image, top=118), "mask", "ids must lie in 0..117, got 0 to 118"),
        (lambda image: organs(image, top=0), "mask", "No organ in the label map: is this a chest CT in HU?"),
    ],
)
def test_a_volume_that_fails_is_named_and_the_others_go_on(
    answer, reason, detail, segmenter, tmp_path, save_nifti
) -> None:
    for n, name in enumerate(("a", "b")):
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", ct(n), AFFINE)
    segmenter.answer = lambda image: answer(image) if len(segmenter.calls) == 1 else organs(image)
    outcome = run(tmp_path / "in", tmp_path / "out")
    assert outcome[:2] == (1, 0)
    assert reasons(outcome) == {"a": (reason, detail)}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.nii.gz"]


def test_volumes_that_cannot_be_segmented_are_refused_before(segmenter, tmp_path, save_nifti) -> None:
    """A blank header, as of CT-RATE's first form, states no spacing, which TotalSegmentator goes by."""
    save_nifti(tmp_path / "in" / "raw.nii.gz", ct() + 1024, np.eye(4))
    save_nifti(tmp_path / "in" / "shifted.nii.gz", ct() + 1024, AFFINE)
    save_nifti(tmp_path / "in" / "flat.nii.gz", ct()[:, :, 0], AFFINE)
    whole = save_nifti(tmp_path / "in" / "torn.nii.gz", ct(), AFFINE)
    whole.write_bytes(whole.read_bytes()[:-400])
    outcome = run(tmp_path / "in", tmp_path / "out")
    assert segmenter.calls == []
    assert {volume: reason for volume, (reason, _) in reasons(outcome).items()} == {
        **{"raw": "v1 or v2", "shifted": "not in HU", "flat": "geometry", "torn": "unreadable"}
    }
    assert reasons(outcome)["raw"][1].startswith("a volume in HU must state its geometry, got a blank header")


def test_a_folder_without_cts_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="No volume in NIfTI"):
        find_cts(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_cts(tmp_path / "nowhere")


def test_parts_make_up_the_whole() -> None:
    whole: Any = list("abcdefg")
    parts = [part_of(whole, f"{n}/3") for n in (1, 2, 3)]
    assert parts == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert part_of(whole, "1/1") == whole
    for text in ("0/3", "4/3", "1", "1/0", "-1/3", "a/b"):
        with pytest.raises(ValueError, match=f"part must be .*, got '{text}'"):
            part_of(whole, text)


def test_a_label_map_is_the_same_bytes_each_time(segmenter, tmp_path, save_nifti) -> None:
    save_nifti(tmp_path / "in" / "scan.nii.gz", ct(), AFFINE)
    for out in ("one", "two"):
        run(tmp_path / "in", tmp_path / out)
    one, two = ((tmp_path / out / "scan.nii.gz").read_bytes() for out in ("one", "two"))
    assert one == two
    assert gzip.decompress(one)[344:347] == b"n+1"


FAST = "Dataset297_TotalSegmentator_total_3mm_1559subj"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory in which nothing of TotalSegmentator was ever done, on a machine without network."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TOTALSEG_HOME_DIR", "TOTALSEG_WEIGHTS_PATH"):
        monkeypatch.delenv(name, raising=False)

    def no_network(method: str, url: str, **_: object) -> None:
        asked.append(url)
        raise requests.ConnectionError(f"no route to {url}")

    asked: list[str] = []
    monkeypatch.setattr("requests.api.request", no_network)
    monkeypatch.setattr("totalsegmentator.config.asked", asked, raising=False)
    return tmp_path


def asked() -> list[str]:
    """Addresses that were asked for anything."""
    from totalsegmentator import config

    return config.asked


def test_the_real_package_runs_without_a_report_of_it(home, monkeypatch) -> None:
    """All of ``totalsegmentator`` but the prediction itself, which needs the weights."""
    from totalsegmentator import nnunet, python_api

    (home / "weights" / FAST).mkdir(parents=True)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(home / "weights"))
    image = nib.Nifti1Image(np.zeros((5, 4, 3), np.int16), np.diag([-0.7, -0.8, 1.5, 1]))
    seen: list[Any] = []

    def predict(file_in: Any, file_out: Any, task_id: Any, **options: Any) -> Any:
        seen.append((file_in is image, file_out, task_id, options["resample"], options["multilabel_image"]))
        return nib.Nifti1Image(np.full((5, 4, 3), 51, np.uint8), image.affine), image, None

    monkeypatch.setattr(nnunet, "nnUNet_predict_image", predict)
    with totalsegmentator_ready("cpu", fast=True):
        result = python_api.totalsegmentator(
            image, None, ml=True, task="total", fast=True, device="cpu", quiet=True
        )
        settings = json.loads(Path(os.environ["TOTALSEG_HOME_DIR"], "config.json").read_text())
    assert np.unique(result.get_fdata()).tolist() == [51]
    assert seen == [(True, None, 297, 3.0, True)]
    assert settings["prediction_counter"] == 1, "the package got as far as its report"
    assert asked() == []
    assert not (home / ".totalsegmentator").exists(), "the user's own configuration is left alone"


def test_a_report_would_have_been_seen(home) -> None:
    from totalsegmentator import config

    params = {
        **dict.fromkeys(("task", "fast", "preview", "multilabel", "statistics", "radiomics")),
        "roi_subset": None,
    }
    config.send_usage_stats(config.setup_totalseg() | {"send_usage_stats": True}, params)
    assert asked() == ["https://stats.totalsegmentator.com:443/log_totalseg_run"]


@pytest.mark.parametrize(("fast", "option"), [(True, "total_fast"), (False, "total")])
def test_missing_weights_are_said_before_any_volume(fast, option, home) -> None:
    with pytest.raises(ConnectionError) as caught, totalsegmentator_ready("cpu", fast):
        pytest.fail("there are no weights")
    said = str(caught.value)
    weights = home / ".totalsegmentator" / "nnunet" / "results"
    assert f"'{weights}'" in said
    assert f"totalseg_download_weights -t {option}; otherwise set TOTALSEG_WEIGHTS_PATH" in said
    assert "\n" not in said
    assert all(url.startswith("https://github.com/wasserth/TotalSegmentator/") for url in asked())


def test_the_environment_is_as_before_afterwards(home, monkeypatch) -> None:
    (home / "weights" / FAST).mkdir(parents=True)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(home / "weights"))
    with totalsegmentator_ready("cpu", fast=True):
        private = os.environ["TOTALSEG_HOME_DIR"]
        assert os.environ["TOTALSEG_WEIGHTS_PATH"] == str(home / "weights")
    assert "TOTALSEG_HOME_DIR" not in os.environ
    assert not Path(private).exists()
    assert os.environ["TOTALSEG_WEIGHTS_PATH"] == str(home / "weights")


@pytest.mark.parametrize("device", ["gpu", "gpu:63"])
def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(device, home) -> None:
    if device == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with (
        pytest.raises(ValueError, match=f"no device '{device}'"),
        totalsegmentator_ready(device, fast=True),
    ):
        pytest.fail("there is no such device")


def test_other_devices_are_refused(home) -> None:
    expected = pytest.raises(ValueError, match="Invalid device type: 'tpu'")
    with expected, totalsegmentator_ready("tpu", fast=True):
        pytest.fail("there is no such device")
