"""The command ``dale-ct``: embeddings, predictions, comparisons, pictures, weights, data, training.

What a command needs is imported when it runs, so that ``--help`` answers at once.
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Chest CT to embeddings: encoders, probes, pictures and training of DALE-CT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)


def show_command(words: list[str]) -> None:
    """Print the command that MONAI's users would type for the same."""
    errors.print(f"[dim]$ {shlex.join(words)}[/dim]", soft_wrap=True, highlight=False)


@app.command(epilog="Example: dale-ct doctor")
def doctor(
    folder: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Where runs would write.")] = Path(),
    online: Annotated[bool, typer.Option(help="Ask the Hugging Face hub, too.")] = True,
) -> None:
    """Look at this machine; each line is fine, or says what to do. The exit status is 1 if one is not."""
    from dale_ct.doctor import examine

    table = Table(box=None, show_header=False)
    findings = list(examine(folder, online))
    for name, is_fine, text in findings:
        table.add_row("[green]ok[/green]" if is_fine else "[red]look[/red]", name, text)
    console.print(table)
    raise typer.Exit(not all(finding.is_fine for finding in findings))


if __name__ == "__main__":
    app()
