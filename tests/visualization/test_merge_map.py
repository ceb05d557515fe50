"""The merge map is correct, not only pretty."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.merge import MergeConfig, Schedule
from aurora.model.vision import VisionConfig
from aurora.visualization.figure import picture_grid, save_picture
from aurora.visualization.merge_map import (
    enlarge,
    group_colours,
    group_map,
    merge_map,
    to_pictures,
    trace_frames,
    traces_of_clip,
)


@pytest.fixture(scope="module")
def model(small_model: AuroraModel) -> AuroraModel:
    return small_model


def _pixels(*, frames: int = 1, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (72, 40)], ids=str)
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.2])
def test_groups_partition_the_patches_into_the_encoders_tokens(
    model: AuroraModel, ratio: float, size: tuple[int, int]
) -> None:
    pixels = _pixels(frames=2, height=size[0], width=size[1])
    merge = MergeConfig(token_kept_ratio=ratio, schedule=Schedule.exact)
    with torch.no_grad():
        counts = model.encode(pixels.unsqueeze(0), merge=merge).counts[0]
    plans = model.plan(2, *size, merge)
    for frame, (trace, row) in enumerate(trace_frames(model, pixels, merge)):
        for layer in range(4):
            labels = group_map(trace, layer=layer, row=row)
            assert labels.shape == (size[0] // 8, size[1] // 8) == trace.grid
            groups, sizes = np.unique(labels, return_counts=True)
            assert groups.tolist() == list(range(plans[frame].tokens[layer + 1]))  # every token holds a patch
            assert sizes.tolist() == trace.sizes[layer][row, 1:, 0].int().tolist()
        assert group_map(trace, row=row).max() + 1 == counts[frame]


def test_slowfast_leaves_the_first_frame_whole(model: AuroraModel) -> None:
    merge = MergeConfig(token_kept_ratio=0.25, schedule=Schedule.exact, slowfast=True)
    traces = trace_frames(model, _pixels(frames=3), merge)
    assert [group_map(t.trace, row=t.row).max() + 1 for t in traces] == [64, 16, 16]
    # Frames are not mixed up: each alone gives the same groups.
    alone = trace_frames(model, _pixels(frames=3)[2:], MergeConfig(token_kept_ratio=0.25, schedule=Schedule.exact))[0]
    assert np.array_equal(group_map(traces[2].trace, row=traces[2].row), group_map(alone.trace, row=alone.row))


def test_halves_of_a_picture_do_not_merge_with_each_other() -> None:
    torch.manual_seed(0)
    vision = VisionConfig(hidden_size=32, intermediate_size=64, num_layers=5, num_heads=2, patch_size=8, image_size=64)
    text = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2)
    model = AuroraModel(AuroraConfig(vision=vision, text=text)).eval()
    torch.nn.init.zeros_(model.vision_tower.pos_embed)  # so that only the colour tells patches apart
    pixels = torch.full((1, 3, 64, 64), -1.5)
    pixels[:, 0, :, 32:] = 1.5
    trace, row = trace_frames(model, pixels, MergeConfig(token_kept_ratio=2 / 64 * 4, schedule=Schedule.exact))[0]
    labels = group_map(trace, row=row)
    assert labels.max() + 1 == 8
    assert not set(labels[:, :4].ravel()) & set(labels[:, 4:].ravel())


@pytest.mark.parametrize("size", [(48, 80), (50, 83)], ids=str)
def test_each_group_is_filled_with_its_own_mean(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    labels = generator.integers(0, 9, (6, 10))
    labels.flat[:9] = np.arange(9)
    drawn = merge_map(image, labels, borders=False)
    assert drawn.shape == image.shape
    colours = group_colours(image, labels)
    for group in range(9):
        inside = np.zeros(size, dtype=bool)
        for y in range(size[0]):
            for x in range(size[1]):
                inside[y, x] = labels[y * 6 // size[0], x * 10 // size[1]] == group
        mean = image[inside].astype(np.float64).mean(0)
        np.testing.assert_allclose(colours[group], mean, rtol=1e-12)
        assert (drawn[inside] == np.rint(mean)).all()


def test_outlines_run_between_groups_and_spare_single_patches() -> None:
    image = np.full((64, 64, 3), 100, dtype=np.uint8)
    labels = np.zeros((8, 8), dtype=np.int64)
    labels[:, 4:] = 1
    labels[0, 0] = 2
    drawn = merge_map(image, labels)
    painted = (drawn != 100).any(-1)
    assert painted[20, 31]
    assert painted[20, 32]
    assert tuple(drawn[20, 31]) != tuple(drawn[20, 32])
    assert not painted[20, 10]
    assert not painted[20, 50]
    assert not painted[:8, :8].any()  # a single patch has no outline
    assert len({tuple(pixel) for pixel in drawn[painted]}) == 2


def test_unmerged_patches_each_keep_their_mean() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    labels = np.random.default_rng(2).permutation(16).reshape(4, 4)
    want = np.rint(image.reshape(4, 8, 4, 8, 3).mean((1, 3))).astype(np.uint8)
    assert np.array_equal(merge_map(image, labels)[::8, ::8], want)


def test_labels_need_not_be_consecutive_and_scale_enlarges() -> None:
    image = np.random.default_rng(1).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    labels = np.array([[7, 7, 900], [3, 900, 900]])
    same = np.array([[1, 1, 2], [0, 2, 2]])
    assert np.array_equal(merge_map(image, labels), merge_map(image, same))
    large = merge_map(image, labels, scale=4, borders=False)
    assert np.array_equal(large, enlarge(merge_map(image, labels, borders=False), 4))
    assert merge_map(image, labels, scale=6).shape == (96, 144, 3)


def test_a_large_map_takes_less_than_a_second() -> None:
    image = np.random.default_rng(0).integers(0, 256, (378, 378, 3), dtype=np.uint8)
    labels = np.random.default_rng(0).permutation(np.arange(729) % 490).reshape(27, 27)
    start = time.perf_counter()
    merge_map(image, labels, scale=2)
    assert time.perf_counter() - start < 1.0


def test_pictures_undo_the_normalisation() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 10, 12, 3), dtype=np.uint8)
    mean, std = (0.48, 0.45, 0.40), (0.27, 0.26, 0.28)
    pixels = (torch.tensor(image).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std
    ).view(3, 1, 1)
    assert np.array_equal(np.stack(to_pictures(pixels, mean, std)), image)


def test_bad_requests_are_refused_by_name(model: AuroraModel, tmp_path: Path) -> None:
    trace, _ = trace_frames(model, _pixels(), MergeConfig())[0]
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"layer=4: want -4 to 3"):
        group_map(trace, layer=4)
    with pytest.raises(ValueError, match=r"row=1: want 0 to 0"):
        group_map(trace, row=1)
    with pytest.raises(ValueError, match=r"image: got float64"):
        merge_map(image.astype(np.float64), group_map(trace))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels: got shape \(65, 1\)"):
        merge_map(image, np.zeros((65, 1), dtype=np.int64))
    with pytest.raises(ValueError, match=r"scale=0"):
        merge_map(image, group_map(trace), scale=0)
    with pytest.raises(ValueError, match=r"pixel_values.*\(1, 1, 3, 64, 64\)"):
        trace_frames(model, _pixels().unsqueeze(0), MergeConfig())
    with pytest.raises(ValueError, match=r"output=.*picture\.jpg: want .*\.png"):
        save_picture(image, tmp_path / "picture.jpg")
    with pytest.raises(ValueError, match="pictures"):
        picture_grid([[image], [image[:5]]])
    with pytest.raises(ValueError, match="labels"):
        picture_grid([[image, image]], labels=[["one"]])
    with pytest.raises(ValueError, match="row_labels"):
        picture_grid([[image, image]], row_labels=["one", "two"])
    with pytest.raises(ValueError, match=r"clip=1.*\b1 clips.*trace=True"):
        traces_of_clip(model.encode(_pixels()[None], trace=True), clip=1)
    with pytest.raises(ValueError, match=r"clip=0.*trace=True"):
        traces_of_clip(model.encode(_pixels()[None]))


def test_a_grid_holds_every_picture_unchanged(tmp_path: Path) -> None:
    pictures = [
        [np.full((20, 30, 3), 10 * (3 * row + column), dtype=np.uint8) for column in range(3)] for row in range(2)
    ]
    figure = picture_grid(
        pictures,
        row_labels=["original", "ratio 0.2\n8 tokens"],
        labels=[["a", "b", "c"], ["", "", ""]],
        title="A title longer than all",
    )
    path = save_picture(figure, tmp_path / "new" / "figure.png")
    assert sorted(p.name for p in path.parent.iterdir()) == ["figure.png"]
    read = np.asarray(Image.open(path))
    assert np.array_equal(read, figure)
    for row in pictures:
        for picture in row:
            assert (read == picture[0, 0]).all(-1).sum() >= 600
    assert (read[:, :, 0] == 255).sum() > 0.3 * read[:, :, 0].size  # paper
