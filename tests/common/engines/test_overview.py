"""Without a probe: boxes where body and lungs were drawn, levels where the same slices lie."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.embeddings.store import EmbeddingStore
from common.engines.overview import overview
from tests.common.engines.conftest import TINY, data_of, save_ct, trunk

BUNDLES = Path(__file__).resolve().parents[3] / "bundles"


def run(ct: Path, out: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    return overview(BUNDLES / "dale_ct_2s", ct, out, **({"reference": None, "encoder_knobs": TINY} | changes))


def test_levels_are_those_of_the_same_slices_and_boxes_lie_where_they_were_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hu = trunk(0, 25)
    blank = np.full((2, 64, 64), -1024, np.int16)
    save_ct(tmp_path / "ct" / "whole.nii.gz", np.concatenate([blank[:1], hu]))
    save_ct(tmp_path / "other" / "SYNTHETIC_top.nii.gz", np.concatenate([blank, hu[4:]]), spacing_mm=9.0)
    found = run(tmp_path / "ct", tmp_path / "out", reference=tmp_path / "other", force=True)
    (facts,) = found.values()
    assert facts["boxes_px"] == {
        # the body is 52 px wide from column 8, and 44 px from row 16, so that its square begins at row 12
        "body": {"slices": [0, 26], "rows": [12, 64], "columns": [8, 60]},
        "lungs": {"slices": [2, 25], "rows": [24, 52], "columns": [14, 54]},
    }
    assert facts["reference"] == {"name": "SYNTHETIC_top", "slices": 23}
    assert facts["levels"][0] is None  # it is blank
    for z, level in enumerate(facts["levels"][5:]):
        assert level == {"slice": z + 3, "z_mm": 9.0 * (z + 2), "cosine": pytest.approx(1, abs=1e-4)}
    record = json.loads((tmp_path / "out" / "overview.json").read_text())
    assert record["volumes"] == json.loads(json.dumps(found))
    assert "diagnosis" in record["note"]
    chest = data_of(tmp_path / "out" / "whole.html")["chest"]
    assert {name: chest[name] for name in facts} == record["volumes"]["whole"]
    assert len(chest["reference_windows"]["lung"]) == 23
    assert "dale-ct probe" in caplog.text
    # the reference's embeddings stay apart, and are there the next time
    assert EmbeddingStore(tmp_path / "out" / "embeddings").volumes == ["whole"]
    before = (tmp_path / "out" / "reference" / "embeddings").stat().st_mtime_ns
    assert run(tmp_path / "ct", tmp_path / "out", reference=tmp_path / "other", force=True) == found
    assert (tmp_path / "out" / "reference" / "embeddings").stat().st_mtime_ns == before


def test_pages_are_as_many_as_asked_for_and_need_no_reference(cts: Path, tmp_path: Path) -> None:
    found = run(cts, tmp_path / "out", num_pages=1)
    assert list(found) == ["p1", "p2"]
    assert [path.name for path in (tmp_path / "out").glob("*.html")] == ["p1.html"]
    data = data_of(tmp_path / "out" / "p1.html")
    assert "levels" not in data["chest"]
    assert data["findings"] == []
    assert [place for place, _ in data["tiles"]] == [1, 4, 7, 10, 12, 15, 18, 21]


def test_encoders_of_volumes_and_no_encoder_are_refused(cts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder of slices .*merlin"):
        overview(BUNDLES / "merlin", cts, tmp_path / "out", reference=None)
    with pytest.raises(ValueError, match="--encoder_bundle"):
        overview(None, cts, tmp_path / "out", reference=None)
    assert not (tmp_path / "out").exists()
