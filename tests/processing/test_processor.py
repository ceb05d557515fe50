import json

import numpy as np
import pytest
import torch
from PIL import Image

from aurora.processing.image import AspectRatio, AuroraImageProcessor, ImageConfig
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import AuroraVideoProcessor

IMAGE = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).reshape(30, 40, 3).astype(np.uint8))


def clip(num_frames, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 30, 40, 3), dtype=np.uint8)


def user(text):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def test_image_snippet(processor):
    prompt = processor.apply_chat_template(user("Describe the image in detail."), add_generation_prompt=True)
    assert prompt == processor.build_prompt("Describe the image in detail.", 1)
    inputs = processor(images=IMAGE, text=prompt, return_tensors="pt").to("cpu", torch.float16)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs.pixel_values.shape == (1, 3, 28, 28)
    assert inputs.pixel_values.dtype == torch.float16
    assert inputs.input_ids.dtype == inputs["attention_mask"].dtype == torch.int64
    assert (inputs["input_ids"] == -200).sum() == 1
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_id
    assert inputs["attention_mask"].all()
    assert processor.decode(inputs.input_ids[0]) == "USER:  \nDescribe the image in detail. ASSISTANT:"


def test_video_snippet(processor):
    # One placeholder for the whole clip: the seed's snippet.
    video = clip(8)
    prompt = processor.apply_chat_template(user("Describe the video in detail."), add_generation_prompt=True)
    inputs = processor(videos=list(video), text=prompt, return_tensors="pt").to("cpu", torch.float16)
    assert inputs.pixel_values_videos.shape == (1, 8, 3, 28, 28)
    assert (inputs["input_ids"] == -200).sum() == 1
    expected = processor.image_processor.preprocess_frames(video).half()
    assert torch.equal(inputs["pixel_values_videos"][0], expected)


def test_forms_of_a_clip_are_equal(processor, tmp_path):
    video = clip(3)
    expected = processor(videos=video)["pixel_values_videos"]
    for form in (
        list(video),
        [Image.fromarray(frame) for frame in video],
        torch.from_numpy(video),
        [video],
        video[None],
    ):
        assert torch.equal(processor(videos=form).pixel_values_videos, expected)
    assert torch.equal(processor(videos=[list(video), list(video)]).pixel_values_videos[1], expected[0])


def test_batch_is_padded_on_the_left(processor):
    texts = [processor.build_prompt(question, 1) for question in ("Hi?", "Describe the red ball in detail.")]
    inputs = processor(images=[IMAGE, IMAGE], text=texts)
    alone = processor(images=IMAGE, text=texts[0])
    width, short = inputs.input_ids.shape[1], alone.input_ids.shape[1]
    assert inputs.pixel_values.shape == (2, 3, 28, 28)
    assert torch.equal(inputs.input_ids[0, width - short :], alone.input_ids[0])
    assert (inputs.input_ids[0, : width - short] == processor.tokenizer.pad_id).all()
    assert inputs.attention_mask.tolist() == [[0] * (width - short) + [1] * short, [1] * width]
    right = processor(images=[IMAGE, IMAGE], text=texts, padding_side="right")
    assert torch.equal(right.input_ids[0, :short], alone.input_ids[0])
    assert right.attention_mask.sum() == inputs.attention_mask.sum()


def test_several_images_per_text(processor):
    one = processor(images=[IMAGE, IMAGE], text=processor.build_prompt("Which?", 2))
    assert one.pixel_values.shape == (1, 2, 3, 28, 28)
    two = processor(images=[[IMAGE, IMAGE], [IMAGE, IMAGE]], text=[processor.build_prompt("Which?", 2)] * 2)
    assert two.pixel_values.shape == (2, 2, 3, 28, 28)


def test_text_alone_and_pixels_alone(processor):
    assert set(processor(text=["Hi"])) == {"input_ids", "attention_mask"}
    assert set(processor(images=IMAGE)) == {"pixel_values"}
    assert set(processor(videos=clip(2))) == {"pixel_values_videos"}


