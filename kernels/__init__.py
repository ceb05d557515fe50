"""Fused operations, each beside its PyTorch reference; imported as `aurora.kernels`."""
