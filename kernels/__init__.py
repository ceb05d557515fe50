"""Fused operations, each beside its PyTorch reference; imported as `aurora.kernels`.

Matching, merging (with residual and LayerNorm), attention with a key bias, and the loss of a large vocabulary. RMSNorm,
rotary positions and SwiGLU have no kernel here: Inductor fuses each of them into one, so one of ours would have to be
measured to beat that first, and no GPU has run this yet. `aurora.model.llama` writes them in plain PyTorch.
"""

from aurora.kernels.dispatch import BACKENDS, KernelUnavailable, choose, report, reset_report, set_default, use

__all__ = ["BACKENDS", "KernelUnavailable", "choose", "report", "reset_report", "set_default", "use"]
