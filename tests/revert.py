"""Reverts one mend at a time, most often of the CUDA code, and asks a test, most often over the emulator, to notice.

    python tests/revert.py [--only WORDS] [--emulated DIR]

The mends are of what readings of commits ca7f053 and de98c3c found; a row names the finding, the text of today and a
text that does what was done before, and the tests that must fail with it. Works on a copy of the tree with the
modules that are installed; not beside an editable install, which Python would import in place of the copy. The tests
must pass on the sound tree first, and none may be skipped. Prints a line for each row; the exit status is 1 if a row
was not noticed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from cuda_on_cpu.mutate import ROOT, copy_of_tree

DECODE = "python/qlora_native/models/decode.py"
GRAPHS, MEMORY = "python/qlora_native/models/graphs.py", "python/qlora_native/tool/train/memory.py"
PROBE = "python/qlora_native/nn/probe.py"
OPS, OPTIM, LORA = (f"python/qlora_native/{name}" for name in ("ops", "optim", "lora"))


class Mend(NamedTuple):
    """``before`` is put in the place of ``today``, which stands once in the file."""

    finding: str
    path: str
    today: str
    before: str
    tests: str  # a file in tests/ and words in the names of its tests


MENDS = (
    Mend("int32 labels are read as int64", f"{OPS}/_operands.py",
         "fits = dtype in accepted and ", "fits = ",
         "test_operands.py fit_is_refused and linear_cross_entropy"),
    Mend("labels, a bias or an adapter on the host or on another device are read", f"{OPS}/_operands.py",
         " and place == device", "", "test_operands.py another_device"),
    Mend("outputs of products are views, which Falcon changes", f"{OPS}/_engine.py", "return _unsafe_view(rows, (",
         "return rows.view((", "test_families.py step_of_training and falcon"),
    Mend("PEFT takes shared experts for stacks", f"{LORA}/adapter.py", "names = _TAKEN_FOR_EXPERTS.get(",
         "names = {}.get(", "test_families.py mixture and qwen3_next"),
    Mend("dropout is lost beside target_parameters", f"{LORA}/adapter.py", "if dropout is not None:", "if False:",
         "test_families.py settings and dropout"),
    Mend("patterns are sorted by name", f"{LORA}/adapter.py", "json.dumps(settings, indent=2)",
         "json.dumps(settings, indent=2, sort_keys=True)", "test_adapter_peft.py ours_loads and Llama-rank_pattern"),
    Mend("routers get adapters", PROBE, "if kind.forward is nn.Linear.forward or", "if True or",
         "test_families.py step_of_training and phimoe"),
    Mend("experts keep inputs that no adapter reads", f"{OPS}/experts_4bit.py", "x if a.shape[1] else None", "x",
         "test_experts_4bit.py no_x_is_kept"),
    Mend("experts are computed one after another", "python/qlora_native/nn/experts.py",
         'is_grouped = hidden_states.device.type == "cpu"', 'is_grouped = hidden_states.device.type == "none"',
         "test_experts.py as_transformers and mixtral"),
    Mend("layers that nothing calls get adapters", PROBE, "UNUSED if seeds[path].grad is None else USED", "USED",
         "test_families.py gets_no_adapter and deepseek_v32"),
    Mend("weights that other code reads become 4-bit", PROBE, "part.is_read = True", "pass",
         "test_probe.py use_of_each and jamba"),
    Mend("a failed pass shows nothing at all", PROBE, "found[0] or {", "{} and {",
         "test_probe.py sources_decide"),
    Mend("activations are cast to the dtype of packed weights", "python/qlora_native/models/build.py",
         "if is_asked_for_dtype(model, path)", "if False", "test_families.py step_of_training and glm_moe_dsa"),
    Mend("a sliding window of 0 masks everything", "python/qlora_native/weights/config.py",
         "config.sliding_window = None", "pass", "test_families.py sliding_window"),
    Mend("architectures are asked for that nvcc does not know", "cmake/cuda_archs.cmake", "if(arch IN_LIST known)\n",
         "if(TRUE)\n", "test_build_options.py test_architectures or without_the_newest"),
    Mend("a device without an image gets kernels", f"{OPS}/_cuda_kernels.py", "if not error:", "if True:",
         "test_cuda_build.py without_an_image"),
    Mend("chunks of logits are a CPU's", f"{OPS}/linear_cross_entropy.py", "DEVICE_TOKENS = 1024", "DEVICE_TOKENS = 1",
         "test_products_emulated.py head_is_read"),
    Mend("the loss waits for the device", f"{OPS}/linear_cross_entropy.py", 'return _chunked(loss_of, call, "cuda")',
         'return _chunked(loss_of, call, "cuda", _kept(call[1], ignore_index, call[5].shape[0]))',
         "test_products_emulated.py waits_for_nothing"),
    Mend("ops that wait carry no tag", f"{OPS}/_library.py", "if _name in NOT_IN_GRAPHS", "if False",
         "test_cuda_emulated.py out_of_graphs"),
    Mend("built-in tables are uploaded", f"{OPS}/_operands.py", "0 if code is None else code.data_ptr()",
         "(torch.zeros(16) if code is None else code).data_ptr()", "test_cuda_emulated.py built_in_tables"),
    Mend("a captured paged step waits for events from outside", f"{OPTIM}/device_pages.py",
         "if is_capturing and not (\n", "if False and not (\n",
         "test_paging_emulated.py capture_of_moving"),
    Mend("a changed learning rate replaces what a graph reads", f"{OPS}/_cuda_optim.py",
         "if len(flat) != self.options.numel():", "if True:", "test_step_graph_emulated.py captured_step"),
    Mend("gradients of fp32 adapters are rounded to 16 bits", f"{OPS}/_cuda_products.py",
         "product = wide_product(left.t(), right)", "product = torch.mm(left.t(), right).float()",
         "test_products_emulated.py not_rounded"),
    Mend("input gradients are rounded once a panel", f"{OPS}/_cuda_products.py",
         "        for first in range(0, width, max(1, columns)):\n", """\
        for first in range(0, 0 if is_forward else n, 128):
            last = min(first + 128, n)
            decoded = torch.empty(last - first, k, dtype=stored, device=x.device)
            decode(self.module, weight, decoded, (k, first, last, 0, k))
            y = torch.addmm(y, x[:, first:last], decoded.to(x.dtype), beta=int(first > 0))
        for first in range(0, width if is_forward else 0, max(1, columns)):
