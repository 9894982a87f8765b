"""Every block of docs/tokens.md runs, in order, on a small encoder and two CTs."""

import re
import shutil
from functools import partial
from pathlib import Path

import dale_ct

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_block_of_the_page_runs(small_bundle, ct_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ct_folder / "a.nii.gz", "ct.nii.gz")
    shutil.copytree(ct_folder, "scans")
    for name in ("embed", "embed_to_store"):
        small = partial(getattr(dale_ct, name), encoder=str(small_bundle), weights="random")
        monkeypatch.setattr(dale_ct, name, small, raising=False)
    page = (REPOSITORY / "docs" / "tokens.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) > 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/tokens.md", "exec"), names)  # noqa: S102 (our own page)
    assert names["tokens"].shape == (11, 24)
    assert names["patches"].shape == (11, 16, 24)
    assert names["padded"].shape == (2, 11, 24)
    assert names["mask"].sum(1).tolist() == [11, 5]
    assert names["inputs"].shape == (1, 18, 48)
    assert set(names["store"].volumes) == {"a", "b"}
