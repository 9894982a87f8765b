"""Render the bundles' configs from the recipes: the method is written once, every bundle is complete.

``python bundles/render.py`` writes ``bundles/<name>/configs/*.json``; ``--check`` only compares, for CI.

An overlay ``_recipes/<bundle>.json`` names the recipe of each config under ``_recipes_`` and then, for each
config or for ``all`` of them, the knobs and components that make this bundle what it is. A key must exist in
the recipe, so that a misspelt knob is an error. There is no template language: a value replaces a value.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

BUNDLES = Path(__file__).resolve().parent
RECIPES = BUNDLES / "_recipes"
LINE = 110


def merged(recipe: dict[str, Any], overlay: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace values of a recipe; ``a::b`` reaches one level into a section.

    Raises:
        KeyError: if the overlay names a key that the recipe lacks.
    """
    result: dict[str, Any] = json.loads(json.dumps(recipe))
    for name, value in overlay.items():
        *sections, key = name.split("::")
        node = result
        for section in sections:
            node = node.get(section, {})
        if key not in node:
            raise KeyError(
                f"{where}: '{name}' is not defined by the recipe. Fix the spelling, or add it there first."
            )
        node[key] = value
    return result


def dumped(value: Any, indent: int = 0) -> str:  # noqa: ANN401 (any JSON)
    """Write JSON with short lists and leaf dictionaries on one line, which people and diffs read best."""
    flat = json.dumps(value, ensure_ascii=True)
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if not items or (indent + len(flat) <= LINE and not any(isinstance(i, dict | list) and i for i in items)):
        return flat
    if isinstance(value, list) and indent + len(flat) <= LINE and not any(isinstance(i, dict) for i in items):
        return flat
    pad = " " * (indent + 4)
    if isinstance(value, dict):
        lines = [f"{pad}{json.dumps(key)}: {dumped(item, indent + 4)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"
    return (
        "[\n" + ",\n".join(f"{pad}{dumped(item, indent + 4)}" for item in items) + "\n" + " " * indent + "]"
    )


def rendered() -> dict[Path, str]:
    """Return every file that rendering writes, with its content."""
    files: dict[Path, str] = {}
    for path in sorted(RECIPES.glob("*.json")):
        overlay = json.loads(path.read_text())
        if "_recipes_" not in overlay:
            continue
        configs = BUNDLES / path.stem / "configs"
        for config, recipe_name in overlay["_recipes_"].items():
            recipe = json.loads((RECIPES / f"{recipe_name}.json").read_text())
            known = {name: value for name, value in overlay.get("all", {}).items()}
            recipe = merged(recipe, known | overlay.get(config, {}), f"_recipes/{path.name}")
            files[configs / f"{config}.json"] = dumped(recipe) + "\n"
        files[configs / "logging.conf"] = (RECIPES / "logging.conf").read_text()
    return files


def main() -> int:
    """Render, or with ``--check`` list what is out of date and return 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a bundle is out of date")
    check = parser.parse_args().check
    stale = [
        (path, text) for path, text in rendered().items() if not path.is_file() or path.read_text() != text
    ]
    if check and stale:
        names = [str(path.relative_to(BUNDLES)) for path, _ in stale]
        sys.stderr.write(f"out of date: {names}. Edit bundles/_recipes/, then run `make bundles`.\n")
        return 1
    for path, text in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
