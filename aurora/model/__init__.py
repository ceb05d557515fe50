"""The model in plain PyTorch, one part per file."""
