"""One process: compiled or not, the network computes the same. Several: tests/distributed."""

import pytest
import timm
import torch

from common.networks.distribute import clip_by_global_norm, distribute, gradients_stay_here
from common.networks.heads import ProjectionHead
from common.networks.pretraining_model import PretrainingModel


def network(**options) -> PretrainingModel:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_large_patch14_dinov2",
        **{"in_chans": 1, "num_classes": 0, "dynamic_img_size": True, "img_size": 16, "patch_size": 8},
        **{"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1},
    )
    return PretrainingModel(vit, ProjectionHead(16, 9, 7), None, **options)


def gradients(model: PretrainingModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(3, n, 1, size, size, generator=generator) for n, size in ((2, 16), (4, 8))]
    model(*views)["projections"].square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def spread(model: PretrainingModel, **changes) -> PretrainingModel:
    options = {"sharding": "ddp", "compile_blocks": False, "device": torch.device("cpu")}
    return distribute(model, model.encoder.blocks, **options | changes)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_without_a_graph_break_under_the_same_names():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = spread(network(), compile_blocks=True)
    found, expected = gradients(compiled), gradients(network())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch._dynamo.utils.counters["graph_break"]
    # two sizes of view, and no compilation for each of the blocks
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert compiled.state_dict().keys() == network().state_dict().keys()


def test_checkpointed_activations_give_the_same_gradient():
    found, expected = gradients(network(checkpoint_activations=True)), gradients(network())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


def test_one_rank_needs_no_wrapping():
    model = network()
    assert spread(model) is model
    with gradients_stay_here(model, unless=False):
        pass


def test_gradients_are_scaled_to_the_largest_norm_and_no_further():
    model = torch.nn.Linear(1, 2, bias=False)
    model.weight.grad = torch.tensor([[3.0], [4.0]])
    assert clip_by_global_norm(model, 10.0) == 5
    assert model.weight.grad.tolist() == [[3.0], [4.0]]
    assert clip_by_global_norm(model, 1.0) == 5
    assert model.weight.grad.flatten().tolist() == pytest.approx([0.6, 0.8])


def test_another_sharding_is_refused():
    with pytest.raises(ValueError, match=r"sharding must be one of \('ddp', 'fsdp2'\), got 'zero'"):
        spread(network(), sharding="zero")


def test_a_network_that_does_not_learn_is_left_as_it_is():
    teacher = network().requires_grad_(False)
    assert spread(teacher) is teacher
