"""diffusers' side of the samplers: its scheduler_config.json, read and written, and its familiar methods."""
