"""The documentation builds as a site without a warning; links lead somewhere, and no other host is asked."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    return folder


@pytest.mark.slow
def test_home_is_the_readme_and_every_document_and_public_name_is_there(site):
    assert "One CT, three commands" in (site / "index.html").read_text(encoding="utf-8")
    documents = [*REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("bundles/*/docs/README.md")]
    for path in documents:
        name = path.relative_to(REPOSITORY).with_suffix("").as_posix().removesuffix("README")
        assert (site / name / "index.html").is_file(), name
    api = (site / "docs" / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("embed", "embed_to_store", "predict", "load_encoder", "encoders", "EmbeddingStore"):
        assert f'id="dale_ct.{name}"' in api
    assert ":func:" not in api
    assert "adaptive_avg_pool2d" in (site / "docs" / "first_ct" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_links_lead_to_files_and_nothing_is_fetched_from_elsewhere(site):
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]  # whose links start at /
    assert len(pages) > 30
    fetched = re.compile(
        r"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:href|src)=\"?((?:https?:)?//[^\s\">]+)"
    )
    astray, foreign = set(), set()
    for page in pages:
        html = page.read_text(encoding="utf-8")
        foreign |= set(fetched.findall(html))
        for target in re.findall(r"\b(?:href|src)=\"?([^\s\">#?:]+)(?=[\s\">#?])", html):
            if not (page.parent / unquote(target)).exists():
                astray.add(f"{page.relative_to(site)}: {target}")
    assert not astray, "\n".join(sorted(astray))
    assert not foreign
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)]+", "\n".join(styles))
