"""Generation: how a next token is chosen, and the loop that runs prefill and decode over a static cache."""

from aurora.generation.engine import GenerateResult, Streamer, check_context, generate
from aurora.generation.sampling import Sampler, SamplingConfig

__all__ = ["GenerateResult", "Sampler", "SamplingConfig", "Streamer", "check_context", "generate"]
