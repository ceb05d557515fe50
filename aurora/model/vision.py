"""Vision tower: a CLIP ViT whose every block merges similar tokens between its attention and its MLP.

CLIP (Radford et al., 2021) for the network, Token Merging (Bolya et al., 2023) for the merge, AuroraCap (Chai et al.,
2024) for putting them together. Features leave after block `num_layers + feature_layer`; what lies behind is not run.

Shape letters: B frames, N tokens including the class token, C width, H heads, D head width, P patch side in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aurora.kernels.merge import key_metric, match_tokens, merge_tokens_norm
from aurora.model.attention import attention
from aurora.model.linear import Linear
from aurora.model.merge import Matching, MergePlan, SizeBias, merge_source


class Activation(Enum):
    """Activation of an MLP, by its Hugging Face name."""

    quick_gelu = "quick_gelu"
    """x * sigmoid(1.702 x): CLIP of OpenAI and DFN, and AuroraCap's tower."""
    gelu = "gelu"
    """The exact one, with erf."""
    gelu_tanh = "gelu_pytorch_tanh"
    """Its tanh approximation: SigLIP."""


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation elementwise."""
    if activation is Activation.quick_gelu:
        # In place where autograd allows it: each temporary of this width is fresh memory, whose page faults cost a
        # ViT-H MLP on a CPU as much as its two matrix products.
        gate = (1.702 * x).sigmoid_()
        return x * gate if gate.requires_grad else gate.mul_(x)
    return F.gelu(x, approximate="tanh" if activation is Activation.gelu_tanh else "none")


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    """Sizes of the vision tower; the defaults are ViT-H/14 at 378 px (DFN5B), AuroraCap's."""

    hidden_size: int = 1280
    """Width C of the tokens."""
    intermediate_size: int = 5120
    """Width of the MLP."""
    num_layers: int = 32
    """Transformer blocks."""
    num_heads: int = 16
    """Attention heads; divides hidden_size."""
    patch_size: int = 14
    """Patch side in pixels."""
    image_size: int = 378
    """Frame side in pixels that the position table was made for."""
    num_channels: int = 3
    """Colour channels."""
    hidden_act: Activation = Activation.quick_gelu
    """Activation of the MLP."""
    norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    class_token: bool = True
    """A class token in front of the patches, which never merges (CLIP); SigLIP has none."""
    pre_norm: bool = True
    """A LayerNorm before the first block (CLIP)."""
    patch_bias: bool = False
    """A bias in the patch embedding (SigLIP)."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"vision.num_heads={self.num_heads}: want a divisor of vision.hidden_size={self.hidden_size}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"vision.image_size={self.image_size}: want at least vision.patch_size={self.patch_size}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of a square frame."""
        return self.image_size // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: one with a class token."""
        return int(self.class_token)


