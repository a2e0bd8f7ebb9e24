"""Experiments: one absl script per claim."""
