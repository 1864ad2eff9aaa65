"""Weights between files and models: Hugging Face safetensors in and out, tensor by tensor."""
