"""What a model is worth: losses on held-out text and answers to questions. One process, no DeepSpeed."""
