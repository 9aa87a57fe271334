"""Compatibility of the samplers with diffusers: reading and writing scheduler_config.json, and a Scheduler class."""
