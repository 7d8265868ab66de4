"""Models: architecture, checkpoint, weights."""
