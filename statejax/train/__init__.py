"""Training: loss, optimizer, checkpoints and the loop."""
