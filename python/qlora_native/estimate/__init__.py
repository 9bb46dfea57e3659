"""The memory of a training run, before it: from a model's config and the headers of its files."""

from qlora_native.estimate.anatomy import Anatomy, Setting, of_config, read_anatomy
from qlora_native.estimate.memory import Estimate, Estimator, Terms

__all__ = ["Anatomy", "Estimate", "Estimator", "Setting", "Terms", "of_config", "read_anatomy"]
