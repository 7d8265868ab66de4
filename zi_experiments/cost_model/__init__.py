"""The cost of a plan: bytes, the lower bound on its time, the predicted time. Pure computation."""
