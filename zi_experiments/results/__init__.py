"""What a run leaves: metrics, the record, and the sinks that have it."""
