"""TinyWorld in words: captions, questions and answers, storyboards, and the corpus of the tokenizer.

Greedy decoding picks the likeliest *wording*, so each value of a slot has exactly one first word, and no article, verb
or preposition before it depends on the value. What varies is the wording around the slots. A slot word is never used
for anything else ("green meadow" would be a second colour).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from .render import frame_times
from .scene import (
    LANDMARK_BASE,
    LANDMARK_HEIGHT,
    NUM_BINS,
    NUM_VIEW_BINS,
    SLOTS,
    Scene,
    main_centre,
    position_bin,
    sample_scene,
    to_frame,
    view_bin,
)


class Category(StrEnum):
    """The five structured captions of VDC."""

    short = "short"
    detailed = "detailed"
    background = "background"
    camera = "camera"
    main_object = "main_object"


@dataclass(frozen=True, kw_only=True, slots=True)
class QA:
    """A question on one slot; category is the caption that states the answer."""

    category: Category
    question: str
    answer: str
    slot: str


PLURALS = {"dot": "dots", "box": "boxes", "cone": "cones", "stick": "sticks"}
CAMERA_PHRASES = {
    "static": "static framing",
    "left": "left panning",
    "right": "right panning",
    "inward": "inward zooming",
    "outward": "outward zooming",
    "vertical": "vertical tilting",
}
SLOT_WORDS = frozenset(word for values in SLOTS.values() for word in values) | frozenset(PLURALS.values())
"""Words that carry the facts; the loss weighs them more."""

CAPTION_PROMPTS: dict[Category, tuple[str, ...]] = {
    Category.short: (
        "Describe the video briefly.",
        "Write a short caption for the video.",
        "Summarize the video.",
    ),
    Category.detailed: (
        "Describe the video in detail.",
        "Write a detailed caption for the video.",
        "What happens in the video?",
    ),
    Category.background: (
        "Describe the background.",
        "Write a caption about the background.",
        "What is around the main object?",
    ),
    Category.camera: (
        "Describe the camera work.",
        "Write a caption about the camera.",
        "How was the video filmed?",
    ),
    Category.main_object: (
        "Describe the main object.",
        "Write a caption about the main object.",
        "What does the main object look like and do?",
    ),
}

_SHORT = (
    "The {colour} {shape} shows {motion} motion in the {background} scene.",
    "The video shows the {colour} {shape} with {motion} motion in the {background} scene.",
    "Here the {colour} {shape} has {motion} motion near the {background}.",
    "We see the {colour} {shape} in the {background} scene with {motion} motion.",
    "In the {background} scene, the {colour} {shape} shows {motion} motion.",
    "The clip follows the {colour} {shape} with {motion} motion near the {background}.",
    "Near the {background}, the {colour} {shape} has {motion} motion.",
    "The {colour} {shape} appears in the {background} scene and shows {motion} motion.",
    "This clip is about the {colour} {shape} in the {background} scene, with {motion} motion.",
)
_MAIN = (
    "The {size} {colour} {shape} shows {motion} motion and starts at the {start}.",
    "The main object is the {size} {colour} {shape}, which begins at the {start} and has {motion} motion.",
    "Starting at the {start}, the {size} {colour} {shape} shows {motion} motion.",
    "We see the {size} {colour} {shape} with {motion} motion, beginning at the {start} of the frame.",
    "The subject, the {size} {colour} {shape}, starts at the {start} and has {motion} motion.",
    "At the {start} of the frame we first find the {size} {colour} {shape}, then it has {motion} motion.",
    "The {size} {colour} {shape} is the main object, with {motion} motion from its first place at the {start}.",
    "Beginning at the {start}, the subject of the video, the {size} {colour} {shape}, has {motion} motion.",
)
_TINY = (
    "The scene also contains {count} {tiny_colour} {tiny_shape}.",
    "On the ground we see {count} {tiny_colour} {tiny_shape}.",
    "It shares the scene with {count} {tiny_colour} {tiny_shape}.",
    "Close by we find {count} {tiny_colour} {tiny_shape}.",
    "The ground holds {count} {tiny_colour} {tiny_shape}.",
    "Look also for {count} {tiny_colour} {tiny_shape} on the ground.",
)
_PLACE = (
    "The background is the {background} at {time} in {weather} weather.",
    "Behind it lies the {background} at {time} with {weather} weather.",
    "The setting is the {background} in {weather} weather at {time}.",
    "Around it stretches the {background} at {time} under {weather} weather.",
    "This happens in the {background} scene during {weather} weather at {time}.",
    "It takes place in the {background} scene at {time} during {weather} weather.",
)
_BACKGROUND = (
    "The background is the {background} at {time} in {weather} weather, with {count} {tiny_colour} {tiny_shape}.",
    "The setting is the {background} in {weather} weather at {time}, and it holds {count} {tiny_colour} {tiny_shape}.",
    "Behind the subject lies the {background} at {time} with {weather} weather and {count} {tiny_colour} {tiny_shape}.",
    "On the ground of the {background} scene rest {count} {tiny_colour} {tiny_shape} at {time} in {weather} weather.",
    "We see the {background} with {count} {tiny_colour} {tiny_shape}, at {time} under {weather} weather.",
    "It is {time} with {weather} weather in the {background} scene, which contains {count} {tiny_colour} {tiny_shape}.",
    "The {background} stretches behind {count} {tiny_colour} {tiny_shape} at {time} during {weather} weather.",
)
_LENS = (
    "The camera uses {camera}.",
    "The camera work is {camera}.",
    "It was filmed with {camera}.",
    "The video is recorded with {camera}.",
    "The camera holds to {camera}.",
    "The shot is made with {camera}.",
)
_CAMERA = (
    "The camera uses {camera}, and the subject first appears at the {start}.",
    "The camera work is {camera}, with the subject first placed at the {start}.",
    "It was filmed with {camera}, while the main object starts at the {start}.",
    "The video is recorded with {camera} and first frames the main object at the {start}.",
    "The shot is made with {camera}, finding its subject at the {start} in the first frame.",
    "The subject starts at the {start}, and the camera uses {camera}.",
    "First the main object is at the {start} of the frame, then we see {camera}.",
)

_QUESTIONS: dict[str, tuple[Category, tuple[str, ...]]] = {
    "colour": (Category.main_object, ("What color is the main object?", "Which color does the main object have?")),
    "shape": (Category.main_object, ("What shape is the main object?", "Which shape does the main object have?")),
    "size": (Category.main_object, ("What size is the main object?", "How big is the main object?")),
    "motion": (Category.main_object, ("How does the main object move?", "Which motion does the main object show?")),
    "start": (Category.camera, ("Where does the main object start?", "Where is the main object in the first frame?")),
    "count": (Category.background, ("How many tiny objects are there?", "How many things rest on the ground?")),
    "tiny_colour": (Category.background, ("What color are the tiny objects?", "Which color do the tiny objects have?")),
    "tiny_shape": (Category.background, ("What shape are the tiny objects?", "What are the tiny objects?")),
    "background": (Category.background, ("What is the background?", "Where does the video take place?")),
    "time": (Category.background, ("What time is it?", "At which time was the video filmed?")),
    "weather": (Category.background, ("How is the weather?", "What is the weather like?")),
    "camera": (Category.camera, ("How does the camera move?", "What does the camera do?")),
}
STATED_SLOTS: dict[Category, tuple[str, ...]] = {
    Category.short: ("colour", "shape", "motion", "background"),
    Category.detailed: tuple(SLOTS),
    Category.background: ("background", "time", "weather", "count", "tiny_colour", "tiny_shape"),
    Category.camera: ("camera", "start"),
    Category.main_object: ("colour", "shape", "size", "motion", "start"),
}
"""The facts that each category's caption states."""
QUESTION_SLOTS = {question: slot for slot, (_, questions) in _QUESTIONS.items() for question in questions}
"""What each question asks for."""

