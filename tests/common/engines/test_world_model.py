from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from common.cohort.cohort import load_labels, split_three_ways
from common.embeddings.store import EmbeddingStore, EmbeddingStoreWriter
from common.engines.world_model import (
    ORGANS,
    label_free,
    organ_spans,
    positions,
    slices_of,
    stride_scores,
    z_position,
)
from common.networks.mil_probe import MILProbe, save_probe
from common.networks.poolers import build_pooler

NAMES = ["Emphysema", "Lung nodule"]
Write = Callable[..., Path]


def split_of(store: EmbeddingStore) -> dict[str, list[str]]:
    return split_three_ways(store.volumes, seed=42)


def test_a_line_says_exactly_where_a_slice_lies(write_paths: Write) -> None:
    store = EmbeddingStore(write_paths("line"))
    found = z_position(store, split_of(store), 200, seed=0)
    assert found["r2_fraction"].value == pytest.approx(1, abs=1e-6)
    assert found["mae_fraction"].value == pytest.approx(0, abs=1e-4)
    # mm from the middle are the fraction times a length that the token does not know
    assert 0.9 < found["r2_mm"].value < 1
    assert found["r2_mm"].low < found["r2_mm"].value < found["r2_mm"].high
    assert found["mae_mm"].n == len(split_of(store)["test"])


def test_a_circle_is_read_as_well_as_a_plane_can(write_paths: Write) -> None:
    store = EmbeddingStore(write_paths("circle"))
    split = split_of(store)
    found = z_position(store, split, 50, seed=0)
    sides = {}
    for side in ("train", "test"):
        parts = [(v.tokens, positions(v.z_mm)) for v in slices_of(store, split[side])]
        sides[side] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    plane = LinearRegression().fit(*sides["train"])
    error = np.abs(plane.predict(sides["test"][0]) - sides["test"][1])
    # the smallest penalty is not none at all
    assert found["r2_fraction"].value == pytest.approx(
        1 - (error[:, 0] ** 2).sum() / (sides["test"][1][:, 0].var() * len(error)), abs=1e-3
    )
    assert found["r2_fraction"].value < 0.9
    np.testing.assert_allclose(np.abs(found["predicted_mm"] - found["true_mm"]), error[:, 1], atol=0.1)


def test_a_tangle_says_nothing_of_a_slice(write_paths: Write) -> None:
    store = EmbeddingStore(write_paths("tangle"))
    found = z_position(store, split_of(store), 200, seed=0)
    assert found["r2_fraction"].value < 0.1
    assert found["r2_mm"].low < 0.1
    assert found["mae_fraction"].value == pytest.approx(0.25, abs=0.05)  # the mean distance from the middle


@pytest.mark.parametrize(
    ("shape", "axis", "path", "directions"), [("line", 1, 1, 1), ("tangle", 0.1, 0.1, 6)]
)
def test_order_and_directions_of_known_paths(
    write_paths: Write, shape: str, axis: float, path: float, directions: float
) -> None:
    store = EmbeddingStore(write_paths(shape))
    found = label_free(store, store.volumes, [10, 20], 100, seed=0)
    assert found["tau_principal_axis"].value == pytest.approx(axis, abs=0.1)
    assert found["tau_nearest_neighbours"].value == pytest.approx(path, abs=0.1)
    assert found["participation_ratio"].value == pytest.approx(directions, rel=0.05)
    assert found["effective_rank"].value == pytest.approx(directions, rel=0.05)
    assert found["participation_ratio"].low <= found["participation_ratio"].value
    near, far = (mean.value for mean in found["gap_curve"])
    assert far > 2 * near if shape == "line" else far == pytest.approx(near, abs=0.1)


def test_a_circle_uses_two_directions(write_paths: Write) -> None:
    store = EmbeddingStore(write_paths("circle"))
    found = label_free(store, store.volumes, [10], 50, seed=0)
    assert found["participation_ratio"].value == pytest.approx(2, abs=0.1)
    assert found["tau_principal_axis"].value < 0.8


