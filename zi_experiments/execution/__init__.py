"""From a plan to worker processes and what became of them."""
