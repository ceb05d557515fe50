import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from aurora.processing.image import AspectRatio, AuroraImageProcessor, ImageConfig, load_image, to_rgb
from tests.golden import assert_close_to_golden, load_tensors

SIZES = ["64x48", "48x64", "500x333", "378x378"]


def processor(size: int = 70, aspect: AspectRatio = AspectRatio.crop) -> AuroraImageProcessor:
    return AuroraImageProcessor(ImageConfig(image_size=size, aspect_ratio=aspect))


def golden_image(name: str) -> np.ndarray:
    return load_tensors("preprocess_infer")[f"image_{name}"].numpy()


@pytest.mark.parametrize(("name", "size"), [*((name, 70) for name in SIZES), ("500x333", 378)])
def test_crop_equals_golden(name, size):
    golden = load_tensors("preprocess_infer")[f"infer_{name}_s{size}"]
    image = golden_image(name)
    for given in (image, Image.fromarray(image), torch.from_numpy(image), image.astype(np.float32) / 255):
        assert_close_to_golden(processor(size)(given)[0], golden)
    assert_close_to_golden(processor(size).preprocess_frames(np.stack([image, image]))[1], golden)


@pytest.mark.parametrize("name", SIZES)
def test_pad_equals_golden(name):
    golden = load_tensors("preprocess_train")[f"train_{name}_s70_pad1_keep1"]
    assert_close_to_golden(processor(aspect=AspectRatio.pad)(golden_image(name)), golden.reshape(1, 3, 70, 70))


@pytest.mark.parametrize("name", SIZES[:3])
def test_training_without_padding_or_aspect_is_crop(name):
    golden = load_tensors("preprocess_train")[f"train_{name}_s70_pad0_keep0"]
    assert_close_to_golden(processor()(golden_image(name)), golden.reshape(1, 3, 70, 70))


def test_squash_shows_everything_and_nothing_else():
    image = golden_image("500x333")
    pixels = processor(aspect=AspectRatio.squash)(image)
    resized = np.asarray(Image.fromarray(image).resize((70, 70), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    expected = (resized - ImageConfig().mean) / ImageConfig().std
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_several_images_equal_the_golden_but_a_missing_one_is_an_error():
    # The reference turns the second, missing file into zeros; here a missing image never becomes a grey one.
    golden = load_tensors("preprocess_train")["train_multi_with_missing_s70_pad1_keep1"]
    pad = processor(aspect=AspectRatio.pad)
    assert not golden[1].any()
    matches = [name for name in SIZES if torch.allclose(pad(golden_image(name))[0], golden[0], atol=1e-4)]
    assert len(matches) == 1
    with pytest.raises(ValueError, match="got NoneType, want a PIL image"):
        pad([golden_image(matches[0]), None])


def test_axes_are_not_swapped():
    # The reference unpacks PIL's (width, height) as (h, w): its pad0_keep1 output of a landscape is a portrait.
    swapped = load_tensors("preprocess_train")["train_64x48_s70_pad0_keep1"]
    assert swapped.shape[-2] > swapped.shape[-1]
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 32:] = 255  # right half white: the left-right edge must stay vertical and central
    for aspect in AspectRatio:
        pixels = processor(aspect=aspect)(image)[0, 0]
        assert pixels[35, 10] < 0 < pixels[35, 60]
    pixels = processor(aspect=AspectRatio.pad)(image)[0, 0]
    assert abs(pixels[2, 2].item()) < 0.02  # the padding is above and below
    assert pixels[35, 2] < -1


@pytest.mark.parametrize("short", [155, 309, 310, 321])
@pytest.mark.parametrize("aspect", list(AspectRatio))
def test_no_377_pixel_edge(short, aspect):
    # For these short edges the reference's float arithmetic gives 377, filled up with a black row and column.
    pixels = processor(378, aspect)(np.full((short, short + 40, 3), 200, np.uint8))
    if aspect is AspectRatio.native:
        assert pixels.shape[2] == 378 <= pixels.shape[3]
    else:
        assert pixels.shape == (1, 3, 378, 378)
    if aspect is not AspectRatio.pad:
        assert pixels.std(dim=(2, 3)).max() < 1e-5


def test_alpha_is_dropped_like_the_reference():
    rgb = golden_image("64x48")
    rgba = np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])
    expected = processor()(rgb)
    assert torch.equal(processor()(Image.fromarray(rgba)), expected)
    assert torch.equal(processor()(rgba), expected)


def test_exif_orientation_is_applied(tmp_path):
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    image = load_image(tmp_path / "turned.png")
    assert image.size == (40, 60)
    pixels = np.asarray(image)
    assert pixels[10].min() == 255
    assert pixels[50].max() == 0


