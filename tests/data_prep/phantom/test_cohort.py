"""The cohort on disk: CT-RATE's layout, the same for the same seed, resumable, and never mixed up."""

import csv
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.cohort.cohort import load_labels
from data_prep.phantom.cohort import Settings, write_cohort

SMALL = Settings(seed=3, form="both", matrix=40, slice_mm=(6.0, 8.0), valid_share=0.4, rex_share=0.6)
NUM_VOLUMES = 9
TS_IDS = {label.name: label.index for label in load_labels("totalsegmentator")}


def write(out: Path, num_volumes: int = NUM_VOLUMES, settings: Settings = SMALL, processes: int = 1) -> Path:
    assert len(list(write_cohort(out, num_volumes, settings, processes))) == num_volumes
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()
    }


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def other_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = Settings(seed=3, site="b", matrix=40, slice_mm=(6.0, 8.0), npz_spacing_mm=8.0)
    return write(tmp_path_factory.mktemp("other_site"), 3, settings)


def test_the_folders_are_ct_rates(cohort) -> None:
    names = set()
    for table in ("train_metadata.csv", "validation_metadata.csv"):
        for row in read(cohort / "dataset/metadata" / table):
            name = row["VolumeName"].removesuffix(".nii.gz")
            split, patient, scan, _ = name.split("_")
            folder = f"{split}_{patient}/{split}_{patient}_{scan}/{name}.nii.gz"
            for root in ("", "ts_seg/ts_total/"):
                assert (cohort / "dataset" / f"{root}{split}_fixed" / folder).is_file()
            assert (cohort / "dataset" / split / folder).is_file()
            names.add(name)
    assert len(names) == NUM_VOLUMES
    assert {name.split("_")[0] for name in names} == {"train", "valid"}
    volumes = [file for file in (cohort / "dataset").rglob("*.nii.gz") if "ts_seg" not in file.parts]
    assert len(volumes) == 2 * NUM_VOLUMES


def test_raw_volumes_rescaled_by_the_metadata_are_the_fixed_ones(cohort) -> None:
    intercepts = set()
    for row in read(cohort / "dataset/metadata/train_metadata.csv"):
        (fixed_path,) = (cohort / "dataset/train_fixed").rglob(row["VolumeName"])
        (raw_path,) = (cohort / "dataset/train").rglob(row["VolumeName"])
        fixed, raw = nib.load(fixed_path), nib.load(raw_path)
        assert isinstance(fixed, nib.Nifti1Image)
        assert isinstance(raw, nib.Nifti1Image)
        hu = np.asarray(raw.dataobj) * float(row["RescaleSlope"]) + float(row["RescaleIntercept"])
        np.testing.assert_array_equal(hu, np.asarray(fixed.dataobj))
        np.testing.assert_array_equal(raw.affine, np.eye(4))
        spacing = [float(value) for value in re.findall(r"[\d.]+", row["XYSpacing"])] + [
            float(row["ZSpacing"])
        ]
        np.testing.assert_allclose(fixed.header.get_zooms(), spacing, rtol=1e-5)
        assert fixed.shape == (int(row["Rows"]), int(row["Columns"]), int(row["NumberofSlices"]))
        intercepts.add(row["RescaleIntercept"])
    assert intercepts == {"-1024", "-8192"}


@pytest.mark.parametrize("site", ["a", "b"])
def test_the_world_is_the_patients(site, request) -> None:
    """RAS world: liver to the right (+x), spleen to the left, spine behind (-y), neck above (+z)."""
    out = request.getfixturevalue("cohort" if site == "a" else "other_site")
    for file in sorted((out / "dataset/ts_seg").rglob("*.nii.gz"))[:3]:
        image = nib.load(file)
        assert isinstance(image, nib.Nifti1Image)
        labels = np.asarray(image.dataobj)
        place = {
            name: nib.affines.apply_affine(image.affine, np.argwhere(labels == TS_IDS[name]).mean(axis=0))
            for name in ("liver", "spleen", "heart", "vertebrae_T8", "trachea")
        }
        assert place["liver"][0] > 15 > -15 > place["spleen"][0]
        assert place["vertebrae_T8"][1] < place["heart"][1] - 30
        assert place["trachea"][2] > place["heart"][2] > place["liver"][2]
        ids = np.unique(labels)
        assert ids.max() <= 117
        assert len(ids) - 1 >= 30


def test_the_other_site_is_stored_otherwise_and_also_as_rad_chestct(other_site) -> None:
    files = sorted((other_site / "dataset").glob("*_fixed/*/*/*.nii.gz"))
    for file in files:
        image = nib.load(file)
        assert isinstance(image, nib.Nifti1Image)
        assert "".join(nib.aff2axcodes(image.affine)) in ("RAS", "LAS")
    volumes = sorted((other_site / "rad_chestct").glob("*.npz"))
    assert len(volumes) == 3
    for path in volumes:
        assert re.fullmatch(r"(trn|val|tst)\d{5}\.npz", path.name)
        with np.load(path, allow_pickle=False) as archive:
            ct = archive["ct"]
        assert ct.dtype == np.int16
        assert -1000 <= ct.min() < ct.max() <= 1000
        assert ct.shape[1] == ct.shape[2]


