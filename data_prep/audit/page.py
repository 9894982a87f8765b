"""Pieces of an HTML page that needs nothing but itself: no scripts, no fonts, nothing loaded from elsewhere.

Text is escaped here. What is passed as ``html`` was made by these functions.
"""

from collections.abc import Sequence
from html import escape

STYLE = """
:root { --ok: #1a7f4b; --warn: #b26a00; --bad: #b3261e; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f5f8; color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 2040px; margin: 0 auto; padding: 20px 24px 60px; }
h1 { margin: 0; font-size: 25px; }
h2 { margin: 34px 0 10px; font-size: 19px; }
h3 { margin: 0; font-size: 16px; overflow-wrap: anywhere; }
p { margin: 4px 0; }
.soft { color: var(--soft); }
.verdict { padding: 18px 22px; border-radius: 10px; color: #fff; }
.verdict.ok { background: var(--ok); } .verdict.warn { background: var(--warn); }
.verdict.bad { background: var(--bad); }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 14px; }
.number-card { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; }
.number-card b { display: block; font-size: 21px; }
table { width: 100%; border-collapse: collapse; background: #fff; border: 1px solid var(--line); }
th, td { padding: 6px 12px; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: #eef1f5; font-weight: 600; border-top: 0; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.light { display: inline-block; min-width: 112px; padding: 1px 10px; border-radius: 11px; color: #fff;
  font-size: 13px; text-align: center; white-space: nowrap; }
.light.ok { background: var(--ok); } .light.warn { background: var(--warn); }
.light.bad { background: var(--bad); } .light.none { background: #8b95a3; }
summary { cursor: pointer; color: var(--soft); margin: 6px 0; }
.sheet { margin: 0 0 16px; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 12px; }
.sheet label { display: block; margin-top: 8px; overflow-x: auto; cursor: zoom-in; }
.sheet img { display: block; width: 100%; background: #000; }
.sheet input { display: none; } .sheet input:checked + img { width: 200%; cursor: zoom-out; }
.sheet ul { margin: 4px 0; padding-left: 20px; }
.why { color: var(--warn); font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 6px 0 12px; }
.legend i { display: inline-block; width: 14px; height: 14px; margin-right: 6px; vertical-align: -2px; }
.charts { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; margin-bottom: 14px; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 4px; }
.chart { width: 324px; } .chart svg { width: 100%; } .chart text { font-size: 11px; fill: #5b6675; }
.chart .bar { fill: #3d6fb4; } .chart .out { fill: #d98a1f; } .chart line { stroke: #8b95a3; }
.shares { width: 480px; }
.shares > div { display: grid; grid-template-columns: 220px 1fr 46px; gap: 2px 8px; font-size: 13px; }
.shares .track { background: #eef1f5; align-self: center; height: 11px; }
.shares .track div { background: #3d6fb4; height: 11px; }
.shares .number { text-align: right; }
@media print { body { background: #fff; } .sheet { break-inside: avoid; } }
"""


def page(title: str, html: str) -> str:
    """Return a whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{html}</main></body></html>\n"
    )


def section(title: str, html: str) -> str:
    """Return a section with its heading; nothing where there is nothing in it."""
    return f"<section><h2>{escape(title)}</h2>{html}</section>" if html else ""


def light(state: str, text: str) -> str:
    """Return a traffic light that also says in words what it means.

    Args:
        state: ``ok``, ``warn``, ``bad`` or ``none``.
        text: the words.
    """
    return f'<span class="light {state}">{escape(text)}</span>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table.

    Args:
        heads: of the columns.
        rows: cells of HTML.
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def listing(items: Sequence[str], more: int = 0) -> str:
    """Return a list of texts, and how many there are besides.

    Example:
        >>> listing(["<b>"], more=2)
        '<ul><li>&lt;b&gt;</li><li>and 2 more</li></ul>'
    """
    rest = [f"and {more:,} more"] if more else []
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in [*items, *rest])}</ul>" if items else ""
