"""From a plan to worker processes and their results."""
