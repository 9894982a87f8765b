"""AdamW as DALE-CT's pretraining uses it."""

import torch
from torch import nn


def adamw(network: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Build AdamW with betas (0.9, 0.999) and eps 1e-6, without weight decay on one-dimensional parameters.

    One fused kernel updates all parameters.

    Norms, biases and LayerScale are one-dimensional; position embedding and class token are decayed.

    Source: recipe of the DALE-CT release (the paper does not state it).

    Args:
        network: every parameter that requires a gradient is optimized, the auxiliary head's included.
        lr: peak learning rate.
        weight_decay: decay of matrices and embeddings.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim > 1],
            "weight_decay": weight_decay,
        },
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-6, fused=True)
