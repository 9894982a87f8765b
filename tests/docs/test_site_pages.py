"""The documentation builds as a site without a warning; links lead somewhere, and no other host is asked."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("embed", "embed_to_store", "predict", "load_encoder", "encoders", "EmbeddingStore")
FETCHED = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:href|src)=\"?((?:https?:)?//[^\s\">]+)")
FETCHED_BY_CSS = re.compile(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^)]+)")


@pytest.mark.slow
def test_make_docs_builds_every_page_with_links_that_hold_and_nothing_from_elsewhere(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    del pages["404.html"]  # its links start at /
    assert "One CT, three commands" in pages["index.html"]
    assert "adaptive_avg_pool2d" in pages["docs/first_ct/index.html"]
    for path in (*REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("bundles/*/docs/README.md")):
        assert f"{path.relative_to(REPOSITORY).with_suffix('')}/index.html".replace("README/", "") in pages
    api = pages["docs/api/index.html"]
    assert not [name for name in NAMES if f'id="dale_ct.{name}"' not in api]
    assert ":func:" not in api
    for name, html in pages.items():
        assert not FETCHED.findall(html), name
        for target in re.findall(r"\b(?:href|src)=\"?([^\s\">#?:]+)(?=[\s\">#?])", html):
            assert (tmp_path / name).parent.joinpath(unquote(target)).exists(), f"{name}: {target}"
    assert not [path for path in tmp_path.rglob("*.css") if FETCHED_BY_CSS.search(path.read_text())]
