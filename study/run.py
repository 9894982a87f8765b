"""Run the study: every stage once, each with its log; what is done stays done.

``python -m study.run`` or ``make study``. Stopped at any moment, the same command goes on: a stage that was
cut short is run again, and its bundles go on where they were.
"""

import hashlib
import json
import os
import platform
import re
import signal
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.run.config import code_version
from common.run.process import atomic_file
from study.commands import start_command
from study.plan import SIZES
from study.stages import REPOSITORY, Stage, all_stages

OUR_CONFIG = re.compile(r"(?<![\w/.-])(?:bundles|demo|study)/(?!out/)[\w./-]+\.json")
SHOWN_CHARACTERS = 60
SHOWN_LINES = 20
SERVER_KILLED = 255  # multiprocessing's exit code of a process that nobody can tell it about


def keys_of(stages: list[Stage]) -> dict[str, str]:
    """Return for each stage a hash of its commands, the configs they name, and the stages it builds on."""
    keys: dict[str, str] = {}
    for stage in stages:
        arguments = [["-m", *words] for words in stage.commands]
        named = sorted(set(OUR_CONFIG.findall(json.dumps(arguments))))
        configs = [(REPOSITORY / name).read_text(encoding="utf-8") for name in named]
        text = json.dumps([arguments, configs, [keys[name] for name in stage.needs]])
        keys[stage.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return keys


def run_stage(stage: Stage, log: Path, environment: dict[str, str], progress: Progress) -> None:
    """Run the commands of a stage one after the other, all they print into its log.

    Args:
        stage: stage to run.
        log: file to write.
        environment: environment of the commands.
        progress: shows the last line printed.

    Raises:
        SystemExit: if a command fails; says which, shows the end of the log and names it. Or if this process
            is asked to end, or the one that starts commands was killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    line = progress.add_task("", total=None, name="", count="")
    for number, words in enumerate(stage.commands, 1):
        shown = " ".join(["python", "-m", *words])
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shown}\n")
        started = log.stat().st_size
        process = start_command(words, REPOSITORY, environment, log.absolute(), log.absolute())
        try:
            while process.is_alive():
                process.join(0.5)
                description = f"  {number}/{len(stage.commands)} {last_line(log, started)}"
                progress.update(line, description=description)
        except KeyboardInterrupt:
            process.terminate()  # training saves its state
            process.join()
            sys.exit("\nStopped. Run the same command again to resume.")
        if process.exitcode == SERVER_KILLED:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGTERM)
            sys.exit("\nThe process that starts commands was killed. Run the same command again to resume.")
        if process.exitcode != 0:
            progress.stop()
            text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
            end = "\n".join(text.splitlines()[-SHOWN_LINES:])
            sys.exit(f"{end}\n\nStage '{stage.name}' failed (exit {process.exitcode}): {shown}\n{log}")
    progress.remove_task(line)


def last_line(log: Path, start: int) -> str:
    """Return the last line of a log from some byte on, shortened; a progress bar's newest state."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - 2000))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((text.strip()[:SHOWN_CHARACTERS] for text in reversed(lines) if text.strip()), "")


def environment_of(out: Path) -> dict[str, str]:
    """Return the environment of the commands: one MLflow store, no telemetry, our code importable."""
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return os.environ | own | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "140"}


def amp_dtype() -> str:
    """Return bfloat16 where the hardware multiplies it, else float32."""
    if torch.cuda.is_available():
        return "bfloat16"
    cpu = Path("/proc/cpuinfo")
    return "bfloat16" if cpu.is_file() and "avx512_bf16" in cpu.read_text() else "float32"


def hardware() -> str:
    """Return in words what this runs on."""
    number = len(os.sched_getaffinity(0))
    cores = f"{number} CPU core{'s' * (number > 1)} ({platform.machine()})"
    return f"{torch.cuda.get_device_name()}, {cores}" if torch.cuda.is_available() else cores


def record_of(stage: str, out: Path) -> Path:
    """Return the file that says that a stage is done."""
    return out / "done" / f"{stage.replace(' ', '_')}.json"


def seconds_of(stage: str, key: str, out: Path) -> int | None:
    """Return how long a stage took, None if it is to be done."""
    path = record_of(stage, out)
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record["seconds"] if record.get("key") == key else None


def write_record(stage: str, key: str, seconds: float, out: Path) -> None:
    """Say that a stage is done, for this process and for others that work on the same study."""
    record: dict[str, Any] = {"stage": stage, "key": key, "seconds": round(seconds), "commit": code_version()}
    record |= {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware()}
    path = record_of(stage, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1) + "\n")


def run_stages(
    stages: list[Stage], folder: Path, heading: str, *, only: str = "", show: bool = False
) -> None:
    """Run the stages that are not done yet, with a progress bar; or list them.

    Args:
        stages: in the order to run.
        folder: of everything made: logs, records of what is done, results. Relative to the repository.
        heading: first line of output.
        only: run only stages whose name holds this text.
        show: list stages and what is done, and run none.

    Raises:
        SystemExit: if a command fails, or this process is asked to end; the same call goes on afterwards.
    """
    os.chdir(REPOSITORY)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    keys = keys_of(stages)
    chosen = [stage for stage in stages if only in stage.name]
    if show:
        for stage in chosen:
            seconds = seconds_of(stage.name, keys[stage.name], folder)
            typer.echo(f"{'to do' if seconds is None else f'{seconds / 60:.1f} min':>10}  {stage.name}")
        return
    console = Console(stderr=True)
    console.print(f"{heading} Logs and results in {folder}.", highlight=False)
    columns = (TextColumn("{task.fields[name]}{task.description}"), BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        overall = progress.add_task("", total=len(chosen), name="stages")
        for stage in chosen:
            if seconds_of(stage.name, keys[stage.name], folder) is None:
                began = time.monotonic()
                progress.update(overall, name=stage.name)
                log = folder / "logs" / f"{record_of(stage.name, folder).stem}.log"
                run_stage(stage, log, environment_of(folder), progress)
                elapsed = time.monotonic() - began
                write_record(stage.name, keys[stage.name], elapsed, folder)
                console.print(f"{elapsed / 60:6.1f} min  {stage.name}", highlight=False)
            progress.advance(overall)
    console.print(f"Done: {len(chosen)} stages.", highlight=False)


def folder_of(size: str, out: Path | None) -> Path:
    """Return ``out`` as a full path; without it study/out/SIZE, relative to the repository.

    So that results do not depend on where the repository lies.
    """
    return Path("study", "out", size) if out is None else out.absolute()


def main(
    size: Annotated[Literal["small", "gpu"], typer.Option(help="small: CPU. gpu: one large GPU.")] = "small",
    out: Annotated[
        Path | None, typer.Option(help="Folder of everything made. Default: study/out/<size>.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only stages whose name holds this text.")] = "",
    show: Annotated[bool, typer.Option("--list", help="List stages and what is done, and stop.")] = False,
) -> None:
    """Run every table of the paper on a synthetic cohort."""
    folder = folder_of(size, out)
    stages = all_stages(SIZES[size], folder, amp_dtype())
    run_stages(stages, folder, f"Study, size {size}: {SIZES[size].takes}.", only=only, show=show)
    if not show:
        typer.echo(f"Render the tables: python -m study.render --study {folder}")


if __name__ == "__main__":
    typer.run(main)
