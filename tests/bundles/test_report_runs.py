"""Reports as users train them: a tiny language model on embeddings that show some of the classes."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.embeddings.store import EmbeddingStore, EmbeddingStoreWriter
from common.reports.results import read_rows
from common.writing.labels import CLASS_NAMES, report_labels
from common.writing.model import open_report_model
from common.writing.trainer import ReportTrainer
from data_prep.phantom.reports import COLUMNS, findings_text
from tests.bundles.conftest import TrainingRuns

IDENTITY = {
    **{"encoder": "areas", "encoder_id": "areas:1", "preprocessing": "none", "slice_order": "feet_to_head"},
    "token_kind": "slice",
}
SHOWN = (2, 5, 7)  # classes that the embeddings show
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KNOBS = {
    **{"language_model": "tiny", "tiny": TINY, "lm_dtype": "float32", "lora": None, "labeller": "rules"},
    **{"num_tokens": 4, "num_zones": 2, "bridge_width": 32, "bridge_heads": 2, "bridge_layers": 1},
    **{"num_val_patients": 10, "batch_size": 8, "max_steps": 4, "warmup_steps": 2, "val_interval": 2},
    **{"lr": 3e-3, "max_words": 60, "num_resamples": 50, "checkpoint_every": 1, "log_every": 10},
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of 90 and 24 volumes, and reports that state the classes shown, in few words."""
    root, rng = tmp_path_factory.mktemp("reports"), np.random.default_rng(0)
    (root / "dataset/radiology_text_reports").mkdir(parents=True)
    for split, name, number in (("train", "train", 90), ("valid", "validation", 24)):
        rows = []
        with EmbeddingStoreWriter(root / "embeddings" / split, IDENTITY, "float32") as writer:
            for patient in range(1, number + 1):
                volume, length = f"{split}_{patient}_a_1", int(rng.integers(3, 9))
                present = rng.random(18) < 0.5
                labels = [CLASS_NAMES[index] for index in SHOWN if present[index]]
                tokens = 0.1 * rng.standard_normal((length, 18)) + 2 * present
                z_mm = torch.arange(length, dtype=torch.float32)
                writer.add(volume, torch.from_numpy(tokens).float(), (1, 1, 1), z_mm=z_mm)
                text = findings_text(labels, [], np.random.default_rng(0))
                rows.append([f"{volume}.nii.gz", "", "", text, ""])
        if split == "train":
            rows[0][3] = ""  # a volume without a report
        with (root / f"dataset/radiology_text_reports/{name}_reports.csv").open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    return root


def train(workflow: Any, cohort: Path, out: Path, **knobs: Any) -> Path:
    shown = KNOBS | {"dataset_dir": cohort, "embeddings_dir": cohort / "embeddings", "output_dir": out}
    run = workflow("report_generation", "train", **(shown | {"results_csv": out / "results.csv"} | knobs))
    run.run()
    run.finalize()
    return out


def refusal(workflow: Any, cohort: Path, out: Path, **knobs: Any) -> str:
    with pytest.raises((RuntimeError, ValueError, FileNotFoundError)) as refused:
        train(workflow, cohort, out, **knobs)
    error: BaseException | None = refused.value
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return " ".join(texts)


