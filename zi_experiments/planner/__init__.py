"""Plan a run: choose open settings, refuse what cannot run, and find faster variants of the run. Pure computation."""