def test_a_text_only_row_needs_no_image(processor):
    texts = [processor.build_prompt("Hi?", 1), processor.build_prompt("Hi?", 0)]
    pixels = processor(images=[IMAGE, None], text=texts).pixel_values
    assert torch.equal(pixels[0], processor(images=IMAGE).pixel_values[0])
    assert not pixels[1].any()
    with pytest.raises(ValueError, match="got NoneType"):
        processor(images=[IMAGE, None], text=texts[:1] * 2)


def test_numbered_frames(tokenizer):
    image_processor = AuroraImageProcessor(ImageConfig(image_size=28))
    processor = AuroraProcessor(image_processor, tokenizer, frame_template="{index} <image>")
    full = processor(videos=clip(3), text=processor.build_prompt("Q", 3))
    # The seed's snippet has one placeholder a clip; a checkpoint with numbered frames always gets one a frame.
    snippet = processor.apply_chat_template(user("Q"), add_generation_prompt=True)
    assert torch.equal(processor(videos=clip(3), text=snippet).input_ids, full.input_ids)
    assert (full.input_ids == -200).sum() == 3
    bare = processor(videos=clip(3), text="USER: <image>\nQ ASSISTANT:")
    assert (bare.input_ids == -200).sum() == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got nothing"),
        ({"images": IMAGE, "videos": clip(2)}, "want one of them"),
        ({"images": IMAGE, "text": "x", "return_tensors": "np"}, "want 'pt'"),
        ({"images": [IMAGE], "text": ["a", "b"]}, "got 1 images and 2 texts"),
        ({"images": [IMAGE, IMAGE, IMAGE], "text": ["a", "b"]}, "got 3 images and 2 texts"),
        ({"videos": [clip(2)], "text": ["a", "b"]}, "got 1 videos and 2 texts"),
        ({"videos": [clip(2), clip(3)], "text": ["a <image>", "b"]}, "text 1: 0 placeholders in the text for 3 frames"),
        ({"videos": []}, "videos: got no clip"),
        ({"videos": [clip(2), IMAGE]}, "mixes frames and clips"),
        ({"videos": 5}, "videos: got int"),
        ({"images": [[IMAGE], []], "text": ["a", "b"]}, "got \\[1, 0\\], want at least 1 for every text"),
        ({"images": []}, "got \\[\\], want at least 1"),
        ({"text": []}, "want one text or a list"),
        ({"text": [5]}, "want one text or a list"),
        ({"text": ["a", "a long text"], "padding": False}, "want equal lengths"),
        ({"text": "a", "padding_side": "top"}, "want 'left' or 'right'"),
    ],
)
def test_bad_calls(processor, given, message):
    with pytest.raises(ValueError, match=message):
        processor(**given)


def test_rows_may_differ_in_frames(processor):
    texts = ["<image> a", "<image> <image> <image> b"]
    batch = processor(videos=[clip(2), clip(3)], text=texts)
    assert [tuple(pixels.shape) for pixels in batch.pixel_values_videos] == [(2, 3, 28, 28), (3, 3, 28, 28)]
    for row, frames in enumerate((2, 3)):
        alone = processor(videos=clip(frames), text=texts[row])
        assert torch.equal(batch.pixel_values_videos[row], alone.pixel_values_videos[0])
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == alone.input_ids[0].tolist()
    batch = processor(images=[[IMAGE], None, [IMAGE, IMAGE]], text=["<image> a", "b", "<image> <image> c"])
    assert [pixels if pixels is None else len(pixels) for pixels in batch.pixel_values] == [1, None, 2]
    moved = batch.to(torch.float64)
    assert (moved.pixel_values[0].dtype, moved.pixel_values[1]) == (torch.float64, None)


