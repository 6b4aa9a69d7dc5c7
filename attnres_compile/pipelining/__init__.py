"""Pipeline stages: where the rewritten graph is cut, what then moves between ranks, what it costs."""
