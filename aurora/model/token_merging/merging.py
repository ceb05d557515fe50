"""Bring token merging to a vision tower of timm, Hugging Face or open_clip, and take it away again.

Nothing of the tower is replaced: each block instance gets a `forward` of its own that runs the block's layers with a
merge between attention and MLP, where AuroraCap and Token Merging (Bolya et al., 2023) have it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aurora.model.merge import MergeConfig, MergePlan, Schedule, SizeBias, plan_merge
from aurora.model.token_merging.placeholders import LlavaPrompt, llava_prompt
from aurora.model.token_merging.run import MergeRun, merged_forward, note_pixels, unmerged_intermediates
from aurora.model.token_merging.towers import ForeignTower, find_tower
from aurora.model.vision import VisionConfig, VisionTrace


class TokenMerging:
    """The merging of one tower: what it will deliver, what it did, and the way back.

    Also a context manager that removes the merging at its end. Models copy, pickle and compile with their merging; the
    copy's is found by `apply_token_merging`, which replaces it.
    """

    def __init__(self, module: nn.Module, tower: ForeignTower, config: MergeConfig, feature_layer: int) -> None:
        self.module = module
        self.tower = tower
        self.config = config
        self.wish = ""
        """The configuration as text."""
        self.feature_layer = feature_layer
        self.prompt: LlavaPrompt | None = llava_prompt(module)
        self.tracing = False
        self.activation_checkpointing = False
        """Recompute blocks in the backward pass of training instead of keeping their activations."""
        self.run = MergeRun()
        self.hooks: list[RemovableHandle] = []
        self.intermediates_arguments: tuple[str, ...] = ()
        num_layers = len(tower.blocks)
        if not -num_layers - 1 <= feature_layer <= num_layers:
            raise ValueError(f"feature_layer={feature_layer}: want -{num_layers + 1} to {num_layers}")
        self.num_active_layers = feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer
        """Blocks that may merge: those before the hidden state that is used."""
        self.vision = VisionConfig(
            hidden_size=1,
            num_heads=1,
            num_layers=num_layers,
            patch_size=tower.patch_size,
            image_size=max(tower.patch_size, *tower.image_size),
        )

    def __repr__(self) -> str:
        if not self.hooks:
            return f"TokenMerging({type(self.tower.module).__name__}, removed)"
        plan = self.plan
        return (
            f"TokenMerging({type(self.tower.module).__name__}, {plan.num_patches} -> {plan.num_visual_tokens} tokens)"
        )

    def __enter__(self) -> TokenMerging:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def plan(self) -> MergePlan:
        """What an image of the tower's own size goes through."""
        return self.plan_for(*self.tower.image_size)

    def plan_for(self, height_px: int, width_px: int) -> MergePlan:
        """Plan the merges of an image.

        Args:
            height_px: Image height in pixels, as it enters the tower.
            width_px: Image width in pixels.

        Returns:
            Merges per layer, and visual tokens after each; prefix tokens are not counted.

        Raises:
            ValueError: as `aurora.model.merge.plan_merge`.
        """
        height, width = self.tower.fitted(height_px, width_px)
        return plan_merge(
            self.config,
            height_px=height,
            width_px=width,
            vision=self.vision,
            num_active_layers=self.num_active_layers,
        )

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def written_plan(self, height_px: int, width_px: int) -> str:
        """Rows and columns of patches and the merges in every block, as text, which compilers keep constant."""
        plan = self.plan_for(height_px, width_px)
        height, width = self.tower.fitted(height_px, width_px)
        side, unmerged = self.tower.patch_size, len(self.tower.blocks) - len(plan.r)
        return " ".join(map(str, (height // side, width // side, *plan.r, *(0,) * unmerged)))

    @property
    def trace(self) -> VisionTrace:
        """What the last forward pass merged, layer by layer; merge pictures are drawn from this.

        Raises:
            ValueError: if nothing was recorded.
        """
        if not self.run.sources:
            raise ValueError("trace: nothing recorded; want trace=True and then a forward pass")
        return self.run.trace(self.tower.num_prefix_tokens)

    @property
    def sources(self) -> list[Tensor]:
        """Token that holds each input token after each layer, (B, prefix + patches) int64; see `trace`."""
        return self.trace.sources

    def num_placeholders(self, height_px: int | None = None, width_px: int | None = None) -> int:
        """Image tokens that LLaVA's prompt must hold for one image, as its features are counted.

        Args:
            height_px: Image height in pixels; None is the tower's own size.
            width_px: Image width in pixels.

        Returns:
            The count, after merging and after the class token is dropped or kept.

        Raises:
            ValueError: if the module is no LLaVA.
        """
        return self._prompt().num_features(self._plan(height_px, width_px).num_visual_tokens)

    def fit_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        height_px: int | None = None,
        width_px: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Shorten the runs of placeholders that a processor wrote for unmerged images.

        Args:
            input_ids: Token ids, (B, T), with `num_patches` (and prefix) placeholders for each image.
            attention_mask: 1 where a token is, (B, T); None: everywhere.
            height_px: Height of every image in pixels; None is the tower's own size.
            width_px: Width of every image in pixels.

        Returns:
            The same text with `num_placeholders` for each image, and its mask; rows that lost more are padded on the
            left.

        Raises:
            ValueError: if the module is no LLaVA, or a row does not hold whole images.
        """
        prompt, plan = self._prompt(), self._plan(height_px, width_px)
        full, kept = prompt.num_features(plan.num_patches), prompt.num_features(plan.num_visual_tokens)
        return prompt.shorten(input_ids, attention_mask, full, kept)

    def set(
        self,
        token_kept_ratio: float | None = None,
        *,
        schedule: Schedule | str | None = None,
        inflection: float | None = None,
        r: int | Sequence[int] | None = None,
        size_bias: SizeBias | str | None = None,
        trace: bool | None = None,
    ) -> TokenMerging:
        """Change what is merged from the next forward pass on; arguments as in `apply_token_merging`.

        What is not given stays, except that a ratio or a schedule ends an earlier `r`, and `r` an earlier ratio.

        Returns:
            The same merging.

        Raises:
            ValueError: for a value that does not fit; then nothing has changed.
        """
        old = self.config
        if r is None and old.schedule is Schedule.list and token_kept_ratio is None and schedule is None:
            r = list(old.r)
        elif r is None:
            token_kept_ratio = old.token_kept_ratio if token_kept_ratio is None else token_kept_ratio
            schedule = old.schedule if schedule is None and old.schedule is not Schedule.list else schedule
        config = merge_config(
            token_kept_ratio,
            schedule=schedule,
            inflection=old.inflection if inflection is None else inflection,
            r=r,
            size_bias=old.size_bias if size_bias is None else size_bias,
            num_active_layers=self.num_active_layers,
        )
        self.config = config
        try:
            self.plan_for(*self.tower.image_size)  # refuse at once what the first image would
        except ValueError:
            self.config = old
            raise
        self.wish = repr(config)
        self.tracing = self.tracing if trace is None else trace
        return self

    def remove(self) -> None:
        """Give the module back as it was; a second call does nothing."""
        if not self.hooks:
            return
        for block in self.tower.blocks:
            if "_hf_hook" in block.__dict__:
                block._old_forward = MethodType(type(block).forward, block)
            else:
                del block.forward
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.tower.module.__dict__.pop("forward_intermediates", None)

    def _install(self) -> None:
        tower = self.tower
        for index, block in enumerate(tower.blocks):
            _refuse_override(block, index)
        for index, block in enumerate(tower.blocks):
            # accelerate lays a forward over the instance, which calls `_old_forward` between its hooks.
            slot = "_old_forward" if "_hf_hook" in block.__dict__ else "forward"
            setattr(block, slot, partial(merged_forward, block, self, index))
            key_layer = tower.parts.key_layer(block)
            if key_layer is not None:
                self.hooks.append(key_layer.register_forward_hook(self.run.tap))
        self.hooks.append(tower.patch_layer.register_forward_pre_hook(partial(note_pixels, self)))
        intermediates = getattr(type(tower.module), "forward_intermediates", None)
        if intermediates is not None:
            self.intermediates_arguments = tuple(inspect.signature(intermediates).parameters)[2:]
            tower.module.forward_intermediates = partial(unmerged_intermediates, tower.module, self)

    def _plan(self, height_px: int | None, width_px: int | None) -> MergePlan:
        height, width = self.tower.image_size
        return self.plan_for(height_px or height, width_px or width)

    def _prompt(self) -> LlavaPrompt:
        if self.prompt is None:
            name = type(self.module).__name__
            raise ValueError(f"placeholders: got a {name}, want merging that was applied to a whole LLaVA")
        return self.prompt


def apply_token_merging(
    module: nn.Module,
    token_kept_ratio: float | None = None,
    *,
    schedule: Schedule | str | None = None,
    inflection: float = -1.0,
    r: int | Sequence[int] | None = None,
    size_bias: SizeBias | str = SizeBias.off,
    feature_layer: int | None = None,
    trace: bool = False,
) -> TokenMerging:
    """Merge similar tokens inside the vision tower of another library.

    Serves timm's VisionTransformer, transformers' CLIPVisionModel and SiglipVisionModel (alone, in CLIPModel and
    SiglipModel, or in LLaVA) and open_clip's VisionTransformer. Weights, classes and state_dict stay as they are. What
    was merged before is replaced. Compile after applying.

    Args:
        module: A tower or a model that holds one; changed in place.
        token_kept_ratio: Share of the patches to keep, in (0, 1]; None keeps all until `set` is called.
        schedule: constant | exact | linear | list, see `aurora.model.merge.Schedule`; `constant` keeps more than
            asked, as published, and `plan` says how many.
        inflection: Slope of the linear schedule, in [-1, 1]; -1 merges most in the first layers.
        r: Instead of a ratio, tokens to merge in each layer, or a list with one count for each layer that may merge;
            at most half of the tokens are.
        size_bias: off | keys: add log(token size) to the attention scores, the proportional attention of Token
            Merging. Changes what a layer computes; try it on towers that were not trained with merging.
        feature_layer: The hidden state that is used, as Hugging Face counts them; layers behind it merge nothing. None
            is LLaVA's `vision_feature_layer`, else -1, every layer.
        trace: Keep sizes, sources and similarities of the last forward pass for `TokenMerging.trace`.

    Returns:
        The merging: its plan, its trace, `set(...)` and `remove()`; also a context manager.

    Raises:
        ValueError: for a module or a block of another kind, which is named, or a value that does not fit.
    """
    tower = find_tower(module)
    if feature_layer is None:
        feature_layer = _llava_feature_layer(module)
    merging = TokenMerging(module, tower, MergeConfig(), feature_layer)
    merging.set(token_kept_ratio, schedule=schedule, inflection=inflection, r=r, size_bias=size_bias, trace=trace)
    for block in tower.blocks:
        earlier = _merging_of(block)
        if earlier is not None:
            earlier.remove()
    merging._install()
    return merging


def merge_config(
    token_kept_ratio: float | None,
    *,
    schedule: Schedule | str | None,
    inflection: float,
    r: int | Sequence[int] | None,
    size_bias: SizeBias | str,
    num_active_layers: int,
) -> MergeConfig:
    """Check the arguments of `apply_token_merging` and put them into a MergeConfig.

    Raises:
        ValueError: for a value or a combination that does not fit.
    """
    bias = _choice(SizeBias, size_bias, "size_bias")
    if r is not None:
        if token_kept_ratio is not None:
            raise ValueError(f"token_kept_ratio={token_kept_ratio} and r={r}: want one of them")
        if schedule is not None and _choice(Schedule, schedule, "schedule") is not Schedule.list:
            raise ValueError(f"r={r}: is read with schedule=list only, got {schedule}")
        counts = [r] * num_active_layers if isinstance(r, int) else list(r)
        return MergeConfig(schedule=Schedule.list, r=counts, inflection=inflection, size_bias=bias)
    rule = Schedule.constant if schedule is None else _choice(Schedule, schedule, "schedule")
    if rule is Schedule.list:
        raise ValueError("schedule=list: want r, one count for each layer")
    ratio = 1.0 if token_kept_ratio is None else float(token_kept_ratio)
    return MergeConfig(token_kept_ratio=ratio, schedule=rule, inflection=inflection, size_bias=bias)


def _choice(kind: Any, value: Any, name: str) -> Any:
    if isinstance(value, kind):
        return value
    if value not in kind.__members__:
        raise ValueError(f"{name}={value!r}: want one of {', '.join(kind.__members__)}")
    return kind[value]


def _llava_feature_layer(module: nn.Module) -> int:
    layer = getattr(getattr(module, "config", None), "vision_feature_layer", None)
    if layer is None:
        return -1
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer={layer}: want one layer; merged ones differ in length")
    return layer


def _overlay(block: Any) -> Any:
    return block.__dict__.get("_old_forward" if "_hf_hook" in block.__dict__ else "forward")


def _merging_of(block: Any) -> TokenMerging | None:
    """The merging that a block follows now."""
    overlay = _overlay(block)
    if not isinstance(overlay, partial) or overlay.func is not merged_forward:
        return None
    merging: TokenMerging = overlay.args[1]
    return merging


def _refuse_override(block: Any, index: int) -> None:
    overlay = _overlay(block)
    plain = overlay is None or overlay == MethodType(type(block).forward, block)
    if not plain:
        raise ValueError(f"block {index}: its forward is overridden by {overlay!r}; want it plain")
