"""The charts of the report as a saved view of W&B."""
