"""What a command is asked to do, the code that does it, and the one line it says when that is wrong."""

from __future__ import annotations

import ast
import difflib
import json
import os
import pydoc
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from common.run.process import Stopped, on_stop, raise_stopped

if TYPE_CHECKING:  # torch and MONAI take 10 s to import, and a misspelt option is reported before that
    from mlflow.tracking import MlflowClient
    from monai.bundle import ConfigParser

MONAI_ARGUMENTS = (
    *("config_file", "meta_file", "logging_file", "args_file", "tracking", "workflow_type"),
    *("run_id", "init_id", "final_id"),
)
SECTIONS = ("imports", "initialize", "run", "finalize")
KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str, list, dict), "text"),
    list: ((list, tuple), "a list"),
}
"""Kind of a bundle's value to the kinds that may replace it, and how to say so."""

_FLAG = re.compile(r"--|-(?=[a-zA-Z])")  # as Fire has it; a negative number is no flag


def executed_config(bundle_root: str, name: str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the merged config that this process runs, after refusing knobs that the bundle does not have.

    MONAI takes any ``--name value`` and any key of a further config file: a misspelt knob would change
    nothing, silently. Outside MONAI's command line the bundle's file is returned as it is.

    Args:
        bundle_root: folder of the bundle.
        name: config file in its ``configs`` folder, such as ``train.json``.
        argv: command line; ``sys.argv`` by default.

    Returns:
        Unresolved content: references and expressions stand as written.

    Raises:
        FileNotFoundError: if a further config file or ``args_file`` does not exist.
        ValueError: if an override or a further config file names something the bundle's config does not
            define or gives it another kind of value, or an override is a bare None, which MONAI ignores.
    """
    known: dict[str, Any] = json.loads((Path(bundle_root) / "configs" / name).read_text())
    knobs = read_knobs(sys.argv if argv is None else argv)
    files = knobs.get("config_file")
    if not files:
        return known
    overrides = {key: value for key, value in knobs.items() if key not in MONAI_ARGUMENTS}
    for key, value in overrides.items():
        if value is None or value == "null":
            raise ValueError(f"{key} must be '$None' (quoted) to be null, got {value}, which MONAI ignores.")
    return dict(merged_config(known, [files] if isinstance(files, str) else files, overrides).get())


def merged_config(known: dict[str, Any], files: Sequence[str], overrides: dict[str, Any]) -> ConfigParser:
    """Merge config files and overrides as MONAI does, after refusing knobs that the bundle does not have.

    Args:
        known: content of the bundle's config file, which defines its knobs.
        files: that file and further ones.
        overrides: knobs of the command line.

    Raises:
        FileNotFoundError: if a further file does not exist.
        ValueError: if one of them names something unknown, or gives it another kind of value.
    """
    for further in files[1:]:
        _refuse_unknown(_read_object("config_file", further), known, f"'{further}'")
    _refuse_unknown(overrides, known, "the command line")
    from monai.bundle import ConfigParser  # takes 10 s, and what is wrong has been said by now

    parser = ConfigParser()
    parser.read_config(files)
    parser.update(pairs=overrides)
    return parser


class PlainConfig(dict[str, Any]):
    """A bundle's config, resolved as MONAI's ConfigParser does, without MONAI's seconds of imports.

    For components with dotted paths, and references to parts at the top: ``@part``, or ``@part`` in a
    ``$expression``; each is built when it is first asked for. ``_requires_`` is left out: the code is here.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._built: dict[str, Any] = {}

    def get_parsed_content(self, name: str) -> Any:  # noqa: ANN401 (whatever the config makes)
        """Return a part, built."""
        if name not in self._built:
            self._built[name] = self._resolve(self[name])
        return self._built[name]

    def _resolve(self, part: Any) -> Any:  # noqa: ANN401
        if isinstance(part, list):
            return [self._resolve(item) for item in part]
        if isinstance(part, dict):
            values = {name: self._resolve(value) for name, value in part.items() if not name.startswith("_")}
            return pydoc.locate(part["_target_"])(**values) if "_target_" in part else values  # type: ignore[operator]
        if not isinstance(part, str) or part[:1] not in ("@", "$"):
            return part
        text = part.removeprefix("$")
        names = {f"_{name}": self.get_parsed_content(name) for name in re.findall(r"@(\w+)", text)}
        for statement in self.get("imports", ()):
            if re.search(rf"\b{re.split(r'[ .]', statement)[-1]}\b", text):
                exec(statement.removeprefix("$"), names)
        return eval(text.replace("@", "_"), names)


def read_knobs(argv: Sequence[str]) -> dict[str, Any]:
    """Read ``--name value``, ``--name=value`` and ``-name value`` the way MONAI's command line does.

    Args:
        argv: command line; words that belong to no name are left out.

    Raises:
        FileNotFoundError: if ``args_file`` does not exist.
        ValueError: if it is not a JSON object.

    Example:
        >>> read_knobs(["--embed_dim", "128", "--amp_dtype=float32", "-compiled"])
        {'embed_dim': 128, 'amp_dtype': 'float32', 'compiled': True}
    """
    pairs: dict[str, Any] = {}
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        if not (flag := _FLAG.match(word)):
            continue
        name, equals, value = word[flag.end() :].partition("=")
        if not equals:
            value = "True" if _FLAG.match(following) else following
        try:
            pairs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pairs[name] = value
    if "args_file" in pairs:
        pairs = _read_object("args_file", str(pairs["args_file"])) | pairs
    return pairs


def _read_object(name: str, path: str) -> dict[str, Any]:
    """Read a JSON object from the file of an option."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} must be a JSON file, got '{path}', which does not exist.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} must be a JSON file, got '{path}' ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(content).__name__} in '{path}'.")
    return content


def _refuse_unknown(overrides: dict[str, Any], known: dict[str, Any], where: str) -> None:
    """Refuse knobs that the bundle does not define, and values of another kind than its own."""
    for name, value in overrides.items():
        node: Any = known
        for part in name.lstrip("+").replace("#", "::").split("::"):
            if isinstance(node, list):
                node = {str(place): item for place, item in enumerate(node)}
            names = list(node) if isinstance(node, dict) else []
            if part not in names:
                near = difflib.get_close_matches(part, names, n=1)
                listed = ", ".join(name for name in names if name[0] != "_") or "nothing within it"
                hint = f"Did you mean '{near[0]}'?" if near else f"Known: {listed}."
                raise ValueError(f"Unknown option '{name}' in {where}. {hint}")
            node = node[part]
        # null, references and components may become anything
        if None in (node, value) or any(isinstance(v, str) and v[:1] in ("$", "@") for v in (value, node)):
            continue
        allowed, kind = KINDS.get(type(node), ((object,), ""))
        if not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(node, bool)):
            raise ValueError(f"{name} must be {kind} such as {node!r}, got {value!r} in {where}.")


def plain_knobs(config: dict[str, Any]) -> dict[str, Any]:
    """Return the top-level knobs of a bundle config: its plain values, not its components or sections.

    Args:
        config: merged content of a bundle config.

    Example:
        >>> plain_knobs({"_desc_": "x", "slab_mm": 12.0, "loss": {"_target_": "Loss"}, "run": []})
        {'slab_mm': 12.0}
    """
    return {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in SECTIONS and not isinstance(value, dict)
    }


def knobs_that_bind(config: dict[str, Any], free: Sequence[str]) -> dict[str, Any]:
    """Return the plain knobs on which the course of a run depends, to be remembered in its checkpoints.

    Args:
        config: executed config.
        free: knobs that may differ when a run is resumed: paths, logging, workers.
    """
    free = (*free, "bundle_root", "code_root", "code_path")
    return {name: value for name, value in plain_knobs(config).items() if name not in free}


def code_version() -> str:
    """Return the git commit of this code, with ``-dirty`` if files differ; "unknown" outside a checkout."""
    here = Path(__file__).resolve()
    # git may know the folder around an unzipped bundle, but not this file
    known = ["git", "ls-files", "--error-unmatch", here.name]
    version = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        subprocess.run(known, cwd=here.parent, capture_output=True, check=True)
        return subprocess.check_output(version, cwd=here.parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or no commit
        return "unknown"


def experiment_id(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """Find an MLflow experiment by its name, or make it.

    Args:
        client: client of the store.
        tracking_uri: the store.
        name: name of the experiment.
    """
    if experiment := client.get_experiment_by_name(name):
        return str(experiment.experiment_id)
    location = None
    if tracking_uri.startswith("sqlite:///"):
        # MLflow would put the files under the working directory of the first run
        location = Path(tracking_uri.removeprefix("sqlite:///")).resolve().with_name("mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location))


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
    Notebooks and interactive sessions, which live on after Ctrl-C, keep their own way.
    """
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        return
    on_stop(raise_stopped)
    sys.excepthook = _show
    for category, start in NOISE:
        warnings.filterwarnings("ignore", message=start, category=category)


def first_cause(error: BaseException) -> BaseException | None:
    """Return the first of an error and its causes that a user can fix; None if there is none.

    MONAI wraps RuntimeErrors around it; what ours was raised from is a library's words for it.

    Args:
        error: any error.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, USER_ERRORS) and not _is_out_of_memory(cause):
        cause = cause.__cause__
    return cause


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # of torch, which is not imported for this


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Take the place of ``sys.excepthook``."""
    everything = bool(os.environ.get("DALE_CT_TRACEBACK"))
    if everything:
        traceback.print_exception(error)
    if isinstance(error, Stopped):
        sys.stderr.write(f"\n{error} Run the same command again to resume.\n")
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
    if _is_out_of_memory(cause):
        message = f"{str(cause).splitlines()[0][:300]} Lower --batch_size, or use a larger GPU."
    sys.stderr.write(f"{type(cause).__name__}: {message} (DALE_CT_TRACEBACK=1 shows where.)\n")


def must_exist(**paths: str | Path | None) -> None:
    """Refuse inputs of a bundle that do not exist.

    Args:
        paths: option to its file or folder; None for one that is not used.

    Raises:
        FileNotFoundError: if one does not exist.
    """
    for option, path in paths.items():
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(
                f"Cannot find {option}: '{path}' does not exist. Pass another --{option}."
            )
