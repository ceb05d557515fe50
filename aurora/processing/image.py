"""Images to normalised pixel tensors, numerically equal to the reference's CLIP preprocessing.

Four ways to bring a frame to the tower, one choice per checkpoint (`image_aspect_ratio`):

    pad     grow to a square with the mean colour, then resize: all stays visible (how the released weights trained)
    crop    resize the short edge, then cut the centre (how the published inference ran; the default)
    squash  resize both edges, ignoring the aspect ratio (how the DFN5B tower was pre-trained)
    native  keep the shape: the short edge is S, the long one whole patches (the original's unused branch, xtuner
            dataset/aurora.py:138, takes width for height there, so it stretched landscapes to portraits)

All resizing is Pillow's bicubic on uint8. Transparency is dropped, not composited, as in the reference. Shape letters:
F frames, H and W pixels, S the square's edge.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from aurora.processing.files import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG_FILE = "preprocessor_config.json"
MAX_IMAGE_PIXELS = 178_956_970
"""Larger images are refused: twice Pillow's warning level, where Pillow itself raises."""
_MAX_WORKING_PIXELS = 2**26
"""Above this many pixels an intermediate image is avoided: a 1 x 60000 strip padded to a square would need 10 GiB."""

ImageInput: TypeAlias = "Image.Image | NDArray[Any] | Tensor"


class AspectRatio(Enum):
    """How a frame becomes square."""

    pad = "pad"
    crop = "crop"
    squash = "squash"
    native = "native"


