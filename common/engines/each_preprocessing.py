"""Table VI in one command: the bundle eval_preprocessing once for each strategy, then one table.

``python -m common.engines.each_preprocessing --help``. Each run is a process of its own, so that the
embeddings of one strategy at a time are in memory. A finished run only writes its results again; a stopped
one resumes.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.reports.results import print_whole, read_rows, results_table
from common.run.config import short_errors
from common.transforms.slice_strategies import STRATEGIES

TABLE_VI = tuple(name for name in STRATEGIES if not name.endswith("_items"))
"""Its seven strategies. Tiles are joined, as in the paper."""


def run_strategy(strategy: str, bundle: Path, folders: dict[str, str], further: list[str]) -> list[str]:
    """Return the command that evaluates one strategy.

    Args:
        strategy: name that replaces ``{}`` in the folders.
        bundle: evaluation bundle.
        folders: knob to folder of embeddings, with ``{}`` for the strategy.
        further: arguments for every run; ``--config_file`` among them replaces the bundle's own.

    Raises:
        ValueError: if a folder has no ``{}``.
        FileNotFoundError: if a folder is not there.
    """
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", str(bundle)]
    if "--config_file" not in further:
        command += ["--config_file", str(bundle / "configs" / "train.json")]
    for knob, pattern in folders.items():
        if "{}" not in pattern:
            raise ValueError(f"{knob} must contain {{}} in place of the strategy, got '{pattern}'.")
        folder = Path(pattern.replace("{}", strategy))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"No embeddings of '{strategy}' in '{folder}' (--{knob}). Embed the volumes with it, or "
                "choose other strategies with --strategy."
            )
        command += [f"--{knob}", str(folder)]
    return [*command, *further]


def main(
    context: typer.Context,
    train_embeddings_dir: Annotated[str, typer.Option(help="Training embeddings, {} for the strategy.")],
    test_embeddings_dir: Annotated[str, typer.Option(help="Test embeddings, {} for the strategy.")],
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategy; may be repeated. [default: the seven of Table VI]")
    ] = None,
    bundle: Annotated[Path, typer.Option(help="Evaluation bundle.")] = Path("bundles/eval_preprocessing"),
    results_csv: Annotated[Path, typer.Option(help="CSV of all evaluations.")] = Path(
        "results/eval_preprocessing.csv"
    ),
) -> None:
    """Evaluate all preprocessing strategies on the same volumes; other arguments are knobs for each run."""
    short_errors()
    folders = {"train_embeddings_dir": train_embeddings_dir, "test_embeddings_dir": test_embeddings_dir}
    further = ["--results_csv", str(results_csv), *context.args]
    # looks for all folders before the first run, which may take an hour
    commands = {name: run_strategy(name, bundle, folders, further) for name in strategy or TABLE_VI}
    for name, command in commands.items():
        code = subprocess.run(command, check=False).returncode
        if code:
            Console(stderr=True).print(
                f"'{name}' failed, see above. Run the same command again to resume there."
            )
            raise typer.Exit(code)
    rows = [row for row in read_rows(results_csv) if row.protocol.startswith("preprocessing_")]
    print_whole(results_table(rows))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)

if __name__ == "__main__":
    app()
