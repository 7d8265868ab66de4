"""What is measured on a loaded model: prompts, times, verification, perplexity."""
