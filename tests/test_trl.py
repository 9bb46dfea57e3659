"""TRL's preference and RL trainers on a 4-bit model with our optimizer: their losses are those on the decoded weights
in TRL's own code, the reference is the base without its adapter, and the logits of all tokens never exist."""

from __future__ import annotations

import copy
import gc
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import emulated_graphs
import emulated_torch
import pytest
import torch
from emulated import Emulator
from helpers import needs_page_files
from test_trainer import arguments, base, losses
from tiny import FACTS, write_model
from tiny_models import make, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

import qlora_native as qn
from qlora_native.models import decode, fuse
from qlora_native.nn import QuantizedLinear
from qlora_native.ops import linear_cross_entropy

peft, trl, datasets = (pytest.importorskip(name) for name in ("peft", "trl", "datasets"))
orpo = pytest.importorskip("trl.experimental.orpo")
utils = pytest.importorskip("trl.trainer.utils")
kernel = pytest.importorskip("trl.kernels.chunked_logprob")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CHUNK = 5  # tokens
PATCHED = ("_ChunkedLogProbFunction", "_use_triton", "add_fused_lm_head")
qn.patch_trl()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "chunk_tokens", lambda *_: CHUNK)
    monkeypatch.setattr("qlora_native.interop.trl.chunk_tokens", lambda *_: CHUNK)


@contextmanager
def trl_alone() -> Iterator[None]:
    """TRL's own code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", kernel.ChunkedLogProbFunction)
        patch.setattr(utils, "_use_triton", kernel._use_triton)
        yield


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


PAIRS = [{"prompt": f"what is {c}?", "chosen": f" {thing}", "rejected": f" {c}"} for c, thing in FACTS]
MARKED = [{"prompt": f"what is {c}?", "completion": f" {thing}", "label": thing < "m"} for c, thing in FACTS]
ASKED = [{"prompt": f"what is {c}?"} for c, _ in FACTS]
GROUPS = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": CHUNK, "beta": 0.1}
# Trainer, its config, rows, options.
KINDS: dict[str, tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, [{"text": row["prompt"] + row["chosen"]} for row in PAIRS], {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, MARKED, {"per_device_train_batch_size": 4}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, ASKED, GROUPS),
    "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, PAIRS, {"max_length": 64}),
}


def trainer_of(kind: str, model: Any, folder: Path, out: Path, optimizer: Any, **changes: Any) -> Any:
    trainer, config, rows, options = KINDS[kind]
    more: dict[str, Any] = {"peft_config": None if "lora_A" in str(model.state_dict().keys()) else qn.peft_config(r=4)}
    if options is GROUPS:
        more["reward_funcs"] = rewards
    if "ref_model" in changes:
        more["ref_model"] = changes.pop("ref_model")
    made = trainer(
        model=model,
        args=config(**arguments(out, **{"save_strategy": "no", "bf16": False, **options, **changes})),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **more,
    )
    made.optimizer_cls_and_kwargs = optimizer
    return made


def steps(trainer: Any) -> tuple[list[float], list[float]]:
    """The losses and the gradients' norms."""
    found = losses(trainer)
    return found, [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], list[float]]]:
    """The steps of TRL on the decoded model with torch's optimizer, by trainer."""
    found, optimizer = {}, (torch.optim.AdamW, {"lr": 1e-2})
    for kind in KINDS:
        with trl_alone():
            dense = base(folder).dequantize()
            found[kind] = steps(trainer_of(kind, dense, folder, tmp_path_factory.mktemp(kind), optimizer))
    return found


