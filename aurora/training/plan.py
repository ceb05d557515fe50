"""How much memory a training step takes on each rank, by arithmetic over a model that has none (the meta device).

What is counted is what the code of this repository keeps: weights, gradients and AdamW's moments in float32; for the
backward pass of each layer the tensors autograd saves (`tests/training/test_plan.py` compares them with what it really
saves), or with activation checkpointing the inputs of the layers and one layer computed again; copies of weights in
half precision; the logits of the loss. What lies outside (CUDA's context, a fragmented heap) is not,
nor the scores that `attn_implementation=eager` keeps.

Letters: T positions of all rows, N tokens of a frame, C width, F width of an MLP, D head width; s bytes of a number in
the residual stream, c in a matrix product.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from aurora.kernels.cross_entropy import linear_cross_entropy
from aurora.model.captioner import FRAMES_PER_CHUNK, AuroraConfig, AuroraModel
from aurora.model.llama import Llama, LlamaLayer
from aurora.model.merge import MergeConfig, MergePlan, plan_clip
from aurora.model.vision import Activation, VisionBlock, VisionTower, num_active_layers
from aurora.training.build import prepare_model
from aurora.training.config import Objective, Parallel, Precision, StageConfig, TrainConfig
from aurora.training.lora import LoraLinear

PARTS = ("vision_tower", "projector", "language_model")
_BUCKET_NUMBERS = 2**24
"""Gradients that ranks average in one exchange, see `World.average`."""
_GATHERED_LAYERS = 2
"""Layers FSDP holds whole at once: the one that computes and the next, fetched ahead."""


@dataclass(kw_only=True, slots=True)
class Work:
    """What one rank does in one forward and backward pass, and how."""

    num_rows: int = 1
    """Sequences of the language model."""
    row_tokens: int = 4096
    """Positions of each, visual tokens included."""
    clips: list[tuple[int, int, int]] = field(default_factory=list)
    """Frames, height and width in pixels of each clip."""
    learned_tokens: int | None = None
    """Positions with a label; None: all."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """How visual tokens merge."""
    masked: bool = True
    """Whether attention of the language model gets a mask: rows that are packed, or padded to one length."""
    precision: Precision = Precision.bf16
    """Arithmetic of the products."""
    activation_checkpointing: bool = False
    """Keep only the inputs of layers."""
    accumulation_steps: int = 1
    """Passes that add to one gradient."""
    parallel: Parallel = Parallel.none
    """How ranks share the model."""
    num_ranks: int = 1
    """Ranks."""
    ema: bool = False
    """Whether averaged weights are kept."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory of one rank, in bytes, and what it is made of."""

    work: Work
    parameters: dict[str, tuple[int, int]]
    """Part -> parameters, and those of them that learn."""
    visual_tokens: tuple[int, int]
    """Delivered and all, of all clips."""
    weights: int
    """Weights, or this rank's shard."""
    gradients: int
    """Gradients, or this rank's shard."""
    optimizer: int
    """Both moments, or this rank's shard."""
    ema: int
    """Averaged weights."""
    copies: int
    """Weights in half precision, and layers that FSDP has gathered."""
    activations: dict[str, int]
    """Part -> what its forward keeps for its backward."""
    workspace: dict[str, int]
    """Part -> the most that its backward holds for a moment; `loss` is one, too."""
    communication: int
    """Copies of gradients while ranks exchange them."""

    @property
    def peak(self) -> int:
        """Expected largest memory of a rank."""
        held = self.weights + self.optimizer + self.ema
        kept = self.activations
        # Gradients of the last step are gone before the backward, those of the last pass of the same step are not.
        earlier = self.gradients if self.work.accumulation_steps > 1 else 0
        learned = {name: count for name, (_, count) in self.parameters.items()}
        share = self.gradients / max(1, sum(learned.values()))
        decoder = max(earlier, int(share * learned["language_model"]))
        behind = kept["vision_tower"] + kept["projector"]
        moments = (
            earlier + sum(kept.values()) + self.copies + max(self.workspace["loss"], self.workspace["language_model"]),
            decoder + behind + self.copies + max(self.workspace["projector"], self.workspace["vision_tower"]),
            self.gradients + self.communication + (self.copies if self.work.parallel is Parallel.fsdp else 0),
            # A validation puts the averaged weights in the place of the others, which it keeps aside.
            self.gradients + self.ema,
        )
        return held + max(moments)


