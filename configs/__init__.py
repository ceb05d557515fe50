"""Hydra configuration, found as `pkg://aurora.configs`."""
