"""Print Tables III, IV and VI as Markdown: our results, and the paper's figures beside them.

``python -m docs.render_results results/*.csv`` prints every row of the results. With ``--paper`` the paper's
figures stand beside them: for data at full scale, never for synthetic data.
"""

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from common.cohort.cohort import table_rows
from common.metrics.multilabel import METRICS
from common.reports.results import MACRO_COLUMNS, ResultRow, read_rows
from common.run.config import short_errors

PAPER = Path(__file__).with_name("paper_results.csv")
TITLES = {
    "III": "Table III: CT-RATE",
    "IV": "Table IV: RAD-ChestCT",
    "VI": "Table VI: preprocessing",
}
COST = {"slices_per_second": "slices/s", "tokens_per_slice": "tokens per slice"}

Lines = dict[tuple[str, str], dict[str, ResultRow]]
"""Encoder and protocol to metric to row."""


def table_of(row: ResultRow) -> str | None:
    """Name the table that a result belongs to; None if there is none."""
    if row.protocol.startswith("preprocessing_"):
        return "VI"
    if row.dataset == "rad_chestct":
        return "IV"
    return "III" if row.dataset == "ct_rate" and row.protocol != "retrieval" else None


def cell(numbers: tuple[float, float, float] | None, signed: bool = False) -> str:
    """Write a value as the paper does, without the leading zero, with its interval where it has one.

    Args:
        numbers: value, low and high; None, or nan as the value, gives an empty cell.
        signed: whether it is a difference.
    """
    shown = [f"{number:{'+' if signed else ''}.3f}" for number in numbers or () if not math.isnan(number)]
    texts = [re.sub(r"^([+-]?)0\.", r"\1.", text) for text in shown]
    return "".join(texts) if len(texts) < 3 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def markdown(rows: list[ResultRow], with_paper: bool) -> str:
    """Lay out all tables; of two rows with the same key the later one counts."""
    tables: dict[str | None, Lines] = {}
    for row in rows:
        of_line = tables.setdefault(table_of(row), {}).setdefault((row.encoder, row.protocol), {})
        of_line[row.metric] = row
    shown = [table for table in TITLES if table in tables]
    lines = [[f"### {TITLES[name]}", "", *_lines(tables[name], name, with_paper), ""] for name in shown]
    return "\n".join(line for table in lines for line in table)


def _lines(values: Lines, table: str, with_paper: bool) -> list[str]:
    paper = {}
    if with_paper:
        columns = ("table", "encoder", "protocol", *METRICS)
        of_table = [row for row in table_rows(PAPER, "paper", columns) if row["table"] == table]
        paper = {(row["encoder"], row["protocol"]): row for row in of_table}
    cost = COST if table == "VI" else {}
    heads = ["encoder", "protocol", *MACRO_COLUMNS.values(), "volumes", *cost.values()]
    heads += ["paper: AUROC / AUPRC / F1 / BA"] if with_paper else []
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (encoder, protocol), ours in values.items():
        counts = [ours[metric].n for metric in MACRO_COLUMNS if metric in ours]
        if not counts:
            continue
        found = (ours[metric].numbers if metric in ours else None for metric in MACRO_COLUMNS)
        cells = [f"`{encoder}`", protocol, *(cell(each, "-" in protocol) for each in found), str(counts[0])]
        cells += [f"{ours[metric].value:.0f}" if metric in ours else "" for metric in cost]
        if with_paper:
            theirs = paper.get((encoder, protocol))
            cells.append(" / ".join(theirs[name] for name in METRICS) if theirs else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(
    results: Annotated[list[Path], typer.Argument(help="Results CSVs, such as results/*.csv.")],
    paper: Annotated[bool, typer.Option("--paper", help="Put the paper's figures beside ours.")] = False,
) -> None:
    """Print Tables III, IV and VI as Markdown."""
    short_errors()
    typer.echo(markdown([row for path in results for row in read_rows(path)], paper), nl=False)


if __name__ == "__main__":
    typer.run(main)