""", "test_products_emulated.py rounded_once"),
    Mend("adapters are copied in every pass", f"{OPS}/_cuda_products.py",
         "return copy_of(matrix, dtype, scale, self.narrow)", "return self.narrow(matrix, dtype, scale)",
         "test_products_emulated.py launches_of"),
    Mend("the device is set for every launch", f"{OPS}/_cuda_kernels.py", "if device.index in (None, current):",
         "if False:", "test_cuda_copies.py made_current"),
    Mend("evicted states are read over the bus", f"{OPTIM}/device_pages.py", "elif again:", "elif False:",
         "test_paging_emulated.py evicted_states"),
    Mend("a store makes a context on another device", "cuda/page_store.cc", """\
  std::thread([this] {
    (void)cudaSetDevice(device_);
    (void)cudaDeviceSynchronize();
  }).join();
""", "  (void)cudaSetDevice(device_), (void)cudaDeviceSynchronize(), (void)cudaSetDevice(current);\n",
         "test_cuda_build.py no_context"),
    Mend("page cache counts as used where memory is shared", "python/qlora_native/_memory.py",
         "if _cuda_kernels.facts(device).is_integrated:", "if False:", "test_pressure.py page_cache"),
    Mend("warnings stop the builds of users", "cmake/cuda_library.cmake",
         "$<$<BOOL:${QLORA_NATIVE_WERROR}>:-Xcompiler=-Werror>", "-Xcompiler=-Werror",
         "test_build_options.py warnings_stop"),
    Mend("fuse() takes the CPU's models alone", "python/qlora_native/models/fuse.py",
         "return is_on_cpu(tensor) or _library.module_for(tensor.device) is not None", "return is_on_cpu(tensor)",
         "test_activations_emulated.py fused_models and Llama"),
    Mend("an nvcc that fails is left out in silence", "cmake/find_nvcc.cmake", 'set(why "${found} fails: ${line}")',
         'set(found "")', "test_build_options.py nvcc_is_found"),
    Mend("doctor asks whether kernels were built, no more", "python/qlora_native/tool/cli/doctor.py",
         "if isinstance(item, _cuda_kernels.Missing)", "if not _cuda_kernels._C.build_info()['cuda_archs']",
         "test_cuda_build.py doctor"),
    Mend("a managed store that fails ends a run", f"{OPTIM}/device_pages.py",
         "if self.paged is True or not self.managed:", "if True:",
         "test_paging_emulated.py managed_store_fails"),
    Mend("stores that nothing moves make streams", "cuda/page_store.cc", "return cudaGetDevice(&device_);",
         "return cudaGetDevice(&device_), make_streams();", "test_cuda_build.py streams_and_events"),
    Mend("capability 11.0 finds no image", "cmake/cuda_archs.cmake", "list(PREPEND chosen 80)", "",
         "test_build_options.py ptx"),
    Mend("the demo leaves the card alone", "python/qlora_native/tool/cli/demo.py",
         '"cuda" if torch.cuda.is_available() else None', "None", "test_commands.py goes_to_the_card"),
    Mend("a T4 is given bfloat16", "python/qlora_native/tool/__init__.py", "including_emulation=False",
         "including_emulation=True", "test_config.py card_multiplies"),
    Mend("a card without nvcc gets no kernels", "cmake/build_backend.py", 'mode == "AUTO" and has_card()', "False",
         "test_build_backend.py is_asked_for"),
    Mend("the GPU model charges decoded weights as if they stayed in L2", "bench/gpu_model.py", "(packed + 2) * n * k",
         "PACKED * n * k", "test_gpu_check.py respects_the_floors"),
    Mend("layers that stream are copied twice on the host", "python/qlora_native/models/device_layers.py",
         "copy_(tensor.detach())", "copy_(tensor.detach().clone())", "test_device_layers.py mapped_file"),
    Mend("the kernels that are measured on one card are taken on another", f"{OPS}/_cuda_choice.py",
         'if stored["card"] == list(card):', "if True:", "test_cuda_choice.py another_card"),
    Mend("kernels are measured within a capture", f"{OPS}/_cuda_choice.py", "if _cuda_kernels.is_capturing(device):",
         "if False:", "test_cuda_choice.py capture"),
    Mend("kept decoded weights exceed their budget", f"{OPS}/_cuda_products.py", " <= KEPT_BYTES:", " <= 1 << 60:",
         "test_recomputation.py kept_from_recomputation"),
    Mend("kept decoded weights outlive a failed backward pass", f"{OPS}/_cuda_products.py",
         " = weakref.WeakValueDictionary()", " = {}", "test_recomputation.py kept_from_recomputation"),
    Mend("a failed capture leaves its stream current", GRAPHS, "torch.cuda.set_stream(stream)", "pass",
         "test_graphs.py failed_capture"),
    Mend("a failed capture leaves the allocator in it", GRAPHS, "torch._C._cuda_endAllocateToPool(device, memory)",
         "pass", "test_graphs.py failed_capture"),
    Mend("a failed capture keeps its memory", GRAPHS, "while self.memory.use_count() > users:", "while False:",
         "test_graphs.py failed_capture"),
    Mend("random numbers fail after a failed capture", GRAPHS,
         "generator.graphsafe_set_state(generator.clone_state())", "pass", "test_graphs.py failed_capture"),
    Mend("gradients of a failed capture are added to", GRAPHS, "parameter.grad = grad  #", "pass  #",
         "test_graphs.py failed_capture"),
    Mend("experts are captured", GRAPHS, "if has_experts(model):", "if False:",
         "test_graphs.py which_models"),
    Mend("devices without kernels are captured", GRAPHS, "if _library.module_for(model.device) is None:", "if False:",
         "test_graphs.py which_models"),
    Mend("a capture is tried where the forward waits", "python/qlora_native/tool/train/passes.py", "if waits:",
         "if False:", "test_train_graphs.py goes_on_eagerly"),
    Mend("graphs are captured where they do not fit", MEMORY, "has_room_for_graphs=not estimate.graphs",
         "has_room_for_graphs=True", "test_estimate.py memory_alone"),
    Mend("a step begins again beside the graphs", MEMORY, 'self._stop_capturing(f"memory ran out in {what}")', "pass",
         "test_train_graphs.py begins_again"),
    Mend("a row of the GPU check that hangs costs its group", "bench/gpu_timing.py",
         "has_limit = is_one_of_many and self.deadline < math.inf", "has_limit = False",
         "test_gpu_check.py hangs_leaves"),
    Mend("tokens are generated from Python", DECODE, "self.graph is None and self.count > EAGER_STEPS", "False",
         "test_decode.py eager_loop and greedy and bfloat16"),
    Mend("a graph multiplies by an adapter of before", DECODE, "if not _cuda_copies.are_current(self.copies):",
         "if False:", "test_decode.py on_the_way"),
    Mend("logits change under their owner", DECODE, "make(logits=logits.clone(), **caches)",
         "make(logits=logits, **caches)", "test_decode.py next_pass"),
    Mend("adapters are copied for each token", f"{OPS}/_cuda_copies.py", "kept = _generation.copies",
         "kept = None", "test_decode.py once_a_generation"),
    Mend("copies of passing views are kept", f"{OPS}/_cuda_copies.py", " or not isinstance(matrix, torch.nn.Parameter)",
         "", "test_decode.py only_what_lasts"),
    Mend("a beam search replays where its cache lay", DECODE, "kind = shapes, form, _places(inputs),",
         "kind = shapes, form,", "test_decode.py beam_search"),
    Mend("a cache used again replays the former adapter", DECODE,
         "self._begin(None)  # a prompt: since the last one adapters may have been switched", "pass",
         "test_decode.py used_again"),
    Mend("an nvcc that is too old keeps pip from bringing one", "cmake/build_backend.py",
         "return None if release and int(release[1]) < OLDEST else found", "return found",
         "test_build_backend.py is_asked_for"),
    Mend("transformers compiles what is captured", DECODE, "if compile_config is None:", "if False:",
         "test_decode.py on_a_cpu"),
    Mend("a recomputation makes x A^T in another order of sums", f"{OPS}/lora_linear_4bit.py",
         "engine.low(as_rows(x), down)", "engine.dense(True, as_rows(x), down)",
         "test_recomputation.py no_gradient_changes"),
)  # fmt: skip


def outcome(root: Path, tests: str, emulated: Path) -> tuple[int, str]:
    """pytest's exit status and last line."""
    file, _, words = tests.partition(" ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{file}", "-k", words, "--emulated", str(emulated)]
    env = {**os.environ, "PYTHONPATH": str(root / "python")}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    return done.returncode, (done.stdout.splitlines() or [done.stderr])[-1].strip("= ")


