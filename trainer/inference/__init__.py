"""Text from trained models: a generator from whatever lies in a folder, and files of prompts through many of them."""
