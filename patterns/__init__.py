"""What a norm, a residual add and a branch look like in a captured graph, in every spelling."""
