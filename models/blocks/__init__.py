"""Parts of the decoder, one module a file."""
