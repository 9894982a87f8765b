"""The config that a ``python -m monai.bundle run`` command executes, read again and checked."""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any


class Stopped(KeyboardInterrupt):
    """The user (Ctrl-C) or the cluster (SIGTERM) has asked this process to end.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}.")
        self.exit_status = 128 + number


def raise_stopped(number: int) -> None:
    """Leave whatever the main thread is doing; a second signal does not wait for it to tidy up.

    Args:
        number: number of the signal.

    Raises:
        Stopped: always.
    """
    on_stop(lambda again: os._exit(128 + again))
    raise Stopped(number)


def on_stop(act: Callable[[int], None]) -> None:
    """Call a function with the number of the signal when this process gets Ctrl-C or SIGTERM.

    Processes forked from this one, such as the workers of a DataLoader, ignore Ctrl-C, which a terminal sends
    to all of them: they end with this one. Outside the main thread, where Python allows no handlers, the
    signals keep their meaning.

    Args:
        act: called in the main thread, between two of its instructions.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            act(number)
        elif number == signal.SIGTERM:
            os._exit(128 + number)

    with suppress(ValueError):
        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)


def exit_if_stopped(engine: Any) -> None:  # noqa: ANN401 (Ignite's)
    """End the process with the signal's status, 130 or 143, if the run was stopped before its last step.

    Args:
        engine: engine that has run; a :class:`common.handlers.checkpoint.Checkpoint` stops it.
    """
    status = getattr(engine.state, "exit_status", 0)
    if status:
        sys.exit(status)


if TYPE_CHECKING:
    from monai.bundle import ConfigParser

MONAI_ARGUMENTS = (
    *("config_file", "meta_file", "logging_file", "args_file", "tracking", "workflow_type"),
    *("run_id", "init_id", "final_id"),
)

_FLAG = re.compile(r"--|-(?=[a-zA-Z])")  # Fire's; a negative number is none


