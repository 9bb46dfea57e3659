"""Generation by CUDA graphs, over the emulator: its tokens are those of the eager loop."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import emulated_graphs
import emulated_torch
import pytest
import tiny_models
import torch
from emulated import Emulator
from emulated_graphs import Calls, Cuda
from helpers import same_bytes
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import StaticCache

import qlora_native as qn
from qlora_native import errors, lora
from qlora_native.lora.layer import adapters_off
from qlora_native.models import decode, fuse, generate
from qlora_native.models.decode import EAGER_STEPS, Decodes
from qlora_native.models.generate import Sampling
from qlora_native.ops import _cuda_copies, _cuda_products, _library, linear_cross_entropy
from qlora_native.tool.cli import demo_models

GREEDY = Sampling(max_tokens=200)


@pytest.fixture
def capturing(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    monkeypatch.setattr(fuse, "is_on_cpu", lambda tensor: False)
    monkeypatch.setattr(linear_cross_entropy, "CPU", linear_cross_entropy.ANY)
    monkeypatch.setattr(errors, "_warned", set())
    with emulated_graphs.graphs(emulator=emulator) as cuda:
        yield cuda


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return emulated_torch.count_replays(monkeypatch)


def make(folder: Path, kind: str = "Llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """With an adapter, and weights so large that tokens do not repeat."""
    if not folder.exists():
        tiny_models.save(folder, kind, dtype, initializer_range=0.3, **options)
    model = qn.load_model(folder, dtype=dtype)
    lora.add_lora(model, lora.LoraConfig(r=4, seed=0))
    return tiny_models.fill(model).eval()


@pytest.fixture
def model(capturing: Cuda, tmp_path: Path) -> Any:
    return make(tmp_path / "model")


def eagerly(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any], *, grows: bool = False) -> Any:
    """Without this library's hand in the passes, over the same cache, or over one that ``grows``."""
    with monkeypatch.context() as patch:
        patch.setattr(decode, "_passes_over", lambda *_: None)
        if grows:
            patch.setattr(generate, "static_cache", lambda *_: None)
        return run()


SAMPLED = Sampling(temperature=1.0, top_p=0.9, seed=3, max_tokens=60)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tokens_are_those_of_the_eager_loop(
    capturing: Cuda,
    tmp_path: Path,
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
    sampling: Sampling,
    dtype: torch.dtype,
) -> None:
    """In fp32, where orders of sums decide nothing, also those of the loop over a cache that grows."""
    model = make(tmp_path / "model", dtype=dtype)
    prompt = tiny_models.tokens(1, 7)[0].tolist()

    def answer() -> list[int]:
        return list(generate.stream(model, prompt, sampling, set()))

    expected = eagerly(monkeypatch, answer, grows=dtype == torch.float32)
    assert not replays
    assert answer() == expected and len(expected) == sampling.max_tokens and len(set(expected)) > 5
    assert len(replays) == sampling.max_tokens - 1 - EAGER_STEPS  # the first token is of the prompt's pass
    gc.collect()
    assert sum(capturing.users.values()) == 0, "the graph's memory is free"
    stop = {expected[20]}
    assert list(generate.stream(model, prompt, sampling, stop)) == expected[: expected.index(expected[20])]


def padded(rows: int) -> dict[str, Tensor]:
    """Prompts of several lengths, padded in front."""
    ids, mask = tiny_models.tokens(rows, 9), torch.ones(rows, 9, dtype=torch.int64)
    for row in range(1, rows):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}, {"disable_compile": True}], ids=str)
