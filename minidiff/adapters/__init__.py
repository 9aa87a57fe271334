"""Additions to a loaded model: LoRA adapters and learned words."""