def executed_config(bundle_root: str, name: str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the merged config that this process runs, after refusing knobs that the bundle does not have.

    MONAI takes any ``--name value`` and any key of a further config file: a misspelt knob changes nothing and
    says nothing. When the process was not started through MONAI's command line, the bundle's own file is
    returned.

    Args:
        bundle_root: folder of the bundle.
        name: config file in its ``configs`` folder, such as ``train.json``.
        argv: command line; ``sys.argv`` by default.

    Returns:
        Unresolved content: references and expressions stand as written.

    Raises:
        FileNotFoundError: if a further config file or ``args_file`` is not there.
        ValueError: if an override or a further config file names something the bundle's config does not
            define or gives it another kind of value, or an override is a bare None, which MONAI ignores.
    """
    own = json.loads((Path(bundle_root) / "configs" / name).read_text())
    argv = sys.argv if argv is None else argv
    overrides, files = _overrides(argv), config_files(argv)
    if not files:
        return own
    overrides = {key: value for key, value in overrides.items() if key not in MONAI_ARGUMENTS}
    for key, value in overrides.items():
        if value is None or value == "null":
            raise ValueError(f"{key} must be '$None' (quoted) to be null, got {value}, which MONAI ignores.")
    return merged_config(own, files, overrides).get()


def merged_config(own: dict[str, Any], files: Sequence[str], overrides: dict[str, Any]) -> ConfigParser:
    """Merge config files and overrides as MONAI does, after refusing knobs that the bundle does not have.

    Args:
        own: content of the bundle's own file, whose knobs count.
        files: that file, or another in its place, and further ones.
        overrides: knobs of the command line.

    Raises:
        FileNotFoundError: if a further file is not there.
        ValueError: if one of them names something unknown, or gives it another kind of value.
    """
    for further in files[1:]:
        _refuse_unknown(_read_object("config_file", further), own, f"'{further}'")
    _refuse_unknown(overrides, own, "the command line")
    from monai.bundle import ConfigParser  # here: all above is told without its 10 s of imports

    parser = ConfigParser()
    parser.read_config(files)
    parser.update(pairs=overrides)
    return parser


def config_files(argv: Sequence[str]) -> list[str]:
    """Return the config files that a MONAI command names, none for another command.

    Args:
        argv: command line.

    Raises:
        FileNotFoundError: if ``args_file`` is not there.

    Example:
        >>> config_files(["monai.bundle", "run", "--config_file", "configs/train.json"])
        ['configs/train.json']
    """
    files = _overrides(argv).get("config_file", [])
    return [files] if isinstance(files, str) else list(files)


def _read_object(name: str, path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} must be a JSON file, got '{path}', which does not exist.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} must be a JSON file, got '{path}' ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(content).__name__} in '{path}'.")
    return content


def _overrides(argv: Sequence[str]) -> dict[str, Any]:
    """Read ``--name value``, ``--name=value`` and ``-name value`` the way MONAI's command line does."""
    pairs: dict[str, Any] = {}
    words = list(argv)
    for index, word in enumerate(words):
        if not (flag := _FLAG.match(word)):
            continue
        name, equals, value = word[flag.end() :].partition("=")
        if not equals:
            following = words[index + 1 : index + 2]
            value = following[0] if following and not _FLAG.match(following[0]) else "True"
        try:
            pairs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pairs[name] = value
    if "args_file" in pairs:
        pairs = _read_object("args_file", str(pairs["args_file"])) | pairs
    return pairs


def _refuse_unknown(overrides: dict[str, Any], own: dict[str, Any], where: str) -> None:
    for name in overrides:
        node: Any = own
        for part in name.lstrip("+").replace("#", "::").split("::"):
            places = range(len(node)) if isinstance(node, list) else ()
            known = list(node) if isinstance(node, dict) else [str(place) for place in places]
            if part not in known:
                near = difflib.get_close_matches(part, known, n=1)
                hint = (
                    f" Did you mean '{near[0]}'?"
                    if near
                    else f" Known: {', '.join(k for k in known if k[0] != '_') or 'nothing within it'}."
                )
                raise ValueError(f"knob must be one the bundle defines, got '{name}' in {where}.{hint}")
            node = node[part] if isinstance(node, dict) else node[int(part)]
        _refuse_other_kind(name, overrides[name], node, where)


def _refuse_other_kind(name: str, value: Any, own: Any, where: str) -> None:  # noqa: ANN401 (any of JSON's)
    """Refuse 'abc' for a number before it fails deep inside; null, references and components may change."""
    if None in (own, value) or any(isinstance(one, str) and one[:1] in ("$", "@") for one in (value, own)):
        return
    kinds: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "True or False"),
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
        str: ((str, list, dict), "text"),
        list: ((list, tuple), "a list"),
    }
    allowed, kind = kinds.get(type(own), ((object,), ""))
    if not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(own, bool)):
        raise ValueError(f"{name} must be {kind} such as {own!r}, got {value!r} in {where}.")


def plain_knobs(config: dict[str, Any]) -> dict[str, Any]:
    """Return the top-level knobs of a bundle config: its plain values, not its components or sections.

    Args:
        config: merged content of a bundle config.

    Example:
        >>> plain_knobs({"_desc_": "x", "slab_mm": 12.0, "loss": {"_target_": "Loss"}, "run": []})
        {'slab_mm': 12.0}
    """
    sections = ("imports", "initialize", "run", "finalize")
    return {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in sections and not isinstance(value, dict)
    }


def knobs_that_bind(config: dict[str, Any], free: Sequence[str]) -> dict[str, Any]:
    """Return the plain knobs on which the course of a run depends, to be remembered in its checkpoints.

    Args:
        config: executed config.
        free: knobs that may differ when a run is resumed: paths, logging, workers.

    Example:
        >>> knobs_that_bind({"seed": 1, "output_dir": "a", "net": {}}, free=["output_dir"])
        {'seed': 1}
    """
    free = (*free, "bundle_root", "code_root", "code_path")
    return {name: value for name, value in plain_knobs(config).items() if name not in free}


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
