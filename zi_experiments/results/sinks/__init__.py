"""Where records go: the console, a file, Weights & Biases."""
