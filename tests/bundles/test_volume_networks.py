"""The 3D baselines' networks take the released state dictionaries strictly: every key, every shape.

The lists are written from the published descriptions, not from our networks; the weights are not needed.
"""

from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from torchvision.models import resnet152

from common.networks.encoder import load_strictly
from common.networks.published_weights import own_part

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
Shapes = dict[str, tuple[int, ...]]


def norm(key: str, width: int) -> Shapes:
    return {f"{key}.weight": (width,), f"{key}.bias": (width,)}


def batch_norm(key: str, width: int) -> Shapes:
    running = {f"{key}.running_mean": (width,), f"{key}.running_var": (width,)}
    return norm(key, width) | running | {f"{key}.num_batches_tracked": ()}


def linear(key: str, out: int, width: int) -> Shapes:
    return {f"{key}.weight": (out, width), f"{key}.bias": (out,)}


def ct_fm() -> Shapes:
    """SegResNet's encoder: 32 filters that double, blocks of two convolutions, 1-2-2-4-4 of them."""
    shapes: Shapes = {"conv_init.weight": (32, 1, 3, 3, 3)}
    for level, blocks in enumerate((1, 2, 2, 4, 4)):
        width = 32 * 2**level
        for block in range(blocks):
            for part in (1, 2):
                key = f"layers.{level}.blocks.{block}"
                shapes |= batch_norm(f"{key}.norm{part}", width)
                shapes[f"{key}.conv{part}.weight"] = (width, width, 3, 3, 3)
        if level < 4:
            shapes[f"layers.{level}.downsample.weight"] = (2 * width, width, 3, 3, 3)
    return shapes


def merlin() -> Shapes:
    """ResNet-152 of torchvision with an axis more, of 3 for kernels above 1; two heads; a text encoder."""
    with torch.device("meta"):
        flat = resnet152().state_dict()
    shapes: Shapes = {"logit_scale": (), "encode_text.linear_layer.weight": (512, 768)}
    for key, tensor in flat.items():
        shape = tuple(tensor.shape)
        if len(shape) == 4:
            shape = (*shape[:2], 1 if shape[2] == 1 else 3, *shape[2:])
        if not key.startswith("fc."):
            shapes[f"encode_image.i3_resnet.{key}"] = shape
    for head, classes in (("classifier", 1692), ("contrastive_head", 512)):
        shapes[f"encode_image.i3_resnet.{head}.weight"] = (classes, 2048, 1, 1, 1)
        shapes[f"encode_image.i3_resnet.{head}.bias"] = (classes,)
    return shapes


def ct_clip() -> Shapes:
    """CTViT of 512, 4 + 4 blocks of 8 heads of 32, 8192 codes; its decoder's last layer; the projections."""
    tower: Shapes = {}
    for name, voxels in (("to_patch_emb", 4000), ("to_patch_emb_first_frame", 400)):
        tower |= norm(f"{name}.1", voxels) | linear(f"{name}.2", 512, voxels) | norm(f"{name}.3", 512)
    tower |= linear("to_pixels.0", 4000, 512) | linear("to_pixels_first_frame.0", 400, 512)
    for layer, (out, width) in (("0.0", (512, 2)), ("1.0", (512, 512)), ("2", (8, 512))):
        tower |= linear(f"spatial_rel_pos_bias.net.{layer}", out, width)
    for transformer in ("enc_spatial_transformer", "enc_temporal_transformer"):
        for layer in range(4):
            key = f"{transformer}.layers.{layer}"
            tower |= {f"{key}.0.dsconv.weight": (512, 1, 3, 3, 3), f"{key}.0.dsconv.bias": (512,)}
            for part in ("norm", "context_norm"):
                tower |= {f"{key}.1.{part}.gamma": (512,), f"{key}.1.{part}.beta": (512,)}
            tower |= {f"{key}.1.null_kv": (8, 0, 32), f"{key}.1.q_scale": (32,), f"{key}.1.k_scale": (32,)}
            tower |= {f"{key}.1.to_q.weight": (256, 512), f"{key}.1.to_kv.weight": (512, 512)}
            tower |= {f"{key}.1.to_out.weight": (512, 256)} | norm(f"{key}.3.0", 512)
            tower |= {f"{key}.3.1.weight": (2730, 512), f"{key}.3.4.weight": (512, 1365)}
        tower |= {f"{transformer}.norm_out.gamma": (512,), f"{transformer}.norm_out.beta": (512,)}
    tower |= {"vq._codebook.initted": (1,), "vq._codebook.cluster_size": (1, 8192)}
    tower |= {"vq._codebook.embed": (1, 8192, 512)}
    shapes = {f"visual_transformer.{key}": shape for key, shape in tower.items()}
    shapes |= {"to_visual_latent.weight": (512, 294_912), "to_visual_latent_extra.weight": (512, 294_912)}
    return shapes | {"temperature": (), "text_transformer.embeddings.position_ids": (1, 512)}


