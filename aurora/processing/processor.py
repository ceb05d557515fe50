"""AuroraProcessor: what a checkpoint needs to turn pictures and words into model inputs, and ids back into words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from aurora.model.splice import check_placeholders
from aurora.processing import chat
from aurora.processing.chat import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from aurora.processing.files import read_json
from aurora.processing.image import AuroraImageProcessor, ImageInput, split_images
from aurora.processing.text import StreamDecoder, Tokenizer
from aurora.processing.video import AuroraVideoProcessor, VideoInput, split_clips

CONFIG_FILE = "processor_config.json"
TEMPLATE_FILE = "chat_template.jinja"
OLD_TEMPLATE_FILE = "chat_template.json"

_Setting = TypeVar("_Setting")
Images: TypeAlias = "ImageInput | Sequence[ImageInput | None] | Sequence[Sequence[ImageInput]]"
Videos: TypeAlias = "VideoInput | Sequence[VideoInput]"


class Batch(dict[str, Any]):
    """Model inputs by name; `model(**batch)` and `batch.input_ids` both work.

    Values are tensors; pixels that differ from row to row are a list of tensors, with None for a row without any.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"batch has no {name!r}; it holds {', '.join(self)}") from None

    def to(self, *targets: torch.device | str | int | torch.dtype | None, **named: Any) -> Batch:
        """Return the batch on another device, with floats in another dtype; ids and masks keep theirs.

        Args:
            targets: Device and dtype, in any order, either may be absent.
            named: The same as `device=` and `dtype=`.

        Raises:
            ValueError: if an argument is neither.
        """
        unknown = set(named) - {"device", "dtype", "non_blocking"}
        if unknown:
            raise ValueError(f"Batch.to: got {', '.join(sorted(unknown))}, want device or dtype")
        given = [*targets, named.get("device"), named.get("dtype")]
        dtype = next((target for target in given if isinstance(target, torch.dtype)), None)
        device = next((target for target in given if target is not None and not isinstance(target, torch.dtype)), None)
        non_blocking = bool(named.get("non_blocking", False))
        moved = Batch()

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            kind = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=kind, non_blocking=non_blocking)

        for name, value in self.items():
            moved[name] = [move(tensor) for tensor in value] if isinstance(value, list) else move(value)
        return moved


