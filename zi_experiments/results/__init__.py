"""What a run leaves: metrics, the record, and the sinks that write it."""
