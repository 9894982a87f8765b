from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.embeddings import dense_cohort
from common.embeddings.dense_cohort import (
    DenseCohort,
    DrawnRows,
    RemainingSteps,
    labelled_and_embedded,
    tasks,
)
from common.embeddings.dense_labels import findings_present, read_dense_labels, write_dense_labels
from common.embeddings.store import EmbeddingStore, EmbeddingStoreWriter


@pytest.fixture
def dirs(write_dense: Any) -> tuple[Path, Path]:
    return write_dense(num_volumes=5)


VOLUMES = ["valid_4_a_1", "valid_2_a_1", "valid_5_a_1"]


def transposed(embeddings_dir: Path, out: Path) -> Path:
    """The same tokens, as of an encoder that saw transposed slices."""
    store = EmbeddingStore(embeddings_dir)
    with EmbeddingStoreWriter(out, store.identity, "float32") as writer:
        for volume in store.volumes:
            writer.add(
                *(volume, store.read(volume).tokens, (1, 1, 1)),
                **{"patches": store.read_patches(volume), "patch_grid": (2, 2), "box": (0, 0, 8)},
                slice_axes="xy",
            )
    return out


def test_rows_of_tokens_and_labels_belong_together(dirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_cohort, "SLICES_PER_CHUNK", 3)
    monkeypatch.setattr(dense_cohort, "ROWS_PER_CHUNK", 5)
    cohort, store = DenseCohort(*dirs, VOLUMES), EmbeddingStore(dirs[0])
    patches = torch.cat([store.read_patches(volume).flatten(0, 1) for volume in VOLUMES])
    files = [read_dense_labels(dirs[1] / f"{volume}.safetensors") for volume in VOLUMES]
    shares = np.concatenate([labels.shares.toarray() for labels in files])
    findings = np.concatenate([findings_present(labels.findings.ravel()) for labels in files])
    torch.testing.assert_close(torch.cat(list(cohort.tokens("patch"))), patches)
    torch.testing.assert_close(
        torch.cat(list(cohort.tokens("cls"))), torch.cat([store.read(volume).tokens for volume in VOLUMES])
    )
    rows = np.array([0, 3, 17, len(patches) - 1, 5, 6])
    soft = cohort.soft_targets("patch", rows)
    np.testing.assert_array_equal(soft[:, :14], findings[rows])
    np.testing.assert_allclose(soft[:, 14:], shares[rows], atol=1e-3)
    for column in (0, 1, 5, 14, 16, 40):
        expected = findings[:, column] if column < 14 else shares[:, column - 14] > 0
        np.testing.assert_array_equal(cohort.targets("patch", column), expected)
        np.testing.assert_array_equal(cohort.targets("cls", column), expected.reshape(-1, 4).any(1))
    assert [cohort.patients[place] for place in cohort.patient_of_row("patch")[[0, -1]]] == [
        "valid_4",
        "valid_5",
    ]
    assert len(cohort.patient_of_row("cls")) * 4 == len(patches) == cohort.num_rows["patch"]


def test_other_volumes_labels_or_tokens_have_another_checksum(dirs: Any, tmp_path: Path) -> None:
    cohort, same = DenseCohort(*dirs, VOLUMES), DenseCohort(*dirs, VOLUMES)
    checksum = cohort.checksum()
    assert same.checksum() == checksum
    others = [DenseCohort(*dirs, VOLUMES[::-1]).checksum()]
    others.append(DenseCohort(transposed(dirs[0], tmp_path / "xy"), dirs[1], VOLUMES).checksum())
    cohort._findings["patch"][5] ^= 2
    others.append(cohort.checksum())
    same.store._place(VOLUMES[1]).record["crc32"]["tokens"] += 1
    others.append(same.checksum())
    assert len({checksum, *others}) == 5


def test_transposed_slices_have_transposed_labels(dirs: Any, tmp_path: Path) -> None:
    upright = DenseCohort(*dirs, VOLUMES)
    turned = DenseCohort(transposed(dirs[0], tmp_path / "xy"), dirs[1], VOLUMES)
    for column in (0, 15):
        expected = upright.targets("patch", column).reshape(-1, 2, 2).transpose(0, 2, 1).ravel()
        assert (expected != upright.targets("patch", column)).any()
        np.testing.assert_array_equal(turned.targets("patch", column), expected)


