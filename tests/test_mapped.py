"""4-bit folders whose weights are used where they lie in the files, and layers that come and go."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import exit_code_of_fork, same_bytes, through_a_file

import qlora_native as qn
from qlora_native import _C
from qlora_native.errors import UserError
from qlora_native.lora import LoraConfig, add_lora
from qlora_native.models.convert import convert
from qlora_native.models.loss import causal_lm_loss
from qlora_native.models.mapped import Streaming, mapped_tensors
from qlora_native.tool.estimate import streaming
from qlora_native.weights.files import ALIGNMENT, LEAST_MAPPED, mapped_part, read_header

pytestmark = pytest.mark.skipif(not hasattr(_C, "MappedFile"), reason="files are mapped on Linux")
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit folder of a llama with eight layers of some 370 KB."""
    place = tmp_path_factory.mktemp("mapped")
    tiny.write_model(place / "dense", **SIZES)
    (place / "model").mkdir()
    convert(place / "dense", place / "model", "qlora")
    return place / "model"


def adapted(folder: Path, **options: Any) -> Any:
    """The model with adapters whose B is not zero, in training mode."""
    model = add_lora(qn.load_model(folder, **options), LoraConfig(r=4, seed=0))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def step(model: Any, length: int = 24) -> list[torch.Tensor]:
    """Loss and gradients of the adapters on one batch."""
    ids = torch.arange(2 * length).view(2, length) % 300
    loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids})
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same_step(model: Any, other: Any) -> bool:
    return all(same_bytes(a, b) for a, b in zip(step(model), step(other), strict=True))


def private_bytes(path: Path) -> int:
    """Of mappings of a file, from /proc/self/smaps: what was copied for this process alone."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    ours = [block for block in blocks if str(path) in block.partition("\n")[0]]
    assert ours
    return sum(1024 * int(kib) for block in ours for kib in re.findall(r"^Anonymous:\s+(\d+)", block, re.MULTILINE))


def test_mapped_weights_compute_the_same_and_stay_the_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    before, stored = file.read_bytes(), [tensor.num_bytes for tensor in read_header(file).values()]
    mapped, copied = adapted(folder, residency="mapped"), adapted(folder, residency="memory")
    assert mapped.load_report.copied == {} and copied.load_report.bytes_mapped == 0
    assert mapped.load_report.bytes_mapped > 0.9 * sum(size for size in stored if size >= LEAST_MAPPED)
    assert not list(mapped_tensors(copied))
    assert same_step(mapped, copied)
    assert private_bytes(file) == 0
    with torch.no_grad():
        mapped.get_input_embeddings().weight[0] = 1  # becomes this process's own
    assert private_bytes(file) > 0
    assert file.read_bytes() == before
    assert same_bytes(qn.load_model(folder).get_input_embeddings().weight, copied.get_input_embeddings().weight)


def test_tensors_begin_at_cache_lines_whoever_writes_the_folder(folder: Path, tmp_path: Path, printed: Any) -> None:
    printed("quantize", folder.with_name("dense"), "--out", tmp_path / "four")
    for place in (folder, tmp_path / "four"):
        large = [t for t in read_header(place / "model.safetensors").values() if t.num_bytes >= LEAST_MAPPED]
        assert len(large) > 8 and {t.start % ALIGNMENT for t in large} == {0}
    assert same_step(adapted(tmp_path / "four"), adapted(folder, residency="memory"))


def test_what_cannot_be_mapped_is_copied_and_counted(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "odd")
    raw = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    odd = (end - 7).to_bytes(8, "little") + raw[8:end] + b" " + raw[end:]
    (tmp_path / "odd" / "model.safetensors").write_bytes(odd)  # every tensor begins at an odd byte
    model, wide = adapted(tmp_path / "odd"), qn.load_model(folder, dtype=torch.float32)
    for report in (model.load_report, wide.load_report):  # bf16; codes are bytes
        assert set(report.copied) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert same_step(model, adapted(folder, residency="memory"))
    assert wide.load_report.bytes_mapped > 0
    assert "2 tensors had to be copied" in str(wide.load_report)


def test_residency_is_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match="residency is 'disk'"):
        qn.load_model(folder, residency="disk")
    with pytest.raises(UserError, match="needs a folder of 4-bit safetensors"):
        qn.load_model(folder.with_name("dense"), residency="mapped")
    assert not list(mapped_tensors(qn.load_model(folder.with_name("dense"))))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe, on which opening waits for a writer; a folder; a path of which the system reads the beginning alone."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="expected a regular file"):
            _C.MappedFile(str(path))
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=f"its byte {len(str(tmp_path / 'a'))}: "):
        _C.MappedFile(f"{tmp_path / 'a'}\0b")


MANY_FILES = """
import os, sys
from qlora_native import _C
folder, count = sys.argv[1], int(sys.argv[2])
files = []
for number in range(count):
    path = f"{folder}/{number}"
    open(path, "wb").write(b"a" * 8192)
    files.append(_C.MappedFile(path))
