"""The 18 labels of CT-RATE that a report states, read by rules or by a classifier of text."""

# N texts, C classes

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from common.cohort.cohort import load_labels

RULES = "rules"
NOTHING_FOUND = "Nothing abnormal is found."
CLASS_NAMES = tuple(label.name for label in load_labels("ct_rate"))
PHRASES: dict[str, tuple[str, ...]] = {
    "Medical material": ("pacemaker", "port", "sternal wires", "gastric tube", "medical material"),
    "Arterial wall calcification": ("aortic wall", "wall of the aorta", "arterial wall"),
    "Cardiomegaly": ("cardiomegaly", "heart is enlarged", "heart size is increased"),
    "Pericardial effusion": ("pericardial effusion", "pericardial fluid"),
    "Coronary artery wall calcification": ("coronary",),
    "Hiatal hernia": ("hiatal hernia", "herniates"),
    "Lymphadenopathy": ("lymphadenopathy", "enlarged lymph nodes", "lymph nodes are enlarged"),
    "Emphysema": ("emphysema", "emphysematous"),
    "Atelectasis": ("atelectasis", "atelectatic"),
    "Lung nodule": ("nodule", "nodules", "micronodules"),
    "Lung opacity": ("ground-glass", "lung opacity"),
    "Pulmonary fibrotic sequela": ("fibrotic", "honeycombing"),
    "Pleural effusion": ("pleural effusion", "pleural fluid"),
    "Mosaic attenuation pattern": ("mosaic",),
    "Peribronchial thickening": ("peribronchial", "bronchial walls"),
    "Consolidation": ("consolidation", "consolidated"),
    "Bronchiectasis": ("bronchiectasis", "dilated bronchi"),
    "Interlobular septal thickening": ("septal thickening", "interlobular septa"),
}
"""Words by which a sentence names a class: those of the phantom's reports."""

_NAMED = {name: re.compile(rf"\b({'|'.join(words)})\b") for name, words in PHRASES.items()}
_NEGATED = re.compile(r"\b(no|not|without|absent|normal|free of)\b")
_SENTENCE_END = re.compile(r"[.;]\s*")
BATCH_SIZE, THRESHOLD = 16, 0.5


def sentences(text: str) -> list[str]:
    """Split a report where a full stop or semicolon stands; the stops are left out.

    Example:
        >>> sentences("The heart is enlarged. No nodule.")
        ['The heart is enlarged', 'No nodule']
    """
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def stated_labels(sentence: str) -> set[str]:
    """Return the classes that a sentence says are present; none if it negates anything.

    Example:
        >>> stated_labels("Pleural effusion on the left"), stated_labels("No pleural or pericardial effusion")
        ({'Pleural effusion'}, set())
    """
    lower = sentence.lower()
    if _NEGATED.search(lower):
        return set()
    return {name for name, words in _NAMED.items() if words.search(lower)}


def report_labels(texts: Sequence[str], labeller: str = RULES) -> NDArray[np.float64]:
    """Read the 18 labels of CT-RATE from reports.

    Args:
        texts: N reports.
        labeller: "rules" for :func:`stated_labels` of each sentence, exact on the phantom's reports and on no
            others; or the folder or Hugging Face id of a ``transformers`` sequence classifier with one logit
            per class in CT-RATE's order, whose sigmoid calls a class from .5 on, such as "IAMJB/RadBERT-CT".

    Returns:
        0 or 1, ``(N, C)``.

    Raises:
        OSError: if the classifier is neither a folder nor on the hub, or cannot be reached.
        ValueError: if it has another number of classes.
    """
    if labeller == RULES:
        found = [set().union(*map(stated_labels, sentences(text))) for text in texts]
        rows = [[float(name in of_text) for name in CLASS_NAMES] for of_text in found]
        return np.array(rows, np.float64).reshape(-1, len(CLASS_NAMES))
    return _classified(texts, labeller)


def positive_findings(reports: Mapping[str, str], labeller: str) -> dict[str, str]:
    """Keep the sentences of each report that say one of the 18 classes is present.

    A report without any becomes ``NOTHING_FOUND``.

    Args:
        reports: volume to text.
        labeller: see :func:`report_labels`.
    """
    parts = [(volume, part) for volume, text in reports.items() for part in sentences(text)]
    positive = report_labels([part for _, part in parts], labeller).max(1)
    kept: dict[str, list[str]] = {volume: [] for volume in reports}
    for (volume, part), is_positive in zip(parts, positive, strict=True):
        if is_positive:
            kept[volume].append(f"{part}.")
    return {volume: " ".join(of_volume) or NOTHING_FOUND for volume, of_volume in kept.items()}


def _classified(texts: Sequence[str], labeller: str) -> NDArray[np.float64]:
    import torch  # here, with transformers: the rules need neither, and data_prep starts without
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(labeller)
        model = AutoModelForSequenceClassification.from_pretrained(labeller, use_safetensors=True).eval()
    except OSError as error:
        remedy = "Name a folder, or a model of the hub that this machine can reach."
        raise OSError(f"No classifier of reports '{labeller}', folder or hub id. {remedy}") from error
    if (number := model.config.num_labels) != len(CLASS_NAMES):
        raise ValueError(
            f"labeller must have {len(CLASS_NAMES)} classes, those of CT-RATE, got {number} in '{labeller}'."
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for first in range(0, len(texts), BATCH_SIZE):
        batch = tokenizer(
            list(texts[first : first + BATCH_SIZE]), padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**batch.to(model.device)).logits
        rows.append((logits.double().sigmoid() >= THRESHOLD).double().cpu().numpy())
    return np.concatenate(rows)
