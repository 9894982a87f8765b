"""Errors of users end in one line that says what to mend, not in MONAI's stack of resolved references."""

import os
import sys
import traceback
from types import TracebackType

USER_ERRORS = (ValueError, KeyError, FileNotFoundError, FloatingPointError)


def short_errors() -> None:
    """Show an uncaught error by its first cause alone, if it is one that a user can mend.

    MONAI wraps an error of a component in one of its own for each reference on the way, the last line of
    which tells how to debug MONAI. With ``DALE_CT_TRACEBACK=1`` in the environment everything is shown.
    """
    if not os.environ.get("DALE_CT_TRACEBACK"):
        sys.excepthook = _show


def first_cause(error: BaseException) -> BaseException:
    """Return the error that others were raised from.

    Args:
        error: any error.

    Example:
        >>> try:
        ...     try:
        ...         raise ValueError("slab_mm must be positive, got -12.0.")
        ...     except ValueError as inner:
        ...         raise RuntimeError("Failed to instantiate") from inner
        ... except RuntimeError as outer:
        ...     str(first_cause(outer))
        'slab_mm must be positive, got -12.0.'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause = first_cause(error)
    if not isinstance(cause, USER_ERRORS):
        traceback.print_exception(kind, error, trace)
        return
    message = cause.args[0] if isinstance(cause, KeyError) and cause.args else cause
    sys.stderr.write(f"{type(cause).__name__}: {message} (DALE_CT_TRACEBACK=1 shows where.)\n")