def test_rex_masks_have_a_json_entry_and_the_entry_its_masks(cohort) -> None:
    splits = json.loads((cohort / "rexgroundingct/dataset.json").read_text())
    items = {item["name"]: item for split in splits.values() for item in split}
    files = {file.name: file for file in (cohort / "rexgroundingct/segmentations").iterdir()}
    assert set(items) == set(files)
    assert 2 <= len(items) < NUM_VOLUMES
    for name, file in files.items():
        masks = nib.load(file)
        assert isinstance(masks, nib.Nifti1Image)
        assert masks.shape[0] == len(items[name]["categories"])
        assert np.asarray(masks.dataobj).reshape(masks.shape[0], -1).any(axis=1).all()


def test_volume_k_is_the_same_in_a_smaller_cohort_over_processes_and_a_cohort_can_grow(
    cohort, tmp_path
) -> None:
    smaller = contents(write(tmp_path / "at once", 4, processes=2))
    larger = contents(cohort)
    volumes = [name for name in smaller if name.endswith(".nii.gz") or name.startswith("synthetic")]
    assert len(volumes) >= 4 * 4
    assert all(smaller[name] == larger[name] for name in volumes)
    write(tmp_path / "grown", 2)
    assert contents(write(tmp_path / "grown", 4)) == smaller


def test_a_stopped_cohort_resumes_to_the_same_files(cohort, tmp_path) -> None:
    running = write_cohort(tmp_path, NUM_VOLUMES, SMALL, 1)
    for _ in range(3):
        next(running)
    running.close()
    assert not (tmp_path / "dataset/metadata").exists()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nii.gz")}
    lost = sorted(kept)[0]
    lost.unlink()
    write(tmp_path)
    assert contents(tmp_path) == contents(cohort)
    assert all(file.stat().st_mtime_ns == kept[file] for file in kept if file.name != lost.name)


def test_another_seed_is_another_cohort(cohort, tmp_path) -> None:
    write(tmp_path, 1, Settings(seed=4, form="v2", matrix=40, slice_mm=(6.0, 8.0)))
    name = "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"
    assert (tmp_path / name).read_bytes() != (cohort / name).read_bytes()


def test_a_folder_of_other_settings_is_refused(cohort) -> None:
    with pytest.raises(ValueError, match=r"other settings: \['matrix', 'seed'\]"):
        next(write_cohort(cohort, NUM_VOLUMES, Settings(seed=9, form="both", matrix=48, slice_mm=(6.0, 8.0),
                                                        valid_share=0.4, rex_share=0.6), 1))  # fmt: skip


def test_a_cohort_of_before_a_setting_was_there_goes_on(tmp_path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "cohort.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in known.items() if name != "dose"}))
    write(tmp_path, 1)
    assert json.loads(path.read_text()) == known


def test_a_cohort_does_not_shrink(cohort) -> None:
    with pytest.raises(ValueError, match=f"volumes must be at least {NUM_VOLUMES}, the size of .* got 2"):
        next(write_cohort(cohort, 2, SMALL, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "c"}, "site must be one of .*, got 'c'"),
        ({"form": "v3"}, "form must be one of .*, got 'v3'"),
        ({"matrix": 8}, "matrix must be at least 32, got 8"),
        ({"slice_mm": (3.0, 1.0)}, "spacing_mm must be two ascending positive numbers"),
        ({"slice_mm": (0.0, 1.0)}, "spacing_mm must be two ascending positive numbers"),
        ({"valid_share": 1.2}, "valid_share must be in"),
        ({"rex_share": -0.1}, "rex_share must be in"),
        ({"npz_spacing_mm": 0.0}, "npz_spacing_mm must be positive"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"kernel": "B30f"}, "kernel must be one of .*PHANTOM_SOFT.*, got 'B30f'"),
        ({"dose": 0.0}, "dose must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        next(write_cohort(tmp_path, 1, Settings(**settings), 1))


@pytest.mark.parametrize(("volumes", "processes", "name"), [(0, 1, "num_volumes"), (1, 0, "processes")])
def test_counts_below_one_are_refused(volumes, processes, name, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        next(write_cohort(tmp_path, volumes, SMALL, processes))


def test_the_cohort_says_that_it_is_synthetic(cohort) -> None:
    assert json.loads((cohort / "cohort.json").read_text())["synthetic"] is True
    assert "synthetic" in (cohort / "README.md").read_text()
