"""Command line: ``python -m data_prep --help``. A command's modules are imported when it is run."""

import ast
import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import typer
from rich.logging import RichHandler
from rich.markup import escape
from typer.core import TyperGroup

from common.run.process import on_stop, raise_stopped
from data_prep.commands.console import console

EXAMPLES: dict[str, str] = {
    "audit": "audit /data/shards --split train --sample 0.1 --report audit.html",
    "ct_rate": "ct-rate --root /data/CT-RATE --split train --out /data/shards "
    "--rexgroundingct /data/ReX/dataset.json --rexgroundingct-masks /data/ReX/segmentations",
    "dense_labels": "dense-labels --root /data/CT-RATE --rexgroundingct /data/ReX/dataset.json "
    "--rexgroundingct-masks /data/ReX/segmentations --out /data/dense_labels",
    "dense_overlay": "dense-overlay ct.nii.gz label_map.nii.gz --out overlay.png",
    "dicom": "dicom /data/export --out /data/shards --masks label_maps/",
    "download": "download ct-rate --out /data/CT-RATE --split train --patients 1:100 --label-maps",
    "hu_stats": "hu-stats /data/shards --split train --volumes 1000 --out hu.json --picture hu.png",
    "nifti": "nifti scans/ --out shards/ --masks label_maps/",
    "phantom": "phantom --volumes 20 --out /tmp/phantom",
    "pos_weights": "pos-weights /data/shards --split train --out weights/",
    "rad_chestct": "rad-chestct --root /data/RAD-ChestCT --split train --out /data/shards",
    "rad_labels": "rad-labels --root /data/RAD-ChestCT --out /data/RAD-ChestCT/rad_chestct_labels.csv",
    "splits": "splits --labels train_predicted_labels.csv --out splits.csv",
    "subset": "subset --labels train_predicted_labels.csv --patients 5000 --out subset.csv",
    "totalsegment": "totalsegment scans/ --out label_maps/ --device gpu",
    "turned": "turned --root /data/RAD-ChestCT --prefix tst --turn transposed --out /data/transposed",
}


class LazyGroup(TyperGroup):
    """Commands of which ``--help`` knows the names and what they do without importing any."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:  # noqa: ANN401 (Click's)
        """Find the command to run and import it."""
        name, stub, rest = super().resolve_command(ctx, args)
        return name, stub and _imported(str(stub.name).replace("-", "_")), rest


def _imported(name: str) -> Any:  # noqa: ANN401 (Click's)
    module = importlib.import_module(f"data_prep.commands.{name}")
    alone = typer.Typer(add_completion=False)
    alone.command(epilog=f"Example: python -m data_prep {EXAMPLES[name]}")(getattr(module, name))
    return typer.main.get_command(alone)


def _first_line(name: str) -> str:
    """What a command does, from the docstring of its function."""
    code = Path(__file__).with_name("commands") / f"{name}.py"
    parts = ast.parse(code.read_text(encoding="utf-8")).body
    functions = {part.name: part for part in parts if isinstance(part, ast.FunctionDef)}
    return str(ast.get_docstring(functions[name])).splitlines()[0]


app = typer.Typer(
    help="Prepare chest CT datasets for pre-training.",
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in EXAMPLES:
    app.command(command.replace("_", "-"), help=_first_line(command))(lambda: None)


def main() -> None:
    """Run the command line; a mistake in its input or a stop ends in one line rather than in a traceback."""
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
    except (ValueError, OSError) as error:
        console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except SystemExit:
        if not signals:
            raise
        console.print("Stopped. Run the same command again to go on.")
        sys.exit(128 + signals[0])


if __name__ == "__main__":
    main()
