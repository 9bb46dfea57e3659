"""docs/serving.md: its adapters answer as each does alone, the formats that other servers read, and, with --llama-cpp
and --vllm, the answers of llama.cpp's server and of vLLM's."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_docs import page, run_page
from tiny_models import distance
from transformers import AutoModelForCausalLM

import qlora_native as qn

gguf = pytest.importorskip("gguf")
peft = pytest.importorskip("peft")
IDS = torch.arange(10, 34)[None]
NAMES = ("fruit", "color")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names of the page's last script, in the folder that the page leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("serving"))
        yield run_page("serving")


@torch.no_grad()
def test_each_adapter_computes_what_it_does_alone(served: dict[str, Any]) -> None:
    model = served["model"]
    with model.disable_adapter():
        found = {"base": model(IDS).logits}
    for name in NAMES:
        model.set_adapter(name)
        found[name] = model(IDS).logits
        alone = qn.load_model("model.gguf")
        qn.load_adapter(alone, f"{name}/adapter")
        assert distance(alone(IDS).logits, found[name]) < 1e-2
        assert distance(found["base"], found[name]) > 2e-2
    assert distance(found["fruit"], found["color"]) > 2e-2
    assert set(served["answers"]) == set(found)


@torch.no_grad()
def test_what_vllm_asks_for(served: dict[str, Any]) -> None:
    """Its checks of an adapter are in vllm/lora/peft_helper.py; a merged folder is an ordinary one."""
    command = re.search(r"^vllm serve base-model .*$", page("serving"), re.MULTILINE)
    assert command and f"--lora-modules {' '.join(f'{name}={name}/adapter' for name in NAMES)}" in command[0]
    (rank,) = re.findall(r"--max-lora-rank (\d+)", command[0])
    for name in NAMES:
        config = json.loads(Path(name, "adapter", "adapter_config.json").read_text(encoding="utf-8"))
        assert config["r"] == int(rank) and config["bias"] == "none" and config["target_modules"]
        assert not config.get("use_dora") and not config.get("modules_to_save")
        with safe_open(Path(name, "adapter", "adapter_model.safetensors"), "pt") as file:
            pattern = r"base_model\.model\.model\.layers\.\d+\.\w+\.\w+\.lora_[AB]\.weight"
            assert all(re.fullmatch(pattern, key) for key in file.keys())  # noqa: SIM118
    assert "quantization_config" not in json.loads(Path("merged", "config.json").read_text(encoding="utf-8"))
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(IDS).logits
    model = qn.load_model("model.gguf", dtype=torch.float32)
    assert distance(merged, model(IDS).logits) > 5e-2
    qn.load_adapter(model, "fruit/adapter")
    assert distance(merged, model(IDS).logits) < 2e-2


def test_the_modelfile_of_ollama(served: dict[str, Any]) -> None:
    text = Path("Modelfile").read_text(encoding="utf-8")
    base, adapter = map(gguf.GGUFReader, re.findall(r"^(?:FROM|ADAPTER) (\S+)$", text, re.MULTILINE))
    names = [reader.fields["general.architecture"].contents() for reader in (base, adapter)]
    assert names[0] == names[1] and adapter.fields["general.type"].contents() == "adapter"
    messages = [{"role": role, "content": f"of {role}"} for role in ("system", "user", "assistant", "user")]
    template = r'TEMPLATE """(.*?){{ range \.Messages }}(.*?){{ end }}(.*?)"""'
    ((start, turn, end),) = re.findall(template, text, re.DOTALL)
    turns = [turn.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    options = {"chat_template": CHATML, "tokenize": False, "add_generation_prompt": True}
    assert start + "".join(turns) + end == served["tokenizer"].apply_chat_template(messages, **options)


@pytest.mark.usefixtures("served")
def test_llama_cpp_serves_it(llama_cpp: Any) -> None:
    (command,) = re.findall(r"^python (-m llama_cpp\.server .*) --port 8000$", page("serving"), re.MULTILINE)
    port = free_port()
    prompt = {"prompt": "what is red?", "max_tokens": 8, "temperature": 0.0}
    with subprocess.Popen([sys.executable, *command.split(), "--port", str(port)]) as server:
        try:
            got = ask(port, prompt, server)["text"]
        finally:
            server.terminate()
    expected, base = (
        llama_cpp.Llama("model.gguf", lora_path=lora, verbose=False)(**prompt)["choices"][0]["text"]
        for lora in ("fruit.gguf", None)
    )
    assert got == expected != base


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("start", "names"), [("base-model ", ("base-model", *NAMES)), ("merged", ("merged",))])
def test_vllm_serves_it(start: str, names: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    """Its log-probabilities of a prompt are those of transformers and PEFT, for the base and for each adapter."""
    python = request.config.getoption("--vllm")
    if not python:
        pytest.skip("--vllm was not given; .ci/full gives it")
    (command,) = re.findall(rf"^vllm serve ({start}.*)$", page("serving"), re.MULTILINE)
    port, ids = free_port(), IDS[0].tolist()
    module = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", *command.split()]  # `vllm serve`
    options = ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "128"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
    got = {}
    with subprocess.Popen([*module, *options], env=env) as server:
        try:
            for name in names:
                answer = ask(port, {"model": name, **body}, server)
                got[name] = torch.tensor(answer["logprobs"]["token_logprobs"][1 : len(ids)])
        finally:
            server.terminate()
    expected = {name: log_probabilities(AutoModelForCausalLM.from_pretrained(name)) for name in (names[0],)}
    for name in names[1:]:
        base = AutoModelForCausalLM.from_pretrained(names[0])
        expected[name] = log_probabilities(peft.PeftModel.from_pretrained(base, f"{name}/adapter"))
    for name in names:
        apart = {other: (got[name] - truth).abs().mean() for other, truth in expected.items()}
        assert apart.pop(name) < 0.05 and all(other > 0.1 for other in apart.values()), name


@torch.no_grad()
def log_probabilities(model: Any) -> torch.Tensor:
    """Of each token of IDS after the first, by the ones before it."""
    found = model(IDS).logits.float().log_softmax(-1)[:, :-1]
    return found.gather(-1, IDS[:, 1:, None])[0, :, 0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, body: dict[str, Any], server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The first choice of a completion, once the server listens."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(1500):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(request) as answer:
                return dict(json.load(answer)["choices"][0])
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError("the server does not listen")
