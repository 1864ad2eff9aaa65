"""Proof on the user's own config that a layout computes what one process computes (``scripts/verify.py``)."""
