"""LoRA: low-rank changes of frozen linears (Hu et al., 2021), trained beside them and folded into them for export.

    y = x W^T + b + (alpha / rank) dropout(x) A^T B^T,   A (rank, in) random, B (out, rank) zero

so a model computes what it did before until the first step. The base keeps its name (`q_proj.weight`); the factors
stand below it as peft's do (`q_proj.lora_A.weight`). Adapters are saved in the folders xtuner gives them, which
`aurora.checkpoint` merges on load and peft reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from aurora.checkpoint.layouts import XTUNER
from aurora.checkpoint.lazy import lazy
from aurora.checkpoint.lora import ADAPTER_FOLDERS, pair_factors
from aurora.checkpoint.store import CheckpointError, WeightFiles, atomic_folder, write_json
from aurora.model.linear import is_plain_linear

_PREFIX = "base_model.model."
_WEIGHTS_STEM = "adapter_model"


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Adapters in place of whole weights."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """The change is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs that a training step drops, in [0, 1)."""
    targets: list[str] = field(default_factory=lambda: ["language_model.layers.*_proj"])
    """Linears that get an adapter, any but the output head, by the end of their names; `*` stands for anything:
    `q_proj`, `language_model.layers.*_proj`, `vision_tower.blocks.*.fc1`."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: want at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha}: want a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout}: want a number in [0, 1)")
        if not self.targets or not all(self.targets):
            raise ValueError(f"lora.targets={self.targets}: want names of linears, such as q_proj")


