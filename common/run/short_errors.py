"""Errors of users end in one line that says what to mend, not in MONAI's stack of resolved references."""

import os
import sys
import traceback
from types import TracebackType

USER_ERRORS = (ValueError, KeyError, FileNotFoundError, FloatingPointError)


def short_errors() -> None:
    """Show of an uncaught error and its causes only the first that a user can mend, if there is one.

    MONAI wraps an error of a component in one of its own for each reference on the way, the last line of
    which tells how to debug MONAI. With ``DALE_CT_TRACEBACK=1`` in the environment everything is shown.
    """
    if not os.environ.get("DALE_CT_TRACEBACK"):
        sys.excepthook = _show


def first_cause(error: BaseException) -> BaseException | None:
    """Return the first of an error and its causes that a user can mend; None if there is none.

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
    cause = first_cause(error)
    if cause is None:
        traceback.print_exception(kind, error, trace)
        return
    message = cause.args[0] if isinstance(cause, KeyError) and cause.args else cause
    sys.stderr.write(f"{type(cause).__name__}: {message} (DALE_CT_TRACEBACK=1 shows where.)\n")