def test_generate(
    capturing: Cuda, model: Any, replays: list[int], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Of a batch whose rows end at different tokens."""
    options = {"max_new_tokens": 40, "pad_token_id": 0, **options}

    def answers(**more: Any) -> Tensor:
        torch.manual_seed(5)
        found: Tensor = model.generate(**padded(3), **options, **more)
        return found

    free = eagerly(monkeypatch, lambda: answers(cache_implementation="static"))[:, 9:].tolist()
    options["eos_token_id"] = free[0][15]
    expected = eagerly(monkeypatch, lambda: answers(cache_implementation="static"))
    assert not replays and (expected[:, 9:] == 0).any()
    assert torch.equal(answers(cache_implementation="static"), expected)
    assert len(replays) == expected.shape[1] - 9 - 1 - EAGER_STEPS > 1
    gc.collect()
    assert sum(capturing.users.values()) == 0


def test_adapters_are_copied_once_a_generation(model: Any, replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew in the next one, which another adapter's weights show in."""
    adapters = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    copied: list[int] = []
    narrow = _cuda_products.Cuda.narrow

    def counted(engine: Any, tensor: Tensor, *options: Any) -> Tensor:
        copied.extend([1] * (id(tensor) in adapters))
        return narrow(engine, tensor, *options)

    monkeypatch.setattr(_cuda_products.Cuda, "narrow", counted)
    answers = []
    for number in range(2):
        answers.append(list(generate.stream(model, [5, 6, 7], Sampling(max_tokens=12), set())))
        assert len(copied) == (number + 1) * len(adapters)
        with torch.no_grad():
            for _, layer in lora.lora_layers(model):
                layer.lora_B.data.mul_(-3)
    assert replays and answers[0] != answers[1]


def test_an_adapter_that_changes_on_the_way_ends_the_graph(
    model: Any, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that an optimizer steps between two tokens; turned off for one of two answers, it needs nothing."""

    def answers() -> list[list[int]]:
        parts: list[list[int]] = [[], []]
        both = [generate.stream(model, [5, 6, 7], Sampling(max_tokens=24), set()) for _ in range(2)]
        for number in range(24):
            parts[0].append(next(both[0]))
            with adapters_off(model):
                parts[1].append(next(both[1]))
            if number == 12:
                with torch.no_grad():
                    for _, layer in lora.lora_layers(model):
                        layer.lora_B.mul_(-2)
        with torch.no_grad():
            for _, layer in lora.lora_layers(model):
                layer.lora_B.div_(-2)
        return parts

    expected = eagerly(monkeypatch, answers)
    assert answers() == expected and expected[0] != expected[1]
    assert len(replays) == 2 * (23 - EAGER_STEPS) - EAGER_STEPS


def test_what_cannot_be_captured_is_generated_eagerly(
    capturing: Cuda, tmp_path: Path, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts; a window that slides; a forward that waits, in captures alone or always. Each says so once."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    cases: list[tuple[str, dict[str, Any], int]] = [("Mixtral", sizes, 0), ("Mistral", {"sliding_window": 8}, 0)]
    cases += [("Llama", {}, 1), ("Llama", {}, 2)]
    for number, (kind, options, waiting) in enumerate(cases):
        made = make(tmp_path / str(number), kind, **options)

        def waits(module: Any, args: Any, waiting: int = waiting) -> None:
            if waiting == 2 or (waiting and capturing.is_capturing):
                torch.ones(2).sum().item()

        made.model.layers[0].register_forward_pre_hook(waits)

        def answer(made: Any = made) -> Tensor:
            found: Tensor = made.generate(**padded(2), max_new_tokens=10, cache_implementation="static")
            return found

        expected = eagerly(monkeypatch, answer)
        with pytest.warns(UserWarning, match="without CUDA graphs") as warned:
            assert torch.equal(answer(), expected)
        assert len(warned.list) == 1
        assert capturing.current is capturing.default and sum(capturing.users.values()) == 0
    assert not replays


def test_a_beam_search_moves_its_cache(model: Any, replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To other memory after each token, where no graph would look."""

    def answer() -> Tensor:
        found: Tensor = model.generate(
            **padded(2), num_beams=3, max_new_tokens=12, pad_token_id=0, cache_implementation="static"
        )
        return found

    expected = eagerly(monkeypatch, answer)
    assert torch.equal(answer(), expected) and not replays


def test_layers_of_an_offloaded_cache_are_not_captured(model: Any) -> None:
    cache = StaticCache(model.config, max_cache_len=64)
    assert decode._why_eager(model, cache) is None
    cache.offloading = True
    assert "offloaded" in str(decode._why_eager(model, cache))


def test_a_cache_that_is_used_again_takes_the_adapter_of_the_day(
    capturing: Cuda, model: Any, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captures are on the model's device, whichever is the thread's."""

    def turn(cache: Any, ids: list[int]) -> list[int]:
        found, given = [], torch.tensor([ids])
        for _ in range(9):
            given = model(input_ids=given, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
            found.append(int(given))
        return found

    @torch.no_grad()
    def turns() -> list[list[int]]:
        cache = StaticCache(model.config, max_cache_len=64)
        first = turn(cache, [5, 6, 7])
        with adapters_off(model):
            return [first, turn(cache, [8, 9])]

    expected = eagerly(monkeypatch, turns)
    assert turns() == expected and len(replays) == 2 * (8 - EAGER_STEPS)
    assert capturing.chosen_devices == [model.device] * 2


def test_masks_by_kind_of_layer_are_captured_too(
    capturing: Cuda, tmp_path: Path, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path / "model", "Qwen2")

    def answer() -> Tensor:
        found: Tensor = made.generate(**padded(2), max_new_tokens=20, pad_token_id=0, cache_implementation="static")
        return found

    assert made.config.layer_types
    expected = eagerly(monkeypatch, answer)
    assert torch.equal(answer(), expected) and replays


def test_only_what_lasts_is_kept_from_token_to_token() -> None:
    """A slice of a stack of experts is another tensor in each pass."""
    copies: _cuda_copies.Kept = {}
    matrix = torch.nn.Parameter(torch.randn(4, 8))
    with torch.no_grad(), _cuda_copies.kept_in(copies):
        for given, count in ((matrix[:2], 0), (matrix, 1), (matrix, 1)):
            _cuda_copies.copy_of(given, torch.bfloat16, 2.0, lambda tensor, dtype, scale: tensor.to(dtype) * scale)
            assert len(copies) == count


def test_logits_are_not_those_of_the_next_pass(model: Any) -> None:
    """A caller may keep them; and what a model is asked for beside them is computed."""
    cache = decode.static_cache(model, 20)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]), cache=cache, use_cache=True)
        outputs = [model(input_ids=torch.tensor([[token]]), cache=cache, use_cache=True) for token in range(8, 14)]
        kept = [output.logits.clone() for output in outputs]
        whole = model(input_ids=torch.tensor([[5, 6, 7, *range(8, 14)]])).logits
        asked = model(input_ids=torch.tensor([[14]]), cache=cache, use_cache=True, output_hidden_states=True)
    assert all(same_bytes(output.logits, each) for output, each in zip(outputs, kept, strict=True))
    assert all(output.cache is cache for output in outputs) and len(asked.hidden_states) == 3
    assert tiny_models.distance(torch.cat(kept, 1).float(), whole[:, 3:].float()) < 2e-2


def test_on_a_cpu_nothing_changes(tmp_path: Path) -> None:
    """The class keeps its name, and copies and pickles are as before."""
    model = make(tmp_path / "model")
    assert issubclass(type(model), Decodes) and type(model).__name__ == "LlamaForCausalLM"
    ids = tiny_models.tokens(1, 5)
    expected = model.generate(ids, max_new_tokens=6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert issubclass(type(other), Decodes) and torch.equal(other.generate(ids, max_new_tokens=6), expected)
    assert decode.static_cache(model, 8) is None and model.get_compiled_call(None) == model.__call__
    assert torch.equal(model.generate(ids, max_new_tokens=6, cache_implementation="static"), expected)
    assert not decode._passes
    with pytest.MonkeyPatch.context() as patch:  # of transformers' class, as some libraries do
        patch.setattr(type(model).__bases__[1], "forward", lambda self, **inputs: "another")
        assert model(input_ids=ids) == "another"


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name in demo_models.MODELS if name != "smollm2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_real_model_answers_as_in_the_loop_of_transformers(
    name: str,
    dtype: torch.dtype,
    real_model: Callable[[str], Path],
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over the same cache, in fp32 over one that grows. Replayed, but for Gemma's windows; the kernels are a CPU's."""
    made = qn.load_model(real_model(name), dtype=dtype)
    lora.add_lora(made, lora.LoraConfig(r=4, seed=0))
    for _, layer in lora.lora_layers(made):  # a larger one would make much of the last bits
        torch.nn.init.normal_(layer.lora_B, std=0.002)
    made.eval().generation_config = GenerationConfig(max_new_tokens=GREEDY.max_tokens)
    prompt, static = torch.arange(1000, 1016)[None], {"cache_implementation": "static"}
    is_exact = dtype == torch.float32
    expected = made.generate(prompt, **({} if is_exact else static))
    answer = expected[0, prompt.shape[1] :].tolist()
    assert len(answer) == GREEDY.max_tokens and len(set(answer)) > 2
    monkeypatch.setattr(_library, "module_for", lambda device: True)
    monkeypatch.setattr(emulated_torch, "implementation", lambda func: None)
    monkeypatch.setattr(errors, "_warned", set())
    slides = "sliding_attention" in made.config.layer_types
    warned: Any = pytest.warns(UserWarning, match="sliding window") if slides else nullcontext()
    with warned, emulated_graphs.graphs(emulator=Calls()):
        assert torch.equal(made.generate(prompt, **static), expected)
        if is_exact:
            assert list(generate.stream(made, prompt[0].tolist(), GREEDY, set())) == answer
    assert len(replays) == (not slides) * (1 + is_exact) * (GREEDY.max_tokens - 1 - EAGER_STEPS)
