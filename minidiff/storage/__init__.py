"""Files on disk: tensors, checkpoints, and the doors through which everything is read and written."""
