"""The memory of a training run before it starts, from a model's config and the headers of its files."""

from qlora_native.tool.estimate.memory import Estimate, Estimator, Terms
from qlora_native.tool.estimate.model import Setting

__all__ = ["Estimate", "Estimator", "Setting", "Terms"]
