"""Networks: one class of each kind for all model families, which differ only in their configs."""
