"""The memory of a training run before it starts: bytes of each part at each moment, the peak, and what fits.

Bytes throughout. docs/memory.md derives the formulas; bench/bench_estimate.py holds them against measured peaks.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from qlora_native import _C, _native
from qlora_native._memory import LEAST_MAPPED, LEAST_MAPPED_WITH_CHECKPOINTING
from qlora_native.lora import LoRALinear
from qlora_native.lora.targets import saved_modules
from qlora_native.models.build import four_bit_parts
from qlora_native.models.graphs import has_experts
from qlora_native.models.loss import LOGIT_FIELDS, is_random
from qlora_native.nn import QuantizedLinear
from qlora_native.ops._cuda_products import PANEL_BYTES
from qlora_native.ops.causal_attention import ALIGNMENT, is_native
from qlora_native.ops.linear_cross_entropy import chunk_tokens
from qlora_native.optim.states import MIN_CODED_NUMEL
from qlora_native.tool.estimate.activations import (
    LayerBytes,
    decoder_layers,
    head_shape,
    layer_bytes,
    norm_bytes,
)
from qlora_native.tool.estimate.model import Setting, meta_model
from qlora_native.weights.stream import Source

LAYER_SLACK = 200 << 10  # on the CPU: Python's objects for modules and graph, small holes
THREAD_SCRATCH = 2 << 20  # of a matrix product: at most about so much a thread, beside what AMX packs
FULL_LOGITS = 14  # bytes a logit where the model makes them all: scores, their fp32 copy, log-softmax and its gradient
CUDA_CONTEXT = 600 << 20  # of a card: what the driver and its libraries hold beside torch's allocator


@dataclass(frozen=True)
class Terms:
    """Bytes by purpose; the fields are the rows of the table."""

    weights: int = 0  # 4-bit codes
    scales: int = 0  # of the 4-bit weights
    dense: int = 0  # embeddings, norms and whatever else is not 4-bit
    adapters: int = 0  # fp32 masters
    copies: int = 0  # of them, as their products on CUDA take them
    gradients: int = 0  # of the adapters
    optimizer: int = 0  # states that are in memory
    activations: int = 0  # saved for the backward pass, and gradients on their way through a layer
    loss: int = 0  # logits of a chunk, hidden states at the output embedding and their gradient
    scratch: int = 0  # of kernels, and of loading
    slack: int = 0  # held by the allocator beside all this

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """The memory of one setting."""

    setting: Setting
    # In each part of a run: "loading", "loss", "backward", "step", "shipping".
    moments: dict[str, Terms]
    paged: int  # bytes of optimizer states in a page file or in the host's memory
    graphs: int  # bytes of a card that only the passes in CUDA graphs can use: what the largest of them takes
    is_rough: tuple[str, ...]  # classes of layers that keep more than is counted

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> Terms:
        return self.moments[self.moment]

    @property
    def total(self) -> int:
        return self.peak.total

    @property
    def reserve(self) -> int:
        """Bytes of a card beside what is in use: that CUDA itself takes, and the pool of its graphs."""
        return CUDA_CONTEXT + self.graphs if self.setting.device == "cuda" else 0

    def fits(self, num_bytes: int) -> bool:
        """Whether a card, or a machine, of so many free bytes is enough."""
        return self.total + self.reserve <= num_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("total", "moment", "reserve", "paged", "graphs")
        return {
            **{name: getattr(self, name) for name in names},
            "peak": vars(self.peak),
            "moments": {
                name: {**vars(terms), "total": terms.total} for name, terms in self.moments.items()
            },
        }


class Estimator:
    """Estimates for one model; the shapes are read once, batch size and length vary.

    Args:
        model: a folder (``config.json``, with or without weights), a GGUF file, an open source, or a config alone. The
            attribute is the model on the meta device, with adapters and its ``load_report``.
        setting: what :meth:`at` starts from.
    """

    def __init__(self, model: Path | Source | PreTrainedConfig, setting: Setting) -> None:
        self.setting = setting
        self.model: Any
        # Held beside the model while it is loaded.
        self.model, self.loading_bytes = meta_model(model, setting)
        self.config = self.model.config.get_text_config()
        self.positions: int = getattr(self.config, "max_position_embeddings", None) or 1 << 20
        self.trained = [
            parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad
        ]
        self.adapters = 4 * sum(self.trained)  # fp32
        modules = saved_modules(self.model, setting.lora.modules_to_save).values()
        whole = {parameter for module in modules for parameter in module.parameters()}
        self.whole = sum(parameter.nbytes for parameter in whole)
        names = [name for name, parameter in self.model.named_parameters() if parameter in whole]
        # Bytes that they had before.
        self.replaced = sum(self.model.load_report.dense.get(name, 0) for name in names)
        numel = self.config.vocab_size * self.config.hidden_size
        head = self.model.get_output_embeddings()
        self.whole_in, self.whole_out = (
            numel * (part in modules) for part in (self.model.get_input_embeddings(), head)
        )
        four_bit = four_bit_parts(self.model).values()
        self.packed = sum(weight.packed.nbytes for weight in four_bit)
        self.shapes = {(weight.shape[-2], weight.shape[-1]) for weight in four_bit}
        self.modules = decoder_layers(self.model)
        self.norm_bytes = norm_bytes(self.model, setting)  # kept for a token, outside of the layers
        # Whether the config names an operation between the output embedding and the logits.
        scaled = any(getattr(self.config, name, None) not in (None, 1, 1.0) for name in LOGIT_FIELDS)
        self.changes_logits = scaled or getattr(head, "bias", None) is not None
        self.is_random, self.has_experts = is_random(self.model), has_experts(self.model)
        self.copied = copied_bytes(self.model, setting.dtype)
        self._layers: dict[bool, list[LayerBytes]] = {}

    def at(self, **changes: Any) -> Estimate:
        """The estimate with other values of the setting on which no shape depends."""
        setting = replace(self.setting, **changes)
        layers = self.layers(setting)
        on_card = setting.device == "cuda"
        in_memory = sum(state_bytes(numel, setting.optimizer) for numel in self.trained)
        paged = 0
        if setting.paged is True:
            paged = in_memory
            in_memory = min(in_memory, setting.page_budget or 0) if on_card else 0
        report = self.model.load_report
        frozen = Terms(
            weights=self.packed,
            scales=report.bytes_4bit - self.packed,
            dense=report.bytes_dense,
            slack=0 if on_card else len(layers) * LAYER_SLACK,
        )
        held = replace(
            frozen,
            dense=frozen.dense - self.replaced,
            adapters=self.adapters,
            copies=self.copied if on_card else 0,
            optimizer=in_memory,
            scratch=self._scratch(setting),
        )
        loss, backward = self._passes(setting, held)
        moments = {
            "loading": replace(frozen, scratch=self.loading_bytes),
            "loss": loss,
            "backward": backward,
            "step": replace(held, gradients=self.adapters),
        }
        if setting.ships:
            from qlora_native.calibration.adapted import TOKENS

            widest = max((k for _, k in self.shapes), default=0)
            # Two passes of the tokens; products of a layer's inputs in fp32 and fp64, and what is solved for.
            activations = 2 * TOKENS * max((layer.token for layer in layers), default=0)
            scratch = 28 * widest**2 + 24 * TOKENS * widest
            # With the codes that are written.
            moments["shipping"] = replace(
                held, weights=2 * self.packed, activations=round(activations), scratch=scratch
            )
        graphs = 0
        if self._is_captured(setting):
            # A pass of another shape, which is not in a graph, takes as much from the rest of the card.
            graphs = max(terms.activations + terms.loss + terms.scratch for terms in (loss, backward))
        unknown = tuple(dict.fromkeys(layer.unknown for layer in layers if layer.unknown))
        return Estimate(
            setting, moments, paged, graphs, unknown if layers else (type(self.model).__name__,)
        )

    def longest(self, num_bytes: int, batch_size: int) -> int:
        """The most tokens a row, a multiple of 64 up to the model's positions, with which ``batch_size`` rows fit; 0 if
        none do."""
        lengths = range(64, max(64, self.positions) + 1, 64)
        fitting = bisect_left(
            lengths, True, key=lambda n: not self.at(batch_size=batch_size, length=n).fits(num_bytes)
        )
        return 64 * fitting

    def widest(self, num_bytes: int, length: int) -> int:
        """The most rows of ``length`` tokens that fit; 0 if none do."""
        rows = range(1, (1 << 16) + 1)
        return bisect_left(
            rows, True, key=lambda n: not self.at(batch_size=n, length=length).fits(num_bytes)
        )

    def layers(self, setting: Setting) -> list[LayerBytes]:
        beyond = setting.length > (getattr(self.config, "sliding_window", None) or setting.length)
        if beyond not in self._layers:
            self._layers[beyond] = layer_bytes(self.model, setting)
        return self._layers[beyond]

    def _is_captured(self, setting: Setting) -> bool:
        """Whether passes of one process are captured, as ``train.cuda_graph`` has it."""
        if setting.device != "cuda" or not setting.cuda_graph:
            return False
        if self.changes_logits or self.has_experts:
            return False
        return not (setting.checkpointing and self.is_random)

    def _passes(self, setting: Setting, held: Terms) -> tuple[Terms, Terms]:
        """At the loss, with all that the layers keep, and at the fullest moment of the backward pass: in the layer
        where what is kept so far, its own tensors, its gradients and the adapters' gradients of the layers behind are
        the most."""
        layers = self.layers(setting)
        tokens = setting.tokens
        # Of all layers together: the angles of the rotation, token numbers, labels and masks.
        kept: float = (
            2 * setting.length * head_shape(self.config)[2] * setting.dtype.itemsize + 5 * 8 * tokens
        )
        before = self._gradients_held(setting)
        behind = sum(layer.gradients for layer in layers)
        fullest = Terms()
        for number, layer in enumerate(layers):
            own = tokens * (layer.token + setting.length * layer.square)
            if number == 0:
                own -= tokens * layer.first  # its input needs no gradient
            here = tokens * layer.spare
            if setting.checkpointing:
                kept += tokens * layer.input
                here += own - tokens * layer.shared
            else:
                kept += own
            gradients = max(before, behind + self.whole)
            terms = replace(held, gradients=gradients, activations=round(kept + here))
            fullest = max(fullest, terms, key=lambda t: t.total)
            behind -= layer.gradients
        # The embedding's come last: beside those of earlier micro-batches, or of an output embedding tied to it.
        added = 4 * self.whole_in * (before >= self.adapters or self.whole_out > 0)
        last = replace(held, gradients=self.adapters + added)
        loss = replace(held, gradients=before, activations=round(kept), loss=self._loss(setting))
        return loss, max(fullest, last, key=lambda t: t.total)

    def _loss(self, setting: Setting) -> int:
        """What the final norm keeps, hidden states, their gradient, and the logits: of a chunk, or all where the model
        changes them afterwards."""
        tokens = setting.tokens
        size = setting.dtype.itemsize
        hidden = self.config.hidden_size
        vocabulary = self.config.vocab_size
        states = round(tokens * self.norm_bytes) + 2 * tokens * hidden * size
        if self.changes_logits:
            return states + tokens * vocabulary * FULL_LOGITS
        chunk = chunk_tokens(setting.device, vocabulary, size, tokens)
        if numel := self.whole_out:  # the sum of its gradients, its mean, the copy that is multiplied
            states += numel * (8 + size % 4) + 4 * chunk * vocabulary
        return states + chunk * (vocabulary + 2 * hidden) * size + 12 * tokens

    def _gradients_held(self, setting: Setting) -> int:
        """Bytes that gradients of the adapters have at the loss: all but the first micro-batch of a step begin with
        those of the ones before, and passes in a CUDA graph leave them in one place for good. On the CPU the heap keeps
        their place from step to step, up to the size from which a block is a mapping of its own."""
        if setting.micro_batches > 1 or self._is_captured(setting):
            return self.adapters
        if setting.device == "cuda":
            return 0
        least = LEAST_MAPPED_WITH_CHECKPOINTING if setting.checkpointing else LEAST_MAPPED
        return sum(4 * numel for numel in self.trained if 4 * numel < least)

    def _scratch(self, setting: Setting) -> int:
        """Of kernels."""
        size = setting.dtype.itemsize
        if setting.device == "cuda":  # a weight decoded for torch's own product
            return min(max((n * k for n, k in self.shapes), default=0) * size, PANEL_BYTES)
        heads, groups, width = head_shape(self.config)
        rows = setting.batch_size, heads
        dtype = _native.DTYPE_NUMBER[setting.dtype]
        attention = 0  # of torch's, which takes other heads
        if is_native(torch.empty(*rows, setting.length, width, dtype=setting.dtype, device="meta")):
            sizes = (*rows, groups, setting.length, width)
            attention = _C.causal_attention_scratch_bytes(dtype, sizes, True) + ALIGNMENT
        vocabulary = self.config.vocab_size
        tokens = min(setting.tokens, 1 << 20)  # more take no more
        products = [(tokens, n, k) for n, k in self.shapes]
        chunk = chunk_tokens("cpu", vocabulary, size, setting.tokens)
        products.append((chunk, vocabulary, self.config.hidden_size))
        most = max(_C.linear_scratch_bytes(dtype, *sizes) for sizes in products)
        return int(max(most, torch.get_num_threads() * THREAD_SCRATCH) + attention)


def copied_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the adapters as their products on CUDA take them, A in another dtype and scale * B, which are kept from
    pass to pass."""
    numel = 0
    for layer in model.modules():
        if isinstance(layer, LoRALinear) and isinstance(layer.base_layer, QuantizedLinear):
            is_cast = layer.lora_A.dtype != dtype  # B's dtype is A's
            numel += layer.lora_A.numel() if is_cast else 0
            numel += layer.lora_B.numel() if is_cast or layer.scale != 1.0 else 0
    return numel * dtype.itemsize


def state_bytes(numel: int, optimizer: str) -> int:
    """Bytes of one parameter's optimizer states."""
    moments = 1 if optimizer == "lion" else 2
    if optimizer == "adamw8bit" and numel >= MIN_CODED_NUMEL:
        return moments * (numel + 4 * -(-numel // _native.STATE_BLOCK))
    return moments * 4 * numel
