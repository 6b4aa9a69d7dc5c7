"""The steps from a captured graph to a rewritten one: each takes a valid graph and leaves a valid graph."""
