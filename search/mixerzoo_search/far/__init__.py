"""FAR: all attention replaced at once by multi-head LSTMs, and the student trained as a whole."""
