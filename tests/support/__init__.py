"""Helpers shared by the tests and the scripts: small models, files to convert, damaged inputs, a fake CUDA device.

Nothing here imports diffusers, transformers or scipy, so that ``tests/unit`` runs without them. Helpers that do are in
``tests/support/parity``.
"""
