"""TinyWorld: a synthetic world of short clips whose every caption can be checked.

seed -> `sample_scene` -> `render_clip` -> `write_mp4`, and from the same scene graph `captions` and `qa_pairs`.
"""

from .dataset import DatasetConfig, conversations, write_dataset
from .language import QA, SLOT_WORDS, Category, caption_prompts, captions, qa_pairs, storyboard, text_corpus
from .render import MASK_CLASSES, frame_masks, frame_times, render_clip, render_frame, write_mp4
from .scene import FRAME_TASKS, SLOTS, Scene, frame_targets, sample_scene

__all__ = [
    "FRAME_TASKS",
    "MASK_CLASSES",
    "QA",
    "SLOTS",
    "SLOT_WORDS",
    "Category",
    "DatasetConfig",
    "Scene",
    "caption_prompts",
    "captions",
    "conversations",
    "frame_masks",
    "frame_targets",
    "frame_times",
    "qa_pairs",
    "render_clip",
    "render_frame",
    "sample_scene",
    "storyboard",
    "text_corpus",
    "write_dataset",
    "write_mp4",
]
