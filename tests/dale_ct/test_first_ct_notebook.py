"""docs/first_ct.ipynb is committed clean, runs from top to bottom, and its pictures show something."""

import base64
import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def notebook() -> NotebookNode:
    return nbformat.read(REPOSITORY / "docs" / "first_ct.ipynb", as_version=4)


def parameters(notebook: NotebookNode) -> NotebookNode:
    (cell,) = (cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"])
    return cell


def test_it_is_committed_without_outputs_and_for_the_authors_weights(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    stated: dict[str, object] = {}
    exec(parameters(notebook).source, stated)  # noqa: S102 (our own page)
    assert (stated["CT"], stated["ENCODER"], stated["WEIGHTS"]) == ("ct.nii.gz", "dale_ct_2s", None)


@pytest.mark.slow
@pytest.mark.parametrize("ct", ["lidc_idri_0314_ct_1p56x1p56x2mm.nii.gz", None], ids=["real", "phantom"])
def test_it_runs_with_a_small_encoder(ct, notebook, small_bundle, request, tmp_path, monkeypatch):
    path = request.getfixturevalue("real_ct_dir") / ct if ct else "ct.nii.gz"
    monkeypatch.delenv("MPLBACKEND")  # the notebook's own
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    parameters(notebook).source = f"CT, ENCODER, WEIGHTS = {str(path)!r}, {str(small_bundle)!r}, 'random'"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5
    for picture in pictures:
        image = plt.imread(io.BytesIO(base64.b64decode(picture)), "png")
        assert image[..., :3].std() > 0.1
    said = "".join(output.text for output in outputs if output.get("name") == "stdout")
    slices, same = map(int, re.search(r"tokens \((\d+), 24\) patches \((\d+), 16, 24\)", said).groups())
    assert slices == same
    assert slices == 137 if ct else 60 < slices < 160  # of the real one's 138 the last is blank
    error, spread = map(int, re.search(r"mean error (\d+) cm²; (\d+) cm²", said).groups())
    assert error < spread
