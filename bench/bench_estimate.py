"""The memory that `qlora estimate` predicts against the peak of a real training run on the CPU.

    python bench/bench_estimate.py --json

SmolLM2-135M and four random models, each with three lengths, checkpointing on and off: a run of three steps in
a fresh process, as `qlora train` does it. From outside, the anonymous and shared memory of the process is read all the
time; the peak counts from the value after the imports. The prediction is made from config.json and headers.
`weights` and `optimizer` compare bytes of tensors. Needs the extra `bench`, and Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import add_json, machine, write_json

MODELS = ("smollm2", "llama", "llama48", "qwen2", "gemma")
LENGTHS = (128, 256, 1024)
ROWS = 2  # a micro-batch
BARS = {"weights": 0.05, "optimizer": 0.05, "total": 0.10}
REPORTED = 0.05
SMALL: dict[str, dict[str, Any]] = {  # of the random models
    "llama": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "llama48": {  # heads of 48
        "model_type": "llama",
        "hidden_size": 480,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
    },
    "qwen2": {
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 8,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "gemma": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
}


def write_model(name: str, folder: Path, vocabulary: int = 32000, **changes: Any) -> Path:
    """A model in bf16 with a tokenizer of numbered words, and rows of every length."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

    if name == "smollm2":
        from qlora_native.tool.cli.demo import model_file

        source = model_file()
        options = {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **options)
        model.config.__dict__.pop("quantization_config", None)
    else:
        sizes = {"vocab_size": vocabulary, **SMALL[name], **changes}
        torch.manual_seed(0)
        config = AutoConfig.for_model(sizes.pop("model_type", name), **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(100)} | {"<pad>": 100, "<eos>": 101, "<unk>": 102}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def config_of(folder: Path, length: int, checkpointing: bool, steps: int) -> Any:
    """The run of one cell, with its rows written."""
    from qlora_native.tool.config import TrainConfig

    rows = folder / f"rows{length}.jsonl"
    text = json.dumps({"text": " ".join(f"w{number * 7 % 100}" for number in range(length + 9))})
    rows.write_text(f"{text}\n" * (ROWS * steps), encoding="utf-8")
    options = {"steps": steps, "batch_size": ROWS, "grad_accum": 1, "grad_checkpointing": checkpointing}
    return TrainConfig.model_validate(
        {
            "model": str(folder),
            "output_dir": str(folder / "out"),
            "data": {"train": str(rows), "eval_fraction": 0, "max_length": length, "train_on": "all"},
            "train": {**options, "eval_every": 0, "save_every": 0},
        }
    )


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file stands behind."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return values["RssAnon"] + values["RssShmem"]


def child(folder: Path, length: int, checkpointing: bool, steps: int) -> None:
    """Predict, print it, train once asked to, and print the program's own figures."""
    import logging

    import matplotlib.figure  # noqa: F401  (the run's picture at its end counts as an import, too)
    from transformers import PreTrainedTokenizerFast

    from qlora_native.tool.train import loop, memory, prepare
    from qlora_native.weights.open import open_source

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = config_of(folder, length, checkpointing, steps)
    own = memory.MemoryReport(memory.forecast(config, open_source(folder), length))  # brings what is imported late
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=channel, flush=True)
    sys.stdin.readline()
    states: list[Any] = []
    make = prepare.make_optimizer

    def made(*arguments: Any) -> Any:
        states.append(make(*arguments))
        return states[0]

    prepare.make_optimizer = made  # type: ignore[assignment]
    seen: list[int] = []
    # Named outright: for some model types transformers would make another class of the same files.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    trainer = loop.Trainer(config, tokenizer=tokenizer, quiet=True, on_step=lambda record: seen.append(own.measured()))
    trainer.train()
    assert own.predicted is not None
    answer = {
        "predicted": own.predicted.as_dict(),
        "weights": trainer.model.load_report.num_bytes,
        "optimizer": states[0].paging_statistics()["state_bytes"],
        "reported": seen[-1],
    }
    print(json.dumps(answer), file=channel, flush=True)
    sys.stdin.readline()


def cell(folder: Path, length: int, checkpointing: bool, steps: int = 3) -> dict[str, Any]:
    """One row: a run in a fresh process, watched."""
    command = [os.path.abspath(__file__), "--child", str(folder), str(length), str(int(checkpointing)), str(steps)]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin as words, process.stdout as answers:
        if answers.readline() != "ready\n":
            raise SystemExit(f"the run of {folder.name} did not start")
        before = peak = anonymous_bytes(process.pid)
        words.write("go\n")
        words.flush()
        while not select.select([answers], [], [], 0.0005)[0]:
            peak = max(peak, anonymous_bytes(process.pid))
        answer = json.loads(answers.readline() or "null")
        words.write("done\n")
        words.flush()
    process.wait()
    if answer is None:
        raise SystemExit(f"the run of {folder.name} failed")
    predicted = answer["predicted"]
    terms = predicted["peak"]
    pairs = {
        "weights": (terms["weights"] + terms["scales"] + terms["dense"], answer["weights"]),
        "optimizer": (terms["optimizer"], answer["optimizer"]),
        "total": (predicted["total"], peak - before),
    }
    row: dict[str, Any] = {"model": folder.name, "rows": ROWS, "length": length, "checkpointing": checkpointing}
    for name, (guess, truth) in pairs.items():
        row[name] = {"predicted": guess, "measured": truth, "error": round(guess / truth - 1, 4)}
    row["bars"] = [
        {"rival": "measured", "measure": f"relative error of {name}", "bar": bar, "value": row[name]["error"],
         "met": abs(row[name]["error"]) <= bar}
        for name, bar in BARS.items()
    ]  # fmt: skip
    # What the run reports of itself must be what is measured from outside.
    row["match"] = abs(answer["reported"] / (peak - before) - 1) <= REPORTED
    return row | {"reported_by_the_run": answer["reported"], "moment": predicted["moment"], "terms": terms}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    add_json(parser)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, length, checkpointing, steps = arguments.child
        child(Path(folder), int(length), checkpointing == "1", int(steps))
        return
    result: dict[str, Any] = {"bench": "estimate", "machine": {**machine(), "threads": 1}, "bars": BARS, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        for model in arguments.models:
            folder = write_model(model, Path(name) / model)
            for length in arguments.lengths:
                for checkpointing in (True, False):
                    row = cell(folder, length, checkpointing)
                    result["rows"].append(row)
                    total = row["total"]
                    print(
                        f"{model:<8} {length:>5} {'checkpointing' if checkpointing else 'all kept':<13} predicted "
                        f"{total['predicted'] / 2**20:6.1f} MiB, measured {total['measured'] / 2**20:6.1f} "
                        f"({100 * total['error']:+.1f} %), reported {row['reported_by_the_run'] / 2**20:6.1f}",
                        flush=True,
                    )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
