"""Data: deterministic sources and the checkpointable input pipeline."""
