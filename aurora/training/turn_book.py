"""TinyWorld's questions and captions as turns, tokenised exactly as inference tokenises them."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from aurora.data.tinyworld.language import SLOT_WORDS, Category, caption_prompts, captions, qa_pairs
from aurora.data.tinyworld.scene import Scene
from aurora.processing.chat import TextEncoder, build_prompt, tokenize_prompt
from aurora.training.turns import Turn, answer_tokens

NO_IMAGE = -1
"""Placeholder id used while splitting a prompt; never seen by a model."""


class TurnBook:
    """Writes the turns of a scene; the wording is a function of the seeds it is given."""

    def __init__(
        self, tokenizer: TextEncoder, *, num_frames: int, frame_template: str, slot_weight: float = 3.0
    ) -> None:
        """Tokenise for prompts of `num_frames` placeholders."""
        self._tokenizer, self._num_frames, self._frame_template = tokenizer, num_frames, frame_template
        self._slot_weight = slot_weight
        self._encode_prompt = cache(self._split_prompt)
        self._encode_word = cache(lambda word: tuple(tokenizer.encode(word)))
        self.eos_id = tokenizer.eos_id

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Return the ids of one word of an answer, remembered."""
        return list(self._encode_word(text)) if not add_bos else self._tokenizer.encode(text, add_bos=True)

    def prefix(self, image_token_index: int) -> list[int]:
        """Return the ids up to the last placeholder: the same for every question."""
        ids = self._encode_prompt("")[0]
        return [image_token_index if i == NO_IMAGE else i for i in ids]

    def questions(self, scene: Scene, seed: int) -> list[Turn]:
        """Return one turn per question about the scene."""
        return [self._turn(qa.slot, qa.question, qa.answer) for qa in qa_pairs(scene, seed)]

    def captions(self, scene: Scene, seed: int, *, num_captions: int | None = None) -> list[Turn]:
        """Return `num_captions` captions of the scene, drawn at random (None: all), each after one of its prompts."""
        rng = np.random.default_rng([seed, 1])
        texts = captions(scene, seed)
        names: Sequence[Category] = list(texts)
        if num_captions is not None:
            names = [names[i] for i in rng.permutation(len(names))[:num_captions]]
        turns = []
        for name in names:
            prompts = caption_prompts(name)
            prompt = prompts[int(rng.integers(len(prompts)))]
            turns.append(self._turn(str(name.value), prompt, texts[name]))
        return turns

    def prompt_ids(self, question: str) -> tuple[int, ...]:
        """Return the ids of a question behind the last placeholder."""
        return self._encode_prompt(question)[1]

    def _turn(self, name: str, question: str, answer: str) -> Turn:
        ids, weights = answer_tokens(answer, self, slot_words=SLOT_WORDS, slot_weight=self._slot_weight)
        return Turn(name, self.prompt_ids(question), ids, weights)

    def _split_prompt(self, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        text = build_prompt(question, self._num_frames, self._frame_template)
        ids = tokenize_prompt(text, self._tokenizer, NO_IMAGE)
        cut = len(ids) - ids[::-1].index(NO_IMAGE)
        return tuple(ids[:cut]), tuple(ids[cut:])