class AuroraProcessor:
    """Image, video and text processing of one checkpoint."""

    def __init__(
        self,
        image_processor: AuroraImageProcessor,
        tokenizer: Tokenizer,
        video_processor: AuroraVideoProcessor | None = None,
        chat_template: str | None = None,
        frame_template: str = IMAGE_TOKEN,
        image_token_index: int = IMAGE_TOKEN_INDEX,
    ) -> None:
        """Combine the parts.

        Args:
            image_processor: Frames to pixels.
            tokenizer: Text to ids.
            video_processor: Clips to pixels; by default eight frames through `image_processor`.
            chat_template: Jinja2 source; `None` is the Vicuna form.
            frame_template: Text of one frame in a prompt, see `aurora.processing.chat.frame_text`.
            image_token_index: Id of a placeholder in `input_ids`, as in the model's configuration.
        """
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.video_processor = video_processor or AuroraVideoProcessor(image_processor)
        self.chat_template = chat_template
        self.frame_template = chat.check_frame_template(frame_template)
        self.image_token_index = image_token_index

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> AuroraProcessor:
        """Read a checkpoint's processor, Aurora or xtuner layout.

        Args:
            path: Checkpoint folder, or a hub id, which is downloaded.

        Raises:
            ValueError: if a part is missing or broken; the message names the file.
        """
        folder = Path(path)
        if not folder.is_dir():
            from aurora.checkpoint.pretrained import resolve_checkpoint  # a local processor needs no model code

            folder = resolve_checkpoint(os.fspath(path))
        config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        model = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}

        def setting(key: str, kind: type[_Setting], default: _Setting) -> _Setting:
            value = config.get(key, model.get(key, default))
            if not isinstance(value, kind):
                raise ValueError(f"{folder / CONFIG_FILE}: {key}={value!r}: want {kind.__name__}")
            return value

        image_processor, tokenizer = AuroraImageProcessor.from_pretrained(folder), Tokenizer.from_pretrained(folder)
        num_frames, frame_template = setting("num_frames", int, 8), setting("frame_template", str, IMAGE_TOKEN)
        template, index = _read_template(folder), setting("image_token_index", int, IMAGE_TOKEN_INDEX)
        try:
            video_processor = AuroraVideoProcessor(image_processor, num_frames=num_frames)
            return cls(image_processor, tokenizer, video_processor, template, frame_template, index)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write everything `from_pretrained` reads into the folder `path`, which is made if needed."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        config = {
            "processor_class": "AuroraProcessor",
            "frame_template": self.frame_template,
            "image_token": IMAGE_TOKEN,
            "image_token_index": self.image_token_index,
            "num_frames": self.video_processor.num_frames,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
        else:
            (folder / TEMPLATE_FILE).unlink(missing_ok=True)

    def build_prompt(self, question: str, num_frames: int) -> str:
        """Return the prompt for one question about `num_frames` frames, see `aurora.processing.chat.build_prompt`."""
        return chat.build_prompt(question, num_frames, self.frame_template)

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Write a conversation as a prompt, see `aurora.processing.chat.apply_chat_template`."""
        special = self.tokenizer.special_text
        return chat.apply_chat_template(
            conversation,
            self.chat_template,
            add_generation_prompt=add_generation_prompt,
            frame_template=self.frame_template,
            bos_token=special(self.tokenizer.bos_id),
            eos_token=special(self.tokenizer.eos_id),
        )

    def __call__(
        self,
        images: Images | None = None,
        videos: Videos | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        padding: bool = True,
        padding_side: str = "left",
    ) -> Batch:
        """Make model inputs.

        Args:
            images: One image, or one per text, or a list of images per text. `None` may stand for the image of a text
                without a placeholder. Several images with a single text all belong to it.
            videos: One clip (an array (F, H, W, 3), a list of frames, or a path) or one per text.
            text: One prompt or several, with `<image>` placeholders.
            return_tensors: Only "pt".
            padding: Pad texts of different lengths; otherwise they must be equally long.
            padding_side: "left" (for generation) or "right".

        Returns:
            `input_ids` and `attention_mask` (B, T) int64 if there is text; `pixel_values` (B, 3, S, S), or
            (B, F, 3, S, S) for several images a text; `pixel_values_videos` (B, F, 3, S, S). Where texts have different
            numbers of images or frames, a list of (F, 3, S, S) instead.

        Raises:
            ValueError: if the numbers of texts, images or clips disagree, a text has another number of placeholders
                than one or its frames, or an input is malformed.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: want 'pt'")
        if images is not None and videos is not None:
            raise ValueError("got images and videos, want one of them")
        if images is None and videos is None and text is None:
            raise ValueError("got nothing, want text, images or videos")
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        batch = Batch()
        if images is not None:
            batch["pixel_values"] = self._images(images, texts, single=isinstance(text, str))
        if videos is not None:
            batch["pixel_values_videos"] = self._videos(videos, texts)
        if texts is not None:
            num_frames = (
                [len(clip) for clip in batch["pixel_values_videos"]] if videos is not None else [0] * len(texts)
            )
            batch.update(self._texts(texts, num_frames, padding=padding, padding_side=padding_side))
        return batch

    def decode(self, ids: Iterable[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Return the text of one sequence of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, ids: Iterable[Iterable[int] | Tensor] | Tensor, skip_special_tokens: bool = True
    ) -> list[str]:
        """Return the text of each sequence of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in ids]

    def stream(self) -> StreamDecoder:
        """Return a decoder for ids that arrive one by one."""
        return self.tokenizer.stream()

    def _images(self, images: Images, texts: list[str] | None, *, single: bool) -> Tensor | list[Tensor | None]:
        """Return (B, 3, S, S), (B, F, 3, S, S) where a text has several images, or a list where the numbers differ."""
        if single or not isinstance(images, Sequence):
            rows: list[list[Any]] = [split_images(images)]  # type: ignore[arg-type]
        else:
            rows = [split_images(row) if isinstance(row, Sequence) else [row] for row in images]
        if texts is not None and len(rows) != len(texts):
            raise ValueError(
                f"got {len(rows)} images and {len(texts)} texts, want one image or list of images per text"
            )
        counts = [len(row) for row in rows]
        if not rows or not all(counts):
            raise ValueError(f"images per text: got {counts}, want at least 1 for every text, or None")
        # Not `row == [None]`: an array does not compare to one truth value.
        absent = [len(row) == 1 and row[0] is None for row in rows]
        missing = [absent[b] and texts is not None and IMAGE_TOKEN not in texts[b] for b in range(len(rows))]
        if all(missing):
            raise ValueError("images: got only None, want images=None for texts without images")
        for b, text in enumerate(texts or []):
            if not missing[b]:
                check_placeholders(f"text {b}", text.count(IMAGE_TOKEN), counts[b], text_alone=False)
        given = [image for row, absent in zip(rows, missing) if not absent for image in row]
        frames = self.image_processor(given)
        if len(set(counts)) > 1:
            parts = iter(frames.split([count for count, absent in zip(counts, missing) if not absent]))
            return [None if absent else next(parts) for absent in missing]
        pixels = frames.new_zeros((len(rows), counts[0], *frames.shape[1:]))
        pixels[~torch.tensor(missing)] = frames.unflatten(0, (-1, counts[0]))
        return pixels[:, 0] if counts[0] == 1 else pixels

    def _videos(self, videos: Videos, texts: list[str] | None) -> Tensor | list[Tensor]:
        """Return (B, F, 3, S, S), or a list where clips differ in F."""
        clips = split_clips(videos)
        if texts is not None and len(clips) != len(texts):
            raise ValueError(f"got {len(clips)} videos and {len(texts)} texts, want one video per text")
        pixels = self.video_processor.clips(clips)
        if not pixels:
            raise ValueError("videos: got no clip, want at least one")
        for b, text in enumerate(texts or []):
            check_placeholders(f"text {b}", text.count(IMAGE_TOKEN), len(pixels[b]), text_alone=False)
        return torch.stack(pixels) if len({len(clip) for clip in pixels}) == 1 else pixels

    def _texts(self, texts: list[str], num_frames: list[int], *, padding: bool, padding_side: str) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, (B, T) int64."""
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}: want 'left' or 'right'")
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"text: got {texts!r}, want one text or a list of them")
        rows = [
            chat.tokenize_prompt(self._number_frames(text, count), self.tokenizer, self.image_token_index)
            for text, count in zip(texts, num_frames, strict=True)
        ]
        lengths = [len(row) for row in rows]
        width = max(lengths)
        if not padding and min(lengths) != width:
            raise ValueError(f"padding=False: got texts of {lengths} tokens, want equal lengths")
        ids = torch.full((len(rows), width), self.tokenizer.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for b, row in enumerate(rows):
            span = slice(width - len(row), width) if padding_side == "left" else slice(len(row))
            ids[b, span] = torch.tensor(row)
            mask[b, span] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _number_frames(self, text: str, num_frames: int) -> str:
        """Write one placeholder out as one for every frame of a clip, where the checkpoint's frames carry text.

        With the plain `<image>` template one placeholder for a whole clip is a form of its own and stays.
        """
        first = chat.frame_text(1, self.frame_template)
        if num_frames < 2 or self.frame_template == IMAGE_TOKEN or text.count(IMAGE_TOKEN) != 1 or first not in text:
            return text
        return text.replace(first, chat.frame_text(num_frames, self.frame_template))


def _read_template(folder: Path) -> str | None:
    """Return the processor's own chat template; a template of the language model alone knows no images and is left."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not readable ({error}); want a Jinja template in UTF-8") from None
    file = folder / OLD_TEMPLATE_FILE
    if not file.is_file():
        return None
    template = read_json(file).get("chat_template")
    if not isinstance(template, str):
        raise ValueError(f"{file}: chat_template={template!r}: want a template")
    return template
