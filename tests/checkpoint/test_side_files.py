"""What stands beside the weights goes along: tokenizers, preprocessing, templates; and tokens LLaVA adds, both ways."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from aurora.checkpoint.convert import convert
from aurora.checkpoint.pretrained import save_model
from aurora.checkpoint.store import read_json
from aurora.processing.image import AspectRatio, AuroraImageProcessor, ImageConfig
from aurora.processing.processor import AuroraProcessor
from aurora.processing.text import Tokenizer
from tests.checkpoint.tiny_models import tiny_config, tiny_model

LINES = ["a red ball rolls over green grass", "the small cat sits", "USER: what is this? ASSISTANT: a ball"] * 20
FOX = "the cat rolls <image> over"


def sentencepiece_tokenizer(folder: Path) -> None:
    """70 pieces, as the tiny model's vocabulary."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=out, vocab_size=70, model_type="bpe", hard_vocab_limit=False,
        minloglevel=2, pad_id=-1,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def json_tokenizer(folder: Path) -> None:
    """70 entries, three of them special."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=70, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(params=[sentencepiece_tokenizer, json_tokenizer], ids=["sentencepiece", "json"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A whole checkpoint in the Aurora layout."""
    folder = tmp_path / "aurora"
    save_model(tiny_model(), folder, "aurora")
    request.param(folder)
    images = AuroraImageProcessor(ImageConfig(image_size=12, aspect_ratio=AspectRatio.pad))
    AuroraProcessor(images, Tokenizer.from_pretrained(folder), chat_template="{{ messages }}").save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


def side_files(folder: Path) -> dict[str, Any]:
    """Everything but weights and configs of the parts."""
    return {
        file.name: json.loads(file.read_text()) if file.suffix == ".json" else file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".safetensors" and file.name != "config.json"
    }


@pytest.mark.parametrize("there", ["xtuner", "llava", "llava_hf"])
def test_side_files_come_along_and_back(checkpoint: Path, tmp_path: Path, there: str) -> None:
    before = side_files(checkpoint)
    convert(checkpoint, tmp_path / "there", layout=there)
    place = tmp_path / "there" / ("visual_encoder" if there == "xtuner" else "")
    assert (place / "preprocessor_config.json").is_file()
    assert side_files(tmp_path / "there").keys() >= before.keys()
    processor = AuroraProcessor.from_pretrained(tmp_path / "there")
    assert processor.image_processor.config == AuroraProcessor.from_pretrained(checkpoint).image_processor.config
    original = AuroraProcessor.from_pretrained(checkpoint)
    want = original(text=FOX)["input_ids"]
    got = processor(text=FOX)["input_ids"]
    assert got.masked_fill(got == processor.image_token_index, -200).equal(want)
    assert processor.image_token_index == -200  # as the model has it, once the added rows are dropped
    convert(tmp_path / "there", tmp_path / "back", layout="aurora")
    assert side_files(tmp_path / "back") == before


def test_added_tokens_are_in_the_tokenizer_of_a_llava_export(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "llava", layout="llava_hf")
    folder = tmp_path / "llava"
    decoder = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
    assert {number: entry["content"] for number, entry in decoder.items()} == {"70": "<image>", "71": "<pad>"}
    if (folder / "tokenizer.json").is_file():
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert theirs.encode("<image>", add_special_tokens=False).ids == [70]
        assert theirs.token_to_id("<pad>") == 71
    else:
        assert read_json(folder / "added_tokens.json") == {"<image>": 70, "<pad>": 71}
    assert Tokenizer.from_pretrained(folder).encode("<pad>") == [71]


def test_a_part_takes_its_own_files_and_a_new_captioner_those_of_both(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "clip", layout="clip")
    assert side_files(tmp_path / "clip").keys() == {"preprocessor_config.json"}
    convert(checkpoint, tmp_path / "llama", layout="llama")
    assert "preprocessor_config.json" not in side_files(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "new", layout="xtuner", vision_path=tmp_path / "clip")
    assert side_files(tmp_path / "new") == side_files(checkpoint)


@pytest.mark.parametrize(("layout", "aspect"), [("timm", "squash"), ("open_clip", "pad"), ("timm", "crop")])
def test_preprocessing_of_timm_and_open_clip_is_translated(tmp_path: Path, layout: str, aspect: str) -> None:
    save_model(tiny_model(), tmp_path / "aurora", "aurora", image_aspect_ratio=aspect)
    convert(tmp_path / "aurora", tmp_path / "tower", layout=layout)
    assert not (tmp_path / "tower/preprocessor_config.json").exists()
    convert(tmp_path / "tower", tmp_path / "clip", layout="clip")
    got = AuroraImageProcessor.from_pretrained(tmp_path / "clip").config
    assert got == ImageConfig(image_size=tiny_config().vision.image_size, aspect_ratio=AspectRatio(aspect))
