"""From a CT to a text: an encoder of slices, a tiny language model of one step, and what is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.embeddings.store import EmbeddingStore, EmbeddingStoreWriter
from common.writing.predict import RESEARCH, write_reports
from dale_ct.embedding import embed_to_store
from data_prep.phantom.reports import COLUMNS, findings_text

KNOBS = {
    **{"language_model": "tiny", "lm_dtype": "float32", "lora": None, "labeller": "rules", "controls": []},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_tokens": 4, "num_zones": 2, "bridge_width": 32, "bridge_heads": 2, "bridge_layers": 1},
    **{"num_val_patients": 4, "batch_size": 4, "max_steps": 1, "val_interval": 1, "checkpoint_every": 1},
    **{"warmup_steps": 0, "max_words": 8, "num_resamples": 5},
}


@pytest.fixture
def trained(small_bundle: Path, ct_folder: Path, workflow: Callable, tmp_path: Path) -> Callable[..., Path]:
    """Return ``train(name, **knobs)``: a model on random tokens of the small encoder's kind."""
    embed_to_store(ct_folder, tmp_path / "embedded", str(small_bundle), weights="random")
    identity = EmbeddingStore(tmp_path / "embedded").identity
    kept = {name: value for name, value in identity.items() if name not in ("dim", "dtype")}
    reports = tmp_path / "data" / "dataset" / "radiology_text_reports"
    reports.mkdir(parents=True)
    for split, name, number in (("train", "train", 12), ("valid", "validation", 4)):
        volumes = [f"{split}_{patient}_a_1" for patient in range(number)]
        with EmbeddingStoreWriter(tmp_path / "data" / "embeddings" / split, kept, "float32") as writer:
            for volume in volumes:
                tokens = torch.randn(5, identity["dim"])
                writer.add(volume, tokens, (1, 1, 1), z_mm=torch.arange(5, dtype=torch.float32))
        with (reports / f"{name}_reports.csv").open("w", newline="") as file:
            text = findings_text(["Atelectasis"], [], np.random.default_rng(0))
            csv.writer(file).writerows([COLUMNS, *([volume, "", "", text, ""] for volume in volumes)])

    def train(name: str, **knobs: object) -> Path:
        places = {"dataset_dir": tmp_path / "data", "embeddings_dir": tmp_path / "data" / "embeddings"}
        places |= {"output_dir": tmp_path / name, "results_csv": tmp_path / name / "results.csv"}
        run = workflow("report_generation", "train", **(KNOBS | places | knobs))
        run.run()
        run.finalize()
        return tmp_path / name

    return train


def test_a_ct_becomes_a_text_with_the_slices_attended_to(trained, small_bundle, ct_folder, tmp_path, capsys):
    model, random = trained("model"), {"encoder_knobs": {"encoder_weights": None}, "force": True}
    written = write_reports(small_bundle, model, ct_folder, tmp_path / "out", num_pictures=1, **random)
    assert sorted(written) == ["a", "b"]
    known = json.loads((tmp_path / "out" / "reports.json").read_text())
    assert known["note"] == RESEARCH
    assert [row["text"] for row in known["reports"]] == [report.text for report in written.values()]
    for volume, number in (("a", 11), ("b", 5)):
        report = written[volume]
        assert report.text
        assert set(report.slices) <= set(range(number))
        assert len(report.slices) == min(6, number)
        assert report.shares == sorted(report.shares, reverse=True)
    assert sum(written["b"].shares) == pytest.approx(1, abs=1e-5)  # all of its slices are shown
    assert (tmp_path / "out" / "a.png").stat().st_size > 10_000
    assert not (tmp_path / "out" / "b.png").exists()
    assert RESEARCH in capsys.readouterr().out
    # the same weights, the same text
    again = write_reports(small_bundle, model, ct_folder, tmp_path / "again", num_pictures=0, **random)
    assert again == written
    other = {"encoder_weights": None, "seed": 7}
    with pytest.raises(ValueError, match="encoder_id"):
        write_reports(small_bundle, model, ct_folder, tmp_path / "x", encoder_knobs=other, force=True)


def test_what_cannot_write_is_refused(trained, small_bundle, ct_folder, tmp_path):
    model, random = trained("frozen", phase="align"), {"encoder_weights": None}
    with pytest.raises(ValueError, match="never learned"):
        write_reports(small_bundle, model, ct_folder, tmp_path / "out", encoder_knobs=random, force=True)
    with pytest.raises(FileNotFoundError, match=r"No 'report.safetensors' in"):
        write_reports(small_bundle, ct_folder, ct_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="Pass --encoder_bundle and --report_dir"):
        write_reports(small_bundle, None, ct_folder, tmp_path / "out")
