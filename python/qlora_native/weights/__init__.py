"""Hugging Face models in 4 bits: read, build, convert, merge, fuse, and the integrations of transformers and PEFT."""
