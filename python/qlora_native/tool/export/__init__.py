"""Exports: GGUF files of models and of adapters."""
