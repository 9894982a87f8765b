"""The repository keeps the shape that the README and CONTRIBUTING promise."""

import ast
import graphlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "dale_ct", "data_prep", "study")
FIRST_PARTY = {*PACKAGES, "bundles", "docs", "tests"}
# An __init__.py holds one docstring; this one also holds what its docstring says.
SPEAKING_INITS = {"common/__init__.py", "dale_ct/__init__.py"}
# Tests that stand for the whole repository or a folder of it rather than for one module.
SWEEPING_TESTS = {
    *("conftest.py", "test_dicom_independent.py", "test_wheel.py", "test_dockerfile.py"),
    *("test_tokens_page.py", "test_first_ct_notebook.py"),
}


def source_files() -> list[Path]:
    return sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))


def written_files(pattern: str) -> list[Path]:
    """Files of the repository, without those of hidden folders and of ignored ones at the root."""
    found = (file.relative_to(REPOSITORY) for file in REPOSITORY.rglob(pattern))
    return sorted(
        REPOSITORY / file
        for file in found
        if not file.parts[0].startswith(".")
        and file.parts[0] not in {"data", "results", "build", "dist"}
        and file.parts[:2] not in {("demo", "out"), ("study", "out")}
    )


def relative(file: Path) -> str:
    return file.relative_to(REPOSITORY).as_posix()


def mirrored_test(source: Path) -> Path:
    name = source.parent.name if source.name == "__init__.py" else source.stem.strip("_")
    return REPOSITORY / "tests" / source.relative_to(REPOSITORY).with_name(f"test_{name}.py")


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def defines(module: str, name: str) -> bool:
    """Whether the module's own file defines a name, rather than importing it from elsewhere."""
    base = REPOSITORY / module.replace(".", "/")
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return (
        file.is_file()
        and re.search(rf"^(class|def) {name}\b|^{name}\b", file.read_text(encoding="utf-8"), re.M) is not None
    )


def strings_of(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings_of(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings_of(item)]
    return [value] if isinstance(value, str) else []


def test_every_module_has_its_mirrored_test() -> None:
    modules = [file for file in source_files() if file.name != "__init__.py"]
    missing = [
        f"{relative(module)} -> {relative(mirrored_test(module))}"
        for module in modules
        if not mirrored_test(module).is_file()
    ]
    assert not missing, "\n".join(missing)


def test_every_mirrored_test_has_its_module() -> None:
    mirrored = {mirrored_test(file) for file in source_files()}
    tests = [file for package in PACKAGES for file in (REPOSITORY / "tests" / package).rglob("*.py")]
    strays = [relative(file) for file in tests if file not in mirrored and file.name not in SWEEPING_TESTS]
    assert not strays, "\n".join(strays)


MAX_MODULES_OF_A_FOLDER = 18
MAX_LINES = 400


def test_a_folder_is_small_enough_to_be_read_as_a_list() -> None:
    folders = Counter(relative(file.parent) for file in source_files() if file.name != "__init__.py")
    assert not {folder: number for folder, number in folders.items() if number > MAX_MODULES_OF_A_FOLDER}


def test_a_file_is_short_enough_to_be_read_at_once() -> None:
    lengths = {relative(file): file.read_text(encoding="utf-8").count("\n") for file in source_files()}
    assert not {file: lines for file, lines in lengths.items() if lines > MAX_LINES}


def test_test_folders_are_no_packages() -> None:
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))


def test_no_module_is_named_for_nothing_or_for_its_generation() -> None:
    vague = re.compile(r"^(utils?|helpers?|misc|tools)$|_(\d+|v\d+|new|old|final)$")
    assert not [relative(file) for file in source_files() if vague.search(file.stem)]


def test_init_files_hold_only_a_docstring() -> None:
    speaking = []
    for file in source_files():
        if file.name == "__init__.py" and relative(file) not in SPEAKING_INITS:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            if len(tree.body) != 1 or ast.get_docstring(tree) is None:
                speaking.append(relative(file))
    assert not speaking, "\n".join(speaking)


def test_every_package_folder_has_an_init_file() -> None:
    folders = {file.parent for file in source_files()}
    bare = sorted(relative(folder) for folder in folders if not (folder / "__init__.py").is_file())
    assert not bare, "\n".join(bare)


def test_first_party_imports_lead_to_files() -> None:
    astray = []
    for file in [*source_files(), *written_files("tests/**/*.py"), REPOSITORY / "bundles" / "render.py"]:
        for module in imported_modules(file):
            target = REPOSITORY / module.replace(".", "/")
            if module.split(".")[0] in FIRST_PARTY and not (
                target.with_suffix(".py").is_file() or target.is_dir()
            ):
                astray.append(f"{relative(file)}: {module}")
    assert not astray, "\n".join(astray)


def first_party_imports() -> dict[str, set[str]]:
    """Modules of the packages and those of them that each imports, inside functions too."""
    modules = {module_name(file): file for file in source_files()}
    return {
        name: (imported_modules(file) | imported_names(file)) & modules.keys() - {name}
        for name, file in modules.items()
    }


