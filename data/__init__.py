"""Sources -> samples -> token cache -> packing -> micro-batches. Imports no other room."""
