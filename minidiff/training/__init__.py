"""Training: the objective, the data, the loop, and what is kept between two runs of it."""
