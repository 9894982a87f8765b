"""The paper as a table: every value it states, and those its recipe states, against the rendered bundles."""

import json
from pathlib import Path

import pytest
import timm
import torch
from monai.bundle import ConfigParser

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"

PAPER = [  # bundle, config, knob, value, where it is stated
    ("dale_ct_2s", "train", "slab_mm", 12.0, "III-A"),
    ("dale_ct_2s", "train", "num_global", 2, "III-A"),
    ("dale_ct_2s", "train", "num_local", 8, "III-A"),
    ("dale_ct_2s", "train", "global_size_px", 256, "III-A: 224 or 256"),
    ("dale_ct_2s", "train", "local_size_px", 144, "III-A: 140 or 144"),
    ("dale_ct_2s", "train", "guided_prob", 0.8, "III-A"),
    ("dale_ct_2s", "train", "guidance", "paper", "III-A: global and local views"),
    ("dale_ct_2s", "train", "aux_weight", 0.1, "III-C2; number of the release"),
    ("dale_ct_2s", "train", "auxiliary_head::num_ts_classes", 118, "III-C2"),
    ("dale_ct_2s", "train", "auxiliary_head::num_rex_classes", 14, "III-C2"),
    ("dale_ct_2s", "train", "auxiliary_terms", ["ts_cls", "ts_patch", "rex_cls", "rex_patch"], "Eq. 2"),
    ("dale_ct_2s", "train", "sigreg_weight", 0.02, "III-C1; number of the release"),
    ("dale_ct_2s", "train", "num_directions", 1024, "release"),
    ("dale_ct_2s", "train", "num_knots", 17, "release"),
    ("dale_ct_2s", "train", "t_max", 3.0, "release"),
    ("dale_ct_2s", "train", "projection_dim", 124, "release"),
    ("dale_ct_2s", "train", "projector_hidden_dim", 2048, "release"),
    ("dale_ct_2s", "train", "global_scale", [0.6, 1.0], "release"),
    ("dale_ct_2s", "train", "local_scale", [0.3, 0.6], "release"),
    ("dale_ct_2s", "train", "rex_fraction", 0.2, "release"),
    ("dale_ct_2s", "train", "flip_prob", 0.0, "ours: laterality is anatomy"),
    ("dale_ct_2s", "train", "gamma_prob", 0.8, "release"),
    ("dale_ct_2s", "train", "gamma_range", [0.9, 1.1], "release"),
    ("dale_ct_2s", "train", "blur_probs", [0.5, 0.1], "release"),
    ("dale_ct_2s", "train", "blur_sigma_range", [0.1, 2.0], "release"),
    ("dale_ct_2s", "train", "hu_window", "ct_rate", "III-A"),
    ("dale_ct_2s", "train", "identity::slice_axes", "yx", "ours: the radiological way"),
    ("dale_ct_2s", "inference", "slice_axes", None, "as the weights state"),
    ("dale_ct_2s", "inference", "hu_window", None, "as the weights state"),
    ("dale_ct_2s", "inference", "layer_scale_init", 1.0, "ours: of random weights, whose slices then differ"),
    ("dale_ct_2s", "train", "vit", "vit_large_patch14_dinov2", "III-C2: ViT-Large"),
    ("dale_ct_2s", "train", "patch_size_px", 16, "released weights; the paper says 14"),
    ("dale_ct_2s", "train", "img_size_px", 512, "released weights"),
    ("dale_ct_2s", "train", "embed_dim", 1024, "III-C2: ViT-Large"),
    ("dale_ct_2s", "train", "depth", 24, "III-C2: ViT-Large"),
    ("dale_ct_2s", "train", "num_heads", 16, "III-C2: ViT-Large"),
    ("dale_ct_2s", "train", "layer_scale_init", 1e-5, "release"),
    ("dale_ct_2s", "train", "batch_size", 64, "release: 64 x 8 ranks = 512"),
    ("dale_ct_2s", "train", "max_steps", 50_000, "release"),
    ("dale_ct_2s", "train", "warmup_steps", 5_000, "release"),
    ("dale_ct_2s", "train", "lr", 3e-4, "release"),
    ("dale_ct_2s", "train", "final_lr", 3e-5, "release"),
    ("dale_ct_2s", "train", "weight_decay", 0.04, "release"),
    ("dale_ct_2s", "train", "clip_norm", 3.0, "release; global norm is ours"),
    ("dale_ct_2s", "train", "amp_dtype", "bfloat16", "III-B"),
    ("dale_ct_2s", "train", "checkpoint_every", 2_000, "release"),
    ("dale_ct_2s", "inference", "strategies", ["cropped_256"], "IV-A2 and Table VI"),
    ("dale_ct_0", "train", "aux_weight", 0.0, "III-C1: no labels"),
    ("dale_ct_0", "train", "auxiliary_loss", None, "III-C1: no labels"),
    ("dale_ct_0", "train", "global_size_px", 256, "III-A: 224 or 256"),
    ("dale_ct_0", "train", "patch_size_px", 16, "released weights; the paper says 14"),
    ("dale_ct_1s", "train", "aux_weight", 0.1, "III-C2; number of the release"),
    ("dale_ct_1s", "train", "auxiliary_terms", ["ts_cls"], "III-C2: organs, CLS only"),
    ("dale_ct_1s", "train", "auxiliary_head::num_ts_classes", 118, "III-C2"),
    ("dale_ct_1s", "train", "auxiliary_head::num_rex_classes", 0, "III-C2: one source"),
    ("dale_ct_1s", "train", "patch_size_px", 14, "III-C2 and released weights"),
    ("dale_ct_1s", "train", "img_size_px", 518, "released weights"),
    ("dale_ct_1s", "train", "global_size_px", 224, "III-A: 224 or 256"),
    ("dale_ct_1s", "train", "local_size_px", 140, "III-A: 140 or 144"),
    ("dale_ct_1s", "inference", "strategies", ["cropped_252"], "IV-A2: 256; the multiple of 14 below"),
    ("dinov2_ct", "train", "vit", "vit_large_patch14_reg4_dinov2.lvd142m", "III-B: ViT-L with registers"),
    ("dinov2_ct", "train", "initial_weights", "hub", "III-B: natural-image weights"),
    ("dinov2_ct", "train", "network_def::in_chans", 1, "released weights"),
    ("dinov2_ct", "train", "patch_size_px", 14, "released weights"),
    ("dinov2_ct", "train", "img_size_px", 518, "released weights"),
    ("dinov2_ct", "train", "slab_mm", 12.0, "III-B"),
    ("dinov2_ct", "train", "hu_window", "ct_rate", "III-A"),
    ("dinov2_ct", "train", "num_global", 2, "III-B"),
    ("dinov2_ct", "train", "num_local", 14, "III-B"),
    ("dinov2_ct", "train", "num_guided_local", 6, "III-B: eight random, six guided"),
    ("dinov2_ct", "train", "global_scale", [0.4, 1.0], "III-B"),
    ("dinov2_ct", "train", "local_scale", [0.2, 0.4], "III-B"),
    ("dinov2_ct", "train", "global_size_px", 224, "lost; DINOv2"),
    ("dinov2_ct", "train", "local_size_px", 98, "lost; DINOv2"),
    ("dinov2_ct", "train", "mask_sample_prob", 0.5, "III-B"),
    ("dinov2_ct", "train", "mask_ratio", [0.1, 0.5], "III-B"),
    ("dinov2_ct", "train", "ibot_weight", 1.0, "DINOv2"),
    ("dinov2_ct", "train", "koleo_weight", 0.0, "III-B names DINO and iBOT alone; DINOv2: 0.1"),
    ("dinov2_ct", "train", "batch_size", 48, "III-B: 48 x 8 ranks = 384"),
    ("dinov2_ct", "train", "max_steps", 20_000, "III-B"),
    ("dinov2_ct", "train", "warmup_steps", 3_300, "III-B"),
    ("dinov2_ct", "train", "lr", 2e-4, "lost; weak evidence of the release"),
    ("dinov2_ct", "train", "final_lr", 1e-5, "lost; weak evidence of the release"),
    ("dinov2_ct", "train", "amp_dtype", "bfloat16", "III-B"),
    ("dinov2_ct", "train", "head_hidden_dim", 2048, "release"),
    ("dinov2_ct", "train", "head_bottleneck_dim", 256, "release"),
    ("dinov2_ct", "train", "num_prototypes", 65_536, "release"),
    ("dinov2_ct", "train", "balance", "sinkhorn_knopp", "DINOv2, ViT-L/14"),
    ("dinov2_ct", "train", "teacher_momentum", [0.994, 1.0], "DINOv2, ViT-L/14"),
    ("dinov2_ct", "train", "teacher_temp", [0.04, 0.07], "DINOv2"),
    ("dinov2_ct", "train", "teacher_temp_warmup_steps", 1_200, "DINOv2: 30 of 500 epochs"),
    ("dinov2_ct", "train", "freeze_last_layer_steps", 40, "DINOv2: 1 of 500 epochs"),
    ("dinov2_ct", "train", "weight_decay", [0.04, 0.2], "DINOv2, ViT-L/14"),
    ("dinov2_ct", "train", "layer_decay", 1.0, "DINOv2, ViT-L/14"),
    ("dinov2_ct", "train", "patch_embed_lr_multiplier", 0.2, "DINOv2"),
    ("dinov2_ct", "train", "clip_norm", 3.0, "DINOv2; global norm is ours"),
    ("dinov2_ct", "inference", "strategies", ["cropped_252"], "IV-A2: 256; the multiple of 14 below"),
    ("eval_ct_rate", "train", "learning_rates", [0.1, 0.03, 0.01, 0.003], "IV-B; numbers of the release"),
    ("eval_ct_rate", "train", "max_steps", 15_000, "IV-B"),
    ("eval_ct_rate", "train", "batch_size", 16, "IV-B"),
    ("eval_ct_rate", "train", "momentum", 0.95, "IV-B"),
    ("eval_ct_rate", "train", "val_interval", 2_500, "release"),
    ("eval_ct_rate", "train", "num_val_patients", 1_000, "release"),
    ("eval_ct_rate", "train", "seed", 42, "release"),
    ("eval_dense_2d", "train", "learning_rates", [0.1, 0.03, 0.01, 0.003], "numbers of the release"),
    ("eval_dense_2d", "train", "max_steps", 15_000, "IV-A3"),
    ("eval_dense_2d", "train", "batch_size", 256, "IV-A3"),
    ("eval_dense_2d", "train", "momentum", 0.95, "IV-A3"),
    ("eval_dense_2d", "train", "weight_decay", 0.0, "release"),
    ("eval_dense_2d", "train", "val_interval", 2_500, "release"),
    ("eval_dense_2d", "train", "split_percent", [70, 10, 20], "IV-A1"),
    ("eval_dense_2d", "train", "split_seed", 42, "release"),
    ("eval_dense_2d", "train", "min_positives", 5, "IV-A3"),
    ("eval_slab_depth", "evaluate", "min_slices", 16, "release"),
    ("eval_slab_depth", "evaluate", "num_resamples", 2_000, "release"),
    ("eval_slab_depth", "evaluate", "strides", [1, 2, 4, 8], "release"),
]


