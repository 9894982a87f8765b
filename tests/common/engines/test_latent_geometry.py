from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.embeddings.store import EmbeddingStore, EmbeddingStoreWriter
from common.engines.latent_geometry import LatentGeometryEvaluator, open_encoders, shared_volumes
from common.metrics.slice_paths import latent_continuity

Write = Callable[..., Path]


def evaluator(write_paths: Write, shapes: tuple[str, str], **changes: object) -> LatentGeometryEvaluator:
    stores = open_encoders(*(write_paths(shape) for shape in shapes))
    arguments = {
        "sample_mm": 8.0,
        "gaps_mm": [10, 20],
        "split_percent": [60, 10, 30],
        "split_seed": 42,
        "num_resamples": 60,
        "seed": 1,
        "strides": [1],
        "handlers": [],
    }
    arguments |= dict.fromkeys(("dense_labels_dir", "probe_dirs", "labels_csv"))
    return LatentGeometryEvaluator(stores=stores, volumes=shared_volumes(stores, 16), **arguments | changes)


def test_a_straight_line_beats_a_tangle(write_paths: Write) -> None:
    engine = evaluator(write_paths, ("line", "tangle"))
    engine.measure_all()
    table = {(row["encoder"], row["measure"]): row for row in engine.state.table}
    for sampling in ("", "_matched"):
        # seen from the origin, a line is an arc of a great circle: no path on the sphere is shorter
        assert table["line", f"continuity_geodesic{sampling}"]["value"] == pytest.approx(1, abs=1e-5)
        assert table["tangle", f"continuity_geodesic{sampling}"]["value"] < 0.2
        comparison = engine.state.comparisons[f"continuity_geodesic{sampling}"]
        assert comparison.difference.low > 0.7
        assert comparison.p_wilcoxon < 1e-4
        assert comparison.p_permutation < 1e-3
        assert comparison.num_patients == 20
    assert table["line", "continuity_cosine"]["value"] > 1  # no metric: many small steps
    assert table["line", "z_position_r2_fraction"]["value"] > 0.99
    assert table["tangle", "tau_principal_axis"]["value"] < 0.4
    assert engine.state.metrics["line/continuity_geodesic"] == table["line", "continuity_geodesic"]["value"]
    assert set(engine.state.world) == {"line", "tangle"}
    assert "organ_spans" not in engine.state.world["line"]


def test_floors_are_measured_beside_the_two_and_change_nothing_of_them(write_paths: Write) -> None:
    alone = evaluator(write_paths, ("circle", "tangle"))
    alone.measure_all()
    among = LatentGeometryEvaluator(
        **{"stores": alone.stores | open_encoders(write_paths("line"), write_paths("organs"))},
        **{"volumes": alone.volumes, "sample_mm": 8.0, "gaps_mm": [10, 20], "split_percent": [60, 10, 30]},
        **{"split_seed": 42, "num_resamples": 60, "seed": 1, "strides": [1], "handlers": []},
        **dict.fromkeys(("dense_labels_dir", "probe_dirs", "labels_csv")),
    )
    among.measure_all()
    table = {(row["encoder"], row["measure"]): row["value"] for row in among.state.table}
    assert table["line", "continuity_geodesic"] == pytest.approx(1, abs=1e-5)
    assert {encoder for encoder, _ in table} == {"circle", "tangle", "line", "organs"}
    assert (
        table.items() >= {(row["encoder"], row["measure"]): row["value"] for row in alone.state.table}.items()
    )
    assert among.state.comparisons == alone.state.comparisons


def test_scores_are_those_of_each_volume(write_paths: Write) -> None:
    engine = evaluator(write_paths, ("circle", "tangle"))
    engine.measure_all()
    store, place = engine.stores["tangle"], engine.volumes.index("valid_7_a_1")
    embedding = store.read("valid_7_a_1")
    stored = engine.state.continuity["tangle", "stored", "chord"]
    assert stored[place] == pytest.approx(latent_continuity(embedding.tokens.double().numpy(), "chord"))
    z_mm = embedding.z_mm.numpy()
    nearest = sorted({int(np.abs(z_mm - mm).argmin()) for mm in np.arange(0, z_mm[-1] + 1e-6, 8)})
    matched = engine.state.continuity["tangle", "matched", "chord"]
    tokens = embedding.tokens.double().numpy()[nearest]
    assert matched[place] == pytest.approx(latent_continuity(tokens, "chord"))


def test_organ_spans_are_measured_where_there_are_labels(write_paths: Write, write_spans: Write) -> None:
    engine = evaluator(write_paths, ("organs", "tangle"), dense_labels_dir=write_spans())
    engine.measure_all()
    table = {(row["encoder"], row["measure"]): row["value"] for row in engine.state.table}
    assert table["organs", "organ_span_iou/heart"] == 1
    assert table["organs", "organ_span_boundary_mm/mean"] == 0


def test_pairs_that_do_not_compare_are_refused(write_paths: Write, tmp_path: Path) -> None:
    line = write_paths("line")
    with pytest.raises(ValueError, match="both hold embeddings of 'line'"):
        open_encoders(line, line)
    identity = EmbeddingStore(line).identity | {
        "encoder": "merlin",
        "token_kind": "grid",
        "slice_order": "none",
    }
    with EmbeddingStoreWriter(tmp_path / "grid", identity, "float32") as writer:
        writer.add("valid_1_a_1", torch.randn(8, 3), (1, 1, 1), grid_shape=[2, 2, 2])
    with pytest.raises(ValueError, match="'grid' in .*grid"):
        open_encoders(line, tmp_path / "grid")


def test_volumes_must_be_shared_slice_by_slice(
    write_paths: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = write_paths("line")
    identity = EmbeddingStore(line).identity | {"encoder": "other"}
    lengths = dict(zip(EmbeddingStore(line).volumes, EmbeddingStore(line).lengths.tolist(), strict=True))
    for name, extra in (("fits", 0), ("longer", 1)):
        with EmbeddingStoreWriter(tmp_path / name, identity, "float32") as writer:
            slices = lengths["valid_3_a_1"] + extra
            writer.add("valid_3_a_1", torch.randn(slices, 2), (1, 1, 1), z_mm=torch.arange(float(slices)))
    assert shared_volumes(open_encoders(line, tmp_path / "fits"), 16) == ["valid_3_a_1"]
    assert "20 volumes left out" in caplog.text
    with pytest.raises(ValueError, match="None of the 1 volumes .* 99 slices"):
        shared_volumes(open_encoders(line, tmp_path / "fits"), 99)
    with pytest.raises(ValueError, match="different numbers of slices of 'valid_3_a_1'"):
        shared_volumes(open_encoders(line, tmp_path / "longer"), 16)
