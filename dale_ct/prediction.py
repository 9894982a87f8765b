"""Probabilities of a trained probe for CTs, by the name of the encoder."""

from pathlib import Path
from typing import Any

from dale_ct.encoder import RANDOM, bundle_folder


def predict(
    path: str | Path,
    probe: str | Path,
    output_dir: str | Path,
    encoder: str = "dale_ct_2s",
    *,
    weights: str | None = None,
    series: str | None = None,
    force: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Score CTs with a probe that ``eval_ct_rate`` has trained. For research, not for diagnosis.

    Args:
        path: CTs, as for :func:`dale_ct.embed`.
        probe: output folder of the evaluation bundle.
        output_dir: folder for tables, a page per CT, and the embeddings.
        encoder: encoder that the probe was trained on.
        weights: its weights, as for :func:`dale_ct.embed`.
        series: the one to use of several CTs, as for :func:`dale_ct.embed`.
        force: whether to continue with what does not look like a chest CT.

    Returns:
        For each CT a dictionary per class, with ``class``, ``probability``, ``threshold`` and ``call``.

    Raises:
        FileNotFoundError: if there is no probe or CT, or no weights can be found.
        ValueError: if the probe was made for other embeddings, or no CT can be used.
    """
    from common.engines.predict import predict as run

    knobs: dict[str, Any] = {"encoder_weights": None if weights == RANDOM else weights} if weights else {}
    knobs |= {"series": series} if series else {}
    folder = bundle_folder(encoder)
    return run(folder, probe, path, output_dir, encoder_knobs=knobs, force=force)
