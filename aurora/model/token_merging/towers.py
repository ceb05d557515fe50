"""Find the vision tower in a model of another library, and describe it as the merging sees it.

Classes are recognised by name, since their packages are no dependencies of Aurora and are not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from aurora.model.token_merging.blocks import BlockParts, parts_of

_CONTAINERS = {
    "transformers.models.llava.modeling_llava.LlavaForConditionalGeneration": "model",
    "transformers.models.llava.modeling_llava.LlavaModel": "vision_tower",
    "transformers.models.clip.modeling_clip.CLIPModel": "vision_model",
    "transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection": "vision_model",
    "transformers.models.clip.modeling_clip.CLIPForImageClassification": "vision_model",
    "transformers.models.siglip.modeling_siglip.SiglipModel": "vision_model",
    "transformers.models.siglip.modeling_siglip.SiglipForImageClassification": "vision_model",
    "open_clip.model.CLIP": "visual",
    "open_clip.model.CustomTextCLIP": "visual",
    "open_clip.coca_model.CoCa": "visual",
    "open_clip.timm_model.TimmModel": "trunk",
}
_TOWERS = {
    "timm.models.vision_transformer.VisionTransformer": "timm",
    "transformers.models.clip.modeling_clip.CLIPVisionModel": "hf",
    "transformers.models.clip.modeling_clip.CLIPVisionTransformer": "hf",
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": "hf",
    "transformers.models.siglip.modeling_siglip.SiglipVisionTransformer": "hf",
    "open_clip.transformer.VisionTransformer": "open_clip",
}


@dataclass(kw_only=True, slots=True)
class ForeignTower:
    """A vision tower of another library."""

    module: Any
    """The tower."""
    blocks: list[Any]
    """Its transformer blocks, in order."""
    parts: BlockParts
    """How to run them."""
    patch_layer: nn.Module
    """The layer that is called with the pixels, (B, 3, height, width)."""
    patch_size: int
    """Patch side in pixels."""
    image_size: tuple[int, int]
    """Height and width in pixels that the tower was made for."""
    num_prefix_tokens: int
    """Class and register tokens before the patches."""
    pads: bool = False
    """Whether pixels that fill no patch are padded to one; else they are dropped."""
    checkpointing: Any = None
    """The object whose `grad_checkpointing` makes the tower recompute whole blocks."""

    def fitted(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Height and width in pixels after the tower's own padding."""
        if not self.pads:
            return height_px, width_px
        side = self.patch_size
        return -(-height_px // side) * side, -(-width_px // side) * side


def find_tower(module: nn.Module) -> ForeignTower:
    """Find and describe the tower in a model.

    Args:
        module: A tower, or a model that holds one.

    Returns:
        The description.

    Raises:
        ValueError: for a class that is not known, or a tower whose blocks cannot merge.
    """
    kind, tower = None, module
    while kind is None:
        names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(tower).__mro__]
        kind = next((_TOWERS[name] for name in names if name in _TOWERS), None)
        inner = next((_CONTAINERS[name] for name in names if name in _CONTAINERS), None)
        if kind is None and inner is None:
            raise ValueError(_unknown(module, tower))
        tower = tower if kind is not None or inner is None else getattr(tower, inner)
    return {"timm": _timm, "hf": _hugging_face, "open_clip": _open_clip}[kind](tower)


def _unknown(module: nn.Module, tower: nn.Module) -> str:
    names = ", ".join(sorted({name.split(".")[0] + " " + name.rpartition(".")[2] for name in (*_TOWERS, *_CONTAINERS)}))
    got = type(tower).__name__
    if hasattr(module, "_orig_mod"):
        return "apply_token_merging: got a compiled module, want it before torch.compile"
    inside = "" if tower is module else f" in {type(module).__name__}"
    return f"apply_token_merging: got a module of class {got}{inside}, want a vision tower or one of: {names}"


def _same_parts(blocks: list[Any], where: str) -> BlockParts:
    if not blocks:
        raise ValueError(f"{where}: got no blocks, want at least one")
    first, *_ = [parts_of(block, f"{where}.{index}") for index, block in enumerate(blocks)]
    return first


def _square(patch_size: Any, where: str) -> int:
    sides = {int(side) for side in (patch_size if isinstance(patch_size, tuple | list) else (patch_size,))}
    if len(sides) != 1:
        raise ValueError(f"{where}: got patch_size={patch_size}, want square patches")
    return sides.pop()


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) else (int(size), int(size))


def _timm(tower: Any) -> ForeignTower:
    embed = tower.patch_embed
    if type(embed).__name__ != "PatchEmbed":
        raise ValueError(f"patch_embed: got class {type(embed).__name__}, want PatchEmbed, one convolution")
    blocks = list(tower.blocks)
    side = _square(embed.patch_size, "patch_embed")
    return ForeignTower(
        module=tower,
        blocks=blocks,
        parts=_same_parts(blocks, "blocks"),
        patch_layer=embed,
        patch_size=side,
        image_size=_pair(embed.img_size if embed.img_size is not None else side),
        num_prefix_tokens=int(tower.num_prefix_tokens),
        pads=bool(getattr(embed, "dynamic_img_pad", False)),
        checkpointing=tower,
    )


def _hugging_face(tower: Any) -> ForeignTower:
    if not hasattr(tower, "encoder"):
        return _hugging_face(tower.vision_model)
    blocks = list(tower.encoder.layers)
    return ForeignTower(
        module=tower,
        blocks=blocks,
        parts=_same_parts(blocks, "encoder.layers"),
        patch_layer=tower.embeddings.patch_embedding,
        patch_size=_square(tower.embeddings.patch_size, "embeddings"),
        image_size=_pair(tower.embeddings.image_size),
        num_prefix_tokens=int(hasattr(tower.embeddings, "class_embedding")),
    )


def _open_clip(tower: Any) -> ForeignTower:
    blocks = list(tower.transformer.resblocks)
    return ForeignTower(
        module=tower,
        blocks=blocks,
        parts=_same_parts(blocks, "transformer.resblocks"),
        patch_layer=tower.conv1,
        patch_size=_square(tower.patch_size, "conv1"),
        image_size=_pair(tower.image_size),
        num_prefix_tokens=1,
        checkpointing=tower.transformer,
    )