@dataclass(kw_only=True, slots=True)
class ImageConfig:
    """What the vision tower expects of a frame."""

    image_size: int = 378
    """Edge of the square given to the tower, pixels; of native frames the short edge."""
    patch_size: int = 14
    """Edge of a patch; both edges of native frames are whole patches."""
    aspect_ratio: AspectRatio = AspectRatio.crop
    """How a frame becomes square; what the checkpoint was trained with is recorded in it."""
    mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    """Mean of each channel, in [0, 1]; also the padding colour."""
    std: list[float] = field(default_factory=lambda: list(CLIP_STD))
    """Standard deviation of each channel, above 0."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image.image_size={self.image_size}: want at least 1 pixel")
        if self.patch_size < 1:
            raise ValueError(f"image.patch_size={self.patch_size}: want at least 1 pixel")
        if len(self.mean) != 3 or not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"image.mean={self.mean}: want three numbers in [0, 1]")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"image.std={self.std}: want three numbers above 0")


class AuroraImageProcessor:
    """Turns images of any size into the tower's normalised squares."""

    def __init__(self, config: ImageConfig | None = None) -> None:
        """Keep the configuration; `None` is that of the released weights' published inference."""
        self.config = config or ImageConfig()

    def __call__(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Normalise one image or several.

        Args:
            images: PIL images, or arrays (H, W), (H, W, 1|3|4) or (F, H, W, 3) of uint8, or of floats in [0, 1]; a
                colour channel in front is accepted where the last axis cannot be one.

        Returns:
            (F, 3, S, S) float32, one row per image.

        Raises:
            ValueError: if there is no image, or one is empty, not finite, out of range or of another shape.
        """
        frames = split_images(images)
        if not frames:
            raise ValueError("images: got none, want at least one")
        return self._normalise([self._square(to_rgb(frame)) for frame in frames])

    def preprocess(self, images: ImageInput | Sequence[ImageInput], return_tensors: str = "pt") -> dict[str, Tensor]:
        """Normalise one image or several, with the interface of CLIPImageProcessor.

        Args:
            images: As for a call.
            return_tensors: pt; no other kind of array is made.

        Returns:
            `pixel_values`, (F, 3, S, S) float32.

        Raises:
            ValueError: for another kind, and as a call.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: want 'pt'")
        return {"pixel_values": self(images)}

    def preprocess_frames(self, frames: NDArray[np.uint8]) -> Tensor:
        """Normalise the frames of a clip.

        Args:
            frames: (F, H, W, 3) uint8, RGB.

        Returns:
            (F, 3, S, S) float32.

        Raises:
            ValueError: if the shape or the type is another.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"frames: got {frames.dtype} {frames.shape}, want uint8 (F, H, W, 3), nothing empty")
        return self._normalise([self._square(Image.fromarray(frame)) for frame in frames])

    def _square(self, image: Image.Image) -> NDArray[np.uint8]:
        """Make one RGB image an (S, S, 3) array."""
        size = self.config.image_size
        if self.config.aspect_ratio is AspectRatio.crop:
            image = resize_and_crop(image, size)
        elif self.config.aspect_ratio is AspectRatio.pad:
            colour = tuple(int(value * 255) for value in self.config.mean)
            image = pad_and_resize(image, size, (colour[0], colour[1], colour[2]))
        elif self.config.aspect_ratio is AspectRatio.native:
            shape = native_size(image.width, image.height, size, self.config.patch_size)
            image = image.resize(shape, Image.Resampling.BICUBIC)
        else:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image, dtype=np.uint8)

    def _normalise(self, squares: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Scale uint8 (S, S, 3) squares to [0, 1], then subtract the mean and divide by the deviation."""
        if len(shapes := sorted({square.shape[:2] for square in squares})) > 1:
            listed = ", ".join(f"{width}x{height}" for height, width in shapes)
            raise ValueError(f"images: native aspect ratio gives frames of {listed} pixels, want one shape in a clip")
        x = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(torch.float32)  # (F, 3, S, S)
        mean = torch.tensor(self.config.mean).view(3, 1, 1)
        std = torch.tensor(self.config.std).view(3, 1, 1)
        return ((x * (1 / 255) - mean) / std).contiguous()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> AuroraImageProcessor:
        """Read `preprocessor_config.json` from a checkpoint folder or from its `visual_encoder/`.

        Args:
            path: Checkpoint folder, Aurora or xtuner layout.

        Raises:
            ValueError: if the file is missing or asks for another kind of preprocessing.
        """
        folder = Path(path)
        for file in (folder / CONFIG_FILE, folder / "visual_encoder" / CONFIG_FILE):
            if file.is_file():
                return cls(_parse_config(read_json(file), file))
        raise ValueError(f"{folder}: no {CONFIG_FILE}, neither there nor in visual_encoder/")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration under CLIPImageProcessor's field names, with `image_aspect_ratio` added."""
        size = self.config.image_size
        crop = self.config.aspect_ratio is AspectRatio.crop
        square = {"height": size, "width": size}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "image_aspect_ratio": self.config.aspect_ratio.value,
            **({"patch_size": self.config.patch_size} if self.config.aspect_ratio is AspectRatio.native else {}),
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size} if crop else square,
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": crop,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.config.mean),
            "image_std": list(self.config.std),
        }

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json` into the folder `path`, which is made if needed."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the short edge to `size` (the long one is floored), then cut the central square.

    Args:
        image: RGB.
        size: Edge of the result, pixels.
    """
    width, height = image.size
    short = min(width, height)
    new_width, new_height = int(size * width / short), int(size * height / short)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if new_width * new_height <= _MAX_WORKING_PIXELS:
        resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + size, top + size))
    # A thin strip: only the part that the crop keeps is resized.
    x_scale, y_scale = width / new_width, height / new_height
    box = (left * x_scale, top * y_scale, (left + size) * x_scale, (top + size) * y_scale)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def pad_and_resize(image: Image.Image, size: int, colour: tuple[int, int, int]) -> Image.Image:
    """Centre the image on a square of `colour` with its long edge, then resize that to `size`.

    Args:
        image: RGB.
        size: Edge of the result, pixels.
        colour: RGB of the added area.
    """
    width, height = image.size
    long = max(width, height)
    if width == height:
        square = image
    elif long * long <= _MAX_WORKING_PIXELS:
        square = Image.new("RGB", (long, long), colour)
        square.paste(image, ((long - width) // 2, (long - height) // 2))
    else:  # the same picture with the two steps exchanged
        inner = (max(1, round(width * size / long)), max(1, round(height * size / long)))
        square = Image.new("RGB", (size, size), colour)
        square.paste(image.resize(inner, Image.Resampling.BICUBIC), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def native_size(width: int, height: int, short: int, patch_size: int) -> tuple[int, int]:
    """Return the shape that keeps an image's aspect ratio as closely as whole patches allow.

    Args:
        width: Of the image, pixels.
        height: Of the image, pixels.
        short: Wanted short edge, pixels; rounded to whole patches.
        patch_size: Edge of a patch, pixels.

    Returns:
        Width and height, pixels. The long edge is at most 4 x the short one: thinner strips are squeezed.
    """
    patches = max(1, round(short / patch_size))
    ratio = min(max(width, height) / min(width, height), 4.0)
    long = round(patches * ratio) * patch_size
    return (long, patches * patch_size) if width >= height else (patches * patch_size, long)


def to_rgb(image: ImageInput) -> Image.Image:
    """Bring an image of any mode or array type to upright 8-bit RGB.

    The EXIF orientation is applied, 16-bit values are scaled to 8 bits and an alpha channel is dropped.

    Args:
        image: PIL image, array or tensor, see `AuroraImageProcessor.__call__`.

    Raises:
        ValueError: if it is empty, not finite, out of range, of an unknown shape or not an image.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        return Image.fromarray(_array_to_uint8(image))
    if not isinstance(image, Image.Image):
        raise ValueError(f"image: got {type(image).__name__}, want a PIL image or an array")
    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"image: got {width}x{height} pixels, want at least 1x1")
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"image: got {width}x{height} pixels, want at most {MAX_IMAGE_PIXELS} in all")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I":  # 32-bit: Pillow also opens some 16-bit files so
        values = np.asarray(image)
        shift = 8 if values.max() > 255 else 0
        return Image.fromarray((values >> shift).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_array_to_uint8(np.asarray(image)))
    return image.convert("RGB")


def split_images(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """Return the single images of one image, of a (F, H, W, 3) array or of a list of either."""
    if isinstance(images, Tensor):
        images = images.detach().cpu().numpy()
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return [single for image in images for single in split_images(image)]
    return [images]


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file by its content, whatever its name; of an animation the first frame.

    Args:
        path: The file.

    Returns:
        Upright 8-bit RGB.

    Raises:
        ValueError: one line that names the file, what was found and what was wanted.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(path)}: no such file; want an image") from None
    except IsADirectoryError:
        raise ValueError(f"{os.fspath(path)}: a folder; want an image") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{os.fspath(path)}: over {MAX_IMAGE_PIXELS} pixels; want a smaller image") from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{os.fspath(path)}: not an image Pillow can read; want png, jpg, webp, gif, bmp or tiff"
        ) from None
    except (OSError, SyntaxError) as error:  # Pillow reports some broken PNG chunks as SyntaxError
        raise ValueError(f"{os.fspath(path)}: broken image ({error}); want a complete one") from None
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def _array_to_uint8(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Check an array image and return it as (H, W, 3) uint8."""
    got = f"image: got {array.dtype} {array.shape}"
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"{got}, want (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), nothing empty")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError(f"{got} with NaN or infinite values, want finite ones")
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{got} with values in [{array.min():g}, {array.max():g}], want floats in [0, 1] or uint8")
        array = np.rint(array.astype(np.float64) * 255)
    elif array.dtype.kind not in "iu":
        raise ValueError(f"{got}, want uint8 or floats in [0, 1]")
    elif array.min() < 0 or array.max() > 255:
        raise ValueError(f"{got} with values in [{array.min()}, {array.max()}], want 0 to 255")
    array = array[..., :3] if array.shape[-1] > 1 else array.repeat(3, axis=-1)
    return np.ascontiguousarray(array.astype(np.uint8))


def _parse_config(raw: dict[str, Any], file: Path) -> ImageConfig:
    """Read CLIPImageProcessor's fields; refuse what this processor would not do the same way."""

    def edge(key: str) -> int | None:
        value = raw.get(key)
        if isinstance(value, dict):
            edges = [value[name] for name in ("shortest_edge", "height", "width") if value.get(name) is not None]
            value = edges[0] if edges and all(edge == edges[0] for edge in edges) else value
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{file}: {key}={raw[key]}: want one edge in pixels")
        return value

    for key, wanted in (("resample", 3), ("do_resize", True), ("do_rescale", True), ("do_normalize", True)):
        if raw.get(key, wanted) != wanted:
            raise ValueError(f"{file}: {key}={raw[key]}: want {wanted}")
    factor = raw.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{file}: rescale_factor={factor}: want 1/255")
    size, crop = edge("size"), edge("crop_size")
    if size is None:
        raise ValueError(f"{file}: no size; want the edge of a frame in pixels")
    named = raw.get("image_aspect_ratio", "crop" if raw.get("do_center_crop", True) else "squash")
    choices = [choice.value for choice in AspectRatio]
    if named not in choices:
        raise ValueError(f"{file}: image_aspect_ratio={named}: want one of {', '.join(choices)}")
    if named == "crop" and crop is not None and crop != size:
        raise ValueError(f"{file}: size {size} and crop_size {crop}: want them equal")
    mean, std = raw.get("image_mean", list(CLIP_MEAN)), raw.get("image_std", list(CLIP_STD))
    for key, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"{file}: {key}={values}: want three numbers")
    # Only native frames depend on patches: elsewhere the key means nothing here.
    patch_size = raw.get("patch_size", 14) if named == "native" else 14
    if isinstance(patch_size, bool) or not isinstance(patch_size, int):
        raise ValueError(f"{file}: patch_size={patch_size!r}: want a whole number of pixels")
    try:
        return ImageConfig(image_size=size, patch_size=patch_size, aspect_ratio=AspectRatio(named), mean=mean, std=std)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
