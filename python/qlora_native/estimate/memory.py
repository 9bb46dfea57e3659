"""The memory of a training run before it starts: bytes of each part at each moment, the peak, and what fits.

Bytes throughout. docs/memory.md derives the formulas; bench/bench_estimate.py holds them against measured peaks.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from qlora_native import _C, _native
from qlora_native._memory import LEAST_MAPPED, LEAST_MAPPED_WITH_CHECKPOINTING
from qlora_native.estimate.activations import (
    LayerBytes,
    decoder_layers,
    head_width,
    layer_bytes,
    most,
    norm_bytes,
    norms_of,
)
from qlora_native.estimate.model import Setting, meta_model
from qlora_native.hf.build import four_bit_parts
from qlora_native.hf.load import LoadReport
from qlora_native.hf.loss import LOGIT_FIELDS
from qlora_native.hf.source import Source
from qlora_native.ops.causal_attention import ALIGNMENT, is_native
from qlora_native.ops.linear_cross_entropy import LOGIT_BYTES
from qlora_native.optim import base

MOMENTS = {"adamw": 2, "adamw8bit": 2, "lion": 1}
LAYER_SLACK = 200 << 10  # on the CPU: Python's objects for modules and graph, small holes
# Without checkpointing, glibc's holes beside aligned blocks of the heap, as a share of what is kept there: 17 % of some
# hundred MiB, less of a few.
HOLES_SHARE = 0.15
THREAD_SCRATCH = 2 << 20  # of a matrix product: at most about so much a thread
FULL_LOGITS = 14  # bytes a logit where the model makes them all: scores, their fp32 copy, log-softmax and its gradient
CUDA_CONTEXT = 600 << 20  # of a card: what the driver and its libraries hold beside torch's allocator


@dataclass(frozen=True)
class Terms:
    """Bytes by purpose; the fields are the rows of the table."""

    weights: int = 0  # 4-bit codes
    scales: int = 0  # of the 4-bit weights
    dense: int = 0  # embeddings, norms and whatever else is not 4-bit
    adapters: int = 0  # fp32 masters
    gradients: int = 0  # of the adapters
    optimizer: int = 0  # states that are in memory
    activations: int = 0  # saved for the backward pass, and gradients on their way through a layer
    loss: int = 0  # logits of a chunk, hidden states at the output embedding and their gradient
    scratch: int = 0  # of kernels, and of loading
    slack: int = 0  # held by the allocator beside all this

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Estimate:
    """The memory of one setting.

    Attributes:
        moments: the terms in each part of a run: "loading", "loss", "backward", "step".
        paged: bytes of optimizer states in a page file or in the host's memory.
        is_rough: classes of layers that keep more than the formulas count.
    """

    setting: Setting
    moments: dict[str, Terms]
    paged: int
    is_rough: tuple[str, ...]

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> Terms:
        """The terms of the peak."""
        return self.moments[self.moment]

    @property
    def total(self) -> int:
        """The peak, in bytes."""
        return self.peak.total

    @property
    def reserve(self) -> int:
        """Bytes of a card that CUDA itself takes."""
        return CUDA_CONTEXT if self.setting.device == "cuda" else 0

    def fits(self, num_bytes: int) -> bool:
        """Whether a card, or a machine, of so many free bytes is enough."""
        return self.total + self.reserve <= num_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "total": self.total,
            "moment": self.moment,
            "reserve": self.reserve,
            "paged": self.paged,
            "peak": vars(self.peak),
            "moments": {name: {**vars(terms), "total": terms.total} for name, terms in self.moments.items()},
        }


class Estimator:
    """Estimates for one model; the shapes are read once, batch size and length vary.

    Args:
        model: a folder (``config.json``, with or without weights), a GGUF file, an open source, or a config alone.
        setting: what :meth:`at` starts from.

    Attributes:
        model: on the meta device, with adapters and its ``load_report``.
        loading_bytes: held beside the model while it is loaded.
    """

    def __init__(self, model: Path | Source | PreTrainedConfig, setting: Setting) -> None:
        self.setting = setting
        self.model, self.loading_bytes = meta_model(model, setting)
        self.config: Any = self.model.config.get_text_config()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = [parameter.numel() for parameter in trained]
        self.adapters = sum(parameter.nbytes for parameter in trained)
        four_bit = four_bit_parts(self.model).values()
        self.packed = sum(weight.packed.nbytes for weight in four_bit)
        self.largest_weight = max((weight.shape[-1] * weight.shape[-2] for weight in four_bit), default=0)
        layers = decoder_layers(self.model)
        inside = tuple(path + "." for path, _ in layers)
        self.modules = [layer for _, layer in layers]
        self.norms = [norm for path, norm in norms_of(self.model) if not path.startswith(inside)]
        head = self.model.get_output_embeddings()
        self.changes_logits = changes_logits(self.config) or getattr(head, "bias", None) is not None
        self._layers: dict[bool, list[LayerBytes]] = {}

    def at(self, **changes: Any) -> Estimate:
        """The estimate with another batch size, length, number of micro-batches, checkpointing, optimizer or
        paging."""
        return _Sum(self, replace(self.setting, **changes)).estimate()

    def longest(self, num_bytes: int, batch_size: int, most: int = 1 << 20) -> int:
        """The most tokens a row, a multiple of 64, with which ``batch_size`` rows fit; 0 if none do."""
        lengths = range(64, most + 1, 64)
        return 64 * bisect_left(
            lengths, True, key=lambda n: not self.at(batch_size=batch_size, length=n).fits(num_bytes)
        )

    def widest(self, num_bytes: int, length: int, most: int = 1 << 16) -> int:
        """The most rows of ``length`` tokens that fit; 0 if none do."""
        return bisect_left(
            range(1, most + 1), True, key=lambda n: not self.at(batch_size=n, length=length).fits(num_bytes)
        )

    def layers(self, setting: Setting) -> list[LayerBytes]:
        """Bytes of each decoder layer."""
        window = getattr(self.config, "sliding_window", None)
        beyond = window is not None and setting.length > window
        if beyond not in self._layers:
            self._layers[beyond] = [layer_bytes(layer, self.model, setting) for layer in self.modules]
        return self._layers[beyond]


class _Sum:
    """The terms of one setting."""

    def __init__(self, estimator: Estimator, setting: Setting) -> None:
        self.estimator, self.setting, self.config = estimator, setting, estimator.config
        self.report: LoadReport = estimator.model.load_report
        self.tokens, self.size = setting.batch_size * setting.length, setting.dtype.itemsize
        self.pairs = self.tokens * setting.length
        self.layers = estimator.layers(setting)

    def estimate(self) -> Estimate:
        adapters, packed = self.estimator.adapters, self.estimator.packed
        states = sum(state_bytes(numel, self.setting.optimizer) for numel in self.estimator.trained)
        in_memory, paged = self._paged(states)
        frozen = Terms(weights=packed, scales=self.report.bytes_4bit - packed, dense=self.report.bytes_dense)
        held = replace(frozen, adapters=adapters, optimizer=in_memory)
        before = self._gradients_held()
        kept, final = self._kept()
        head = self._head()
        moments = {
            "loading": replace(frozen, scratch=self.estimator.loading_bytes),
            "loss": replace(held, gradients=before, activations=kept, loss=final + head, scratch=self._scratch()),
            "backward": self._backward(held, before),
            "step": replace(held, gradients=adapters, scratch=self._scratch()),
        }
        with_slack = {name: self._with_slack(name, terms) for name, terms in moments.items()}
        return Estimate(self.setting, with_slack, paged, self._rough())

    def _kept(self) -> tuple[int, int]:
        """What all layers keep at the end of the forward pass; what the final norm keeps."""
        final = self.tokens * sum(norm_bytes(norm, self.setting) for norm in self.estimator.norms)
        if self.setting.checkpointing:
            kept = float(self.tokens * sum(layer.input for layer in self.layers))
        else:
            kept = sum(self._of(layer) for layer in self.layers)
            kept -= self.tokens * self.layers[0].first if self.layers else 0  # its input needs no gradient
        return round(kept + self._shared()), round(final)

    def _of(self, layer: LayerBytes) -> float:
        return self.tokens * layer.token + self.pairs * layer.square

    def _shared(self) -> int:
        """Of all layers together: the angles of the rotation, token numbers, labels and masks."""
        return 2 * self.setting.length * head_width(self.config) * self.size + 5 * 8 * self.tokens

    def _backward(self, held: Terms, before: int) -> Terms:
        """The fullest moment of the backward pass: in the layer where what is kept so far, its own tensors, its
        gradients and the adapters' gradients of the layers behind are the most."""
        best, so_far, behind = Terms(), 0.0, sum(layer.gradients for layer in self.layers)
        for number, layer in enumerate(self.layers):
            own = self._of(layer) - (self.tokens * layer.first if number == 0 else 0)
            so_far += self.tokens * layer.input if self.setting.checkpointing else own
            here = so_far + self.tokens * layer.spare + self._shared()
            if self.setting.checkpointing:
                here += own - self.tokens * layer.shared
            terms = replace(held, gradients=max(before, behind), activations=round(here), scratch=self._scratch())
            best = max(best, terms, key=lambda t: t.total)
            behind -= layer.gradients
        return best

    def _head(self) -> int:
        """Hidden states, their gradient, and the logits: of a chunk, or all where the model changes them afterwards."""
        hidden, vocabulary = self.config.hidden_size, self.config.vocab_size
        states = 2 * self.tokens * hidden * self.size
        if self.estimator.changes_logits:
            return states + self.tokens * vocabulary * FULL_LOGITS
        chunk = min(max(1, LOGIT_BYTES // (self.size * vocabulary)), self.tokens)
        return states + chunk * (vocabulary + 2 * hidden) * self.size + 12 * self.tokens

    def _gradients_held(self) -> int:
        """Bytes that gradients of the adapters have at the loss: all but the first micro-batch of a step begin with
        those of the ones before; and on the CPU the heap keeps their place from step to step, up to the size from
        which a block is a mapping of its own."""
        if self.setting.micro_batches > 1:
            return self.estimator.adapters
        if self.setting.device != "cpu":
            return 0
        least = LEAST_MAPPED_WITH_CHECKPOINTING if self.setting.checkpointing else LEAST_MAPPED
        return sum(4 * numel for numel in self.estimator.trained if 4 * numel < least)

    def _paged(self, states: int) -> tuple[int, int]:
        """Bytes of states in ordinary memory, and elsewhere."""
        if self.setting.paged is not True:
            return states, 0
        budget = self.setting.page_budget or 0
        return (min(states, budget), states) if self.setting.device == "cuda" else (0, states)

    def _scratch(self) -> int:
        """Of kernels."""
        if self.setting.device == "cuda":  # a weight decoded for torch's own product
            return self.estimator.largest_weight * self.size
        threads = torch.get_num_threads()
        heads = most(self.config, "num_attention_heads") or 1
        groups, width = most(self.config, "num_key_value_heads") or heads, head_width(self.config)
        shape = (self.setting.batch_size, heads, groups, self.setting.length, width)
        q = torch.empty(shape[0], heads, shape[3], width, dtype=self.setting.dtype, device="meta")
        attention = 0  # of torch's, which takes other heads
        if is_native(q):
            dtype = _native.DTYPE_NUMBER[self.setting.dtype]
            attention = _C.causal_attention_scratch_bytes(dtype, shape, True) + ALIGNMENT
        return int(threads * THREAD_SCRATCH + attention)

    def _with_slack(self, name: str, terms: Terms) -> Terms:
        if self.setting.device == "cuda":
            return terms
        slack: float = len(self.layers) * LAYER_SLACK
        if not self.setting.checkpointing:
            slack += HOLES_SHARE * max(0.0, terms.activations - sum(map(self._mapped, self.layers)))
        return replace(terms, slack=round(slack))

    def _mapped(self, layer: LayerBytes) -> float:
        """What a layer keeps in blocks that are mappings of their own and leave no holes."""
        if self.tokens * layer.input >= LEAST_MAPPED:
            return self._of(layer)
        return self.tokens * layer.in_wide if self.tokens * layer.wide >= LEAST_MAPPED else 0.0

    def _rough(self) -> tuple[str, ...]:
        if not self.layers:
            return (type(self.estimator.model).__name__,)
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.unknown))


def state_bytes(numel: int, optimizer: str) -> int:
    """Bytes of one parameter's optimizer states."""
    if optimizer == "adamw8bit" and numel >= base.MIN_CODED_NUMEL:
        return MOMENTS[optimizer] * (numel + 4 * -(-numel // _native.STATE_BLOCK))
    return MOMENTS[optimizer] * 4 * numel


def changes_logits(config: Any) -> bool:
    """Whether a config names an operation between the output embedding and the logits."""
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_FIELDS)