def test_modes_give_rgb():
    grey = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5)
    expected = np.repeat(grey[..., None], 3, axis=-1)
    palette = Image.fromarray(grey).convert("P")
    sixteen = Image.fromarray(grey.astype(np.uint16) << 8)
    wide = Image.fromarray(grey.astype(np.int32) << 8)
    assert sixteen.mode == "I;16"
    assert wide.mode == "I"
    images = [Image.fromarray(grey), palette, sixteen, wide, Image.fromarray(grey.astype(np.float32) / 255), grey]
    for image in images:
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)
    assert to_rgb(Image.new("CMYK", (3, 2))).mode == "RGB"
    assert to_rgb(Image.new("1", (3, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    np.testing.assert_array_equal(np.asarray(to_rgb(expected.transpose(2, 0, 1).repeat(5, axis=1))).shape, (25, 5, 3))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "got uint8 (0, 5, 3), want (H, W)"),
        (np.zeros((5, 5, 2), np.uint8), "got uint8 (5, 5, 2), want (H, W)"),
        (np.zeros((2, 3, 5, 5, 3), np.uint8), "got uint8 (2, 3, 5, 5, 3), want (H, W)"),
        (np.full((5, 5, 3), np.nan), "NaN or infinite"),
        (np.full((5, 5, 3), 2.5), "values in [2.5, 2.5], want floats in [0, 1]"),
        (np.full((5, 5, 3), -3), "values in [-3, -3], want 0 to 255"),
        (np.full((5, 5, 3), "a"), "want uint8 or floats"),
        (Image.new("RGB", (0, 5)), "got 0x5 pixels, want at least 1x1"),
        ("picture.png", "want a PIL image or an array"),
        ([], "got none, want at least one"),
    ],
)
def test_bad_images_are_refused(image, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor()(image if isinstance(image, list) else [image] if isinstance(image, str) else image)


def test_bad_frames_are_refused():
    for frames in (np.zeros((5, 5, 3), np.uint8), np.zeros((1, 5, 5, 3), np.float32), np.zeros((0, 5, 5, 3), np.uint8)):
        with pytest.raises(ValueError, match="want uint8 \\(F, H, W, 3\\)"):
            processor().preprocess_frames(frames)


def test_bad_files_are_refused(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(golden_image("500x333")).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    for name, found in {
        "half.png": "broken image",
        "text.jpg": "not an image",
        "empty.jpg": "not an image",
        "gone.png": "no such file",
        "": "a folder",
        "bomb.png": "pixels",
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: ")) as error:
            load_image(tmp_path / name)
        message = str(error.value)
        assert found in message
        assert "want" in message
        assert "\n" not in message


def test_content_decides_not_the_name(tmp_path):
    Image.fromarray(golden_image("64x48")).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "X.MP4")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "X.MP4")), golden_image("64x48"))


@pytest.mark.parametrize("shape", [(2, 60000), (60000, 2)])
@pytest.mark.parametrize("aspect", list(AspectRatio))
def test_thin_strips_stay_cheap(shape, aspect):
    # Cropping would resize to 378 x 11 million pixels, padding to a square of 3.6 gigapixels.
    array = np.full((*shape, 3), 255, np.uint8)
    pixels = processor(378, aspect)(array)
    assert sorted(pixels.shape[2:]) == [378, 4 * 378 if aspect is AspectRatio.native else 378]
    assert pixels.max() > 1.9


def test_strip_route_draws_the_same_picture(monkeypatch):
    ramp = np.add.outer(np.arange(333), np.arange(500)) * 0.3
    image = np.stack([ramp, ramp / 2, 250 - ramp], axis=-1).astype(np.uint8)
    for aspect in (AspectRatio.crop, AspectRatio.pad):
        usual = processor(70, aspect)(image)
        with monkeypatch.context() as patch:
            patch.setattr("aurora.processing.image._MAX_WORKING_PIXELS", 1)
            strip = processor(70, aspect)(image)
        inner = (slice(None), slice(None), slice(14, 56), slice(2, 68))
        assert (usual - strip)[inner].abs().max() < 0.1
        assert (usual - usual.flip(-1))[inner].abs().max() > 0.5


@pytest.mark.parametrize(
    ("size", "shape"), [((500, 333), (112, 70)), ((333, 500), (70, 112)), ((64, 64), (70, 70)), ((900, 9), (280, 70))]
)
def test_native_keeps_landscapes_wide_where_the_reference_swaps_axes(size, shape):
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1]))  # white on the left
    pixels = processor(70, AspectRatio.native)(image)
    assert pixels.shape == (1, 3, shape[1], shape[0])
    assert pixels[..., 0].mean() > 1 > -1 > pixels[..., -1].mean()
    with pytest.raises(ValueError, match="want one shape in a clip"):
        processor(70, AspectRatio.native)([image, Image.new("RGB", (64, 200))])


@pytest.mark.parametrize("aspect", list(AspectRatio))
def test_saved_config_returns(tmp_path, aspect):
    config = ImageConfig(image_size=96, aspect_ratio=aspect, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1])
    AuroraImageProcessor(config).save_pretrained(tmp_path / "new")
    assert AuroraImageProcessor.from_pretrained(tmp_path / "new").config == config


def test_released_config_is_read(tmp_path):
    (tmp_path / "visual_encoder").mkdir()
    released = {
        "size": {"shortest_edge": 378},
        "crop_size": {"height": 378, "width": 378},
        "resample": 3,
        "do_center_crop": True,
    }
    (tmp_path / "visual_encoder" / "preprocessor_config.json").write_text(json.dumps(released))
    assert AuroraImageProcessor.from_pretrained(tmp_path).config == ImageConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 70, "resample": 2}, "resample=2: want 3"),
        ({"size": 70, "crop_size": 60}, "size 70 and crop_size 60"),
        ({"size": {"height": 70, "width": 60}}, "want one edge"),
        ({"size": "big"}, "size=big"),
        ({}, "no size"),
        ({"size": 70, "image_aspect_ratio": "anyres"}, "want one of pad, crop, squash"),
        ({"size": 70, "rescale_factor": 1}, "want 1/255"),
        ({"size": 70, "image_std": [0, 1, 1]}, "want three numbers above 0"),
        ({"size": 70, "image_mean": "x"}, "want three numbers"),
        ({"size": 0}, "image_size=0"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path, fields, message):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        AuroraImageProcessor.from_pretrained(tmp_path)
    assert str(file) in str(error.value)


def test_missing_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no preprocessor_config.json"):
        AuroraImageProcessor.from_pretrained(tmp_path)
