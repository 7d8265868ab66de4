"""What is chosen for a run, what is refused, and which runs near it are faster. Pure."""
