"""Training: the objective, the data, the loop, and the state that a resumed run needs."""
