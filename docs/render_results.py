"""Print Tables III, IV and VI as Markdown: our results, and the paper's figures beside them.

``python -m docs.render_results results/*.csv`` prints every row of the results. With ``--paper`` the paper's
figures stand beside them: for data at full scale, never for synthetic data.
"""

import csv
import math
import re
from pathlib import Path
from typing import Annotated

import typer

from common.reports.results import MACRO_COLUMNS, ResultRow, read_rows
from common.run.config import short_errors

PAPER = Path(__file__).with_name("paper_results.csv")
TITLES = {
    "III": "Table III: CT-RATE",
    "IV": "Table IV: RAD-ChestCT",
    "VI": "Table VI: preprocessing",
}
COST = {"slices_per_second": "slices/s", "tokens_per_slice": "tokens per slice"}

Values = dict[tuple[str, str], dict[str, ResultRow]]
"""Encoder and protocol to metric to row."""


def table_of(row: ResultRow) -> str | None:
    """Name the table that a result belongs to; None if there is none."""
    if row.protocol.startswith("preprocessing_"):
        return "VI"
    if row.dataset == "rad_chestct":
        return "IV"
    if row.dataset == "ct_rate" and row.protocol != "retrieval":
        return "III"
    return None


def cell(numbers: tuple[float, float, float] | None, signed: bool = False) -> str:
    """Write a value as the paper does, without the leading zero, with its interval where it has one.

    Args:
        numbers: value, low and high; None, or nan as the value, gives an empty cell.
        signed: whether it is a difference.
    """
    texts = [_number(number, signed) for number in numbers or () if not math.isnan(number)]
    return "".join(texts) if len(texts) < 3 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _number(number: float, signed: bool) -> str:
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{number:{'+' if signed else ''}.3f}")


def markdown(rows: list[ResultRow], with_paper: bool) -> str:
    """Lay out all tables.

    Args:
        rows: rows of results CSVs; of two with the same key the later one counts.
        with_paper: whether the paper's figures are shown beside ours.
    """
    values: dict[str, Values] = {}
    for row in rows:
        table = table_of(row)
        if table is not None:
            of_line = values.setdefault(table, {}).setdefault((row.encoder, row.protocol), {})
            of_line[row.metric] = row
    lines = []
    for table, title in TITLES.items():
        if table in values:
            lines += [f"### {title}", "", *_lines(values[table], table, with_paper), ""]
    return "\n".join(lines)


def _lines(values: Values, table: str, with_paper: bool) -> list[str]:
    with PAPER.open(newline="", encoding="utf-8") as file:
        paper = {
            (row["encoder"], row["protocol"]): row for row in csv.DictReader(file) if row["table"] == table
        }
    cost = COST if table == "VI" else {}
    heads = ["encoder", "protocol", *MACRO_COLUMNS.values(), "volumes", *cost.values()]
    heads += ["paper: AUROC / AUPRC / F1 / BA"] if with_paper else []
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (encoder, protocol), own in values.items():
        if not MACRO_COLUMNS.keys() & own.keys():
            continue
        counted = next(own[metric].n for metric in MACRO_COLUMNS if metric in own)
        found = (own[metric].numbers if metric in own else None for metric in MACRO_COLUMNS)
        cells = [
            f"`{encoder}`",
            protocol,
            *(cell(numbers, "-" in protocol) for numbers in found),
            str(counted),
        ]
        cells += [f"{own[metric].value:.0f}" if metric in own else "" for metric in cost]
        if with_paper:
            theirs = paper.get((encoder, protocol))
            names = ("auroc", "auprc", "f1", "balanced_accuracy")
            cells.append(" / ".join(theirs[name] for name in names) if theirs else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(
    results: Annotated[list[Path], typer.Argument(help="results CSVs, such as results/*.csv")],
    paper: Annotated[bool, typer.Option("--paper", help="Put the paper's figures beside ours.")] = False,
) -> None:
    """Print Tables III, IV and VI as Markdown."""
    short_errors()
    rows = [row for path in results for row in read_rows(path)]
    typer.echo(markdown(rows, paper), nl=False)


if __name__ == "__main__":
    typer.run(main)
