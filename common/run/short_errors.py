"""A command says what its user needs to know: an error or a stop in one line, and no noise of libraries."""

import os
import sys
import traceback
import warnings
from types import TracebackType

from common.run.stop import Stopped, on_stop, raise_stopped

USER_ERRORS = (ValueError, KeyError, OSError, FloatingPointError)
MONAIS_WRAPPERS = ("Failed to instantiate component", "Failed to evaluate ")
NOISE = (
    (FutureWarning, "`torch.jit.interface` is deprecated"),  # raised by the import of torchvision
)
"""Warnings about lines of libraries that no user can change: category and how the message starts."""


def short_errors() -> None:
    """Show of an uncaught error only what a user can fix, and end at Ctrl-C or SIGTERM with one line.

    MONAI wraps an error of a component in one of its own for each reference on the way, the last line of
    which tells how to debug MONAI. With ``DALE_CT_TRACEBACK=1`` in the environment everything is shown.
    """
    on_stop(raise_stopped)
    sys.excepthook = _show
    for category, start in NOISE:
        warnings.filterwarnings("ignore", message=start, category=category)


def first_cause(error: BaseException) -> BaseException | None:
    """Return the first of an error and its causes that a user can fix; None if there is none.

    What MONAI wraps around it is a RuntimeError; what ours was raised from is a library's words for it.

    Args:
        error: any error.

    Example:
        >>> try:
        ...     try:
        ...         try:
        ...             raise EOFError("No data left in file")
        ...         except EOFError as inner:
        ...             raise ValueError("'a.npz' must be a readable index.") from inner
        ...     except ValueError as ours:
        ...         raise RuntimeError("Failed to instantiate") from ours
        ... except RuntimeError as outer:
        ...     first_cause(outer)
        ValueError("'a.npz' must be a readable index.")
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, USER_ERRORS):
        cause = cause.__cause__
    return cause


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    everything = bool(os.environ.get("DALE_CT_TRACEBACK"))
    if everything:
        traceback.print_exception(error)
    if isinstance(error, Stopped):
        sys.stderr.write(f"\n{error} Run the same command again to go on.\n")
        sys.exit(error.exit_status)
    if everything:
        return
    cause = first_cause(error)
    if cause is None:
        while isinstance(error, RuntimeError) and str(error).startswith(MONAIS_WRAPPERS) and error.__cause__:
            error = error.__cause__
        traceback.print_exception(error)
        return
    message = cause.args[0] if isinstance(cause, KeyError) and cause.args else cause
    sys.stderr.write(f"{type(cause).__name__}: {message} (DALE_CT_TRACEBACK=1 shows where.)\n")
