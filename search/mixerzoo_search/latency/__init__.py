"""`mixerzoo latency`: the latency of every candidate at every shape of site, and how well sums of it predict."""
