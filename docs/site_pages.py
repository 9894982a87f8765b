"""Hook of MkDocs that makes pages of the repository's documents, each under its own path.

So a link means the same on the site as on disk, and nothing is copied into docs/. A source file that a page
links to is put into the site as it is. A link to a folder leads to its README; without one, it becomes plain
text. The notebook becomes a page of its text and code.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = (
    "*.md",
    "docs/*.md",
    "docs/*.css",
    "bundles/*.md",
    "bundles/*/docs/*.md",
    "data_prep/*.md",
    "benchmarks/*.md",
)
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s:]+)(#\S*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the repository's documents in place of what MkDocs found in docs/."""
    ours = {path.relative_to(REPOSITORY).as_posix(): path for glob in PAGES for path in REPOSITORY.glob(glob)}
    linked = {name: path for page in ours.values() for name, path in _linked(page)}
    return Files(
        [
            *(file for file in files if file.src_dir != config.docs_dir),  # the theme's
            *(File.generated(config, name, abs_src_path=str(path)) for name, path in (linked | ours).items()),
            *(
                File.generated(
                    config, path.with_suffix(".md").relative_to(REPOSITORY).as_posix(), content=_text(path)
                )
                for path in REPOSITORY.glob("docs/*.ipynb")
            ),
        ]
    )


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to folders and notebooks to their pages."""
    here = (REPOSITORY / page.file.src_uri).parent

    def lead(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if target.endswith(".ipynb"):
            return f"[{text}]({target.removesuffix('.ipynb')}.md)"
        if not (here / target).is_dir():
            return link[0]
        readmes = (f"{target}/{name}" for name in ("README.md", "docs/README.md"))
        return next((f"[{text}]({readme}{anchor})" for readme in readmes if (here / readme).is_file()), text)

    return LINK.sub(lead, markdown)


class Docstrings(griffe.Extension):
    """Bring docstrings to what mkdocstrings reads: no roles, as in :func:`embed`, and ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            plain = re.sub(r":(?:func|class|meth|mod):(?=`)", "", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", plain, flags=re.M)


def _linked(page: Path) -> Iterator[tuple[str, Path]]:
    """Find the files of the repository that a page links to."""
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        path = (page.parent / link[2]).resolve()
        if path.is_file() and path.is_relative_to(REPOSITORY):
            yield path.relative_to(REPOSITORY).as_posix(), path


def _text(notebook: Path) -> str:
    """Return the cells of a notebook as Markdown."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ((cell["cell_type"], "".join(cell["source"])) for cell in cells)
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts)
