import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from common.shards.shards import ShardSet

SHAPE_XYZ = (19, 17, 5)
Invoke = Callable[..., Result]


def test_ct_rate_is_written_with_all_its_masks(
    tiny: Any,
    tmp_path: Path,
    write_rex: Callable[..., tuple[Path, Path]],
    save_nifti: Callable[..., Path],
    invoke: Invoke,
) -> None:
    for volume in ("train_1_a_1", "train_2_a_1", "train_3_a_1", "train_4_a_1"):
        tiny.add(volume)
    tiny.rows.pop()  # without metadata, but not among the first two
    tiny.write_tables("train")
    save_nifti(tiny.ts_path("train_1_a_1", "train"), np.ones(SHAPE_XYZ, np.uint8), tiny.affine())
    masks = np.ones((1, *SHAPE_XYZ), np.uint8)
    listing, folder = write_rex({"train_2_a_1": masks}, {"train_2_a_1": ["2d"]}, tiny.affine())
    answer = invoke(
        *("ct-rate", "--root", tiny.root, "--split", "train", "--out", tmp_path / "out", "--limit", 2),
        *("--rexgroundingct", listing, "--rexgroundingct-masks", folder, "--slices-per-shard", 5),
    )
    assert answer.exit_code == 0, answer.output
    assert len((tmp_path / "out" / "rejected.csv").read_text().splitlines()) == 1
    entries = {entry.volume: entry for entry in ShardSet(tmp_path / "out", "train").volumes}
    assert list(entries) == ["train_1_a_1", "train_2_a_1"]
    assert entries["train_1_a_1"].has_ts
    assert entries["train_2_a_1"].has_rex
    for line in (r"volumes +│ +2", r"slices +│ +10", r"TotalSegmentator ids +│ +1", r"ReXGroundingCT +│ +1"):
        assert re.search(line, answer.stdout), answer.stdout


@pytest.mark.parametrize(("form", "status"), [("auto", 0), ("v1", 0), ("v2", 1)])
def test_the_form_is_the_users_to_state(
    form: str, status: int, tiny_v1: Any, tmp_path: Path, invoke: Invoke
) -> None:
    tiny_v1.add("train_1_a_1")
    answer = invoke(
        "ct-rate", "--root", tiny_v1.root, "--split", "train", "--out", tmp_path / "out", "--form", form
    )
    assert answer.exit_code == status, answer.output
    if status == 0:
        slices = ShardSet(tmp_path / "out", "train").read_slab(0, 3, 1).read_ct(0)
        np.testing.assert_array_equal(slices, tiny_v1.hu("train_1_a_1")[:, :, 3].T)
    else:
        assert re.search(r"left out: v1 or v2 +│ +1", answer.stdout)


def test_annotations_and_their_masks_belong_together(tmp_path: Path, invoke: Invoke) -> None:
    answer = invoke(
        *("ct-rate", "--root", tmp_path, "--split", "train", "--out", tmp_path / "out"),
        *("--rexgroundingct", "x.json"),
    )
    assert "--rexgroundingct and --rexgroundingct-masks must be given together, got one" in str(
        answer.exception
    )
    assert not (tmp_path / "out").exists()