def test_what_the_embeddings_show_is_written_and_controls_tell_it_from_chance(
    workflow, cohort, tmp_path, caplog
) -> None:
    knobs = {"max_steps": 200, "val_interval": 40, "checkpoint_every": 100, "positive_only": True}
    out = train(workflow, cohort, tmp_path / "out", **knobs)
    assert "1 volumes have no report" in caplog.text
    assert "'train_1_a_1'" in caplog.text
    rows = {(row.protocol, row.metric): row.numbers for row in read_rows(out / "results.csv")}
    real, shuffled, constant = (
        rows[f"report_generation_positive{name}", "macro_f1"]
        for name in ("", "_shuffled", "_constant_report")
    )
    assert real[0] > 0.85
    assert shuffled[0] < 0.75
    assert 0.3 < constant[0] < 0.9
    difference = rows["report_generation_positive-shuffled", "macro_f1"]
    assert difference[0] == pytest.approx(real[0] - shuffled[0], abs=1e-5)
    assert 0 < difference[1] < difference[0] < difference[2]
    owed = rows["report_generation_positive-shuffled", "share_of_f1_owed"]
    assert owed[0] == pytest.approx(1 - shuffled[0] / real[0], abs=1e-4)
    for control in ("zero", "mean"):
        assert rows[f"report_generation_positive_{control}", "macro_recall"][0] <= 1
    assert rows["report_generation_positive_all_classes", "macro_recall"][0] == 1
    assert rows["report_generation_positive", "share_not_ended"][0] == 0
    assert (
        rows["report_generation_positive", "rouge_l"][0]
        > rows["report_generation_positive_shuffled", "rouge_l"][0]
    )
    with (out / "reports.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 24
    for kind in ("zero", "mean"):  # one bag for all but its length
        assert len({row[kind] for row in written}) <= 6
    found = report_labels([row["real"] for row in written])
    expected = report_labels([row["reference"] for row in written])
    assert (found == expected).mean() > 0.97
    assert (out / "scores.png").stat().st_size > 10_000
    card = json.loads((out / "report.json").read_text())
    assert card["embeddings"]["encoder_id"] == "areas:1"
    assert card["test"]["real"]["macro_f1"][0] == pytest.approx(real[0], abs=1e-5)


def test_phases_follow_each_other_and_misfits_are_refused(workflow, cohort, tmp_path, caplog) -> None:
    # the tiny model stands in for a trained one: it is frozen as it was drawn
    first = train(workflow, cohort, tmp_path / "align", phase="align", max_words=3)
    learned = load_file(first / "report.safetensors")
    assert all(name.startswith("bridge/") for name in learned)
    assert "did not end within max_words = 3" in caplog.text
    second = tmp_path / "full"
    train(workflow, cohort, second, start_from=first, max_steps=1, lr=0.0, controls=[])
    for name, weight in load_file(second / "report.safetensors").items():
        if name in learned:
            torch.testing.assert_close(weight, learned[name], rtol=0, atol=0)
    wider = refusal(workflow, cohort, tmp_path / "wider", start_from=first, bridge_width=64)
    assert "has shape (32,), this model (64,)" in wider
    card = json.loads((first / "report.json").read_text())
    card["embeddings"]["encoder_id"] = "another"
    (first / "report.json").write_text(json.dumps(card))
    assert "must be 'another'" in refusal(workflow, cohort, tmp_path / "x", start_from=first)
    assert "must be 'dale_ct_2s'" in refusal(workflow, cohort, tmp_path / "y", encoder="dale_ct_2s")
    assert "('shuffled', 'zero', 'mean'), got ['noise']" in refusal(
        workflow, cohort, tmp_path / "z", controls=["noise"]
    )


def test_a_run_that_broke_off_goes_on_to_the_same_weights(
    workflow, cohort, tmp_path, monkeypatch, caplog
) -> None:
    knobs: dict[str, Any] = {"controls": [], "max_steps": 30, "val_interval": 10, "checkpoint_every": 7}
    expected = load_file(train(workflow, cohort, tmp_path / "whole", **knobs) / "report.safetensors")
    validate = ReportTrainer.validate

    def break_off(self: ReportTrainer, step: int) -> None:
        if step == 20:
            raise OSError("power cut")
        validate(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(ReportTrainer, "validate", break_off)
        with pytest.raises(RuntimeError) as broken:
            train(workflow, cohort, tmp_path / "broken", **knobs)
    caplog.set_level(logging.INFO, "common.handlers.checkpoint")
    assert "power cut" in str(broken.value.__cause__ or broken.value.__context__)
    train(workflow, cohort, tmp_path / "broken", **knobs)
    assert "Resumed at step 14" in caplog.text
    for name, weight in load_file(tmp_path / "broken" / "report.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.two_ranks
def test_two_ranks_train_and_write_as_one_and_what_they_leave_opens(
    workflow, python_m_on, cohort, tmp_path
) -> None:
    # of 9 reports, the third batch leaves one rank without any
    knobs = {"num_val_patients": 80, "batch_size": 4, "max_steps": 6, "cross_layers": [1], "clip_norm": 0.5}
    expected = train(workflow, cohort, tmp_path / "one", **knobs)
    given = {"tiny": json.dumps(TINY), "lora": "$None", "embeddings_dir": cohort / "embeddings"}
    runs = TrainingRuns(python_m_on, "report_generation", cohort, KNOBS | knobs | given)
    runs.run(tmp_path / "two", 2, results_csv=tmp_path / "two.csv")
    found = load_file(tmp_path / "two" / "report.safetensors")
    assert found["readers/0/gate"] != 0
    for name, weight in load_file(expected / "report.safetensors").items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    ours, theirs = (read_rows(path) for path in (tmp_path / "two.csv", expected / "results.csv"))
    assert [(row.protocol, row.metric) for row in ours] == [(row.protocol, row.metric) for row in theirs]
    tables = [(folder / "reports.csv").read_text() for folder in (tmp_path / "two", expected)]
    assert tables[0] == tables[1]
    opened = open_report_model(expected, IDENTITY | {"dim": 18})
    store = EmbeddingStore(cohort / "embeddings" / "valid")
    with (expected / "reports.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert opened.write([store.view(first["volume"])], 60)[0].text == first["real"]
