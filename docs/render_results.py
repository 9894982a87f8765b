"""Print Tables III, IV and VI as Markdown: our results, and the paper's figures beside them.

``python -m docs.render_results results/*.csv`` prints every row that the results hold. With ``--paper``, the
paper's figures stand beside: for data at full scale, never for synthetic data.
"""

import csv
import re
from pathlib import Path
from typing import Annotated

import typer

from common.handlers.results_table import COLUMNS, read_rows
from common.run.short_errors import short_errors

PAPER = Path(__file__).with_name("paper_results.csv")
TITLES = {
    "III": "Table III: CT-RATE",
    "IV": "Table IV: RAD-ChestCT",
    "VI": "Table VI: preprocessing",
}
COST = {"slices_per_second": "slices/s", "tokens_per_slice": "tokens a slice"}

Values = dict[tuple[str, str], dict[str, dict[str, str]]]


def table_of(row: dict[str, str]) -> str | None:
    """Say in which table a result stands; None for one that stands in none."""
    if row["protocol"].startswith("preprocessing_"):
        return "VI"
    if row["dataset"] == "rad_chestct":
        return "IV"
    if row["dataset"] == "ct_rate" and row["protocol"] != "retrieval":
        return "III"
    return None


def cell(row: dict[str, str] | None, signed: bool = False) -> str:
    """Write a value as the paper does, without the leading zero, with its interval where it has one.

    Args:
        row: of a results CSV; None, or one without a value, gives an empty cell.
        signed: whether it is a difference.
    """
    texts = [row[name] for name in ("value", "low", "high")] if row else []
    numbers = [_number(text, signed) for text in texts if text not in ("", "nan")]
    return "".join(numbers) if len(numbers) < 3 else f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def _number(text: str, signed: bool) -> str:
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{float(text):{'+' if signed else ''}.3f}")


def markdown(rows: list[dict[str, str]], with_paper: bool) -> str:
    """Lay out all tables.

    Args:
        rows: of results CSVs; of two rows with the same key the later counts.
        with_paper: whether the paper's figures are to stand beside ours.
    """
    values: dict[str, Values] = {}
    for row in rows:
        table = table_of(row)
        if table is not None:
            of_line = values.setdefault(table, {}).setdefault((row["encoder"], row["protocol"]), {})
            of_line[row["metric"]] = row
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
    heads = ["encoder", "protocol", *COLUMNS.values(), "volumes", *cost.values()]
    heads += ["paper: AUROC / AUPRC / F1 / BA"] if with_paper else []
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (encoder, protocol), own in values.items():
        if not COLUMNS.keys() & own.keys():
            continue
        counted = next(own[metric]["n"] for metric in COLUMNS if metric in own)
        cells = [
            f"`{encoder}`",
            protocol,
            *(cell(own.get(metric), "-" in protocol) for metric in COLUMNS),
            counted,
        ]
        cells += [f"{float(own[metric]['value']):.0f}" if metric in own else "" for metric in cost]
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
