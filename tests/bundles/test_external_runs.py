"""Evaluation on another institution, of a preprocessing strategy, and by overlays, as users run them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from common.cohort.cohort import load_labels
from common.networks.mil_probe import load_probe, save_probe
from common.networks.poolers import POOLERS, GatedAttentionPool, build_pooler, pad_bags
from common.reports.results import read_rows

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
CT_RATE, RAD = ([label.name for label in load_labels(name)] for name in ("ct_rate", "rad_chestct"))
SCHEDULE = {"max_steps": 30, "val_interval": 10, "checkpoint_every": 10, "log_every": 10, "num_seeds": 1}
SCHEDULE |= {"num_resamples": 50, "poolers": ["average", "max"], "learning_rates": [0.1]}

Run = Callable[..., ConfigWorkflow]


@pytest.fixture
def run(sites: Path, workflow: Run, tmp_path: Path) -> Run:
    def make(bundle: str, config: str = "train", overlay: str | None = None, **knobs: Any) -> ConfigWorkflow:
        settings = {"encoder_bundle": sites / "dale_ct_2s"}
        settings["dataset_dir"] = sites / ("rad" if bundle == "eval_rad_chestct" else "ct_rate")
        if config == "train":
            settings |= SCHEDULE | {"output_dir": tmp_path / bundle}
        overlays = [BUNDLES / "_overlays" / "probe" / f"{overlay}.json"] if overlay else []
        found = workflow(bundle, config, *overlays, **settings | knobs)
        found.run()
        return found

    return make


def save(trainer: Any, folder: Path) -> None:
    """Write the chosen probe as the report does."""
    identity = {name: value for name, value in trainer.test_bags.identity.items() if name != "dtype"}
    card = {
        "pooler": trainer.grid.names[trainer.best.index][0],
        "class_names": trainer.test_bags.class_names,
        "thresholds": trainer.best.thresholds.tolist(),
    }
    save_probe(folder, trainer.chosen_probe(), card | identity)


def values_of(path: Path) -> dict[tuple[str, str], float]:
    return {(row.protocol, row.metric): row.value for row in read_rows(path) if row.encoder == "dale_ct_2s"}


def test_a_probe_of_one_site_is_tested_frozen_beside_one_of_the_other(run: Run, tmp_path: Path) -> None:
    other = run("eval_ct_rate", num_val_patients=8, results_csv=tmp_path / "other.csv").trainer
    trainer = run("eval_rad_chestct").trainer
    save(other, tmp_path / "frozen")
    save(trainer, tmp_path / "retrained")
    sides = (trainer.train_bags, trainer.val_bags, trainer.test_bags)
    assert [len(side) for side in sides] == [40, 12, 24]
    prefixes = [{volume[:3] for volume in side.volumes} for side in sides]
    assert prefixes == [{"trn"}, {"val"}, {"tst"}]
    assert trainer.test_bags.class_names == RAD
    before = values_of(tmp_path / "results.csv")
    run(
        "eval_rad_chestct",
        "evaluate",
        frozen_probe=tmp_path / "frozen",
        retrained_probe=tmp_path / "retrained",
        num_resamples=50,
    )
    after = values_of(tmp_path / "results.csv")
    for metric in ("macro_auroc", "macro_auprc", "macro_f1", "macro_balanced_accuracy"):
        assert after["retrained", metric] == pytest.approx(before["retrained", metric], abs=1e-5)
        difference = after["retrained", metric] - after["frozen", metric]
        assert after["retrained-frozen", metric] == pytest.approx(difference, abs=2e-6)
    # the sites share the shift of each class, so the frozen probe reads them too
    assert after["frozen", "macro_auroc"] > 0.65


def test_a_table_of_ones_own_is_read_by_the_bundle(sites: Path, run: Run, tmp_path: Path) -> None:
    embeddings, rows = sites / "dale_ct_2s" / "embeddings", ["VolumeName,count,days,died"]
    for split in ("train", "valid"):
        labels = sites / "ct_rate" / "dataset" / "multi_abnormality_labels" / f"{split}_predicted_labels.csv"
        for volume, *cells in (line.split(",") for line in labels.read_text().splitlines()[1:]):
            count = sum(map(int, cells))  # how many labels are raised
            rows.append(f"{volume},{count},{100 - 4 * count},{len(rows) % 2}")
    (tmp_path / "targets.csv").write_text("\n".join(rows))
    run(
        "eval_targets",
        "evaluate",
        targets_csv=tmp_path / "targets.csv",
        targets={"count": "number", "death": ["days", "died"]},
        train_embeddings_dir=embeddings / "train",
        test_embeddings_dir=embeddings / "valid",
        num_val_patients=8,
        num_resamples=50,
    )
    values = values_of(tmp_path / "results.csv")
    assert values["targets", "spearman/count"] > 0.5
    assert values["targets", "c_index/death"] > 0.5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"predictions.csv", "count.png", "death.png"}


def test_a_strategy_is_known_by_its_embeddings(sites: Path, run: Run, tmp_path: Path) -> None:
    folder = sites / "ct_rate" / "dataset" / "multi_abnormality_labels"
    embeddings = sites / "dale_ct_2s" / "embeddings"
    run(
        "eval_preprocessing",
        train_labels_csv=folder / "train_predicted_labels.csv",
        train_embeddings_dir=embeddings / "train",
        test_embeddings_dir=embeddings / "valid",
        num_val_patients=8,
    )
    assert ("preprocessing_cropped_256", "macro_auprc") in values_of(tmp_path / "results.csv")


@pytest.mark.parametrize(
    "overlay", ["gated_abmil", "transformer", "radiomics_gate", "low_shot_1", "low_shot_10"]
)
def test_overlays_of_probes_are_rows_beside_the_papers(overlay: str, run: Run, tmp_path: Path) -> None:
    own = json.loads((BUNDLES / "_overlays" / "probe" / f"{overlay}.json").read_text())
    changes = {"poolers": own["poolers"], "learning_rates": [0.001]} if "poolers" in own else {}
    if overlay == "radiomics_gate":  # the embeddings here are of slices
        with pytest.raises(RuntimeError, match="dim_with_radiomics") as refused:
            run("eval_ct_rate", overlay=overlay, num_val_patients=8, **changes)
        assert "of organs with radiomics, got preprocessing 'cropped_256'" in str(refused.value.__cause__)
        changes["network_def::dim"] = 23
    trainer = run("eval_ct_rate", overlay=overlay, num_val_patients=8, **changes).trainer
    assert (own["protocol"], "macro_auroc") in values_of(tmp_path / "results.csv")
    patients = {volume.rsplit("_", 2)[0] for volume in trainer.train_bags.volumes}
    assert len(patients) == {"low_shot_1": 1, "low_shot_10": 3}.get(overlay, 22)
    assert len(trainer.val_bags) == 16
    written = {path.name for path in (tmp_path / "eval_ct_rate").glob("*")}
    assert {"probe.safetensors", "per_class.csv", "roc.png", "attention.png"} <= written
    probe, _ = load_probe(tmp_path / "eval_ct_rate")
    bags = pad_bags([trainer.test_bags[0]["tokens"].float()])
    assert torch.equal(probe(*bags), trainer.chosen_probe()(*bags))


def test_a_pooler_added_as_the_readme_says_is_trained_and_comes_back(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POOLERS, "own", lambda dim: GatedAttentionPool(dim, hidden_dim=11))  # the class
    trainer = run(
        "eval_ct_rate",
        num_val_patients=8,
        num_seeds=2,
        poolers=["average", "own"],  # the line in the recipe
        learning_rates=[1.0],
    ).trainer
    trainer.best.index = 1
    trainer.best.parameters = trainer.grid.probe(1).state_dict()
    save(trainer, tmp_path / "own")
    loaded, card = load_probe(tmp_path / "own")
    assert card["pooler"] == "own"
    bags = pad_bags([trainer.test_bags[place]["tokens"].float() for place in range(5)])
    assert torch.equal(loaded(*bags), trainer.chosen_probe()(*bags))
    torch.manual_seed(42)
    initial = build_pooler("own", 23).state_dict()
    for name in ("value.weight", "gate.weight", "score.weight"):
        assert float((loaded.pooler.state_dict()[name] - initial[name]).abs().max()) > 1e-4


def test_every_overlay_of_probes_is_tested_above() -> None:
    names = sorted(path.stem for path in (BUNDLES / "_overlays" / "probe").glob("*.json"))
    assert names == ["gated_abmil", "low_shot_1", "low_shot_10", "radiomics_gate", "transformer"]


DENSE = [label.name for task in ("rexgroundingct", "totalsegmentator") for label in load_labels(task)]


@pytest.mark.parametrize(
    ("bundle", "classes"),
    [
        ("eval_ct_rate", CT_RATE),
        ("eval_rad_chestct", RAD),
        ("eval_preprocessing", CT_RATE),
        ("eval_dense_2d", DENSE),
    ],
)
def test_class_names_of_the_metadata_are_those_of_the_label_set(bundle: str, classes: list[str]) -> None:
    metadata = json.loads((BUNDLES / bundle / "configs" / "metadata.json").read_text())
    assert list(metadata["network_data_format"]["outputs"]["pred"]["channel_def"].values()) == classes