_BIN_LETTERS = "abcdefghijkl"
COLUMN_WORDS = tuple(f"x{letter}" for letter in _BIN_LETTERS)
ROW_WORDS = tuple(f"y{letter}" for letter in _BIN_LETTERS)
VIEW_WORDS = tuple(f"z{letter}" for letter in _BIN_LETTERS[:NUM_VIEW_BINS])
STORY_WORDS = ("landmark", "sky", *COLUMN_WORDS, *ROW_WORDS, *VIEW_WORDS)
"""Words that occur in storyboards only; letters, not digits, because sentencepiece splits numbers off."""


def _words(scene: Scene) -> dict[str, str]:
    noun = scene.tiny_shape if scene.count == "one" else PLURALS[scene.tiny_shape]
    return {**scene.slots, "tiny_shape": noun, "camera": CAMERA_PHRASES[scene.camera]}


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]


def captions(scene: Scene, seed: int) -> dict[Category, str]:
    """The five captions of a scene; the same scene and seed give the same wording."""
    rng = np.random.default_rng([21, seed])
    middle = [_pick(rng, _TINY), _pick(rng, _PLACE), _pick(rng, _LENS)]
    detailed = " ".join([_pick(rng, _MAIN), *(middle[i] for i in rng.permutation(3))])
    templates = {
        Category.short: _pick(rng, _SHORT),
        Category.detailed: detailed,
        Category.background: _pick(rng, _BACKGROUND),
        Category.camera: _pick(rng, _CAMERA),
        Category.main_object: _pick(rng, _MAIN),
    }
    words = _words(scene)
    return {category: template.format(**words) for category, template in templates.items()}


