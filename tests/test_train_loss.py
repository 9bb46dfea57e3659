"""The loss without logits against transformers' own, and the models whose logits are more than one product."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn

from qlora_native.models.loss import causal_lm_loss, trained_tokens
from qlora_native.nn import QuantizedLinear

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", {}),
    "granite-unscaled": ("Granite", {"logits_scaling": 1.0}),
}
OWN_LOGITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "cohere": ("Cohere", {"logit_scale": 0.0625}, "logit_scale=0.0625"),
    "granite": ("Granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
    "phi": ("Phi", {}, "has a bias"),
}


def make(kind: str = "Llama", **changes: Any) -> Any:
    model = tiny_models.make(kind, **changes)
    for parameter in model.parameters():  # away from the tiny start, so that soft-capping would show in the loss
        parameter.data.normal_(std=0.3)
    return model


def make_batch() -> dict[str, torch.Tensor]:
    ids = tiny_models.tokens(3, 11)
    attention, labels = torch.ones_like(ids), ids.clone()
    labels[:, :4] = -100
    ids[1, 8:], attention[1, 8:], labels[1, 8:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def truth(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as every textbook writes it, with the whole logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("name", PLAIN)
def test_equals_the_loss_from_full_logits_with_gradients(name: str) -> None:
    kind, changes = PLAIN[name]
    model, batch = make(kind, **changes), make_batch()
    expected = truth(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = causal_lm_loss(model, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradients(model, loss), gradients(model, expected)) < 1e-5


def test_full_logits_are_never_made_and_no_hook_is_left_behind() -> None:
    model, batch = make(), make_batch()
    rows: list[int] = []
    causal_lm_loss(model, batch)  # the first call tries the head with two tokens
    head: nn.Module = model.lm_head
    assert not head._forward_hooks and not head._forward_pre_hooks
    head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    causal_lm_loss(model, batch)
    assert rows == [0]


@pytest.mark.parametrize("name", OWN_LOGITS)
def test_models_that_change_their_logits_use_them_with_one_warning(name: str) -> None:
    kind, changes, reason = OWN_LOGITS[name]
    model, batch = make(kind, **changes), make_batch()
    expected = truth(model, batch)
    with pytest.warns(UserWarning, match="the model's own logits") as caught:
        losses = [causal_lm_loss(model, batch) for _ in range(3)]
    ours = [str(warning.message) for warning in caught if "the model's own logits" in str(warning.message)]
    assert len(ours) == 1
    assert reason in ours[0] and type(model).__name__ in ours[0]
    assert losses[-1].item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradients(model, losses[-1]), gradients(model, expected)) < 1e-5


def test_a_change_that_no_config_field_names_is_found() -> None:
    model, batch = make(), make_batch()
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
    model, batch = make(), make_batch()
    model.lm_head = layer = QuantizedLinear.from_linear(model.lm_head)
    loss = causal_lm_loss(model, batch)
    model.lm_head = layer.dequantize()
    assert loss.item() == pytest.approx(truth(model, batch).item(), rel=1e-5)


def test_inspecting_the_head_leaves_the_random_state_alone() -> None:
    model, batch = make("GPT2").train(), make_batch()  # dropout 0.1
    torch.manual_seed(5)
    first = causal_lm_loss(model, batch)
    torch.manual_seed(5)
    assert torch.equal(causal_lm_loss(model, batch), first)


def test_trained_tokens_counts_shifted_labels() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])
    assert trained_tokens({"labels": labels}) == 3


def masks_seen(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, and the attention masks with which the model's forward was called for it."""
    causal_lm_loss(model, batch)  # the first call inspects the model
    seen: list[torch.Tensor] = []

    def hook(_: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["attention_mask"])

    with model.register_forward_pre_hook(hook, with_kwargs=True):
        return causal_lm_loss(model, batch), seen


def test_padding_behind_a_row_needs_no_mask() -> None:
    model, batch = make(), make_batch()
    loss, masks = masks_seen(model, batch)
    assert [bool(mask.all()) for mask in masks] == [True]
    expected = truth(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradients(model, loss), gradients(model, expected)) < 1e-5


@pytest.mark.parametrize("why", ["padding on the left", "a masked trained token", "no causal model"])
def test_masks_that_matter_stay(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(), make_batch()
    if why == "padding on the left":
        batch = {key: value.flip(1) for key, value in batch.items()}
    elif why == "a masked trained token":
        batch["labels"][1, 9] = 5
    else:
        for layer in model.model.layers:  # each position sees all
            layer.self_attn.is_causal = False
    loss, masks = masks_seen(model, batch)
    assert [torch.equal(mask, batch["attention_mask"]) for mask in masks] == [True]
    assert loss.item() == pytest.approx(truth(model, batch).item(), rel=1e-5)


def test_inspecting_the_mask_leaves_training_flags_and_randomness_alone() -> None:
    model, batch = make().train(), make_batch()
    model.model.norm.eval()
    flags = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    causal_lm_loss(model, batch)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)