class Logits(TorchDispatchMode):
    """The most tokens for which there is a row of ``words`` numbers at a time."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.tokens = words, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = not any(result.alias_info for result in func._schema.returns)  # no view, such as the weight's transpose
        if made and isinstance(out, torch.Tensor) and out.shape[-1:] == (self.words,) and out.is_floating_point():
            self.tokens = max(self.tokens, out.numel() // self.words)
        return out


@pytest.mark.parametrize("paged", [False, pytest.param(True, marks=needs_page_files)])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_trl_on_the_decoded_model(
    kind: str, paged: bool, folder: Path, tmp_path: Path, expected: dict[str, tuple[list[float], list[float]]]
) -> None:
    """The logits of all tokens exist in ORPO alone."""
    trainer = trainer_of(kind, base(folder), folder, tmp_path, (qn.optim.AdamW, {"lr": 1e-2, "paged": paged}))
    with Logits(300) if paged else nullcontext() as seen:  # the other runs take the calls past torch's dispatcher
        got, norms = steps(trainer)
    assert got == pytest.approx(expected[kind][0], abs=1e-4)
    assert norms == pytest.approx(expected[kind][1], rel=1e-3) and len(set(norms)) == 4
    assert type(trainer.optimizer.optimizer) is qn.optim.AdamW
    assert getattr(trainer, "ref_model", None) is None and list(trainer.model.peft_config) == ["default"]
    if seen is not None:
        assert (seen.tokens > 4 * CHUNK) if kind == "orpo" else 0 < seen.tokens <= CHUNK


def test_an_adapter_that_is_given_is_its_own_reference(folder: Path, tmp_path: Path) -> None:
    """TRL keeps a copy of it, to which it switches."""

    def run(model: Any) -> list[float]:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, qn.peft_config(r=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        trainer = trainer_of("dpo", model, folder, tmp_path, (qn.optim.AdamW, {"lr": 1e-2}))
        assert trainer.ref_model is None and list(trainer.model.peft_config) == ["default", "ref"]
        return losses(trainer)

    with trl_alone():
        expected = run(base(folder).dequantize())
    got = run(base(folder))
    assert got == pytest.approx(expected, abs=1e-4) and got[0] == pytest.approx(math.log(2), abs=1e-4) != got[1]


def test_the_reference_of_an_adapter_of_add_lora(folder: Path, tmp_path: Path) -> None:
    """Before the first step it is the base, whose log-probabilities are then kept in place of a second model."""

    def trainer(name: str, **options: Any) -> Any:
        model = qn.add_lora(qn.load_model(folder, dtype=torch.float32, device="cpu"), qn.LoraConfig(r=4, seed=0))
        optimizer = qn.optim.AdamW, {"lr": 1e-2}
        return trainer_of("dpo", model, folder, tmp_path / name, optimizer, **options)

    kept = trainer("kept", precompute_ref_log_probs=True)
    second = trainer("second", ref_model=base(folder).dequantize())
    got = losses(kept)
    assert kept.ref_model is None and len(set(got)) == 4
    assert got == pytest.approx(losses(second), abs=1e-4)
    without = trainer("without").ref_model  # TRL loads the folder again
    assert not any(isinstance(module, QuantizedLinear) for module in without.modules())


@pytest.mark.parametrize("head", ["dense", "bf16", "quantized", "rows"])
def test_the_head_gives_what_trls_own_gives(head: str) -> None:
    """Every output and the gradients, with a temperature and with what models do to their logits."""
    model = make(final_logit_softcapping=3.0, logit_scale=0.7, initializer_range=0.3)
    if head == "bf16":  # under fp32 activations
        model.lm_head.bfloat16().requires_grad_(False)
    if head == "rows":  # those of two tokens are trained, and no longer what they were
        qn.add_lora(model, qn.LoraConfig(target_modules=["q_proj"], seed=0, trainable_tokens={"lm_head": [3, 9]}))
        model.lm_head.token_adapter.trainable_tokens_delta.data.add_(0.1)
    twin = copy.deepcopy(model)
    if head == "quantized":
        model.set_output_embeddings(QuantizedLinear.from_linear(model.lm_head))
        twin.set_output_embeddings(model.lm_head.dequantize())
    ids = tokens(3, 9)
    labels = ids.masked_fill(torch.arange(9) % 4 == 3, -100)
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def outputs(model: Any) -> list[torch.Tensor]:
        utils.add_fused_lm_head(model, temperature=0.8, outputs=fields)
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
        weights = torch.linspace(-1, 1, 24).view(3, 8)
        (found.log_probs * weights + found.entropy * weights.flip(1)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        return [getattr(found, field).float() for field in fields] + grads

    with trl_alone():
        expected = outputs(twin)
    got = outputs(model)
    assert len(got) == len(expected) and (type(model.lm_head) is QuantizedLinear) == (head == "quantized")
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    nothing = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    nothing.log_probs.sum().backward()
    assert nothing.loss == 0


# Prints the loss of one step of each trainer on a model with a quantized output embedding, imported in the given order.
ORDER = """
import json, sys
from pathlib import Path
first, folder, tests = sys.argv[1:]
sys.path.append(tests)
for name in (first, "trl", "qlora_native"):
    __import__(name)
    if name == "trl":
        from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer
        from trl.experimental.orpo import ORPOTrainer
