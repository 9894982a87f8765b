"""What the commands show: progress, the table at the end, volumes that were left out."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from common.run.config import USER_ERRORS
from common.run.process import on_stop, raise_stopped
from data_prep.cluster import ShowProgress

console = Console(stderr=True)


class RateColumn(ProgressColumn):
    """Items per minute."""

    def render(self, task: Task) -> Text:
        """Return the rate, once there is one."""
        return Text("" if task.speed is None else f"{60 * task.speed:,.0f}/min")


@contextmanager
def progress_bars() -> Iterator[ShowProgress]:
    """Show a bar for each stage of the work, with its rate and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, speed_estimate_period=120) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                # what an earlier run did does not count for this run's rate
                tasks[stage] = bars.add_task(stage, total=total, completed=done)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def show_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a table of names and numbers."""
    table = Table(title=escape(title), show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def check_rejected(num_rejected: int, share: float, max_share: float) -> None:
    """Exit with status 1 if more than a share of the volumes was rejected."""
    if share > max_share:
        console.print(
            f"{share:.2%} of the volumes ({num_rejected}) were rejected, but only {max_share:.2%} may be. "
            "Fix them, or raise --max-rejected.",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def left_out(volume: str, detail: str) -> None:
    """Say in one line why something was left out."""
    console.print(f"[red]Left out:[/red] '{escape(volume)}': {escape(detail)}", soft_wrap=True)


def run_app(app: typer.Typer) -> None:
    """Run a command line; wrong input or a stop ends in one line instead of a traceback."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    logging.getLogger("numexpr").setLevel(logging.WARNING)  # counts the cores when blosc2 is imported
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        raise_stopped(number)

    on_stop(stop)
    try:
        app()
    except (*USER_ERRORS, ImportError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        console.print(f"[red]Error:[/red] {escape(str(text))}", soft_wrap=True)
        sys.exit(2)
    except SystemExit:
        if not signals:
            raise
        console.print("Stopped. Run the same command again to resume.")
        sys.exit(128 + signals[0])