def copy_with_modules(root: Path) -> None:
    copy_of_tree(root, {})
    for name in ("_C", "_cuda"):
        spec = importlib.util.find_spec(f"qlora_native.{name}")
        if spec is not None and spec.origin is not None:
            shutil.copy(spec.origin, root / "python/qlora_native")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="findings with these words")
    parser.add_argument("--emulated", type=Path, default=ROOT / "build/emulated", help="folder of the emulated modules")
    options = parser.parse_args()
    chosen = [mend for mend in MENDS if options.only in mend.finding]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_with_modules(root)
        for mend in chosen:
            file = root / mend.path
            sound = file.read_text(encoding="utf-8")
            status, before = outcome(root, mend.tests, options.emulated)
            if status or re.search("skipped", before):
                raise SystemExit(f"{mend.tests}: {before}: expected passed without a skip, on the sound tree")
            file.write_text(sound.replace(mend.today, mend.before), encoding="utf-8")
            status, after = outcome(root, mend.tests, options.emulated)
            file.write_text(sound, encoding="utf-8")
            wrong += status != 1  # 1: tests failed; others: none ran, or pytest itself failed
            print(f"{mend.finding}: {'seen' if status == 1 else 'NOT SEEN'} by {mend.tests}: {after}", flush=True)
    print(f"score: {len(chosen) - wrong} of {len(chosen)} seen")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
