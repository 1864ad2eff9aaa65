"""Checkpoints in the layout of Megatron-LM."""