def test_batches_are_the_drawn_rows(dirs: Any) -> None:
    cohort = DenseCohort(*dirs, VOLUMES)
    drawn = DrawnRows(cohort, num_steps=3, batch_size=7, seed=5)
    for number, kind in enumerate(("cls", "patch")):
        rows = np.random.default_rng([5, number]).integers(0, cohort.num_rows[kind], (3, 7))
        tokens = torch.cat(list(cohort.tokens(kind)))
        for step in (2, 0):
            item = drawn[step]
            torch.testing.assert_close(item["tokens"][number], tokens[rows[step]].half())
            np.testing.assert_array_equal(item["targets"][number], cohort.soft_targets(kind, rows[step]))
        assert len(drawn.tokens[number]) == len(np.unique(rows)) < cohort.num_rows[kind]
    assert item["tokens"].dtype == torch.float16


def test_steps_go_on_where_they_stopped() -> None:
    steps = RemainingSteps(5)
    steps.start_step = 3
    assert list(steps) == [3, 4]


def test_columns_are_findings_then_organs() -> None:
    assert list(tasks().items()) == [("rexgroundingct", 14), ("totalsegmentator", 118)]


def test_volumes_are_those_with_labels(dirs: Any, tmp_path: Path) -> None:
    (dirs[1] / "valid_3_a_1.safetensors").unlink()
    assert labelled_and_embedded(*dirs) == [f"valid_{n}_a_1" for n in (1, 2, 4, 5)]
    labels = read_dense_labels(dirs[1] / "valid_1_a_1.safetensors")
    write_dense_labels(dirs[1], labels._replace(volume="valid_9_a_1"))
    with pytest.raises(FileNotFoundError, match="1 of 5 .*'valid_9_a_1'"):
        labelled_and_embedded(*dirs)
    with pytest.raises(FileNotFoundError, match=f"No dense labels in '{tmp_path}'"):
        labelled_and_embedded(dirs[0], tmp_path)


def test_tokens_without_patches_are_refused(dirs: Any, tmp_path: Path) -> None:
    store = EmbeddingStore(dirs[0])
    with EmbeddingStoreWriter(tmp_path / "bare", store.identity, "float32") as writer:
        writer.add("valid_1_a_1", torch.randn(5, 3), (1, 1, 1), z_mm=torch.arange(5.0))
    with pytest.raises(ValueError, match="No patch tokens in"):
        labelled_and_embedded(tmp_path / "bare", dirs[1])


def test_labels_of_another_grid_or_crop_are_refused(dirs: Any, tmp_path: Path) -> None:
    path = dirs[1] / "valid_2_a_1.safetensors"
    labels = read_dense_labels(path)
    write_dense_labels(
        dirs[1],
        labels._replace(findings=labels.findings[:-1], shares=labels.shares[: -labels.findings.shape[1]]),
    )
    with pytest.raises(ValueError, match=r"'valid_2_a_1' has \(slices, patches\)"):
        DenseCohort(*dirs, VOLUMES)
    store = EmbeddingStore(dirs[0])
    patches = store.read_patches("valid_4_a_1")
    for name, crop, shown in (("boxed", {"box": (1, 0, 8)}, "1, 0, 8"), ("raw", {"side_px": 9}, "0, 0, 9")):
        with EmbeddingStoreWriter(tmp_path / name, store.identity, "float32") as writer:
            writer.add(
                *("valid_4_a_1", store.read("valid_4_a_1").tokens, (1, 1, 1)),
                **{"patches": patches, "patch_grid": (2, 2)} | crop,
            )
        message = rf"'valid_4_a_1' .*\({shown}\) .*\(0, 0, 8\)"
        with pytest.raises(ValueError, match=message):
            DenseCohort(tmp_path / name, dirs[1], ["valid_4_a_1"])


def test_an_empty_draw_is_refused(dirs: Any) -> None:
    with pytest.raises(ValueError, match="num_steps and batch_size must be at least 1, got 0 and 7"):
        DrawnRows(DenseCohort(*dirs, VOLUMES), 0, 7, 0)
