"""Scoring of captions: VDC, caption metrics and the mini benchmark of the bundled model."""