os.truncate(path, 0)
memoryview(files[-1])[0]
"""


def test_one_of_many_files_cut_short_ends_in_a_sentence(tmp_path: Path) -> None:
    words = [sys.executable, "-c", MANY_FILES, str(tmp_path), "600"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count(f"{tmp_path / '599'} can no longer be read") == 1


def test_a_stream_refuses_units_that_it_does_not_have(folder: Path) -> None:
    stream = _C.WeightStream([[(_C.MappedFile(str(folder / "model.safetensors")), 0, 4096)], []], [], [])
    for units, now in (([2], -1), ([10**6], -1), ([0, -1], -1), ([0], 1), ([0], 5), ([], 0), ([0], -2)):
        with pytest.raises(ValueError, match="of the stream's 2|now is -?[0-9]: "):
            stream.want(units, now, False)
    assert stream.want([0, 1], 1, False)


def test_copies_pickles_casts_and_files_of_a_mapped_model(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    running = Streaming(model, 0)
    others = [copy.deepcopy(model), through_a_file(model, weights_only=False), pickle.loads(pickle.dumps(model))]
    expected = step(model)
    for other in [*others, model.to("cpu")]:
        assert all(same_bytes(a, b) for a, b in zip(step(other), expected, strict=True))
    assert not any(list(mapped_tensors(other)) for other in others)
    qn.load_model(folder).save_pretrained(tmp_path / "saved")
    assert same_step(adapted(tmp_path / "saved"), model)
    running.close()


def test_a_mapping_lives_as_long_as_its_tensors(folder: Path) -> None:
    weight = qn.load_model(folder).get_input_embeddings().weight
    part = mapped_part(weight)
    assert part is not None and part.end - part.begin == weight.nbytes
    assert weight.float().isfinite().all()  # the model is gone


@pytest.mark.parametrize("checkpointing", [None, False, True])  # not, not re-entrant, re-entrant
@pytest.mark.parametrize("budget", ["least", "half"])
def test_a_streamed_step_is_the_same_and_holds_what_the_plan_says(
    folder: Path, budget: str, checkpointing: bool | None
) -> None:
    expected, model = adapted(folder, residency="memory"), adapted(folder)
    if checkpointing is not None:
        for one in (expected, model):
            one.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            one.enable_input_require_grads()
    layers = sum(part.end - part.begin for name, _, part in mapped_tensors(model) if ".layers." in name)
    running = Streaming(model, 0 if budget == "least" else layers * 3 // 4)
    plan, stream = running.plan, running.stream
    assert (len(plan.streamed), plan.slots) == ((8, 2) if budget == "least" else (6, 3))
    for _ in range(2):
        assert same_step(model, expected)
    stream.settle()
    before = stream.bytes_read
    assert same_step(model, expected)
    stream.settle()
    assert stream.bytes_read - before == plan.bytes_read()
    assert len(stream.held) <= plan.slots
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    assert same_step(model, expected)
    running.close()


def test_a_released_layer_is_out_of_memory_and_a_written_one_is_kept(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")  # which no other model maps
    with (tmp_path / "model" / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())  # a page that is still to be written stays in memory
    model = qn.load_model(tmp_path / "model")
    layers = model.model.layers
    weight = layers[3].mlp.down_proj.weight
    part = mapped_part(weight)
    assert part is not None
    with torch.no_grad():
        weight.view(-1)[weight.numel() // 2] ^= 255  # not where it begins, in a page that another layer has a part of
    changed = weight.clone()
    running = Streaming(model, 0)
    part.file.release(0, part.file.num_bytes)  # what was written was cached in pages larger than a layer
    for _ in range(2):  # what is resident comes with the first, and what the system reads around it
        model(input_ids=torch.arange(8)[None])
        running.stream.settle()
    running.stream.want([], -1, False)
    running.stream.settle()
    assert torch.equal(weight, changed)
    other = mapped_part(layers[2].mlp.down_proj.weight)
    assert other is not None
    assert other.file.resident_bytes(other.begin, other.end) < (other.end - other.begin) / 4  # all but edges
    running.close()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def test_a_forked_child_streams_on_a_thread_of_its_own(folder: Path) -> None:
    """It computes the same bytes, keeps what it writes, and ends streams; the parent goes on."""
    model = qn.load_model(folder).eval()
    running, expected, weight = Streaming(model, 0), logits_of(model), model.model.layers[3].mlp.down_proj.weight
    others = [_C.WeightStream([], [], [])]

    def in_child() -> None:
        others.clear()  # never used here
        with torch.no_grad():
            weight.view(-1)[weight.numel() // 2] ^= 255  # of which the parent's pages know nothing
            changed = weight.clone()
            logits_of(model)
            weight.view(-1)[weight.numel() // 2] ^= 255
        assert same_bytes(logits_of(model), expected)
        running.stream.settle()
        assert running.stream.bytes_read >= 2 * (6 * changed.nbytes)
        running.close()
        running.stream.settle()
        assert not running.stream.held
        weight.view(-1)[weight.numel() // 2] ^= 255
        assert torch.equal(weight, changed)

    assert exit_code_of_fork(in_child) == 0
    assert same_bytes(logits_of(model), expected)
    running.close()


def test_two_threads_run_one_streamed_model(folder: Path) -> None:
    """Each asks for other layers than those that the other one waits for."""
    model = qn.load_model(folder).eval()
    running, expected, found = Streaming(model, 0), logits_of(model), list[bool]()

    def run() -> None:
        for _ in range(20):
            found.append(same_bytes(logits_of(model), expected))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 40
    running.close()


def test_estimate_predicts_bytes_and_speed_of_a_streamed_run(folder: Path, printed: Any) -> None:
    def streamed(*words: str) -> dict[str, Any]:
        short = ("--cpu", "--seq-length", 32, "--batch-size", 1, "--grad_accum", 3)
        return dict(printed("estimate", folder, *short, *words)["streamed"])

    plenty = streamed("--memory", "64GB")
    assert plenty["layers_streamed"] == plenty["bytes_read"] == 0
    assert plenty["resident"] == plenty["weights"]
    fast = streamed("--memory", "1GB", "--weight_budget", "1", "--disk-rate", "900GB")
    slow = streamed("--memory", "1GB", "--weight_budget", "1", "--disk-rate", "2MB")
    assert fast["layers_streamed"] == fast["layers"] == 8
    layer = (fast["weights"] - fast["resident"]) / 8
    assert fast["bytes_read"] == pytest.approx(3 * 2 * 6 * layer, rel=0.1)  # micro-batches, directions, layers
    assert fast["tokens_per_second"] == pytest.approx(fast["tokens_per_second_in_memory"], rel=0.01)
    assert slow["tokens_per_second"] == pytest.approx(3 * 32 * 2e6 / slow["bytes_read"], rel=0.2)
    assert streamed("--memory", "1GB")["disk_rate"] > 0


def test_reading_beside_a_measurement_goes_on_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SLOT", 1 << 16)
    (tmp_path / "file").write_bytes(bytes(1 << 18))
    with streaming._reading(str(tmp_path / "file")) as reads:
        time.sleep(0.2)
    assert reads.num_bytes > 1 << 18, "more than once"
    assert reads.rate > 0 and not [thread for thread in threading.enumerate() if thread.name == "reads"]
