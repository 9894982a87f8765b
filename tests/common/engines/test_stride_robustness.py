from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from common.embeddings.store import EmbeddingStore
from common.engines.stride_robustness import stride_scores
from common.networks.mil_probe import MILProbe, save_probe
from common.networks.poolers import build_pooler

NAMES = ["Emphysema", "Lung nodule"]


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