def test_organs_that_tokens_show_are_found_from_end_to_end(write_paths: Write, write_spans: Write) -> None:
    labels, spans = write_spans(), {}
    for shape in ("organs", "tangle"):
        store = EmbeddingStore(write_paths(shape))
        split = {"train": store.volumes[:11], "validation": store.volumes[11:14], "test": store.volumes[14:]}
        spans[shape] = organ_spans(store, split, labels, 100, seed=0)
    assert set(spans["organs"]) == {"heart", "liver", "mean"}
    for means in spans["organs"].values():
        assert means["iou"].value == 1
        assert means["boundary_mm"].value == 0
        assert means["miss_rate"].value == 0
    assert spans["tangle"]["mean"]["iou"].value < 0.6
    assert spans["tangle"]["mean"]["boundary_mm"].value > 5


def test_names_of_structures_are_those_of_the_label_list() -> None:
    known = {label.name for label in load_labels("totalsegmentator")}
    assert {name for names in ORGANS.values() for name in names} <= known


def test_validation_without_organs_and_grids_without_positions_are_refused(
    write_paths: Write, write_spans: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, labels = EmbeddingStore(write_paths("organs")), write_spans()
    split = {"train": store.volumes[:11], "validation": store.volumes[11:13], "test": store.volumes[13:]}
    monkeypatch.setattr("common.engines.world_model.MIN_SHARE", 0.5)
    with pytest.raises(ValueError, match=r"None of the 2 validation volumes shows one of \['heart', "):
        organ_spans(store, split, labels, 10, seed=0)
    with EmbeddingStoreWriter(tmp_path / "bare", store.identity, "float32") as writer:
        writer.add("valid_1_a_1", torch.randn(5, 3), (1, 1, 1))
    with pytest.raises(ValueError, match=r"embedding of 'valid_1.*' has no slice positions"):
        list(slices_of(EmbeddingStore(tmp_path / "bare"), ["valid_1_a_1"]))


@pytest.fixture
def case(write_paths: Callable[..., Path], tmp_path: Path) -> tuple[EmbeddingStore, Path, Path]:
    store = EmbeddingStore(write_paths("tangle"))
    torch.manual_seed(0)
    probe = MILProbe(build_pooler("average", 6), 6, 2)
    card = {"pooler": "average", "class_names": NAMES} | store.identity
    save_probe(tmp_path / "probe", probe, card)
    rows = [f"{volume},{index % 2},{index % 3 % 2}" for index, volume in enumerate(store.volumes)]
    (tmp_path / "labels.csv").write_text("\n".join([f"VolumeName,{','.join(NAMES)}", *rows]) + "\n")
    return store, tmp_path / "probe", tmp_path / "labels.csv"


def test_scores_are_those_of_every_kth_slice(case: tuple[EmbeddingStore, Path, Path]) -> None:
    store, probe_dir, labels_csv = case
    found = stride_scores(store, probe_dir, labels_csv, [1, 3], 200, seed=0)
    torch.manual_seed(0)
    probe = MILProbe(build_pooler("average", 6), 6, 2)
    labels = np.array([(index % 2, index % 3 % 2) for index in range(21)])
    for stride, means in found.items():
        pooled = torch.stack([store.read(volume).tokens[::stride].mean(0) for volume in store.volumes])
        scores = probe.classifier(pooled).detach().numpy()
        assert means["macro_auroc"].value == pytest.approx(roc_auc_score(labels, scores, average="macro"))
        assert means["macro_auprc"].value == pytest.approx(
            average_precision_score(labels, scores, average="macro")
        )
        assert means["macro_auroc"].low < means["macro_auroc"].value < means["macro_auroc"].high
        assert means["macro_auroc"].n == 21


def test_other_encoders_and_strides_are_refused(case: tuple[EmbeddingStore, Path, Path]) -> None:
    store, probe_dir, labels_csv = case
    with pytest.raises(ValueError, match=r"strides must be positive, got \[0\]"):
        stride_scores(store, probe_dir, labels_csv, [0], 10, seed=0)
    for name in ("encoder", "encoder_id", "preprocessing"):
        own, store.identity[name] = store.identity[name], "other"
        with pytest.raises(ValueError, match=f"{name} .*'{own}'.*'other'"):
            stride_scores(store, probe_dir, labels_csv, [1], 10, seed=0)
        store.identity[name] = own
