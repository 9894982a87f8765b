"""Reports of CTs in words, from a CT to a text and the slices that the model looked at."""

# S tokens of a volume that is not blank: its slices, or cells of its grid

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.cohort.cohort import write_table
from common.engines.chest_cts import EmbeddedCTs, embed_chest_cts
from common.reports.slice_grid import Row, slice_grid
from common.run.process import atomic_file, write_figure
from common.writing.model import ReportModel, open_report_model, read_card

RESEARCH = "For research, not for diagnosis and not for reporting: the text is fluent where it is wrong."
NUM_SLICES = 6
"""Slices of a picture; our choice."""


class Report(NamedTuple):
    """What was written of a volume.

    Args:
        text: the report.
        ended: whether it ended by itself, before the longest length.
        slices: numbers of the slices with the most attention, from 0, the most first; none for a grid.
        shares: their shares of the bridge's attention.
    """

    text: str
    ended: bool
    slices: list[int]
    shares: list[float]


def write_reports(
    encoder_bundle: str | Path | None,
    report_dir: str | Path | None,
    dataset_dir: str | Path,
    output_dir: str | Path,
    *,
    encoder_configs: Sequence[str] = (),
    encoder_knobs: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    num_pictures: int = 10,
    force: bool = False,
) -> dict[str, Report]:
    """Embed CTs and let a trained model write about them; write, print and return the texts.

    ``reports.csv`` has a row per volume, ``reports.json`` the same, ``<volume>.png`` the slices that the
    bridge attended to most, in its last layer. Embeddings stay in ``output_dir/embeddings``.

    Args:
        encoder_bundle: folder of the encoder that the model was trained on.
        report_dir: output folder of the model's training.
        dataset_dir: CTs, as for :func:`common.engines.predict.predict`.
        output_dir: folder to write.
        encoder_configs: as for ``predict``.
        encoder_knobs: as for ``predict``.
        device: where the language model runs.
        num_pictures: volumes that get a picture, the first by name.
        force: as for ``predict``.

    Raises:
        FileNotFoundError: if the bundle, the model or a CT does not exist.
        ValueError: if the model was trained on other embeddings, or no CT is left.
    """
    if encoder_bundle is None or report_dir is None:
        raise ValueError("Pass --encoder_bundle and --report_dir, the folders of encoder and report model.")
    output, card = Path(output_dir), read_card(report_dir)
    how: dict[str, Any] = {"encoder_configs": encoder_configs, "encoder_knobs": encoder_knobs}
    embedded = embed_chest_cts(
        encoder_bundle, dataset_dir, output, **how, force=force, card=card["embeddings"]
    )
    network = open_report_model(report_dir, embedded.store.identity).to(device)
    written = {
        source.volume: _write(network, embedded, source.volume, card["max_words"]) for source in embedded.used
    }
    rows = [{"volume": volume, **report._asdict()} for volume, report in written.items()]
    with atomic_file(output / "reports.json", "w", encoding="utf-8") as file:
        file.write(json.dumps({"note": RESEARCH, "reports": rows}, indent=2) + "\n")
    write_table(
        output / "reports.csv", [{name: row[name] for name in ("volume", "text", "ended")} for row in rows]
    )
    for source in embedded.used[:num_pictures]:
        report = written[source.volume]
        if report.slices:
            order = np.argsort(report.slices)  # feet to head
            titles = [f"slice {report.slices[i] + 1}, {report.shares[i]:.0%}" for i in order]
            row = Row(source.read().hu[np.array(report.slices)[order]], titles)
            title = f"{source.volume}: {report.text} {RESEARCH}"
            write_figure(output / f"{source.volume}.png", slice_grid([row], title)[0])
    sys.stdout.write(_summary(written, embedded, output))
    return written


@torch.no_grad()
def _write(network: ReportModel, embedded: EmbeddedCTs, volume: str, max_words: int) -> Report:
    """Write about one volume, and find the slices that the bridge attended to."""
    tokens = embedded.tokens(volume).to(network.bridge.queries.device)
    (found,) = network.write([tokens], max_words)
    has_image = np.flatnonzero(embedded.cts[volume].has_image)
    if embedded.store.identity["token_kind"] != "slice" or len(has_image) != len(tokens):
        return Report(found.text, found.ended, [], [])
    weights = network.bridge.token_weights(tokens).cpu().numpy()
    most = np.argsort(-weights, kind="stable")[:NUM_SLICES]
    return Report(found.text, found.ended, has_image[most].tolist(), weights[most].tolist())


def _summary(written: Mapping[str, Report], embedded: EmbeddedCTs, output: Path) -> str:
    lines = []
    for volume, report in written.items():
        lines += ["", volume, *textwrap.wrap(report.text, 100, initial_indent="  ", subsequent_indent="  ")]
        lines += [] if report.ended else ["  (cut: the text did not end)"]
        if report.slices:
            lines.append(f"  Slices attended to most: {', '.join(str(z + 1) for z in report.slices)}.")
    return "\n".join([*lines, *embedded.remarks(output), "", embedded.origin, RESEARCH, ""])
