"""The networks: one class each for every family, told apart by their configs alone."""