def colipri() -> Shapes:
    """Primus-M: 16 blocks of 864, SwiGLU of 2304, patches of 8; projector and pooler of 768; text."""
    encoder: Shapes = {"backbone.mask_token": (1, 1, 864), "backbone.eva.rope.pos_embed": (13_824, 144)}
    encoder |= {
        "backbone.down_projection.proj.weight": (864, 1, 8, 8, 8),
        "backbone.down_projection.proj.bias": (864,),
    }
    for block in range(16):
        key = f"backbone.eva.blocks.{block}"
        for part in ("norm1", "norm2", "attn.norm"):
            encoder |= norm(f"{key}.{part}", 864)
        for part in ("attn.q_proj", "attn.v_proj", "attn.proj"):
            encoder |= linear(f"{key}.{part}", 864, 864)
        encoder |= {f"{key}.attn.k_proj.weight": (864, 864)} | norm(f"{key}.mlp.norm", 2304)
        for part in ("mlp.fc1_g", "mlp.fc1_x"):
            encoder |= linear(f"{key}.{part}", 2304, 864)
        encoder |= linear(f"{key}.mlp.fc2", 864, 2304)
        encoder |= {f"{key}.gamma_1": (864,), f"{key}.gamma_2": (864,)}
    encoder |= norm("backbone.eva.norm", 864)
    encoder |= {"projector.weight": (768, 864, 1, 1, 1), "projector.bias": (768,)}
    encoder |= {"pooler.attn.in_proj_weight": (2304, 768), "pooler.attn.in_proj_bias": (2304,)}
    encoder |= linear("pooler.attn.out_proj", 768, 768)
    shapes = {f"image_encoder.{key}": shape for key, shape in encoder.items()}
    return shapes | {"softmax_temperature": (), "text_encoder.pooler.query": (1, 4, 768)}


PUBLISHED = {"ct_fm": ct_fm, "ct_clip": ct_clip, "merlin": merlin, "colipri": colipri}
each_bundle = pytest.mark.parametrize("bundle", PUBLISHED)


def tensors(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def config_of(bundle: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(BUNDLES / bundle / "configs" / "inference.json")
    parser["bundle_root"] = str(BUNDLES / bundle)
    return parser


def loaded(bundle: str, published: dict[str, torch.Tensor]) -> torch.nn.Module:
    config = config_of(bundle)
    with torch.device("meta"):
        network = config.get_parsed_content("network_def")
    options = {name: config[f"network::{name}"] for name in ("prefixes", "ignored", "summed")}
    load_strictly(network, own_part(published, **options), bundle)
    return network


@each_bundle
def test_a_state_dictionary_of_the_published_keys_and_shapes_loads_strictly(bundle):
    loaded(bundle, tensors(PUBLISHED[bundle]()))


@each_bundle
def test_a_state_dictionary_that_lacks_or_adds_a_key_does_not(bundle):
    prefix = next(iter(config_of(bundle)["network::prefixes"]))
    shapes = PUBLISHED[bundle]()
    lost = {
        "ct_fm": "layers.2.blocks.1.norm2.running_var",
        "ct_clip": "visual_transformer.enc_temporal_transformer.layers.3.3.4.weight",
        "merlin": "encode_image.i3_resnet.layer3.35.bn3.bias",
        "colipri": "image_encoder.backbone.eva.blocks.15.gamma_2",
    }[bundle]
    with pytest.raises(ValueError, match="(?i)missing key"):
        loaded(bundle, tensors({key: shape for key, shape in shapes.items() if key != lost}))
    with pytest.raises(ValueError, match=r"(?i)unexpected key.*new\.weight"):
        loaded(bundle, tensors(shapes | {f"{prefix}new.weight": (1,)}))


@pytest.mark.parametrize(
    ("bundle", "prefix", "millions"),
    [
        ("ct_fm", "", 77.76),
        # the released tower, with the parts that encoding has no use for
        ("ct_clip", "visual_transformer.", 25.89),
        ("merlin", "encode_image.i3_resnet.", 117.35),
        ("colipri", "image_encoder.backbone.", 144.09),
    ],
)
def test_the_count_of_parameters_is_the_published_one(bundle, prefix, millions):
    buffers = ("running_mean", "running_var", "num_batches_tracked", ".beta", "pos_embed", "mask_token")
    shapes = {
        key: shape
        for key, shape in PUBLISHED[bundle]().items()
        if key.startswith(prefix) and not key.endswith(buffers) and "_codebook" not in key
    }
    if bundle == "merlin":  # counted as the network of one channel, without its heads
        shapes = {
            key: shape for key, shape in shapes.items() if "classifier" not in key and "head" not in key
        }
        shapes["encode_image.i3_resnet.conv1.weight"] = (64, 1, 3, 7, 7)
    assert round(sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e6, 2) == millions
