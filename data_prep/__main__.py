"""Command line: ``python -m data_prep --help``. A command's modules are imported only when it runs."""

import ast
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup

from data_prep.commands.console import run_app


class Command(NamedTuple):
    """Where a command is, and how it is called.

    Args:
        module: module of ``data_prep.commands`` with the command's function.
        example: words after its name.
    """

    module: str
    example: str


COMMANDS = {
    "audit": Command("audit", "/data/shards --split train --sample 0.1 --report audit.html"),
    "ct-rate": Command(
        "prepare",
        "--root /data/CT-RATE --split train --out /data/shards "
        "--rexgroundingct /data/ReX/dataset.json --rexgroundingct-masks /data/ReX/segmentations",
    ),
    "dense-labels": Command(
        "dense",
        "--root /data/CT-RATE --rexgroundingct /data/ReX/dataset.json "
        "--rexgroundingct-masks /data/ReX/segmentations --out /data/dense_labels",
    ),
    "dense-overlay": Command("dense", "ct.nii.gz label_map.nii.gz --out overlay.png"),
    "dicom": Command("prepare", "/data/export --out /data/shards --masks label_maps/"),
    "download": Command(
        "download", "ct-rate --out /data/CT-RATE --split train --patients 1:100 --label-maps"
    ),
    "hu-stats": Command(
        "statistics", "/data/shards --split train --volumes 1000 --out hu.json --picture hu.png"
    ),
    "lesion-areas": Command("phantom", "--root /tmp/phantom --split train --out /tmp/lesion_areas/train"),
    "nifti": Command("prepare", "scans/ --out shards/ --masks label_maps/"),
    "phantom": Command("phantom", "--volumes 20 --out /tmp/phantom"),
    "pos-weights": Command("statistics", "/data/shards --split train --out weights/"),
    "rad-chestct": Command("prepare", "--root /data/RAD-ChestCT --split train --out /data/shards"),
    "rad-labels": Command("lists", "--root /data/RAD-ChestCT --out /data/RAD-ChestCT/rad_chestct_labels.csv"),
    "splits": Command("lists", "--labels train_predicted_labels.csv --out splits.csv"),
    "subset": Command("lists", "--labels train_predicted_labels.csv --patients 5000 --out subset.csv"),
    "totalsegment": Command("totalsegment", "scans/ --out label_maps/ --device gpu"),
    "turned": Command(
        "turned", "--root /data/RAD-ChestCT --prefix tst --turn transposed --out /data/transposed"
    ),
}


class LazyGroup(TyperGroup):
    """Lists the commands for ``--help`` without importing any of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:  # noqa: ANN401 (Click's)
        """Find the command to run and import it."""
        name, stub, rest = super().resolve_command(ctx, args)
        return name, stub and _imported(str(stub.name)), rest


def _imported(name: str) -> Any:  # noqa: ANN401 (Click's)
    module = importlib.import_module(f"data_prep.commands.{COMMANDS[name].module}")
    alone = typer.Typer(add_completion=False)
    alone.command(epilog=f"Example: python -m data_prep {name} {COMMANDS[name].example}")(
        getattr(module, name.replace("-", "_"))
    )
    return typer.main.get_command(alone)


def _first_line(name: str) -> str:
    """What a command does, from the docstring of its function."""
    code = Path(__file__).with_name("commands") / f"{COMMANDS[name].module}.py"
    parts = ast.parse(code.read_text(encoding="utf-8")).body
    functions = {part.name: part for part in parts if isinstance(part, ast.FunctionDef)}
    return str(ast.get_docstring(functions[name.replace("-", "_")])).splitlines()[0]


app = typer.Typer(
    help="Prepare chest CT datasets for pre-training.",
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command(command, help=_first_line(command))(lambda: None)


if __name__ == "__main__":
    run_app(app)
