"""Other ways to show a language model fewer visual tokens, on the same model without training it anew.

A baseline is a function of frames behind the whole tower; `encode_reduced` makes of it a prefix for
`generate(prefix=...)`. All deliver exactly the number of tokens a frame that is asked for, but `no_merging`, which
knows one number only.
"""

from aurora.evaluation.baselines.attention_pruning import class_attention_pruning, mean_attention_pruning
from aurora.evaluation.baselines.average_pooling import average_pooling
from aurora.evaluation.baselines.frames import Reduced, Reduction, TowerFrames, encode_reduced
from aurora.evaluation.baselines.merging_after_encoder import merging_after_encoder
from aurora.evaluation.baselines.no_merging import no_merging
from aurora.evaluation.baselines.random_drop import random_drop
from aurora.evaluation.baselines.uniform_drop import uniform_drop

BASELINES: dict[str, Reduction] = {
    "no_merging": no_merging,
    "average_pooling": average_pooling,
    "random_drop": random_drop,
    "uniform_drop": uniform_drop,
    "class_attention": class_attention_pruning,
    "mean_attention": mean_attention_pruning,
    "merging_after_encoder": merging_after_encoder,
}
"""Baselines by name."""

__all__ = ["BASELINES", "Reduced", "Reduction", "TowerFrames", "encode_reduced"]
