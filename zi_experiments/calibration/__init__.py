"""Measured rates of this machine, cached between runs."""
