"""The loss without logits against transformers' own, and the models whose logits are more than one product."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
)

from qlora_native.hf.loss import causal_lm_loss, trained_tokens
from qlora_native.nn import QuantizedLinear

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "granite-unscaled": GraniteConfig(**SIZES, logits_scaling=1.0),
}
OWN_LOGITS = {
    "gemma2": (Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.0625), "logit_scale=0.0625"),
    "granite": (GraniteConfig(**SIZES, logits_scaling=8.0), "logits_scaling=8.0"),
    "phi": (PhiConfig(**{**SIZES, "num_key_value_heads": None}), "has a bias"),
}


def make(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # away from the tiny start, so that soft-capping would show in the loss
        parameter.data.normal_(std=0.3)
    return model


def make_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :4] = -100
    ids[1, 8:], attention[1, 8:], labels[1, 8:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def truth(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as every textbook writes it, with the whole logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].reshape(-1, 90).float(), batch["labels"][:, 1:].reshape(-1))


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("name", PLAIN)
def test_equals_the_loss_from_full_logits_with_gradients(name: str) -> None:
    model, batch = make(PLAIN[name]), make_batch()
    expected = truth(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = causal_lm_loss(model, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradients(model, loss), gradients(model, expected)) < 1e-5


def test_full_logits_are_never_made() -> None:
    model, batch = make(PLAIN["llama"]), make_batch()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    causal_lm_loss(model, batch)
    rows.clear()  # the first call tries the head with two tokens
    causal_lm_loss(model, batch)
    assert rows == [0]


@pytest.mark.parametrize("name", OWN_LOGITS)
def test_models_that_change_their_logits_use_them_with_one_warning(name: str) -> None:
    config, reason = OWN_LOGITS[name]
    model, batch = make(config), make_batch()
    expected = truth(model, batch)
    with pytest.warns(UserWarning, match="the model's own logits") as caught:
        losses = [causal_lm_loss(model, batch) for _ in range(3)]
    ours = [str(warning.message) for warning in caught if "the model's own logits" in str(warning.message)]
    assert len(ours) == 1
    assert reason in ours[0] and type(model).__name__ in ours[0]
    assert losses[-1].item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradients(model, losses[-1]), gradients(model, expected)) < 1e-5


def test_a_change_that_no_config_field_names_is_found() -> None:
    model, batch = make(PLAIN["llama"]), make_batch()
    plain_forward = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain_forward(*args, **kwargs)
        output.logits = 40 * torch.tanh(output.logits / 40)
        return output

    model.forward = forward
    with pytest.warns(UserWarning, match="changes its logits"):
        loss = causal_lm_loss(model, batch)
    assert loss.item() == pytest.approx(truth(model, batch).item(), rel=1e-5)


def test_quantized_output_embedding() -> None:
    model, batch = make(PLAIN["llama"]), make_batch()
    layer = QuantizedLinear.from_linear(model.lm_head)
    model.lm_head = layer
    loss = causal_lm_loss(model, batch)
    model.lm_head = layer.dequantize()
    assert loss.item() == pytest.approx(truth(model, batch).item(), rel=1e-5)


def test_inspecting_the_head_leaves_the_random_state_alone() -> None:
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2)  # dropout 0.1
    model, batch = make(config).train(), make_batch()
    torch.manual_seed(5)
    first = causal_lm_loss(model, batch)
    torch.manual_seed(5)
    assert torch.equal(causal_lm_loss(model, batch), first)


def test_no_hook_is_left_behind() -> None:
    model = make(PLAIN["llama"])
    causal_lm_loss(model, make_batch())
    head: nn.Module = model.lm_head
    assert not head._forward_hooks and not head._forward_pre_hooks


def test_trained_tokens_counts_shifted_labels() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])
    assert trained_tokens({"labels": labels}) == 3


def masks_seen(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, and the attention masks with which the model's forward was called for it."""
    causal_lm_loss(model, batch)  # the first call inspects the model
    seen: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with hook:
        return causal_lm_loss(model, batch), seen


def test_padding_behind_a_row_needs_no_mask() -> None:
    model, batch = make(PLAIN["llama"]), make_batch()
    batch["labels"][1, 8:] = -100
    loss, masks = masks_seen(model, batch)
    assert [bool(mask.all()) for mask in masks] == [True]
    expected = truth(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradients(model, loss), gradients(model, expected)) < 1e-5


@pytest.mark.parametrize("why", ["padding on the left", "a trained token that is masked", "no causal model"])
def test_masks_that_matter_stay(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(PLAIN["llama"]), make_batch()
    if why == "padding on the left":
        batch = {key: value.flip(1) for key, value in batch.items()}
    elif why == "a trained token that is masked":
        batch["labels"][1, 9] = 5
    else:
        for layer in model.model.layers:  # each position sees all
            layer.self_attn.is_causal = False
    loss, masks = masks_seen(model, batch)
    assert [torch.equal(mask, batch["attention_mask"]) for mask in masks] == [True]
    assert loss.item() == pytest.approx(truth(model, batch).item(), rel=1e-5)


def test_inspecting_the_mask_leaves_training_flags_and_randomness_alone() -> None:
    model, batch = make(PLAIN["llama"]).train(), make_batch()
    model.model.norm.eval()
    flags = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    causal_lm_loss(model, batch)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)
