import logging
from typing import Any

import pytest

from common.embeddings.bags import EmbeddingBags
from common.engines.probe_cohorts import check_cohorts

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]


@pytest.fixture
def cohorts(write_cohort: Any) -> dict[str, EmbeddingBags]:
    splits = ("train", "validation", "test")
    return {split: EmbeddingBags(*write_cohort(split, 9), CLASSES) for split in splits}


def test_cohorts_that_belong_together_pass(
    cohorts: dict[str, EmbeddingBags], caplog: pytest.LogCaptureFixture
) -> None:
    check_cohorts(cohorts)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [("encoder", "dale_ct_0"), ("encoder_id", "sha256:x"), ("preprocessing", "raw_144"), ("dim", 8)],
)
def test_embeddings_of_another_encoder_weights_preprocessing_or_width_are_refused(
    cohorts: dict[str, EmbeddingBags], key: str, value: Any
) -> None:
    cohorts["test"].identity[key] = value
    with pytest.raises(ValueError, match=rf"{key} of cohort 'test' .*in train.* {value!r}"):
        check_cohorts(cohorts)


def test_volume_on_two_sides_is_refused(cohorts: dict[str, EmbeddingBags]) -> None:
    with pytest.raises(ValueError, match="not share patients, got 'train_1_a_1' of test: 'train_1' is in"):
        check_cohorts(cohorts | {"test": cohorts["train"]})


def test_patient_on_two_sides_is_refused(cohorts: dict[str, EmbeddingBags]) -> None:
    patient = cohorts["train"].volumes[0].rsplit("_", 2)[0]
    cohorts["test"].volumes[2] = f"{patient}_z_9"
    with pytest.raises(ValueError, match=f"got '{patient}_z_9' of test: '{patient}' is in train, too"):
        check_cohorts(cohorts)
    check_cohorts(cohorts, "volumes")


def test_volume_without_a_slice_is_named(cohorts: dict[str, EmbeddingBags]) -> None:
    cohorts["validation"].lengths[4] = 0
    volume = cohorts["validation"].volumes[4]
    message = f"must have at least one slice, got 0 for volume '{volume}' of validation. Embed it again"
    with pytest.raises(ValueError, match=message):
        check_cohorts(cohorts)


def test_class_without_positives_is_named(
    cohorts: dict[str, EmbeddingBags], caplog: pytest.LogCaptureFixture
) -> None:
    cohorts["test"].labels[:, 1] = 0
    with caplog.at_level(logging.WARNING):
        check_cohorts(cohorts)
    assert "test (9 volumes) has no positive of ['Lung nodule']" in caplog.text
