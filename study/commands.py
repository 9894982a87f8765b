"""Starts ``python -m module arguments`` again and again without the imports, some 10 s each time.

A server process of ``multiprocessing`` imports MONAI and what it imports once; every command is a fork of it.
Nothing of what commands import of this repository is imported there: they find it as they would alone.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = (  # what bundles and data_prep import of others
    *("dask.distributed", "ignite.engine", "matplotlib.pyplot", "mlflow", "monai.bundle", "nibabel"),
    *("pandas", "scipy.ndimage", "timm", "torch", "typer"),
)


def start_command(
    words: list[str], folder: str | Path, environment: dict[str, str], out: str | Path, err: str | Path
) -> ForkServerProcess:
    """Start the command ``python -m words`` and return its process.

    Args:
        words: module and its arguments.
        folder: working folder.
        environment: environment; what libraries read when they are imported must also be in ours.
        out: file to append its standard output to.
        err: file to append its standard error to.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    arguments = (words, str(folder), environment, str(out), str(err))
    process = context.Process(target=_be_the_command, args=arguments)
    process.start()
    return process


def _be_the_command(words: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """Do in a fork what the interpreter does when it starts and ends."""
    os.setsid()  # Ctrl-C in a terminal reaches it through its parent alone
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    named = environment.get("PYTHONPATH", "").split(os.pathsep)
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [folder, *filter(None, named), *installed]
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 (the interpreter shows any)
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
