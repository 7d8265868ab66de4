"""Engines: each loads a planned model and generates with it."""