class VisionTrace(NamedTuple):
    """What merging did, layer by layer; pictures are drawn from this."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    num_prefix_tokens: int
    """Tokens before the patches, which never merge: 1 with a class token, else 0."""
    sizes: list[Tensor]
    """Patches per token after each layer, (B, N_layer, 1) float32; the class token counts as one."""
    sources: list[Tensor]
    """Token that holds each input token after each layer, (B, prefix + patches) int64."""
    similarities: list[Tensor]
    """Cosine similarity of the pairs merged in each layer, (B, r) float32."""


class VisionOutput(NamedTuple):
    """Tokens of a tower run."""

    hidden: Tensor
    """(B, N, C), the class token first if there is one."""
    size: Tensor
    """Patches per token, (B, N, 1) float32."""
    trace: VisionTrace | None


class VisionAttention(nn.Module):
    """Multi-head self-attention that also hands out its keys, the metric of the merge."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the tokens (B, N, C), each (B, N, H, D)."""
        q, k, v = (
            rearrange(proj(x), "b n (h d) -> b n h d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def forward(self, x: Tensor, *, key_bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        """Return the attended tokens (B, N, C) and the keys (B, N, H, D)."""
        q, k, v = self.project(x)
        out = attention(q, k, v, key_bias=key_bias, backend=backend)
        return self.out_proj(rearrange(out, "b n h d -> b n (h d)")), k


class VisionMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        return self.fc2(activate(self.fc1(x), self.activation))


class VisionBlock(nn.Module):
    """Attention, merge, MLP; pre-norm with residuals."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_token = config.class_token
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config)

    def forward(
        self, x: Tensor, size: Tensor, r: int, size_bias: SizeBias, backend: str
    ) -> tuple[Tensor, Tensor, Matching | None]:
        """Run the block.

        Args:
            x: Tokens, (B, N, C).
            size: Patches per token, (B, N, 1) float32.
            r: Pairs to merge.
            size_bias: Whether log(size) biases the keys.
            backend: Attention backend.

        Returns:
            Tokens (B, N - r, C), their sizes (B, N - r, 1), and the matching, or None where r is 0.
        """
        key_bias = size[..., 0].log() if size_bias is SizeBias.keys else None
        attended, keys = self.attn(self.norm1(x), key_bias=key_bias, backend=backend)
        if r == 0:
            x = x + attended
            return x + self.mlp(self.norm2(x)), size, None
        match = match_tokens(key_metric(keys), r, class_token=self.class_token)
        norm = self.norm2
        x, normed, size = merge_tokens_norm(x, attended, size, match, norm.weight, norm.bias, norm.eps)  # (B, N - r, C)
        return x + self.mlp(normed), size, match


class VisionTower(nn.Module):
    """Patch embedding, position table, and blocks that merge."""

    def __init__(self, config: VisionConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend: str = backend
        self.activation_checkpointing = False
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(
            config.num_channels, width, kernel_size=patch, stride=patch, bias=config.patch_bias
        )
        self.cls_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(config.num_prefix_tokens + config.grid_size**2, width))
        self.norm_pre = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.norm_post = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        *,
        plan: MergePlan | None = None,
        feature_layer: int = -2,
        size_bias: SizeBias = SizeBias.off,
        trace: bool = False,
    ) -> VisionOutput:
        """Encode frames and merge their tokens as planned.

        Args:
            pixel_values: Normalised frames, (B, 3, height, width); any size of at least one patch, and any aspect.
            plan: Merges per layer for this frame size; None merges nothing.
            feature_layer: Hidden state to return: -1 is the output of the last block, -2 of the one before.
            size_bias: Whether log(size) biases the attention keys.
            trace: Also record sizes, sources and similarities of every layer.

        Returns:
            Tokens with the class token first if there is one, before the final norm.

        Raises:
            ValueError: if the shape, the layer or the plan does not fit.
        """
        config = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values: got {tuple(pixel_values.shape)}, want (frames, {config.num_channels}, height, width)"
            )
        num_active = num_active_layers(config, feature_layer)
        x, grid = self.embed(pixel_values)  # (B, N, C)
        num_patches = grid[0] * grid[1]
        plan = plan or MergePlan((0,) * num_active, (num_patches,) * (num_active + 1))
        if len(plan.r) != num_active or plan.num_patches != num_patches:
            raise ValueError(
                f"plan: got {len(plan.r)} layers over {plan.num_patches} patches, want {num_active} over {num_patches}"
            )
        size = torch.ones(*x.shape[:2], 1, dtype=torch.float32, device=x.device)
        record = VisionTrace(grid, config.num_prefix_tokens, [], [], []) if trace else None
        source = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        for block, r in zip(self.blocks[:num_active], plan.r, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, size, match = checkpoint(block, x, size, r, size_bias, self.backend, use_reentrant=False)
            else:
                x, size, match = block(x, size, r, size_bias, self.backend)
            if record is not None:
                source = source if match is None else merge_source(source, match)
                record.sizes.append(size)
                record.sources.append(source)
                record.similarities.append(size.new_zeros(size.shape[0], 0) if match is None else match.scores)
        return VisionOutput(x, size, record)

    def compile_blocks(self, *, backend: str | Callable[..., object] = "inductor") -> None:
        """Have torch.compile make fused code of the blocks, at their first run.

        All blocks share it: token counts and r are symbols in it, since merging gives every layer another count and
        code for each would pass the limit of recompilations. There, as at a graph break, this raises; nothing falls
        back to running uncompiled.

        Args:
            backend: A backend of torch.compile, by name or as a function.
        """
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=True, backend=backend)

    def embed(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed patches, add positions and normalise: (B, prefix + patches, C) and the patch grid (rows, columns)."""
        patches = self.patch_embed(pixel_values)  # (B, C, rows, columns)
        grid = (patches.shape[2], patches.shape[3])
        tokens = rearrange(patches, "b c rows columns -> b (rows columns) c")
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens], dim=1)
        positions = interpolate_positions(self.pos_embed, self.config.grid_size, grid)
        return self.norm_pre(tokens + positions.to(tokens.dtype)), grid


def num_active_layers(config: VisionConfig, feature_layer: int) -> int:
    """Blocks that run for `feature_layer`, counted from the end as Hugging Face counts hidden states.

    Raises:
        ValueError: if the tower has no such hidden state.
    """
    if not -config.num_layers - 1 <= feature_layer <= -1:
        raise ValueError(
            f"feature_layer={feature_layer}: want -1 to {-config.num_layers - 1}, counted from the last of the layers"
        )
    return config.num_layers + 1 + feature_layer


def interpolate_positions(table: Tensor, grid_size: int, grid: tuple[int, int]) -> Tensor:
    """Stretch a square position table to another patch grid; the table itself is not touched.

    Bicubic with scale factors (rows + 0.1) / grid_size, as the published code has it: that differs from interpolating
    to the target size by up to 0.2.

    Args:
        table: Class position first if there is one, then row-major patches, (prefix + grid_size ** 2, C).
        grid_size: Side of the table's grid.
        grid: Wanted rows and columns.

    Returns:
        (prefix + rows * columns, C) in the dtype of the table.
    """
    rows, columns = grid
    if (rows, columns) == (grid_size, grid_size):
        return table
    prefix = table.shape[0] - grid_size**2
    patches = rearrange(table[prefix:], "(rows columns) c -> 1 c rows columns", rows=grid_size).float()
    scale = ((rows + 0.1) / grid_size, (columns + 0.1) / grid_size)
    patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([table[:prefix], rearrange(patches, "1 c rows columns -> (rows columns) c").to(table.dtype)])
