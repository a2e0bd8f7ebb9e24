"""Thin Linen modules (x, state, context) -> (y, state)."""
