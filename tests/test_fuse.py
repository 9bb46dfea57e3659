"""fuse(): what is replaced computes the same with the same gradients, and what differs is left alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import SavedTensors, relative_error
from tiny_models import logits, make, save, tokens
from torch import nn
from transformers.models.llama import modeling_llama

import qlora_native as qn
from qlora_native.models import fuse as fusing
from qlora_native.models.fuse import Fused, fuse, unfuse
from qlora_native.models.loss import causal_lm_loss
from qlora_native.nn import experts

ALL = {"attention": 2, "mlp": 2, "norm": 5}
EXPECTED = {
    "Llama": ALL,
    "Mistral": ALL,
    "Qwen2": ALL,
    "Qwen3": {**ALL, "norm": 9},  # queries and keys have norms of their own
    "Gemma": {"attention": 2},  # norms of weight 1 + w, GELU
    "Gemma2": {"attention": 2},
    "Olmo2": {**ALL, "norm": 9},
    "Phi3": {"attention": 2, "norm": 5},  # one projection for gate and up, rotation of a part of the head
    "GPT2": {"attention": 2},
    "Cohere": {"attention": 2, "mlp": 2},  # layer norm, interleaved rotation
}


def model_of(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    if kind in ("Gemma", "Gemma2", "Qwen3"):
        changes["head_dim"] = 16
    model = make(kind, dtype, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:  # ones as made: a lost weight would go unseen
                parameter.normal_(1.0, 0.2)
    return model


def count_fused(model: Any) -> int:
    return sum(isinstance(module, Fused) for module in model.modules())


def loss_and_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the first projections, so that everything between them and the loss takes part."""
    ids = tokens(2, 24)
    weights = [p for p in model.parameters() if p.dim() == 2 and p.dtype.is_floating_point]
    loss = model(input_ids=ids, labels=ids).loss
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.float32) for kind in EXPECTED), ("Llama", torch.bfloat16)])
def test_same_loss_and_gradients(kind: str, dtype: torch.dtype) -> None:
    exact = dtype == torch.float32
    model = model_of(kind, dtype, **({} if exact else {"head_dim": 32}))
    plain = copy.deepcopy(model)
    assert fuse(model) == EXPECTED[kind] | ({} if exact else {"linear": 15})
    (loss, gradient), (want, want_gradient) = loss_and_gradient(model), loss_and_gradient(plain)
    assert float(loss) == pytest.approx(float(want), rel=1e-5 if exact else 1e-3)
    assert relative_error(gradient, want_gradient) < (1e-5 if exact else 3e-2)
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("change", ["clamp", "gelu", "dropout", "offset"])
def test_what_differs_is_left_alone(change: str) -> None:
    model = model_of("Llama")
    part = "norm" if change == "offset" else "mlp"
    kind = type(getattr(model.model.layers[0], "input_layernorm" if part == "norm" else part))

    class Other(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if change == "offset":
                return super().forward(x) + 0.01
            gate = self.gate_proj(x)
            gate = gate.clamp(max=2.0) if change == "clamp" else gate
            hidden = nn.functional.gelu(gate) if change == "gelu" else self.act_fn(gate)
            return self.down_proj(nn.functional.dropout(hidden * self.up_proj(x), 0.1, self.training))

    for module in list(model.modules()):
        if type(module) is kind:
            module.__class__ = Other
    assert fuse(model) == {name: count for name, count in ALL.items() if name != part}


def test_twice_is_once_and_training_flags_and_randomness_stay() -> None:
    model = model_of("Llama").train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    fuse(model)
    assert fuse(model) == {}
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_models_of_the_class_stay_as_they_are() -> None:
    model, other = model_of("Llama"), model_of("Llama")
    fuse(model)
    assert count_fused(other) == 0
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__
    assert isinstance(modeling_llama.ALL_ATTENTION_FUNCTIONS, transformers.AttentionInterface)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(how: str) -> None:
    model = model_of("Llama")
    fuse(model)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert count_fused(copied) == 9
    want = model(tokens()).logits
    assert torch.equal(copied(tokens()).logits, want)
    copied.model.norm.weight.data.zero_()
    assert torch.equal(model(tokens()).logits, want)


def test_generates_the_same() -> None:
    model = model_of("Llama")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    want = model.generate(tokens(2, 7), **options)
    fuse(model)
    assert torch.equal(model.generate(tokens(2, 7), **options), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_torch_attends_in_fp32_where_it_has_no_products_of_bf16(
    dtype: torch.dtype, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, padded batches and single tokens go to torch; whole causal sequences never do."""
    monkeypatch.setattr(fusing, "NATIVE_BF16", (qn.build_info()["cpu_isa"],) if bf16 else ())
    monkeypatch.setattr(experts, "_made", {})
    model = model_of("Mistral", dtype, sliding_window=8).eval()
    plain = copy.deepcopy(model)
    fuse(model)
    seen: list[torch.Tensor | None] = []
    sdpa: Any = nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        seen.extend((*args, attn_mask))
        return sdpa(*args, attn_mask=attn_mask, **kwargs)

    ids = tokens(2, 24)
    want = plain(input_ids=ids).logits
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    want_padded = plain(input_ids=ids[:, :7], attention_mask=padded[:, :7]).logits[1]
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", recorded)
    got = model(input_ids=ids, labels=ids)
    got.loss.backward()
    assert len(seen) == 2 * 4  # of the two layers, whose windows are narrower than the row
    assert relative_error(got.logits, want) < 2e-2
    assert relative_error(model(ids[:, :7], attention_mask=padded[:, :7]).logits[1], want_padded) < 2e-2
    assert len(seen) == 4 * 4
    model(input_ids=ids[:, :7])
    assert len(seen) == 4 * 4
    model.generate(ids[:, :7], attention_mask=padded[:, :7], max_new_tokens=3, do_sample=False)
    assert len(seen) > 6 * 4
    assert {x.dtype for x in seen if x is not None} <= {dtype if bf16 else torch.float32, torch.bool}


def quantized(adapter: bool = True) -> Any:
    model = model_of("Llama", torch.bfloat16, head_dim=32)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            model.set_submodule(path, qn.nn.QuantizedLinear.from_linear(module))
    return qn.add_lora(model, qn.LoraConfig(r=4, seed=0)) if adapter else model


def test_before_and_after_adapters() -> None:
    before, after = quantized(), quantized(adapter=False)
    assert fuse(before) == fuse(after) == ALL | {"linear": 1}
    qn.add_lora(after, qn.LoraConfig(r=4, seed=0))
    assert torch.equal(before(tokens()).logits, after(tokens()).logits)


def test_keeps_less() -> None:
    model = quantized()
    ids = tokens(2, 64)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def kept() -> int:
        with SavedTensors() as saved:
            causal_lm_loss(model, batch)
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved.tensors}.values())

    plain = kept()
    fuse(model)
    assert kept() < 0.85 * plain


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = quantized().train()
    fuse(model)

    def gradients() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_breaks(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = model_of("Llama", dtype, head_dim=32, num_hidden_layers=1)
    fuse(model)
    ids = tokens(2, 16)
    compiled = torch.compile(lambda x: model(input_ids=x, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(ids), model(ids).logits) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dense_layers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("Llama", dtype)
    plain = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert fuse(model)["linear"] == len(layers)
    assert all(isinstance(layer, Fused) for layer in layers)
    wanted = [(ids, plain(ids).logits) for ids in (tokens(1, 3), tokens(2, 24))]
    with torch.inference_mode(), monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", None)  # torch's own product
        for ids, want in wanted:
            assert relative_error(model(ids).logits, want) < 3e-2
    batch = {"input_ids": tokens(2, 24), "labels": tokens(2, 24)}
    loss, want = causal_lm_loss(model, batch), causal_lm_loss(plain, batch)
    assert float(loss) == pytest.approx(float(want), rel=1e-3)
    assert isinstance(pickle.loads(pickle.dumps(model)).lm_head, Fused)


def test_load_model_fuses_by_default(tmp_path: Path) -> None:
    folder = save(tmp_path, dtype=torch.bfloat16)
    fused, plain = qn.load_model(folder), qn.load_model(folder, fuse=False)
    assert count_fused(fused) > 0
    assert count_fused(plain) == 0
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [type(a).__name__ for a in fused.modules()] == [type(b).__name__ for b in plain.modules()]
    assert relative_error(logits(fused).float(), logits(plain).float()) < 2e-2


def test_unfuse_leaves_what_there_was() -> None:
    model = model_of("Llama")
    plain = copy.deepcopy(model)
    fuse(model)
    unfuse(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(model.modules(), plain.modules(), strict=True))
    assert torch.equal(logits(model), logits(plain))
    assert fuse(model)["norm"] == ALL["norm"]
