"""Every command that the documentation shows works: run on tiny stand-ins, or checked word by word.

Bash reads the commands, with every program replaced by one that notes its words: so loops, quotes and
variables mean what they mean to a user, and a program that is not known here is not found.
"""

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from itertools import dropwhile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import pytest
import typer
from monai.bundle import scripts
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

from common.run.config import executed_config
from data_prep.__main__ import COMMANDS
from study.plan import SIZES
from study.stages import all_stages
from tests.released_weights import random_weights, timm_shapes

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = (
    *("README.md", "data_prep/README.md", "bundles/README.md", "benchmarks/README.md"),
    *sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("docs/*.md")),
    *sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("bundles/*/docs/README.md")),
)
PROGRAMS = (
    "python",
    "dale-ct",
    "torchrun",
    "srun",
    "sbatch",
    "scontrol",
    "make",
    "bash",
    "mlflow",
    "dask",
    "pip",
    "docker",
)
GIVEN_BY_SLURM = {"SLURM_NNODES": "2"}

# Commands that are not run here, by a pattern of page and words: why, and the test that runs their like.
NOT_RUN = {
    r"^bundles/\w+/docs/": ("as the README's, bundle by bundle", "bundles/test_embedding_runs.py"),
    r"^data_prep/README.md": ("command by command, on phantoms", "data_prep/commands/test_prepare.py"),
    r"^docs/bring_your_own_encoder.md": ("with the page's own JSON", "bundles/test_bring_your_own.py"),
    r": python (-m )?benchmarks": ("minutes each", None),
    r": (make|bash|python -m study\S*) ": ("minutes each", "test_hops.py"),
    r": python -m data_prep download": ("gated data", "data_prep/commands/test_download.py"),
    r"(data_prep|dale_ct.cli data) totalsegment": ("its weights", "data_prep/commands/test_totalsegment.py"),
    r": python -m data_prep \S+$": ("only its name is mentioned", None),
    r"dale_ct.cli (embed|predict|probe|report)\b": ("the release at its full size", "dale_ct/test_cli.py"),
    r"dale_ct.cli doctor": ("depends on the machine", "dale_ct/test_doctor.py"),
    r"bundles/merlin": ("weights of the hub", "bundles/test_volume_runs.py"),
    r"vit_b14_dinov2|table_v_": ("weights of the hub", "bundles/test_overlays.py"),
    r": python -m data_prep (dicom|audit)": ("run there", "data_prep/commands/test_audit.py"),
    r"my_cts/train --out /data/my_shards": ("as with --masks", "data_prep/commands/test_prepare.py"),
    r"dense_labels|patch_tokens": ("on masks of every slice", "bundles/test_dense_runs.py"),
    r"RAD-ChestCT": ("on RAD-ChestCT's layout", "bundles/test_external_runs.py"),
    r"raw_144|each_preprocessing": ("seven strategies", "bundles/test_external_runs.py"),
    r"docs.render_results": ("the rows of all evaluations", "docs/test_render_results.py"),
    r"^docs/elsewhere.md: (python|pip)": ("from a release", "bundles/test_release.py"),
    r"demo/out/cohort": ("after make demo", "bundles/test_probe_runs.py"),
    r": docker ": ("every line of the Dockerfile", "dale_ct/test_dockerfile.py"),
    r"^docs/export.md": ("on small networks", "bundles/test_torchscript.py"),
    r": mlflow ": ("serves until it is stopped", "common/handlers/test_tracking.py"),
    r": (srun|sbatch|scontrol) ": ("SLURM", "bundles/test_slurm_runs.py"),
    r"--nnodes": ("several machines", "bundles/test_slurm_runs.py"),
}
# Networks, views and schedules of every bundle made small, so that commands stay as they are shown.
SMALL = {
    **{"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    **{"layer_scale_init": 0.1, "amp_dtype": "float32", "num_workers": 0, "strategies": ["cropped_32"]},
    **{"global_size_px": 32, "local_size_px": 16, "num_local": 3, "projector_hidden_dim": 16},
    **{"projection_dim": 11, "num_directions": 32, "batch_size": 4, "max_steps": 4, "warmup_steps": 1},
    **{"val_interval": 2, "log_every": 2, "checkpoint_every": 2, "num_val_patients": 4, "num_seeds": 2},
    **{"num_resamples": 50, "num_pages": 1, "patients": 8},
}


class Command(NamedTuple):
    """A command as bash understood it."""

    page: str  # that shows it
    words: tuple[str, ...]  # program and arguments

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def scripts_of(page: str) -> list[str]:
    """Return what a page shows as commands, in order: blocks of bash, and commands of Python within lines."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    names = COMMANDS if page == "data_prep/README.md" else {}  # its tables leave the first words out
    found = []
    for block, span in re.findall(r"^```(.*?)^```|`([^`]+)`", text, re.M | re.S):
        line = " ".join(span.split())
        if block.startswith("bash\n"):
            found.append(block.removeprefix("bash\n"))
        elif re.match(r"python (-m \S+ \S|\S+\.py)|dale-ct [a-z]", line):
            found.append(line)
        elif line.split(" ")[0] in names and " " in line:
            found.append(f"python -m data_prep {line}")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkout looks like to the commands, with every bundle made small."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("models", "runs", "embeddings", "__pycache__")
    shutil.copytree(REPOSITORY / "bundles", folder / "bundles", ignore=ignored)
    for path in folder.glob("bundles/*/configs/*.json"):
        config = json.loads(path.read_text())
        if path.name != "metadata.json":
            small = {name: value for name, value in SMALL.items() if name in config}
            path.write_text(json.dumps(config | small))
    for name in "common dale_ct data_prep benchmarks demo docs Makefile requirements.txt study".split():
        (folder / name).symlink_to(REPOSITORY / name)
    for name in ("dale_ct_2s", "eval_ct_rate"):  # as downloaded
        (folder / name).symlink_to(folder / "bundles" / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    for page in PAGES:  # the JSON files that a page has its readers write, by the name it gives them
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for name, content in re.findall(r"`(\w+\.json)`[^`]*```json\n(.*?)```", text, re.S):
            (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="module")
def commands(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Command]:
    """All commands of all pages, in order."""
    programs = tmp_path_factory.mktemp("programs")
    noted = programs / "noted"
    for name in PROGRAMS:
        note = f"#!/bin/sh\nprintf '%s\\0' {name} \"$@\" >> {noted}\nprintf '\\n\\0' >> {noted}\n"
        (programs / name).write_text(note)
        (programs / name).chmod(0o755)
    (programs / "head").symlink_to(shutil.which("head"))
    found = []
    for page in PAGES:
        for script in scripts_of(page):
            noted.write_text("")
            environment = {"PATH": str(programs), **GIVEN_BY_SLURM}
            shell = [shutil.which("bash"), "-eu", "-c", script]
            result = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{page}:\n{script}\n{result.stderr}"
            calls = noted.read_text().split("\n\0")[:-1]
            found += [Command(page, module_of(call.split("\0")[:-1])) for call in calls]
    return found


def module_of(words: list[str]) -> tuple[str, ...]:
    """The module that a program of ours is, in a container or not."""
    if words[:2] == ["docker", "run"]:
        words = words[words.index("dale-ct") :]
    return ("python", "-m", "dale_ct.cli", *words[1:]) if words[0] == "dale-ct" else tuple(words)


def check(words: list[str]) -> None:
    """Check every word of a command without running it."""
    program, *rest = words
    if program == "srun":
        check([*dropwhile(lambda word: word.startswith("-"), rest)])
    elif program == "torchrun":
        launched = get_args_parser().parse_args(rest)
        check(["python", *["-m"] * launched.module, launched.training_script, *launched.training_script_args])
    elif program == "python":
        check_python(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), f"no such target: {rest}"
    elif program == "bash":
        assert rest[0].endswith(".sh")
        subprocess.run(["bash", "-n", REPOSITORY / rest[0]], check=True)
    elif program in ("mlflow", "dask"):
        check_server(program, rest)
    elif program in ("pip", "docker"):
        assert rest[0] in ("install", "build")
    else:
        assert program in ("sbatch", "scontrol"), f"no check for '{program}'"


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module == "monai.bundle":
            check_bundle(rest)
            return
        is_package = (REPOSITORY / module.replace(".", "/") / "__main__.py").is_file()
        check_typer(importlib.import_module(f"{module}.__main__" if is_package else module), rest)
        return
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
        return
    path = REPOSITORY / words[0]
    assert path.is_file(), f"no file '{words[0]}'"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check_typer(module, words[1:])


def check_bundle(words: list[str]) -> None:
    """Check a command of MONAI: config files, and every option a knob or an argument."""
    options = dict(zip(words[1::2], words[2::2], strict=True))
    if words[0] == "run":
        first = options["--config_file"].strip("[]'").split("'")[0]
        name = Path(first).name
        executed_config(options["--bundle_root"], name, words)
        assert Path(first).resolve().parents[1] == Path(options["--bundle_root"]).resolve()
        return
    known = inspect.signature(getattr(scripts, words[0])).parameters
    knobs = json.loads(Path(options["--config_file"]).read_text()) if "--config_file" in options else {}
    for option in options:
        assert option[2:] in known or option[2:] in knobs, f"no option '{option}'"


def check_typer(module: ModuleType, words: list[str]) -> None:
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    parse(typer.main.get_command(app), words)


def check_server(program: str, words: list[str]) -> None:
    if program == "mlflow":
        parse(importlib.import_module("mlflow.cli").cli, words)
    else:
        parse(importlib.import_module(f"distributed.cli.dask_{words[0]}").main, words[1:])


def parse(command: object, words: list[str]) -> None:
    """Parse words as a command line of click, and of its sub-command, without calling either."""
    if words in ([], ["--help"]):  # a command that is only named
        return
    with ExitStack() as stack:
        for parameter in command.params:
            info = getattr(getattr(parameter, "type_descriptor", None), "parameter_info", None)
            if getattr(info, "exists", False):  # the pages name data that is not here
                stack.enter_context(patch.object(info, "exists", False))
        context = command.make_context("command", list(words))
    if hasattr(command, "resolve_command"):
        _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(inner, rest)


def reason_not_to_run(command: Command) -> str | None:
    return next((pattern for pattern in NOT_RUN if re.search(pattern, str(command))), None)


def test_every_command_is_understood_word_by_word(commands, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")  # one script imports from its neighbour
    wrong = []
    for command in dict.fromkeys(commands):
        try:
            check(list(command.words))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (all that is wrong, at once)
            wrong.append(f"{command}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("size", SIZES)
def test_every_command_of_the_study_is_understood_word_by_word(size, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    stages = all_stages(SIZES[size], Path("out"), "float32")
    commands = [command for stage in stages for command in stage.commands]
    assert len(commands) > 100
    for words in commands:
        check(["python", "-m", *words])


def test_the_page_on_downloads_installs_what_the_bundle_asks_for() -> None:
    metadata = json.loads((REPOSITORY / "bundles" / "dale_ct_2s" / "configs" / "metadata.json").read_text())
    asked = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"]}
    page = (REPOSITORY / "docs" / "elsewhere.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"([\w-]+)==(\S+)", page)) == asked | metadata["required_packages_version"]
    assert f"dale_ct_2s_v{metadata['version']}.zip" in page


def test_a_command_with_a_mistake_is_noticed(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    train = "bundles/dale_ct_2s/configs/train.json --bundle_root bundles/dale_ct_2s"
    for line in (
        f"python -m monai.bundle run --config_file {train} --slab_m 6.0",
        f"torchrun --num_ranks 8 -m monai.bundle run --config_file {train}",
        f"python -m monai.bundle run --config_file {train.replace('2s', '3')}",
        "python -m data_prep ct-rate --rot /data",
        "python -m data_prep ct-rat --root /data",
        "dale-ct weights export --bundle x",
        "python -m dale_ct.cli embd ct.nii.gz",
        "python benchmarks/sigrek.py",
        "make dem",
        "bash demo/none.sh",
        "mlflow server --prt 5000",
        "dask scheduler --prt 8786",
        "curl https://example.org",
    ):
        with pytest.raises((Exception, SystemExit)):
            check(line.split())


def test_every_command_is_run_or_says_why_not(commands) -> None:
    assert len(commands) > 60
    used = {reason_not_to_run(command) for command in commands}
    assert set(NOT_RUN) <= used, f"no command for {set(NOT_RUN) - used}"
    for _, test in NOT_RUN.values():
        assert test is None or (REPOSITORY / "tests" / test).is_file(), test


@pytest.fixture(scope="module")
def run(python_m: Callable[..., subprocess.CompletedProcess], folder: Path) -> Callable[[list[str]], None]:
    """Run a module with its arguments; fail with what it said."""

    def module(words: list[str]) -> None:
        result = python_m(words, folder)
        assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout}{result.stderr[-3000:]}"

    return module


def stand_ins(folder: Path) -> None:
    """Give the commands what they name: data of a synthetic cohort in data/ct_rate, and a small release.

    The release lies where a user without a network places it, until pretraining writes its weights there.
    """
    grid = SMALL["img_size_px"] // SMALL["patch_size_px"]
    shapes = timm_shapes(SMALL["embed_dim"], SMALL["depth"], SMALL["patch_size_px"], grid)
    (folder / "bundles" / "dale_ct_2s" / "models").mkdir()
    save_file(random_weights(shapes), folder / "bundles" / "dale_ct_2s" / "models" / "model.safetensors")
    data, cohort = folder / "data", folder / "data" / "ct_rate" / "dataset"
    shutil.copy(next((cohort / "valid_fixed").rglob("*.nii.gz")), folder / "ct.nii.gz")
    for name in ("my_cts", "my_labels"):
        (data / name).mkdir()
    (data / "ReX").symlink_to(data / "ct_rate" / "rexgroundingct")
    (data / "my_label_maps").symlink_to(cohort / "ts_seg" / "ts_total" / "train_fixed")
    for split, ours in (("train", "train"), ("valid", "test")):
        (data / "my_cts" / ours).symlink_to(cohort / f"{split}_fixed")
        labels = cohort / "multi_abnormality_labels" / f"{split}_predicted_labels.csv"
        (data / "my_labels" / f"{ours}.csv").symlink_to(labels)


def small(words: list[str]) -> list[str]:
    """The command with the stand-ins' paths and with its sizes, where it states any, made small."""
    words = [word.removeprefix("/") if word.startswith("/data/") else word for word in words]
    for option, value in zip(words, words[1:], strict=False):
        if option.removeprefix("--") in SMALL:
            words[words.index(option) + 1] = str(SMALL[option.removeprefix("--")])
            assert value
    return words


@pytest.mark.slow
def test_the_commands_run_on_tiny_stand_ins(commands, folder, run) -> None:
    phantom = "data_prep phantom --volumes 28 --out data/ct_rate --seed 3 --matrix 48 --spacing 10 12"
    run([*phantom.split(), "--valid-share", "0.3", "--processes", "1"])
    stand_ins(folder)
    todo = [list(command.words) for command in commands if reason_not_to_run(command) is None]
    # a prediction is shown before the commands that make its probe
    todo.sort(key=lambda words: "predict.json" in " ".join(words))
    done = []
    for words in todo:
        if words[0] == "torchrun":  # on one process; on several: tests/bundles/test_pretraining_runs.py
            launched = get_args_parser().parse_args(words[1:])
            words = ["python", "-m", launched.training_script, *launched.training_script_args]
        assert words[:2] == ["python", "-m"]
        words = small(words[2:])
        if words not in done:
            run(words)
            done.append(words)
    assert len(done) > 8
    assert (folder / "results" / "eval_ct_rate.csv").is_file()
    assert (folder / "results" / "mine.csv").is_file()
