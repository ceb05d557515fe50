"""Datasets and collation: what training and evaluation read."""
