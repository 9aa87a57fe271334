"""Files on disk: tensors, checkpoints, and the functions through which everything is read and written."""
