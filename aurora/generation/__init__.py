"""Generation: how a next token is chosen, the loops that run prefill and decode, and text while it is made."""

from aurora.generation.beam import BeamResult, beam_search
from aurora.generation.engine import (
    GenerateResult,
    PromptState,
    Streamer,
    check_context,
    extend,
    generate,
    prefill,
)
from aurora.generation.sampling import Sampler, SamplingConfig
from aurora.generation.streaming import StopStrings, TextCallback, TextStream, cut_at_stop

__all__ = [
    "BeamResult",
    "GenerateResult",
    "PromptState",
    "Sampler",
    "SamplingConfig",
    "StopStrings",
    "Streamer",
    "TextCallback",
    "TextStream",
    "beam_search",
    "check_context",
    "cut_at_stop",
    "extend",
    "generate",
    "prefill",
]
