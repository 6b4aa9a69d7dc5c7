"""What a model reads over depth: measured on its captured graph, in tables and pictures."""
