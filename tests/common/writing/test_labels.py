"""Labels of reports, against sentences read by hand."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from common.writing.labels import (
    CLASS_NAMES,
    NOTHING_FOUND,
    positive_findings,
    report_labels,
    stated_labels,
)


@pytest.mark.parametrize(
    ("sentence", "labels"),
    [
        ("Calcified nodule in the left upper lobe", {"Lung nodule"}),
        ("There are calcifications of the aortic wall", {"Arterial wall calcification"}),
        ("Emphysema and bronchiectasis in both lungs", {"Emphysema", "Bronchiectasis"}),
        ("No pleural effusion", set()),
        ("Emphysema is absent", set()),
        ("Another thing", set()),
        ("An important notice about the portal vein", set()),
        ("Knots in the bronchi", set()),
    ],
)
def test_a_sentence_states_what_it_names_and_does_not_deny(sentence, labels) -> None:
    assert stated_labels(sentence) == labels


def test_a_denial_holds_for_its_own_sentence() -> None:
    (row,) = report_labels(["No consolidation. Hiatal hernia; The heart is enlarged."])
    assert {name for name, value in zip(CLASS_NAMES, row, strict=True) if value} == {
        "Hiatal hernia",
        "Cardiomegaly",
    }
    assert report_labels([""]).tolist() == [[0.0] * 18]


def test_a_classifier_of_text_reads_them_too(tmp_path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=4, num_labels=18, **sizes)).eval()
    model.save_pretrained(tmp_path)
    texts = ["a b", "b", *["a a b"] * 20]
    found = report_labels(texts, str(tmp_path))
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([[words[word] for word in text.split()]])
        np.testing.assert_array_equal(row, (model(ids).logits[0] > 0).double().numpy())
    assert 0 < found.mean() < 1
    BertForSequenceClassification(BertConfig(vocab_size=4, num_labels=7, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="18 classes.*got 7"):
        report_labels(texts, str(tmp_path))
    with pytest.raises(OSError, match="No classifier of reports '.*nowhere'"):
        report_labels(texts, str(tmp_path / "nowhere"))


def test_positive_findings_keep_the_sentences_that_state_a_class() -> None:
    reports = {
        "a": "The airways are open. No nodule. Emphysema in both lungs. Hiatal hernia.",
        "b": "No nodule.",
    }
    kept = positive_findings(reports, "rules")
    assert kept == {"a": "Emphysema in both lungs. Hiatal hernia.", "b": NOTHING_FOUND}
    assert not report_labels([NOTHING_FOUND]).any()
