"""Merge maps of other libraries' towers, through `apply_token_merging`."""

import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from aurora import apply_token_merging
from aurora.runtime import define_missing_torchvision_ops
from aurora.visualization.charts import size_bins
from aurora.visualization.film import TracedRun, image_figure
from aurora.visualization.merge_map import frames_of_merging

RED, BLUE = (1.5, -1.0, -1.0), (-1.0, -1.0, 1.5)


def _timm(height: int, width: int, **changes: object) -> nn.Module:
    define_missing_torchvision_ops()
    models = importlib.import_module("timm.models.vision_transformer")
    sizes = {"img_size": (height, width), "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    vit = models.VisionTransformer(**sizes, num_classes=0, **changes)
    nn.init.zeros_(vit.pos_embed)  # so that only the colour tells patches apart
    return vit.eval()


def _clip(height: int, width: int) -> nn.Module:
    define_missing_torchvision_ops()
    library = importlib.import_module("transformers")
    config = library.CLIPVisionConfig(
        image_size=64, patch_size=8, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=3
    )
    tower = library.CLIPVisionModel(config).eval()
    nn.init.zeros_(next(w for name, w in tower.named_parameters() if "position_embedding" in name))
    return _Interpolating(tower) if (height, width) != (64, 64) else tower


class _Interpolating(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: torch.Tensor) -> object:
        return self.tower(pixels, interpolate_pos_encoding=True)


needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.mark.parametrize("size", [(64, 64), (48, 96)], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(_timm, marks=needs_timm, id="timm"),
        pytest.param(partial(_timm, reg_tokens=4), marks=needs_timm, id="timm with registers"),
        pytest.param(partial(_timm, class_token=False, global_pool="avg"), marks=needs_timm, id="timm of patches only"),
        pytest.param(_clip, marks=needs_transformers, id="clip"),
    ],
)
def test_groups_of_another_tower_partition_its_patches_and_respect_halves(
    build: Callable[[int, int], nn.Module], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    height, width = size
    model = build(height, width)
    pixels = torch.empty(2, 3, height, width)
    pixels[:] = torch.tensor(RED).view(3, 1, 1)
    pixels[0, :, :, width // 2 :] = torch.tensor(BLUE).view(3, 1, 1)
    pixels[1, :, height // 2 :] = torch.tensor(BLUE).view(3, 1, 1)
    tower = model.tower if isinstance(model, _Interpolating) else model
    with apply_token_merging(tower, 0.6, schedule="exact", trace=True) as merging, torch.no_grad():
        model(pixels)
        plan = merging.plan_for(height, width)
        run = TracedRun("kept 0.6", frames_of_merging(merging))
    assert len(run.traces) == 2
    assert run.token_counts().tolist() == [list(plan.tokens)] * 2
    for frame in range(2):
        for layer in range(4):
            groups = run.groups(frame, layer)
            assert groups.shape == (height // 8, width // 8)
            assert np.unique(groups).tolist() == list(range(plan.tokens[layer + 1]))
    sideways, upright = run.groups(0), run.groups(1)
    assert not set(sideways[:, : width // 16].ravel()) & set(sideways[:, width // 16 :].ravel())
    assert not set(upright[: height // 16].ravel()) & set(upright[height // 16 :].ravel())
    assert size_bins(run.group_sizes(), 7)[1].sum() == 2 * height * width // 64
    figure = image_figure(np.zeros((height, width, 3), dtype=np.uint8), [run])
    scale = round(384 / width)
    assert figure.shape[1] == 2 * scale * width + 42  # a gap and two margins
    assert figure.shape[0] > scale * height


@needs_timm
def test_a_tower_that_was_not_traced_is_refused() -> None:
    with apply_token_merging(_timm(64, 64), 0.5) as merging, pytest.raises(ValueError, match="trace=True"):
        frames_of_merging(merging)
