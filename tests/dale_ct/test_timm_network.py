import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LATE = """
    import sys
    import torch
    from dale_ct.timm_network import build_network
    network = build_network({"model_name": "vit_tiny_patch16_224"}, 0, False).eval()
    network.load_state_dict(build_network({"model_name": "vit_tiny_patch16_224"}, 0, True).state_dict())
    with torch.inference_mode():
        network(torch.zeros(1, 3, 224, 224))
    assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
    import timm, torchvision
    assert torchvision.ops.roi_align.__globals__["is_compile_supported"]("cpu")
    other = timm.create_model("naflexvit_base_patch16_gap", depth=1, num_classes=0).eval()
    images = torch.ones(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(other, backend="eager")(images), other(images))
"""
ANOTHER_NAME = """
    from dale_ct.timm_network import compiler_left_out
    with compiler_left_out():
        import timm
    import torch._dynamo.utils
    assert timm.counters is torch._dynamo.utils.counters
    assert timm.config is torch._dynamo.config
"""


@pytest.mark.parametrize("code", [LATE, ANOTHER_NAME])
def test_the_compiler_is_imported_when_it_is_used_and_not_before(code, tmp_path):
    folder = tmp_path if code is ANOTHER_NAME else REPOSITORY
    if folder is tmp_path:  # a timm that wants more of the compiler
        (tmp_path / "timm.py").write_text(
            "from torch._dynamo.utils import counters, is_compile_supported\n"
            "import torch._dynamo.config\nconfig = torch._dynamo.config\n"
        )
    path = f"import sys\nsys.path[:0] = ['{folder}', '{REPOSITORY}']\n"
    command = [sys.executable, "-c", path + textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