def caption_prompts(category: Category | str) -> list[str]:
    """Prompts that ask for a category's caption; evaluation and the demo use the first.

    Raises:
        ValueError: if category is unknown.
    """
    if category not in set(Category):
        raise ValueError(f"category={category!r}: want one of {', '.join(c.value for c in Category)}")
    return list(CAPTION_PROMPTS[Category(category)])


def qa_pairs(scene: Scene, seed: int) -> list[QA]:
    """One question per slot, in random order and wording; answers are one or two words."""
    rng = np.random.default_rng([22, seed])
    answers = {
        **scene.slots,
        "motion": f"{scene.motion} motion",
        "tiny_shape": PLURALS[scene.tiny_shape],
        "camera": CAMERA_PHRASES[scene.camera],
    }
    names = list(_QUESTIONS)
    pairs = []
    for index in rng.permutation(len(names)):
        category, questions = _QUESTIONS[names[index]]
        question = _pick(rng, questions)
        pairs.append(QA(category=category, question=question, answer=answers[names[index]], slot=names[index]))
    return pairs


def storyboard(scene: Scene, seed: int, num_frames: int = 8) -> list[list[list[str]]]:
    """What a tower would see, as words: frames of entities of words, entities in random order.

    Each entity stands for one visual token (embed its words, then add them): the main object, the tiny group, the
    landmark, the sun or moon, and three patches of scenery. Frame positions are xa..xl and ya..yl, the view's width is
    za..ze; a tenth of the positions is one off. Every slot but motion, start and camera is named in every frame, and
    those three follow from the positions.
    """
    rng = np.random.default_rng([23, seed])
    noun = scene.tiny_shape if scene.count == "one" else PLURALS[scene.tiny_shape]
    middle = LANDMARK_BASE - LANDMARK_HEIGHT / 2
    frames = []
    for t in frame_times(num_frames):
        main_x, main_y = (float(v) for v in main_centre(scene, t))
        view = VIEW_WORDS[view_bin(scene.camera, t)]
        spots = [
            ([scene.colour, scene.shape, scene.size], main_x, main_y),
            ([scene.count, scene.tiny_colour, noun], scene.tiny_x, scene.tiny_y),
            (["landmark", view], scene.landmark_x, middle),
            (["sky", view], scene.sky_x, scene.sky_y),
        ]
        entities = []
        for words, x, y in spots:
            column, row = (position_bin(v) for v in to_frame(scene, x, y, t))
            shift = rng.integers(-1, 2, 2) * (rng.random(2) < 0.15)
            column, row = (int(np.clip(v + d, 0, NUM_BINS - 1)) for v, d in zip((column, row), shift, strict=True))
            entities.append([*words, COLUMN_WORDS[column], ROW_WORDS[row]])
        for column, row in rng.integers(0, NUM_BINS, (3, 2)):
            entities.append([scene.background, scene.time, scene.weather, COLUMN_WORDS[column], ROW_WORDS[row]])
        frames.append([entities[i] for i in rng.permutation(len(entities))])
    return frames


def text_corpus(n: int, seed: int) -> Iterator[str]:
    """Lines to train a tokenizer on: n training scenes in words, the chat markers, frame numbers and the alphabet."""
    letters = " ".join("abcdefghijklmnopqrstuvwxyz")
    rest = (letters, letters.upper(), "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16", ", . ? ! : ; ' \" ( ) - /")
    prompts = [prompt for choices in CAPTION_PROMPTS.values() for prompt in choices]
    for index in range(n):
        scene = sample_scene(seed + index, "train")
        yield from captions(scene, seed + index).values()
        for pair in qa_pairs(scene, seed + index):
            yield f"USER: 1 2 3 4 5 6 7 8 {pair.question} ASSISTANT: {pair.answer}"
        yield f"USER: {prompts[index % len(prompts)]} ASSISTANT:"
        yield f"USER: {prompts[index // 3 % len(prompts)]} ASSISTANT:"
        yield " ".join(STORY_WORDS)
        yield rest[index % len(rest)]
