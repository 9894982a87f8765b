"""The robustness card of an encoder: a page, a picture, and a section for a model card."""

import html
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from common.reports.results import Numbers, print_whole
from common.reports.slice_grid import PALETTE
from common.run.process import atomic_file, write_figure

TEMPLATE = Path(__file__).with_name("robustness_card.html")
BLUE, RED = PALETTE[:2]
COLUMNS = 4


class Effect(NamedTuple):
    """What a change of the scan does.

    Args:
        change: its name.
        strength: its strength.
        axis: what the strength is; empty for a change without.
        n: volumes that allow it.
        numbers: ``macro_auroc`` and ``macro_auprc`` after it and their paired ``..._change``;
            ``probability_change``, mean absolute; ``calls_flipped``, share of calls at the thresholds;
            ``token_cosine``, mean over slices of the cosine to the unchanged slice's token.
    """

    change: str
    strength: float
    axis: str
    n: int
    numbers: Numbers


class Card(NamedTuple):
    """What the card shows.

    Args:
        encoder: its name.
        dataset: name of the data.
        unchanged: macro metrics of the unchanged scans.
        floor: those of one score for all volumes.
        effects: in the order to show, strengths of a change together.
        left_out: changes without an effect, and why.
        facts: lines about volumes, weights and probe.
        note: sentence to be read first; empty for none.
    """

    encoder: str
    dataset: str
    unchanged: Numbers
    floor: Numbers
    effects: Sequence[Effect]
    left_out: Sequence[str]
    facts: Sequence[str]
    note: str


def write_card(folder: Path, card: Card) -> None:
    """Write ``robustness.html``, ``robustness.png`` and ``robustness.md``; text is shown as text.

    Raises:
        ValueError: if there is no effect to show.
    """
    if not card.effects:
        raise ValueError("No change could be measured: at least two patients must allow it.")
    draw_effects(folder / "robustness.png", card)
    page = TEMPLATE.read_text(encoding="utf-8")
    for place, text in (
        ("TITLE", html.escape(f"Robustness of {card.encoder}")),
        ("NOTE", f'<p class="note">{html.escape(card.note)}</p>' if card.note else ""),
        ("FACTS", "".join(f"<li>{html.escape(fact)}</li>" for fact in (card.dataset, *card.facts))),
        ("BEFORE", "".join(_cells([name, *cells], ("", "AUROC", "AUPRC")) for name, cells in _before(card))),
        ("CARDS", "".join(_section(card, change, effects) for change, effects in _by_change(card))),
        ("LEFT_OUT", html.escape("; ".join(card.left_out) or "none")),
    ):
        page = page.replace(f"@@{place}@@", text)
    section = _markdown(card)
    for name, text in (("robustness.html", page), ("robustness.md", section)):
        with atomic_file(folder / name, "w", encoding="utf-8") as file:
            file.write(text)