def test_batch_to(processor):
    batch = processor(images=IMAGE, text="<image> Hi")
    for moved in (batch.to(torch.float64), batch.to(device="cpu", dtype=torch.float64), batch.to("cpu", torch.float64)):
        assert moved.pixel_values.dtype == torch.float64
        assert moved.input_ids.dtype == torch.int64
        assert batch.pixel_values.dtype == torch.float32
    assert batch.to("meta").input_ids.device.type == "meta"
    with pytest.raises(ValueError, match="want device or dtype"):
        batch.to(kind="cpu")
    with pytest.raises(AttributeError, match="it holds pixel_values, input_ids, attention_mask"):
        _ = batch.pixels


def test_batch_decode(processor):
    ids = torch.tensor([processor.tokenizer.encode("Hi")] * 2)
    assert processor.batch_decode(ids) == ["Hi", "Hi"]


def test_save_and_load(tokenizer, tmp_path):
    config = ImageConfig(image_size=42, aspect_ratio=AspectRatio.pad)
    image_processor = AuroraImageProcessor(config)
    videos = AuroraVideoProcessor(image_processor, num_frames=5)
    template = "{{ messages[0].content[0].text }}你"
    AuroraProcessor(image_processor, tokenizer, videos, template, "{index} <image>", -9).save_pretrained(
        tmp_path / "new"
    )
    loaded = AuroraProcessor.from_pretrained(tmp_path / "new")
    assert loaded.image_processor.config == loaded.video_processor.image_processor.config == config
    assert loaded.video_processor.num_frames == 5
    assert loaded.image_token_index == -9
    assert loaded.frame_template == "{index} <image>"
    assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi你"
    AuroraProcessor(image_processor, tokenizer).save_pretrained(tmp_path / "new")
    assert AuroraProcessor.from_pretrained(tmp_path / "new").chat_template is None


def test_xtuner_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    AuroraImageProcessor(ImageConfig(image_size=70)).save_pretrained(tmp_path / "visual_encoder")
    loaded = AuroraProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor.config.image_size == 70
    assert (loaded.image_token_index, loaded.frame_template, loaded.chat_template) == (-200, "<image>", None)


def test_old_chat_template_file(tokenizer, tmp_path):
    AuroraProcessor(AuroraImageProcessor(), tokenizer).save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert AuroraProcessor.from_pretrained(tmp_path).chat_template == "old"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("processor_config.json", '{"num_frames": "8"}', "num_frames='8': want int"),
        ("processor_config.json", '{"frame_template": "x"}', "want exactly one <image>"),
        ("processor_config.json", "[]", "want an object"),
        ("chat_template.json", "{}", "want a template"),
    ],
)
def test_hostile_files(tokenizer, tmp_path, name, content, message):
    AuroraProcessor(AuroraImageProcessor(), tokenizer).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        AuroraProcessor.from_pretrained(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        AuroraProcessor.from_pretrained(tmp_path / "gone")


def test_an_array_or_a_tensor_is_an_image(processor):
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    want = processor(images=Image.fromarray(picture), text="<image> a")
    for same in (picture, [picture], torch.from_numpy(picture)):
        batch = processor(images=same, text="<image> a")
        assert torch.equal(batch["pixel_values"], want["pixel_values"])


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("kind", ["images", "videos"])
def test_a_prompt_with_a_missing_or_extra_placeholder_is_refused(tokenizer, kind, count):
    processor = AuroraProcessor(AuroraImageProcessor(ImageConfig(image_size=14)), tokenizer)
    frames = [np.zeros((14, 14, 3), np.uint8)] * (3 if kind == "videos" else 1)
    given = {"images": frames[0]} if kind == "images" else {"videos": frames}
    wanted = f"text 0: {count} placeholders? in the text for {len(frames)} frames?; want one placeholder per frame"
    with pytest.raises(ValueError, match=wanted):
        processor(text=f"USER: {'<image> ' * count}What? ASSISTANT:", **given)
