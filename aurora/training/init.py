"""Initial weights of a model trained from nothing."""

import math

import torch
from torch import Tensor, nn

from aurora.model.llama import Llama
from aurora.model.vision import VisionTower


def init_tower(tower: VisionTower) -> None:
    """Draw the tower's weights; positions start as a 2-D sine-cosine table and stay learnable."""
    _init_linears(tower)
    config = tower.config
    fan_in = config.num_channels * config.patch_size**2
    nn.init.normal_(tower.patch_embed.weight, std=fan_in**-0.5)
    if tower.cls_token is not None:
        nn.init.normal_(tower.cls_token, std=0.02)
    with torch.no_grad():
        tower.pos_embed.copy_(sincos_positions(config.grid_size, config.hidden_size)[-len(tower.pos_embed) :])
    _calm_residuals(tower.blocks, ("attn.out_proj", "mlp.fc2"))


def init_llama(decoder: Llama) -> None:
    """Draw the decoder's weights."""
    _init_linears(decoder)
    nn.init.normal_(decoder.embed_tokens.weight, std=0.05)
    if decoder.lm_head is not None:
        nn.init.normal_(decoder.lm_head.weight, std=0.02)
    _calm_residuals(decoder.layers, ("self_attn.o_proj", "mlp.down_proj"))


def sincos_positions(grid_size: int, hidden_size: int) -> Tensor:
    """Return sines and cosines of row and column at geometric frequencies, zeros for the class token.

    Args:
        grid_size: Patches along one side.
        hidden_size: Width C, a multiple of 4.

    Returns:
        (1 + grid_size ** 2, C) float32.

    Raises:
        ValueError: if the width is not a multiple of 4.
    """
    if hidden_size % 4:
        raise ValueError(f"vision.hidden_size={hidden_size}: want a multiple of 4 for sine-cosine positions")
    quarter = hidden_size // 4
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)
    rows, columns = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, hidden_size), table])


def _init_linears(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.6 * layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _calm_residuals(layers: nn.ModuleList, outputs: tuple[str, ...]) -> None:
    """Shrink what each layer adds to the residual stream, so that its variance does not grow with depth (GPT-2)."""
    for layer in layers:
        for name in outputs:
            layer.get_submodule(name).get_parameter("weight").data.div_(math.sqrt(2 * len(layers)))
