"""Token merging for the vision towers of timm, Hugging Face transformers and open_clip."""

from aurora.model.token_merging.merging import TokenMerging, apply_token_merging

__all__ = ["TokenMerging", "apply_token_merging"]
