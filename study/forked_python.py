"""Runs ``python -m module arguments`` again and again, in forks of a process that has done the imports.

Most of a short command is the import of MONAI and what it imports, some 10 s each time. Nothing of this
repository is imported before the fork: a command finds its code as it would in a process of its own.

A line of input is a JSON list: words, working folder, environment, and the two files to append what it says
to. The answer is two lines: the number of the process, and, when it has ended, its exit status.
"""

import json
import os
import runpy
import sys

# what bundles and data_prep import of others
import dask.distributed  # noqa: F401
import ignite.engine  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import mlflow  # noqa: F401
import monai.bundle  # noqa: F401
import nibabel  # noqa: F401
import pandas  # noqa: F401
import scipy.ndimage  # noqa: F401
import timm  # noqa: F401
import torch  # noqa: F401
import typer  # noqa: F401


def become(words: list[str], folder: str, environment: dict[str, str], said: list[str]) -> None:
    """Be the command ``python -m words``: in a fork, once."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    sys.path[1:1] = environment["PYTHONPATH"].split(os.pathsep) if environment.get("PYTHONPATH") else []
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(*request)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()
