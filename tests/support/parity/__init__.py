"""Helpers of ``tests/parity``, which build models and samplers of the pinned diffusers and transformers."""
