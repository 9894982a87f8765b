"""One forward gives what Eq. 1 to 3 need, for every view."""

import timm
import torch

from common.networks.heads import AuxiliaryHead, ProjectionHead
from common.networks.pretraining_model import PretrainingModel


def model(auxiliary: bool) -> PretrainingModel:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_large_patch14_dinov2",
        in_chans=1,
        num_classes=0,
        dynamic_img_size=True,
        img_size=32,
        patch_size=8,
        embed_dim=12,
        depth=1,
        num_heads=2,
    )
    head = AuxiliaryHead(embed_dim=12, num_ts_classes=7, num_rex_classes=5) if auxiliary else None
    return PretrainingModel(vit, ProjectionHead(embed_dim=12, hidden_dim=17, out_dim=11), head).eval()


def test_every_view_is_projected_and_read_out_alone():
    net = model(auxiliary=True)
    views = {"global": torch.randn(3, 2, 1, 24, 24), "local": torch.randn(3, 4, 1, 16, 16)}
    output = net(views["global"], views["local"])
    assert output["projections"].shape == (6, 3, 11)
    assert output["cls"].shape == (3, 2, 12)
    slots = [("global", 0), ("global", 1), ("local", 0), ("local", 1), ("local", 2), ("local", 3)]
    for index, (group, view) in enumerate(slots):
        for slab in range(3):
            image = views[group][slab, view][None]
            tokens = net.encoder.forward_features(image)
            projection = net.projector(tokens[:, 0])[0]
            torch.testing.assert_close(output["projections"][index, slab], projection, rtol=1e-4, atol=1e-5)
            patches = net.auxiliary_head(tokens[:, 1:])
            torch.testing.assert_close(
                output["logits"][group]["ts_patch"][slab, view], patches["ts"][0], rtol=1e-4, atol=1e-5
            )
            cls = net.auxiliary_head(tokens[:, 0])
            torch.testing.assert_close(
                output["logits"][group]["rex_cls"][slab, view], cls["rex"][0], rtol=1e-4, atol=1e-5
            )


def test_every_parameter_gets_a_gradient_the_auxiliary_head_too():
    net = model(auxiliary=True).train()
    output = net(torch.randn(2, 2, 1, 16, 16), torch.randn(2, 3, 1, 8, 8))
    logits = [tensor.sum() for group in output["logits"].values() for tensor in group.values()]
    # LayerNorm before the last Linear makes plain sums of projections flat, hence the square
    (output["projections"].square().sum() + sum(logits)).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    assert net.auxiliary_head.readouts["ts"].weight.grad.abs().sum() > 0


def test_without_auxiliary_head_there_are_no_logits():
    output = model(auxiliary=False)(torch.randn(2, 2, 1, 16, 16), torch.randn(2, 3, 1, 8, 8))
    assert output["logits"] == {}