import test_trl
print("losses:", json.dumps(test_trl.losses_on_a_quantized_head(Path(folder))))
"""


def losses_on_a_quantized_head(folder: Path) -> dict[str, float]:
    """The first loss of each trainer."""
    found = {}
    for kind in KINDS:
        model = base(folder)
        model.set_output_embeddings(QuantizedLinear.from_linear(model.lm_head))
        torch.manual_seed(0)
        options = {"max_steps": 1, "temperature": 1.0, "top_k": 1} if kind == "grpo" else {"max_steps": 1}
        trainer = trainer_of(kind, model, folder, folder / "out", (qn.optim.AdamW, {"lr": 1e-2}), **options)
        (found[kind],) = losses(trainer)
    return found


def test_grpo_generates_by_graphs(
    folder: Path, tmp_path: Path, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``cache_implementation="static"`` its answers are those that are generated eagerly."""
    replay, replays = emulated_torch.Graph.replay, []

    def counted(graph: emulated_torch.Graph) -> None:
        replays.append(1)
        replay(graph)

    monkeypatch.setattr(emulated_torch.Graph, "replay", counted)
    monkeypatch.setattr(fuse, "is_on_cpu", lambda tensor: False)
    answers: list[list[str]] = []
    plain = rewards

    def kept(completions: list[str], **_: Any) -> list[float]:
        answers.append(completions)
        return plain(completions)

    monkeypatch.setitem(globals(), "rewards", kept)
    options = {"max_steps": 2, "max_completion_length": 12, "cache_implementation": "static"}
    for is_eager in (True, False):
        with monkeypatch.context() as patch, emulated_graphs.graphs(emulator=emulator) as cuda:
            if is_eager:
                patch.setattr(decode, "_passes_over", lambda *_: None)
            torch.manual_seed(0)
            losses(trainer_of("grpo", base(folder), folder, tmp_path, (qn.optim.AdamW, {"lr": 1e-2}), **options))
            assert bool(replays) is not is_eager
            gc.collect()
            assert sum(cuda.users.values()) == 0
    assert answers[:2] == answers[2:] and len({text for group in answers[:2] for text in group}) > 4


def test_importing_changes_nothing_of_trl() -> None:
    code = "import qlora_native, sys; from trl.trainer import utils; before = vars(utils).copy(); "
    code += (
        "qlora_native.peft_config(); print(vars(utils) == before, *(n for n in sys.modules if 'interop.trl' in n)); "
    )
    code += "qlora_native.patch_trl(); once = vars(utils).copy(); qlora_native.patch_trl(); "
    code += "print(vars(utils) == once, [name for name in before if before[name] is not once[name]])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "True" and second.startswith("True") and all(name in second for name in PATCHED)


def test_the_order_of_imports_does_not_matter(folder: Path) -> None:
    """TRL's trainers import their functions by name, so that a later patch has to find them there."""
    found = []
    for first in ("trl", "qlora_native"):
        command = [sys.executable, "-c", ORDER, first, str(folder), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("losses:")]
        found.append(json.loads(line.removeprefix("losses:")))
    assert found[0] == pytest.approx(found[1], abs=1e-4) and list(found[0]) == list(KINDS)
