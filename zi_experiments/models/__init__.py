"""What a model is: its architecture, its checkpoint, its weights."""
