"""Exports: the error of a merged model, and GGUF files."""
