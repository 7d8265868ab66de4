"""Reports of finished runs: one page and three tables, and the comparison of two runs or sweeps."""