@pytest.mark.parametrize(("bundle", "config", "knob", "value", "where"), PAPER)
def test_the_bundle_holds_the_stated_value(bundle, config, knob, value, where):
    node = json.loads((BUNDLES / bundle / "configs" / f"{config}.json").read_text())
    for part in knob.split("::"):
        node = node[part]
    assert node == value, where


def test_the_encoder_is_a_vit_large_of_the_released_shape():
    parser = ConfigParser()
    parser.read_config(BUNDLES / "dale_ct_2s" / "configs" / "inference.json")
    with torch.device("meta"):
        encoder = timm.create_model(
            **{
                name: parser.get_parsed_content(f"network_def::{name}")
                for name in json.loads((BUNDLES / "dale_ct_2s" / "configs" / "inference.json").read_text())[
                    "network_def"
                ]
                if not name.startswith("_")
            }
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    assert shapes["pos_embed"] == (1, 1 + 32 * 32, 1024)
    assert shapes["patch_embed.proj.weight"] == (1024, 1, 16, 16)
    assert shapes["blocks.23.ls1.gamma"] == (1024,)
    assert "reg_token" not in shapes
    assert round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6) == 304


def test_the_baselines_encoder_has_registers_and_the_released_shape():
    knobs = json.loads((BUNDLES / "dinov2_ct" / "configs" / "inference.json").read_text())
    names = {"img_size": "img_size_px", "patch_size": "patch_size_px", "init_values": "layer_scale_init"}
    names |= {name: name for name in ("embed_dim", "depth", "num_heads")}
    with torch.device("meta"):
        encoder = timm.create_model(
            knobs["vit"], in_chans=1, num_classes=0, **{name: knobs[knob] for name, knob in names.items()}
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    assert shapes["reg_token"] == (1, 4, 1024)
    assert shapes["pos_embed"] == (1, 37 * 37, 1024)
    assert shapes["patch_embed.proj.weight"] == (1024, 1, 14, 14)
    assert shapes["blocks.23.ls1.gamma"] == (1024,)