def imported_names(file: Path) -> set[str]:
    """What ``from`` imports name, a module or something in one."""
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {
        f"{node.module}.{alias.name}"
        for node in tree
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def module_name(file: Path) -> str:
    return relative(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_module_imports_itself_by_way_of_others() -> None:
    # static_order raises a CycleError that names the circle
    list(graphlib.TopologicalSorter(first_party_imports()).static_order())


def test_folders_of_common_do_not_import_each_other_in_a_circle() -> None:
    edges = {
        (importer.split(".")[1], imported.split(".")[1])
        for importer, all_imported in first_party_imports().items()
        for imported in all_imported
        if importer.startswith("common.") and imported.startswith("common.")
    }
    folders: dict[str, set[str]] = {}
    for importer, imported in edges:
        folders.setdefault(importer, set()).update({imported} - {importer})
    # static_order raises a CycleError that names the circle
    list(graphlib.TopologicalSorter(folders).static_order())


def test_the_method_imports_neither_its_data_preparation_nor_its_bundles() -> None:
    """All others import common; no arrow leads back, and none from data_prep to what builds on it."""
    allowed = {"common": {"common"}, "data_prep": {"common", "data_prep"}}
    ours = {folder.name for folder in REPOSITORY.iterdir() if folder.is_dir()} - sys.stdlib_module_names
    astray = []
    for file in source_files():
        package = relative(file).split("/")[0]
        tops = {module.split(".")[0] for module in imported_modules(file)} & ours
        astray += [f"{relative(file)}: {top}" for top in tops - allowed.get(package, tops)]
    assert not astray, "\n".join(astray)


def test_nothing_imports_across_by_changing_the_search_path() -> None:
    changing = {relative(file) for file in source_files() if "sys.path" in file.read_text(encoding="utf-8")}
    assert changing == {"study/commands.py"}  # which does for a command what the interpreter does


def test_bundles_hold_no_python() -> None:
    assert not list((REPOSITORY / "bundles").glob("*/**/*.py"))


def test_targets_of_bundles_are_file_paths_with_dots() -> None:
    astray = []
    for config in written_files("bundles/**/*.json"):
        for text in strings_of(json.loads(config.read_text(encoding="utf-8"))):
            for module, name in re.findall(r"\b((?:common|data_prep)(?:\.[a-z_0-9]+)+)\.(\w+)\b(?!\.)", text):
                if (
                    not defines(module, name)
                    and not (REPOSITORY / module.replace(".", "/") / f"{name}.py").is_file()
                ):
                    astray.append(f"{relative(config)}: {module}.{name}")
    assert not astray, "\n".join(astray)


def test_bundles_hold_no_absolute_path() -> None:
    absolute = re.compile(r"(?:^|['\"])(/[A-Za-z]|~|[A-Za-z]:\\)")
    found = [
        f"{relative(config)}: {text}"
        for config in written_files("bundles/**/*.json")
        for text in strings_of(json.loads(config.read_text(encoding="utf-8")))
        if absolute.search(text)
    ]
    assert not found, "\n".join(found)


def test_git_ignores_no_source() -> None:
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    files = [
        *source_files(),
        *written_files("tests/**/*.py"),
        *written_files("bundles/**/*.json"),
        *written_files("*.csv"),
    ]
    # --no-index judges by the patterns alone, whether or not a file is tracked
    answer = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        input="\n".join(relative(file) for file in files),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not answer.stdout
    assert answer.returncode == 1, answer.stderr


def test_every_third_party_import_is_pinned(pinned: Callable[[str], dict[str, str]]) -> None:
    runtime = pinned("requirements.txt").keys()
    development = (
        runtime | pinned("requirements-dev.txt").keys() | {"packaging"}
    )  # pytest needs packaging itself
    providers = packages_distributions()
    unpinned = []
    for file in [*source_files(), *written_files("tests/**/*.py"), *written_files("bundles/*.py")]:
        allowed = development if relative(file).startswith("tests/") else runtime
        tops = {module.split(".")[0] for module in imported_modules(file)}
        for top in tops - FIRST_PARTY - sys.stdlib_module_names:
            if not {canonicalize_name(name) for name in providers.get(top, [top])} & allowed:
                unpinned.append(f"{relative(file)}: {top}")
    assert not unpinned, "\n".join(unpinned)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_exact_pins(name: str, pinned: Callable[[str], dict[str, str]]) -> None:
    assert all(re.fullmatch(r"[\d.]+(\.post\d+)?", version) for version in pinned(name).values())


def test_pins_satisfy_the_bounds_of_the_package(pinned: Callable[[str], dict[str, str]]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = pinned("requirements.txt")
    for requirement in map(Requirement, project["dependencies"]):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_one_version_everywhere() -> None:
    version = re.search(
        r'^__version__ = "(.+)"$', (REPOSITORY / "common" / "__init__.py").read_text(), re.M
    ).group(1)
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(
        rf"^## \[{re.escape(version)}\]", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )


def test_links_of_the_documentation_lead_to_files() -> None:
    broken = []
    for page in written_files("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{relative(page)}: {target}")
    assert not broken, "\n".join(broken)


def test_paths_of_the_readme_map_exist() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^## Map\n+```\n(.*?)```", readme, re.M | re.S).group(1)
    stack: list[str] = []
    missing = []
    for line in tree.splitlines():
        indent, entry = re.match(r"( *)(\S+)", line).groups()
        stack = [*stack[: len(indent) // 2], entry]
        if not (REPOSITORY / "".join(stack)).exists():
            missing.append("".join(stack))
    assert not missing, "\n".join(missing)


def test_the_readme_is_a_front_page() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
