import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from common.engines.latent_geometry import LatentGeometryEvaluator, open_encoders, shared_volumes
from common.handlers.latent_report import LatentReport
from common.reports.results import ResultRow, add_rows, read_rows


def run(write_paths: Callable[..., Path], out: Path, classification: Path | None) -> LatentGeometryEvaluator:
    stores = open_encoders(write_paths("circle"), write_paths("tangle"), [write_paths("line")])
    report = LatentReport(
        **{"output_dir": out, "results_csv": out / "results.csv", "classification_csv": classification},
        **{"dataset_name": "ct_rate", "figure_volumes": None, "seed": 1, "settings": {"seed": 1}},
    )
    engine = LatentGeometryEvaluator(
        **{"stores": stores, "volumes": shared_volumes(stores, 16)},
        **{"sample_mm": 8.0, "gaps_mm": [10], "split_percent": [60, 10, 30], "split_seed": 42},
        **{"num_resamples": 50, "seed": 1, "handlers": [report], "strides": [1]},
        **{"dense_labels_dir": None, "probe_dirs": None, "labels_csv": None},
    )
    engine.measure_all()
    return engine


def test_table_v_joins_classification_and_geometry(
    write_paths: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_rows(tmp_path / "mil.csv", [ResultRow("circle", "mil_probe", "ct_rate", "macro_auroc", 0.7838)])
    engine = run(write_paths, tmp_path / "out", tmp_path / "mil.csv")
    with (tmp_path / "out" / "table_v.csv").open(newline="") as file:
        table = {line["metric"]: line for line in csv.DictReader(file)}
    assert (table["Macro AUROC"]["circle"], table["Macro AUROC"]["tangle"]) == ("0.7838", "not run")
    value = engine.state.metrics["circle/continuity_cosine"]
    assert table["continuity_geodesic"]["line"].startswith("1.0000 ± ")
    assert table["continuity_cosine"]["circle"].startswith(f"{value:.4f} ± ")
    assert "Table V, 21 volumes" in capsys.readouterr().out
    with (tmp_path / "out" / "comparisons.csv").open(newline="") as file:
        comparisons = {line["measure"]: line for line in csv.DictReader(file)}
    assert float(comparisons["continuity_chord"]["p_wilcoxon"]) < 0.01
    for name in ("figure_2.png", "continuity.png", "world_model.png"):
        assert Image.open(tmp_path / "out" / name).width > 800


def test_every_measure_and_difference_is_a_row_of_results(
    write_paths: Callable[..., Path], tmp_path: Path
) -> None:
    engine = run(write_paths, tmp_path, None)
    rows = {(row.encoder, row.metric): row for row in read_rows(tmp_path / "results.csv")}
    assert len(rows) == len(engine.state.table) + 3 * len(engine.state.comparisons)
    for line in engine.state.table:
        row = rows[line["encoder"], line["measure"]]
        numbers = [line[name] for name in ("value", "low", "high")]
        assert row.numbers == pytest.approx(numbers, rel=1e-5, nan_ok=True)
        assert (row.protocol, row.dataset, row.n) == ("latent_geometry", "ct_rate", line["n"])
    difference = rows["circle - tangle", "continuity_geodesic"]
    assert difference.low < difference.value < difference.high
    assert rows["circle - tangle", "continuity_geodesic_p_permutation"].value < 0.01
