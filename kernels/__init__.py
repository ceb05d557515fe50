"""Fused operations, each beside its PyTorch reference; imported as `aurora.kernels`."""

from aurora.kernels.dispatch import BACKENDS, KernelUnavailable, choose, report, reset_report, set_default, use

__all__ = ["BACKENDS", "KernelUnavailable", "choose", "report", "reset_report", "set_default", "use"]