def plan_memory(model: AuroraModel, work: Work) -> Plan:
    """Estimate the memory of training a model.

    Args:
        model: On the meta device or with memory; what learns has `requires_grad`, adapters are in place.
        work: What a rank does at once.

    Returns:
        The plan.

    Raises:
        ValueError: if nothing learns, or merging is impossible as wished.
    """
    parameters = {part: _count(model.get_submodule(part).parameters()) for part in PARTS}
    total, learned = (sum(pair[i] for pair in parameters.values()) for i in range(2))
    if not learned:
        raise ValueError("stage.trainable: nothing learns; want prefixes of parameters")
    plans = [plan for clip in work.clips for plan in _plan_frames(model.config, work.merge, clip)]
    kept, workspace = _activations(model, work, plans)
    copies, shared = _copies(model, work)
    shards = work.num_ranks if work.parallel is Parallel.fsdp else 1
    return Plan(
        work=work,
        parameters=parameters,
        visual_tokens=(sum(p.num_visual_tokens for p in plans), sum(p.num_patches for p in plans)),
        weights=-(-4 * total // shards),
        gradients=-(-4 * learned // shards),
        optimizer=-(-8 * learned // shards),
        ema=-(-4 * learned // shards) if work.ema else 0,
        copies=copies,
        activations=kept,
        workspace=workspace,
        communication=shared,
    )


def _plan_frames(config: AuroraConfig, merge: MergeConfig, clip: tuple[int, int, int]) -> tuple[MergePlan, ...]:
    num_frames, height_px, width_px = clip
    return plan_clip(
        merge,
        num_frames=num_frames,
        height_px=height_px,
        width_px=width_px,
        vision=config.vision,
        num_active_layers=num_active_layers(config.vision, config.feature_layer),
    )


def _count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Numbers in all parameters, and in those that learn."""
    total = learned = 0
    for parameter in parameters:
        total += parameter.numel()
        learned += parameter.numel() if parameter.requires_grad else 0
    return total, learned


def _compute(work: Work) -> int:
    """Bytes of a number in a matrix product: c."""
    return 4 if work.precision is Precision.fp32 else 2


def _residual(work: Work) -> int:
    """Bytes of a number in the residual stream: s. Autocast leaves it in float32, FSDP gathers embeddings in half."""
    return _compute(work) if work.parallel is Parallel.fsdp else 4


def _copies(model: AuroraModel, work: Work) -> tuple[int, int]:
    """Bytes of weights that are there a second time, and of what exchanging gradients takes at the end."""
    layers = list(model.language_model.layers)
    if work.parallel is Parallel.fsdp:
        # Each decoder layer is gathered for itself, all the rest once for the whole step.
        of_layers = [_count(layer.parameters()) for layer in layers]
        total, learned = _count(model.parameters())
        rest, rest_learned = total - sum(n for n, _ in of_layers), learned - sum(n for _, n in of_layers)
        gathered = rest + min(_GATHERED_LAYERS, len(layers)) * max(n for n, _ in of_layers)
        return _compute(work) * gathered, (_compute(work) + 4) * rest_learned
    trained = [p for p in model.parameters() if p.requires_grad]
    bucket = max(min(sum(p.numel() for p in trained), _BUCKET_NUMBERS), max(p.numel() for p in trained))
    exchanged = 4 * bucket if work.parallel is Parallel.ddp and work.num_ranks > 1 else 0
    if work.precision is Precision.fp32:
        return 0, exchanged
    # Autocast keeps its casts of weights that learn to the end of the forward; others live as long as autograd needs
    # them, with checkpointing as long as their layer.
    again = work.activation_checkpointing
    kept = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
    return sum(_compute(work) * p.numel() for p in kept if p.requires_grad or not again), exchanged


def _activations(model: AuroraModel, work: Work, plans: Sequence[MergePlan]) -> tuple[dict[str, int], dict[str, int]]:
    """By part: bytes kept from the forward for the backward, and the most that its backward needs besides."""
    kept, workspace = {}, {}
    kept["vision_tower"], workspace["vision_tower"] = _tower(model.vision_tower, work, plans)
    compute, tokens = _compute(work), sum(plan.num_visual_tokens for plan in plans)
    narrow, wide = model.config.vision.hidden_size, model.config.text.hidden_size
    # The visual tokens themselves stay referenced until the loss is there.
    kept["projector"] = tokens * wide * compute
    if any(p.requires_grad for p in model.projector.parameters()):
        kept["projector"] += tokens * (narrow + 2 * wide) * compute
    workspace["projector"] = 2 * tokens * wide * compute
    kept["language_model"], workspace["language_model"] = _decoder(model.language_model, work)
    workspace["loss"] = _loss(model.language_model, work)
    return kept, workspace


def _tower(tower: VisionTower, work: Work, plans: Sequence[MergePlan]) -> tuple[int, int]:
    compute, residual, config = _compute(work), _residual(work), tower.config
    pixels = config.num_channels * config.patch_size**2 * sum(plan.num_patches for plan in plans)
    if not any(p.requires_grad for p in tower.parameters()):
        widest = max((plan.num_patches for plan in plans[:FRAMES_PER_CHUNK]), default=0)
        frames = min(len(plans), FRAMES_PER_CHUNK)
        passing = frames * widest * (4 * config.hidden_size + 2 * config.intermediate_size) * compute
        return 4 * pixels, passing
    prefix = config.num_prefix_tokens
    # The clips, and the chunks they are stacked to; then the input of the norm before the blocks.
    kept = 8 * pixels + sum(plan.num_patches + prefix for plan in plans) * config.hidden_size * residual
    largest = 0
    blocks = [block for block in tower.blocks if isinstance(block, VisionBlock)]
    for index, block in enumerate(blocks[: len(plans[0].r) if plans else 0]):
        tokens = sum(plan.tokens[index] + prefix for plan in plans)
        merged = sum(plan.tokens[index + 1] + prefix for plan in plans)
        whole = _block(block, tokens, merged, compute, residual)
        inputs = tokens * (config.hidden_size * residual + 4)
        largest = max(largest, whole)
        kept += inputs if work.activation_checkpointing else whole
    first = sum(plan.num_patches + prefix for plan in plans)
    passing = 3 * first * config.intermediate_size * compute
    return kept, passing + (largest if work.activation_checkpointing else 0)


def _block(block: VisionBlock, tokens: int, merged: int, compute: int, residual: int) -> int:
    """Bytes one vision block keeps for N tokens that become `merged`."""
    attn, mlp = block.attn, block.mlp
    width, hidden = attn.q_proj.in_features, mlp.fc1.out_features
    before = width * residual + _inputs([attn.q_proj, attn.k_proj, attn.v_proj], compute)
    before += 4 * width * compute + 4 * attn.num_heads + 24  # q, k, v, out; log-sums; statistics, size, matching
    after = width * residual + _inputs([mlp.fc1], compute) + 24
    after += (2 if mlp.activation is Activation.quick_gelu else 1) * hidden * compute + _inputs([mlp.fc2], compute)
    return tokens * before + merged * after


def _decoder(decoder: Llama, work: Work) -> tuple[int, int]:
    compute, residual, config = _compute(work), _residual(work), decoder.config
    tokens = work.num_rows * work.row_tokens
    mask = work.num_rows * work.row_tokens**2 if work.masked else 0
    layers = [layer for layer in decoder.layers if isinstance(layer, LlamaLayer)]
    sizes = [_layer(layer, tokens, mask, compute, residual) for layer in layers]
    inputs = tokens * config.hidden_size * residual
    norm = inputs * (2 if decoder.norm.weight.requires_grad else 1)
    kept = (len(layers) * inputs if work.activation_checkpointing else sum(sizes)) + norm + mask
    kept += 8 * tokens * config.head_dim  # the rotary table
    passing = 4 * tokens * config.intermediate_size * compute
    return kept, passing + (max(sizes) if work.activation_checkpointing else 0)


def _layer(layer: LlamaLayer, tokens: int, mask: int, compute: int, residual: int) -> int:
    """Bytes one decoder layer keeps for T tokens."""
    attn, mlp = layer.self_attn, layer.mlp
    width, hidden = attn.q_proj.in_features, mlp.gate_proj.out_features
    heads = 2 * attn.num_heads + 2 * attn.num_kv_heads  # q and out, k and v
    per_token = 2 * width * residual + heads * attn.head_dim * compute + 4 * attn.num_heads + 8
    per_token += residual * sum(
        width for norm in (layer.input_layernorm, layer.post_attention_layernorm) if norm.weight.requires_grad
    )
    per_token += _inputs([attn.q_proj, attn.k_proj, attn.v_proj], compute) + _inputs(
        [mlp.gate_proj, mlp.up_proj], compute
    )
    per_token += 3 * hidden * compute + _inputs([mlp.down_proj], compute)
    # SDPA turns a mask of truth values into one of numbers, in every layer.
    return tokens * per_token + mask * compute


def _inputs(linears: Iterable[nn.Linear], compute: int) -> int:
    """Bytes per token of the input that linears side by side keep, which only those that learn do."""
    learning = [x for x in linears if x.weight.requires_grad or isinstance(x, LoraLinear)]
    if not learning:
        return 0
    # Autocast casts the input for each linear anew.
    copies = 1 if compute == 4 else len(learning)
    ranks = sum(x.rank for x in learning if isinstance(x, LoraLinear))
    return (copies * learning[0].in_features + ranks) * compute


def _loss(decoder: Llama, work: Work) -> int:
    """Logits of one chunk with their gradient, the gradient of the head, and that of the hidden states."""
    config = decoder.config
    tokens = work.num_rows * work.row_tokens
    learned = min(tokens, work.learned_tokens if work.learned_tokens is not None else tokens)
    chunk = min(learned, inspect.signature(linear_cross_entropy).parameters["chunk"].default)
    head = decoder.embed_tokens.weight if decoder.lm_head is None else decoder.lm_head.weight
    logits = 3 * 4 * chunk * config.vocab_size
    weight = 2 * 4 * head.numel() if head.requires_grad else 0
    return logits + weight + 2 * tokens * config.hidden_size * _residual(work)


def memory_plan(config: TrainConfig, stage: StageConfig, *, num_ranks: int | None = None) -> Plan:
    """Plan a stage of a recipe for the longest rows its data may have.

    Args:
        config: The recipe; its `model` is planned.
        stage: One of its stages, of objective conversations.
        num_ranks: Ranks that share it; None: as many as the stage starts.

    Returns:
        The plan of one rank.

    Raises:
        ValueError: for another objective, and as `prepare_model` and `plan_memory`.
    """
    if stage.objective is not Objective.conversations:
        raise ValueError(f"plan: stage.objective={stage.objective.value}: want conversations; others fit any machine")
    with torch.device("meta"):
        model = prepare_model(AuroraModel(config.model), stage)
    ranks = num_ranks or stage.max_ranks
    rows = max(1, -(-stage.batch_size // (ranks * stage.accumulation_steps)))
    side = config.model.vision.image_size
    work = Work(
        num_rows=rows,
        row_tokens=min(config.data.max_length, config.model.text.max_seq_len),
        clips=[(config.data.num_frames, side, side)] * rows,
        merge=stage.merge,
        masked=stage.packing or rows > 1,
        precision=stage.precision,
        activation_checkpointing=stage.activation_checkpointing,
        accumulation_steps=stage.accumulation_steps,
        parallel=stage.parallel,
        num_ranks=ranks,
        ema=stage.ema_decay is not None,
    )
    return plan_memory(model, work)


def format_plan(plan: Plan) -> str:
    """Return a plan as tables for the terminal."""
    work = plan.work
    delivered, patches = plan.visual_tokens
    shared = f"{work.num_ranks} rank{'s' * (work.num_ranks > 1)} ({work.parallel.value})"
    kept = "computed again" if work.activation_checkpointing else "kept"
    frames = sum(clip[0] for clip in work.clips)
    lines = [
        f"{shared}, {work.precision.value}, activations {kept}",
        f"a pass of one rank: {work.num_rows} x {work.row_tokens} positions at most, {frames} frames, {delivered} of "
        f"{patches} visual tokens ({_merging(work.merge)})",
    ]
    if len(work.clips) and (longest := delivered // len(work.clips)) >= work.row_tokens:
        lines.append(
            f"note: a clip of {work.clips[0][0]} frames, {longest} visual tokens, has no room in {work.row_tokens} "
            "positions and is a mistake in the data; images and shorter clips are none"
        )
    lines.append("")
    counts = [
        (name, f"{total / 1e6:,.2f} M", f"{learned / 1e6:,.2f} M") for name, (total, learned) in plan.parameters.items()
    ]
    sums = (sum(pair[i] for pair in plan.parameters.values()) for i in range(2))
    lines += _columns([("", "parameters", "that learn"), *counts, ("all", *(f"{n / 1e6:,.2f} M" for n in sums))])
    whole = {"weights": plan.weights, "gradients": plan.gradients, "moments of AdamW": plan.optimizer}
    rows = [(f"{name}, float32", num_bytes) for name, num_bytes in whole.items()]
    rows += [
        ("averaged weights", plan.ema),
        ("gathered weights" if work.parallel is Parallel.fsdp else "weights in half precision", plan.copies),
        *((f"activations of {name}", num_bytes) for name, num_bytes in plan.activations.items()),
        ("the most a backward adds", max(plan.workspace.values())),
        ("exchange of gradients", plan.communication),
    ]
    table = [(name, _gib(num_bytes)) for name, num_bytes in rows if num_bytes]
    lines += ["", *_columns([("", "a rank"), *table, ("expected peak", _gib(plan.peak))])]
    return "\n".join(lines)


def _merging(merge: MergeConfig) -> str:
    if merge.visual_token_budget is not None:
        return f"visual_token_budget={merge.visual_token_budget}"
    return f"token_kept_ratio={merge.token_kept_ratio:g}, {merge.schedule.value}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay rows out as text: names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
