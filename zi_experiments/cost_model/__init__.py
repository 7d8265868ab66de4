"""What a plan costs: bytes, the lower bound on its time, the predicted time. Pure figures."""