class LoraLinear(nn.Linear):
    """A linear with an adapter; its own weight and bias are frozen."""

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        """Take over the parameters of `base`, without a copy.

        Args:
            base: The linear.
            rank: Rows of A and columns of B.
            scale: Factor on the change.
            dropout: Share of the inputs dropped in training.
        """
        # Not nn.Linear's, which would allocate and draw a weight that nobody needs.
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.scale, self.dropout = rank, scale, dropout
        # Small steps on a bfloat16 factor would be rounded away.
        dtype, device = torch.promote_types(base.weight.dtype, torch.float32), base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype of the frozen product."""
        out = F.linear(x, self.weight, self.bias)
        dropped = F.dropout(x, self.dropout, self.training).to(self.lora_A.weight.dtype)
        change: Tensor = self.lora_B(self.lora_A(dropped))
        return out + (self.scale * change).to(out.dtype)

    def merged_weight(self) -> Tensor:
        """W + scale * B @ A, (out, in), added in float32 at least and rounded once, as peft does."""
        change = self.scale * (self.lora_B.weight @ self.lora_A.weight)
        return (self.weight.to(change.dtype) + change).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Say what the adapter is."""
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def apply_lora(model: nn.Module, config: LoraConfig) -> list[str]:
    """Give linears of a model an adapter, in place, and freeze the rest of the parts they belong to.

    A part is a child of the model, such as `language_model`: where one of its linears has an adapter, only adapters
    learn in it. Other parts stay as they are.

    Args:
        model: An `AuroraModel`.
        config: Which linears, and the adapters' size.

    Returns:
        Names of the new parameters, all of which learn.

    Raises:
        ValueError: if the model has adapters already, or a target names no plain linear.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ValueError("lora: the model has adapters already; want merge_lora before new ones")
    linears = _adaptable(model)
    chosen: dict[str, None] = {}
    for target in config.targets:
        found = [name for name in linears if fnmatchcase(f".{name}", f"*.{target}")]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f"lora.targets: {target!r} names no linear; want ends of names, such as {', '.join(ends)}")
        chosen |= dict.fromkeys(found)
    for part in {name.partition(".")[0] for name in chosen}:
        model.get_submodule(part).requires_grad_(False)
    scale = config.alpha / config.rank
    for name in chosen:
        _wrap(model, name, rank=config.rank, scale=scale, dropout=config.dropout)
    return _adapter_parameters(model)


def merge_lora(model: nn.Module) -> list[str]:
    """Fold every adapter into its linear and take it away, in place.

    Args:
        model: Any model; one without adapters stays as it is.

    Returns:
        Names of the linears that had one. They stay frozen.
    """
    names = [name for name, _ in lora_linears(model)]
    for name in names:
        adapted = model.get_submodule(name)
        assert isinstance(adapted, LoraLinear)
        linear = nn.Linear(adapted.in_features, adapted.out_features, adapted.bias is not None, device="meta")
        with torch.no_grad():
            linear.weight = nn.Parameter(adapted.merged_weight(), requires_grad=False)
        linear.bias = adapted.bias
        model.set_submodule(name, linear.train(adapted.training))
    return names


def lora_linears(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield name and module of every linear with an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def save_adapters(model: nn.Module, folder: Path, *, base: str | None = None) -> None:
    """Write the adapters alone in peft's format, in the folders of an xtuner export.

    Args:
        model: An `AuroraModel` with adapters; it is not changed.
        folder: Gets `llm_adapter/` and `visual_encoder_adapter/`, as there are adapters of these parts.
        base: Folder or hub id of the weights they change, to be recorded; None where these lie in `folder` itself.

    Raises:
        ValueError: if the model has no adapter.
        CheckpointError: if xtuner has no place for one, as for the projector's, or the disk refuses.
    """
    parts: dict[str, dict[str, LoraLinear]] = {}
    for name, module in lora_linears(model):
        part, foreign = XTUNER.place(f"{name}.weight")
        parts.setdefault(part.folder, {})[foreign.removesuffix(".weight")] = module
    if not parts:
        raise ValueError("lora: the model has no adapter; want one that apply_lora has changed")
    folders = {part: name for name, part in ADAPTER_FOLDERS.items()}
    if homeless := sorted(parts.keys() - folders.keys()):
        raise CheckpointError(f"{folder}: no place for adapters of {homeless[0]}; want them merged, or none there")
    with atomic_folder(folder) as stage:
        for place, modules in parts.items():
            target = stage / folders[place]
            target.mkdir()
            tensors = {
                f"{_PREFIX}{name}.lora_{which}.weight": factor.weight.detach().cpu().contiguous()
                for name, module in modules.items()
                for which, factor in (("A", module.lora_A), ("B", module.lora_B))
            }
            save_file(tensors, target / f"{_WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
            write_json(target / "adapter_config.json", _peft_config(modules, base))


def load_adapters(model: nn.Module, folder: Path) -> list[str]:
    """Put saved adapters beside the weights of a model, in place, to go on training them.

    The checkpoint reader merges adapters, which is what inference wants; this keeps them apart. The parts they belong
    to are frozen as by `apply_lora`.

    Args:
        model: An `AuroraModel` with the weights the adapters were trained on, and no adapters.
        folder: Holds `llm_adapter/`, `visual_encoder_adapter/`, or both.

    Returns:
        Names of the new parameters.

    Raises:
        CheckpointError: if there is none, a file is broken, or a factor fits no linear of the model.
    """
    present = {name: part for name, part in ADAPTER_FOLDERS.items() if (folder / name).is_dir()}
    if not present:
        raise CheckpointError(f"{folder}: no adapters, want {' or '.join(ADAPTER_FOLDERS)}")
    linears = _adaptable(model)
    for name, folder_of_part in present.items():
        keys = next(part.keys for part in XTUNER.parts if part.folder == folder_of_part)
        with WeightFiles(folder / name, stem=_WEIGHTS_STEM) as files:
            tensors = {key: lazy(files.load(key), file=files.file_of(key), key=key) for key in files.names}
        for foreign, (a, b, scale) in pair_factors(folder / name, tensors).factors.items():
            ours = (keys.to_ours(foreign) or "").removesuffix(".weight")
            linear = linears.get(ours)
            if linear is None or (b.shape[0], a.shape[1]) != tuple(linear.weight.shape):
                wanted = "a linear of the model" if linear is None else f"{tuple(linear.weight.shape)}"
                raise CheckpointError(f"{folder / name}: {foreign}: got ({b.shape[0]}, {a.shape[1]}), want {wanted}")
            model.get_submodule(ours.partition(".")[0]).requires_grad_(False)
            adapted = _wrap(model, ours, rank=a.shape[0], scale=scale)
            with torch.no_grad():
                adapted.lora_A.weight.copy_(a.read())
                adapted.lora_B.weight.copy_(b.read())
    for _, adapted in lora_linears(model):
        adapted.lora_A.requires_grad_(True)
        adapted.lora_B.requires_grad_(True)
    return _adapter_parameters(model)


def _adaptable(model: nn.Module) -> dict[str, nn.Linear]:
    """Linears by name, all but the output head: the loss takes its weight alone, and would not see an adapter."""
    named = model.named_modules()
    return {name: linear for name, linear in named if is_plain_linear(linear) and not name.endswith("lm_head")}


def _wrap(model: nn.Module, name: str, *, rank: int, scale: float, dropout: float = 0.0) -> LoraLinear:
    base = model.get_submodule(name)
    assert isinstance(base, nn.Linear)
    adapted = LoraLinear(base, rank=rank, scale=scale, dropout=dropout)
    model.set_submodule(name, adapted)
    return adapted


def _adapter_parameters(model: nn.Module) -> list[str]:
    return [f"{name}.{which}.weight" for name, _ in lora_linears(model) for which in ("lora_A", "lora_B")]


def _peft_config(modules: dict[str, LoraLinear], base: str | None) -> dict[str, object]:
    """adapter_config.json; modules are spelt out, since an end such as q_proj may be in both parts."""
    first = next(iter(modules.values()))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.scale * first.rank,
        "rank_pattern": {name: module.rank for name, module in modules.items() if module.rank != first.rank},
        "alpha_pattern": {
            name: module.scale * module.rank
            for name, module in modules.items()
            if (module.scale, module.rank) != (first.scale, first.rank)
        },
        "lora_dropout": first.dropout,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
