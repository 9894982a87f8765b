"""What the commands show while they work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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
from rich.text import Text

console = Console(stderr=True)

ShowProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class RateColumn(ProgressColumn):
    """Items a minute."""

    def render(self, task: Task) -> Text:
        """Return the rate, once there is one."""
        return Text("" if task.speed is None else f"{60 * task.speed:,.0f}/min")


@contextmanager
def progress_bars() -> Iterator[ShowProgress]:
    """Show a bar for each stage of the work, with its rate and the time it still takes."""
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
                # what an earlier run did is not of this run's rate
                tasks[stage] = bars.add_task(stage, total=total, completed=done)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
