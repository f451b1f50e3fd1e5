"""`mixerzoo prune`: a family of smaller students from one, by FAR's structural pruning."""
