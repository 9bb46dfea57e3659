"""The cost of a merge: the error of every weight that changed, and the drift of the logits on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.data.template import check_vocabulary, padding_id
from qlora_native.lora import load_adapter
from qlora_native.lora.adapter import StoredAdapter
from qlora_native.models.load import load_dense, load_model
from qlora_native.models.merge_files import Merging
from qlora_native.models.trained import TrainedBase
from qlora_native.tool.evaluate.measure import Scores, measure
from qlora_native.tool.evaluate.retention import describe, retention
from qlora_native.tool.evaluate.texts import load_text
from qlora_native.weight import from_bnb
from qlora_native.weights.files import stored_tensors

SAMPLE_ROWS = 4
SAMPLE_TOKENS = 128
# Nats a token; on one run a merge over the 4-bit base was 0.0002 away, over the original 2.5.
AS_TRAINED = 0.01
HELD_OUT_ROWS = 64
HELD_OUT_TOKENS = 512
SAMPLE = (
    "The quick brown fox jumps over the lazy dog, and the dog, which has seen this before, sleeps on.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain of 3000 metres it boils at about 90 degrees.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3, 4]))",
    "Question: which planets of the solar system have rings?\nAnswer: Jupiter, Saturn, Uranus and Neptune.",
)


def check_weights(work: Merging, folder: Path) -> list[dict[str, Any]]:
    """Compare each weight that ``work`` changed, as written in ``folder``, with W + scale * B A in fp64.

    Per weight, in the order of the layers: ``layer``; ``error``, the Frobenius norm of the difference over that of the
    exact sum; ``change``, the norm of the adapter's part over that of W, None without an adapter; ``lost``, the norm of
    the difference over that of the adapter's part: above 1, rounding has moved the weight more than the adapter has.
    """
    written = stored_tensors(folder)
    rows = []
    for item, base_item in zip(work.items(), work.items(adapted=False), strict=True):
        if item.entry.converter is not None or item.name in work.replaced:  # copied exactly
            continue
        if not work.changes(item.name) and item.weight is None:
            continue
        path = item.name.removesuffix(".weight")
        base = torch.cat([part.double() for part in base_item.rows()])
        delta = (
            work.adapter.delta(path, torch.float64) if path in work.adapter.pairs else torch.zeros(())
        )
        exact = base + delta
        key = item.entry.key
        parts = {
            name: stored.read() for name, stored in written.items() if f"{name}.".startswith(f"{key}.")
        }
        if len(parts) > 1:
            got = from_bnb(parts, key).dequantize(torch.float32)
        else:
            got = parts[key].t() if item.name in work.meta.transposed else parts[key]
        off = float((got.double() - exact).norm())
        change = float(delta.norm())
        rows.append(
            {
                "layer": path,
                "error": off / (float(exact.norm()) or 1.0),
                "change": change / (float(base.norm()) or 1.0) if change else None,
                "lost": off / change if change else None,
            }
        )
    order = [name.removesuffix(".weight") for name in work.meta.model.state_dict()]
    return sorted(rows, key=lambda row: order.index(row["layer"]))


def check_logits(
    work: Merging, trained: TrainedBase, folder: Path, rows: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Compare the merged model's logits on rows of token numbers with those of the base with the adapter beside it.

    One entry, or two where the merge took the original weights and the adapter was ``trained`` on 4-bit ones: each
    has ``against``, and the measures of :func:`drift`. The models are in memory one after the other, in 16 or 4 bits,
    and compute in fp32, so that the result is the error of the merge without that of bf16 activations.
    """
    name = "base + adapter, as trained" if work.is_kept else "base + adapter, 4-bit, as trained"
    expected = {name: _logits(trained, rows, work.adapter)}
    if not work.four_bit and not work.rounded and not work.is_kept:
        expected = {"base + adapter, 16-bit": _logits(work.source.path, rows, work.adapter)} | expected
    four_bit = {**work.options, "skip_modules": work.skip_modules}
    merged = _logits(TrainedBase(folder, four_bit) if work.target != "16bit" else folder, rows)
    return [{"against": name, **drift(logits, merged)} for name, logits in expected.items()]


def check_retention(
    work: Merging, trained: TrainedBase, folder: Path, sample: Path, tokenizer: Any
) -> dict[str, Any]:
    """How much of what the adapter learned the merged model keeps on the first HELD_OUT_ROWS rows of ``sample``; the
    models are in memory one after the other."""
    rows = load_text(sample, tokenizer, max_length=HELD_OUT_TOKENS, limit=HELD_OUT_ROWS).rows
    highest = max(int(row["input_ids"].max()) for row in rows)
    check_vocabulary(highest, tokenizer, work.meta.model, str(sample))

    def scores(model: Any) -> Scores:
        return measure(model, rows, padding_id(tokenizer))[0]

    assert work.adapter_folder is not None
    base: Any = load_model(trained.path, **trained.options)
    before = scores(base)
    adapted = scores(load_adapter(base, work.adapter_folder))
    del base
    return retention(
        before, adapted, scores((load_dense if work.target == "16bit" else load_model)(folder))
    )


def verdict(report: dict[str, Any]) -> str:
    """One sentence: whether the merged model is the one that was trained, and which options give that one."""
    away = report["logits"][-1]["kl_mean"]
    if away <= AS_TRAINED:
        return f"this is the model that was trained, to {away:.2g} nats a token"
    advice = "--calibration FILE with --to nf4, or --to bf16, keep more of it"
    if report["base"] == "original":
        advice = "that one is the adapter over the 4-bit base, which --base dequantized merges"
    return f"this is not the model that was trained, but {away:.2g} nats a token away; {advice}"


