"""Every change comes from one reading of a volume, with random numbers of its own; masks must fit."""

from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common.cohort.cohort import load_labels
from common.embeddings.changed_scans import BLOOD, UNCHANGED, ChangedScans, label
from common.embeddings.work import CTSlices, CTSource
from common.transforms.hounsfield import HU_WINDOWS, normalize_hu
from common.transforms.scan_changes import chosen_changes
from common.transforms.slice_strategies import SliceStrategy

WINDOW = HU_WINDOWS["ct_rate"]
READ: Counter[str] = Counter()


def source(volume: str, num_slices: int) -> CTSource:
    def read() -> CTSlices:
        READ[volume] += 1
        rng = np.random.default_rng(num_slices)
        return CTSlices(rng.integers(0, 90, (num_slices, 16, 16)).astype(np.int16), (1.0, 1.0, 2.0))

    return CTSource(volume, read)


def images(
    changes: list[str], masks: dict[str, Path] | None = None, **others
) -> dict[tuple[str, str], torch.Tensor]:
    """What the encoder is shown, by volume and kind of scan."""
    settings = {"seed": 1, "slice_axes": "yx", "slices_per_batch": 4, "num_workers": 2} | others
    batches = ChangedScans(
        changes=chosen_changes(changes),
        masks=masks or {},
        work=[source("a", 9), source("b", 5)],
        strategies=[SliceStrategy("raw_16", 8)],
        window=WINDOW,
        device=torch.device("cpu"),
        padded=False,
        **settings,
    )
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    sizes = []
    for batch in batches:
        sizes.append(len(batch["image"]))
        parts = batch["image"].split([piece.num_images for piece in batch["pieces"]])
        for piece, part in zip(batch["pieces"], parts, strict=True):
            found.setdefault((piece.task.volume, piece.task.store), []).append(part)
    assert set(sizes[:-1]) == {4}  # full across changes and volumes
    return {key: torch.cat(parts) for key, parts in found.items()}


def test_each_volume_is_read_once_and_all_its_changes_are_shown() -> None:
    READ.clear()
    found = images(["thicker_slices", "flipped_head_feet"])
    assert READ == {"a": 1, "b": 1}
    sizes = {key: len(part) for key, part in found.items()}
    kinds = {UNCHANGED: 9, "thicker_slices_2": 4, "thicker_slices_4": 2, "flipped_head_feet": 9}
    assert {kind: size for (volume, kind), size in sizes.items() if volume == "a"} == kinds
    hu = torch.from_numpy(source("a", 9).read().hu)
    torch.testing.assert_close(found["a", UNCHANGED][:, 0], normalize_hu(hu, WINDOW))
    torch.testing.assert_close(found["a", "flipped_head_feet"], found["a", UNCHANGED].flip(0))
    assert ("b", "thicker_slices_4") not in found  # five slices hold no two


def test_random_numbers_are_those_of_seed_volume_and_change() -> None:
    noisy, again, other = (images(["lower_dose"], seed=seed) for seed in (1, 1, 2))
    for key, part in noisy.items():
        torch.testing.assert_close(part, again[key], rtol=0, atol=0)
    assert not torch.equal(noisy["b", "lower_dose_0.1"], other["b", "lower_dose_0.1"])
    # of one volume, the strengths have one noise, of another size
    added = [(noisy["b", f"lower_dose_{share}"] - noisy["b", UNCHANGED]).flatten() for share in (0.25, 0.1)]
    assert float(torch.corrcoef(torch.stack(added))[0, 1]) > 0.99


def test_contrast_needs_masks_on_the_grid_of_the_ct(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [one.name for one in load_labels("totalsegmentator")]
    assert {*BLOOD} <= {*names}
    masks = {}
    for volume, shape in (("a", (9, 16, 16)), ("b", (5, 8, 8))):
        labels = np.zeros(shape, np.uint8)
        labels[1, 2, 3], labels[2] = names.index("aorta"), names.index("liver")
        masks[volume] = tmp_path / f"{volume}.nii.gz"
        affine = np.diag([-1.0, -1.0, 2.0, 1.0])
        affine[:3, 3] = 5.0  # as a scanner's origin: not the blank header of a tool
        nib.save(nib.Nifti1Image(labels.transpose(2, 1, 0), affine), masks[volume])
    found = images(["more_contrast"], masks)
    difference = (found["a", "more_contrast_150"] - found["a", UNCHANGED])[:, 0] * WINDOW.std_hu
    assert difference.nonzero().tolist() == [[1, 2, 3]]
    assert float(difference[1, 2, 3]) == pytest.approx(150, abs=0.01)
    assert ("b", "more_contrast_150") not in found
    assert "b.nii.gz" in caplog.text
    assert label("more_contrast", 150) == "more_contrast_150"
    assert label("transposed", 1.0) == "transposed"
