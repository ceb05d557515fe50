"""Measurements: several implementations of one thing, timed alternately in one process, written as JSON."""
