"""Measure what quantizing and training did to a model: loss, perplexity, KL divergence from 16 bits, lm-eval tasks."""
