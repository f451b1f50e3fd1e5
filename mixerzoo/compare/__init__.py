"""`mixerzoo compare`: students side by side, and whether their figures may be compared at all."""