def drift(expected: Sequence[Tensor], got: Sequence[Tensor]) -> dict[str, Any]:
    """Compare rows of logits [tokens, vocabulary].

    Returns ``tokens``; ``kl_mean`` and ``kl_max``, of KL(expected || got) in nats a token; ``relative``, the norm of
    the difference over that of ``expected``; ``same_top``, the share of tokens with the same likeliest continuation.
    """
    rows = []
    for x, y in zip(expected, got, strict=True):
        x = x.double()
        y = y.double()
        p = x.log_softmax(-1)
        q = y.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        same = (p.argmax(-1) == q.argmax(-1)).double()
        rows.append(torch.stack([kl, same, (y - x).square().sum(-1), x.square().sum(-1)]))
    kl, same, off, size = torch.cat(rows, 1)
    return {
        "tokens": kl.numel(),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "relative": float((off.sum() / size.sum()).sqrt()),
        "same_top": float(same.mean()),
    }


@torch.no_grad()
def _logits(
    base: TrainedBase | Path, rows: Sequence[Sequence[int]], adapter: StoredAdapter | None = None
) -> list[Tensor]:
    """fp32 [tokens, vocabulary] of each row, by a model as it was trained, or 16-bit if there is a path alone."""
    if isinstance(base, TrainedBase):
        model: Any = load_model(base.path, **base.options, dtype=torch.bfloat16, fuse=False)
    else:
        model = load_dense(base, dtype=torch.bfloat16, fuse=False)
    if adapter is not None:
        _put_beside(model, adapter)
    _compute_in_fp32(model)
    inputs = [torch.tensor([row], device=model.device) for row in rows]
    return [model(ids).logits[0].float().cpu() for ids in inputs]


def _put_beside(model: nn.Module, adapter: StoredAdapter) -> None:
    """Compute y + scale * (x A^T) B^T at every adapted layer in plain torch, with no code that merging uses."""

    def add(a: Tensor, b: Tensor, scale: float, module: Any, inputs: Any, y: Tensor) -> Tensor:
        x = inputs[0].float()
        return (y.float() + x @ a.to(x).t() @ b.to(x).t() * scale).to(y.dtype)

    for path, pair in adapter.pairs.items():
        model.get_submodule(path).register_forward_hook(partial(add, *pair))
    for name, tensor in adapter.saved.items():
        weight = model.get_parameter(name)
        weight.data = tensor.to(weight)  # which may have rows of new tokens


def _compute_in_fp32(model: nn.Module) -> None:
    """Hold each module's own 16-bit parameters in fp32 while it runs."""

    def cast(own: dict[nn.Parameter, Tensor], dtype: torch.dtype, *_: Any) -> None:
        for parameter, data in own.items():
            parameter.data = data.to(dtype)

    for module in model.modules():
        own = {p: p.data for p in module.parameters(recurse=False) if p.dtype == torch.bfloat16}
        module.register_forward_pre_hook(partial(cast, own, torch.float32))
        module.register_forward_hook(partial(cast, own, torch.bfloat16))


def sample_rows(path: Path | None, tokenizer: Any) -> list[list[int]]:
    """Up to SAMPLE_ROWS rows of SAMPLE_TOKENS tokens: of a data file, of a text, or by default of SAMPLE."""
    if path is None:
        return [tokenizer(text)["input_ids"][:SAMPLE_TOKENS] for text in SAMPLE[:SAMPLE_ROWS]]
    text = load_text(path, tokenizer, max_length=SAMPLE_TOKENS, train_on="all", limit=SAMPLE_ROWS)
    return [row["input_ids"].tolist() for row in text.rows]


def report_markdown(report: dict[str, Any]) -> str:
    """The figures of a check as a Markdown page."""
    lines = [
        "# What this merge cost",
        "",
        f"Model `{report['model']}`, adapter `{report['adapter']}`, base {report['base']}, written as {report['to']}.",
        "",
        "## Logits",
        "",
        "Merged model against the base with the adapter beside it; KL in nats a token.",
        "",
        "| against | tokens | KL mean | KL largest | relative difference | same likeliest token |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['against']} | {row['tokens']} | {row['kl_mean']:.3g} | {row['kl_max']:.3g} "
            f"| {row['relative']:.3g} | {100 * row['same_top']:.1f} % |"
            for row in report["logits"]
        ),
        "",
        f"Verdict: {report['verdict']}.",
        "",
    ]
    if found := report.get("retention"):
        lines += ["## Held-out loss", "", f"{describe(found)}.", ""]
    lines += [
        "## Weights",
        "",
        "error: |written - (W + scale B A)| / |W + scale B A|. change: |scale B A| / |W|. lost: |written - exact| / "
        "|scale B A|; above 1, rounding moved the weight more than the adapter did.",
        "",
    ]
    if worst := report["largest_drift"]:
        lines += [f"Largest error: `{worst['layer']}`, {worst['error']:.3g}.", ""]
    lines += ["| layer | error | change | lost |", "|---|---|---|---|"]
    for row in report["weights"]:
        error, change, lost = (
            "" if row[key] is None else f"{row[key]:.3g}" for key in ("error", "change", "lost")
        )
        lines.append(f"| {row['layer']} | {error} | {change} | {lost} |")
    return "\n".join(lines) + "\n"