def draw_effects(path: Path, card: Card) -> None:
    """Draw a panel per change: paired changes of macro AUROC and AUPRC, with intervals, against strength."""
    groups = _by_change(card)
    panels = [(change, effects) for change, effects in groups if effects[0].axis]
    alone = [effect for _, effects in groups for effect in effects if not effect.axis]
    if alone:
        panels.append(("as a whole", alone))
    rows, columns = math.ceil(len(panels) / COLUMNS), min(COLUMNS, len(panels))
    figure = Figure(figsize=(0.8 + 3.2 * columns, 1.3 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, (change, effects) in zip(grid, panels, strict=False):
        _draw_panel(axes, change, effects)
    ends = np.array(
        [effect.numbers[f"macro_{m}_change"] for effect in card.effects for m in ("auroc", "auprc")]
    )
    low, high = min(-0.01, np.nanmin(ends, initial=0)), max(0.01, np.nanmax(ends, initial=0))
    grid[0].set_ylim(1.1 * low, 1.1 * high)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.supylabel("paired change, 95 % interval", fontsize=9)
    before = ", ".join(f"macro {m.upper()} {card.unchanged[f'macro_{m}'][0]:.3f}" for m in ("auroc", "auprc"))
    figure.suptitle(f"{card.encoder} on {card.dataset}: unchanged {before}", fontsize=11)
    write_figure(path, figure)


def _draw_panel(axes: Axes, change: str, effects: Sequence[Effect]) -> None:
    places = np.arange(len(effects))
    axes.axhline(0, color="0.5", linewidth=0.8)
    for metric, colour, shift in (("auroc", BLUE, -0.08), ("auprc", RED, 0.08)):
        beside = places + shift * len(effects) / 4
        value, low, high = np.array([effect.numbers[f"macro_{metric}_change"] for effect in effects]).T
        line = "o-" if effects[0].axis else "o"
        axes.plot(beside, value, line, color=colour, markersize=4, linewidth=1.2, label=metric.upper())
        axes.vlines(beside, low, high, color=colour, linewidth=1)
    flips = [f"{100 * effect.numbers['calls_flipped'][0]:.0f} %" for effect in effects]
    names = [f"{e.strength:g}" if e.axis else e.change.replace("_", "\n") for e in effects]
    axes.set_xticks(
        places, [f"{name}\n({flip})" for name, flip in zip(names, flips, strict=True)], fontsize=7
    )
    axes.set_xlim(-0.5, len(effects) - 0.5)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(titled(change), fontsize=9)
    axes.set_xlabel(f"{effects[0].axis} (calls flipped)".strip(), fontsize=8)


def _by_change(card: Card) -> list[tuple[str, list[Effect]]]:
    return [
        (change, list(effects)) for change, effects in groupby(card.effects, lambda effect: effect.change)
    ]


def _number(ends: tuple[float, float, float], form: str = ".3f") -> str:
    value, low, high = ends
    if math.isnan(value):
        return "undefined"
    return f"{value:{form}}" + ("" if math.isnan(low) else f" ({low:{form}} to {high:{form}})")


def _before(card: Card) -> list[tuple[str, list[str]]]:
    """Rows of the unchanged scans and of the floor."""
    rows = (("unchanged", card.unchanged), ("floor: prevalence for all", card.floor))
    return [(name, [_number(of[f"macro_{m}"]) for m in ("auroc", "auprc")]) for name, of in rows]


def _row(effect: Effect) -> list[str]:
    numbers = effect.numbers
    return [
        *(_number(numbers[f"macro_{metric}_change"], "+.3f") for metric in ("auroc", "auprc")),
        _number(numbers["probability_change"]),
        f"{100 * numbers['calls_flipped'][0]:.1f} %",
        _number(numbers["token_cosine"], ".4f"),
    ]


def _cells(texts: Sequence[str], heads: Sequence[str]) -> str:
    """A row of a table; on a narrow screen each cell has its head beside it."""
    pairs = zip(map(html.escape, texts), map(html.escape, heads), strict=True)
    return "<tr>" + "".join(f'<td data-name="{head}">{text}</td>' for text, head in pairs) + "</tr>"


HEADS = ("AUROC, change", "AUPRC, change", "probability, mean change", "calls flipped", "token cosine")


def _section(card: Card, change: str, effects: Sequence[Effect]) -> str:
    """One change: its curve and its table."""
    named_strength = [effects[0].axis] if effects[0].axis else []
    heads = [*named_strength, *HEADS]
    table = "<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"
    for effect in effects:
        texts = [f"{effect.strength:g}" for _ in named_strength] + _row(effect)
        table += _cells(texts, heads)
    fewer = {effect.n for effect in effects}
    name = html.escape(titled(change))
    counts = " to ".join(str(n) for n in sorted({min(fewer), max(fewer)}))
    return (
        f'<section><h2>{name} <span class="soft">{counts} volumes</span></h2>{_svg(card, effects)}'
        f"<table>{table}</table></section>"
    )


def _svg(card: Card, effects: Sequence[Effect]) -> str:
    """Paired changes with intervals as a small picture in the page's colours, one scale for all."""
    ends = np.array([e.numbers[f"macro_{m}_change"] for e in card.effects for m in ("auroc", "auprc")])
    low, high = min(-0.01, np.nanmin(ends, initial=0)), max(0.01, np.nanmax(ends, initial=0))
    width, height = 300.0, 110.0

    def y(value: float) -> float:
        return float(8 + (high - value) / (high - low) * (height - 26))

    parts = [f'<line class="zero" x1="0" x2="{width:g}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>']
    parts += [f'<text x="{width + 22:g}" y="{y(end) + 4:.1f}">{end:+.2f}</text>' for end in (high, low)]
    for place, effect in enumerate(effects):
        x = (place + 0.5) / len(effects) * width
        parts.append(
            f'<text x="{x:.1f}" y="{height - 3:g}">{effect.strength:g}</text>' if effect.axis else ""
        )
        for metric, shift in (("auroc", -5), ("auprc", 5)):
            value, *interval = effect.numbers[f"macro_{metric}_change"]
            if math.isnan(value):
                continue
            bottom, top = (y(value if math.isnan(end) else end) for end in interval)
            parts.append(
                f'<line class="{metric}" x1="{x + shift:.1f}" x2="{x + shift:.1f}" y1="{bottom:.1f}" '
                f'y2="{top:.1f}"/><circle class="{metric}" cx="{x + shift:.1f}" cy="{y(value):.1f}" r="4"/>'
            )
    described = html.escape(f"{effects[0].change}: paired changes of macro AUROC and AUPRC")
    shape = f"0 0 {width + 45:g} {height:g}"
    return f'<svg viewBox="{shape}" role="img" aria-label="{described}">{"".join(parts)}</svg>'


def _markdown(card: Card) -> str:
    """A section for a model card."""
    before = [f"| {name} | " + " | ".join(cells) + " | | | |" for name, cells in _before(card)]
    lines = [
        f"## Robustness on {card.dataset}",
        "",
        f"{'; '.join(card.facts)}.",
        "Each scan as it is and changed: macro AUROC and AUPRC of one frozen probe, as paired changes with",
        "95 % bootstrap intervals. `bundles/eval_robustness` says what the changes are.",
        "For research, not for diagnosis.",
        "",
        "| change | " + " | ".join(HEADS) + " |",
        "|---|" + "---|" * len(HEADS),
        *before,
        *(f"| {named(effect)} | " + " | ".join(_row(effect)) + " |" for effect in card.effects),
    ]
    if card.left_out:
        lines += ["", f"Not measured: {'; '.join(card.left_out)}."]
    return "\n".join([*lines, ""])


def named(effect: Effect) -> str:
    """Say a change with its strength in words."""
    name = titled(effect.change)
    return f"{name}, {effect.axis} = {effect.strength:g}" if effect.axis else name


def titled(change: str) -> str:
    """Write a change's name for readers."""
    return change.replace("_", " ").replace("hu ", "HU ")


def print_card(card: Card) -> None:
    """Print a row for the unchanged scans, the floor and each effect."""
    table = Table(title=f"{card.encoder} on {card.dataset}", box=box.SIMPLE)
    for head in ("change", *HEADS):
        table.add_column(head, no_wrap=True)
    for name, cells in (*_before(card), *((named(effect), _row(effect)) for effect in card.effects)):
        table.add_row(name, *cells)
    print_whole(table)
