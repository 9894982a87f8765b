"""The exported encoder gives the embeddings of the network it came from."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch

from dale_ct.onnx_export import export_onnx

FACTS = {"slice_axes": "xy", "hu_window": [-940.8, 923.1, -25.03, 246.87], "version": "1.2.0"}


def test_embeddings_are_those_of_eager_mode_for_any_number_of_slices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = timm.create_model(
        "vit_large_patch14_dinov2",
        in_chans=1,
        num_classes=0,
        dynamic_img_size=True,
        img_size=48,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        init_values=1.0,
    )
    path = export_onnx(encoder, tmp_path / "deep" / "encoder.onnx", size_px=32, facts=FACTS)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    stated = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(stated["hu_window"]) == FACTS["hu_window"]
    assert (stated["slice_axes"], stated["version"], stated["size_px"]) == ("xy", "1.2.0", "32")
    for slices in (1, 2, 7):
        image = torch.randn(slices, 1, 32, 32)
        (cls,) = session.run(["cls"], {"image": image.numpy()})
        assert cls.shape == (slices, 24)
        with torch.no_grad():
            np.testing.assert_allclose(cls, encoder.eval()(image).numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(cls[0] - cls[1]).max() > 1e-2  # slices differ, so that equality means something
