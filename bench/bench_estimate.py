"""The memory that `qlora estimate` predicts against the peak of a real training run on the CPU.

    python bench/bench_estimate.py --json

SmolLM2-135M and four random models, each with three lengths, checkpointing on and off: a run of three steps in
a fresh process, as `qlora train` does it. From outside, the anonymous and shared memory of the process is read all the
time; the peak counts from the value after the imports. The prediction is made from config.json and headers.
`weights` and `optimizer` compare bytes of tensors. Needs the extra `bench`, and Linux.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from children import Child, calling, serve
from common import Bench, verdict
from peer_models import dense_model, private_megabytes

LENGTHS = (128, 256, 1024)
ROWS = 2  # a micro-batch
BARS = {"weights": 0.05, "optimizer": 0.05, "total": 0.10}
REPORTED = 0.05
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SMALL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {  # of the random models: SIZES, and what else differs
    "llama": ((512, 1376, 8, 8, 8), {}),
    "llama48": ((480, 1376, 8, 10, 2), {"model_type": "llama"}),  # heads of 48
    "qwen2": ((640, 1728, 8, 10, 2), {"tie_word_embeddings": True}),
    "gemma": ((512, 2048, 6, 4, 1), {"head_dim": 256}),
}
MODELS = ("smollm2", *SMALL)


def write_model(name: str, folder: Path, vocabulary: int = 32000, **changes: Any) -> Path:
    """A model in bf16 with a tokenizer of numbered words, and rows of every length."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    if name == "smollm2":
        model = dense_model()
    else:
        sizes, more = SMALL[name]
        options: dict[str, Any] = dict(zip(SIZES, sizes, strict=True)) | {"vocab_size": vocabulary, **more, **changes}
        torch.manual_seed(0)
        config = AutoConfig.for_model(options.pop("model_type", name), **options)
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


def child(folder: str, length: int, checkpointing: bool, steps: int) -> None:
    """Serves "predict", then "train", whose answer has the program's own figures."""
    import logging

    import matplotlib.figure  # noqa: F401  (the run's picture at its end counts as an import, too)
    from transformers import PreTrainedTokenizerFast

    from qlora_native.tool.train import loop, memory, prepare
    from qlora_native.weights.open import open_source

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = config_of(Path(folder), length, checkpointing, steps)
    own = memory.MemoryReport(memory.forecast(config, open_source(folder), length))  # brings what is imported late
    states: list[Any] = []
    make = prepare.make_optimizer

    def made(*arguments: Any) -> Any:
        states.append(make(*arguments))
        return states[0]

    prepare.make_optimizer = made  # type: ignore[assignment]
    seen: list[int] = []

    def answer(command: list[str]) -> dict[str, Any]:
        assert own.predicted is not None
        if command == ["predict"]:
            return own.predicted.as_dict()
        # Named outright: for some model types transformers would make another class of the same files.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        trainer = loop.Trainer(config, tokenizer=tokenizer, quiet=True, on_step=lambda _: seen.append(own.measured()))
        trainer.train()
        states_bytes = states[0].paging_statistics()["state_bytes"]
        return {"weights": trainer.model.load_report.num_bytes, "optimizer": states_bytes, "reported": seen[-1]}

    serve(answer)


def cell(folder: Path, length: int, checkpointing: bool, steps: int = 3) -> dict[str, Any]:
    """One row: a run in a fresh process, watched."""
    process = Child(folder.name, calling(child, folder, length, checkpointing, steps), {"OMP_NUM_THREADS": "1"})
    predicted = process.ask("predict")
    samples: list[float] = []

    def look() -> None:  # at the memory that no file stands behind
        samples.append(sum(private_megabytes(field, process.process.pid) for field in ("RssAnon", "RssShmem")) * 2**20)

    look()
    answer = process.ask("train", meanwhile=look)
    process.end()
    measured = round(max(samples) - samples[0])
    terms = predicted["peak"]
    pairs = {
        "weights": (terms["weights"] + terms["scales"] + terms["dense"], answer["weights"]),
        "optimizer": (terms["optimizer"], answer["optimizer"]),
        "total": (predicted["total"], measured),
    }
    row: dict[str, Any] = {"model": folder.name, "rows": ROWS, "length": length, "checkpointing": checkpointing}
    row["bars"] = []
    for name, (guess, truth) in pairs.items():
        error = guess / truth - 1
        row[name] = {"predicted": guess, "measured": truth, "error": round(error, 4)}
        bar = verdict("measured", f"relative error of {name}", BARS[name], abs(error))
        row["bars"].append({**bar, "value": row[name]["error"]})
    # What the run reports of itself must be what is measured from outside.
    row["match"] = abs(answer["reported"] / measured - 1) <= REPORTED
    return row | {"reported_by_the_run": answer["reported"], "moment": predicted["moment"], "terms": terms}


def main() -> None:
    bench = Bench("estimate", __doc__, models=MODELS, lengths=LENGTHS, threads=1)
    bench.begin(bars=BARS)
    with tempfile.TemporaryDirectory() as name:
        for model in bench.options.models:
            folder = write_model(model, Path(name) / model)
            for length, checkpointing in itertools.product(bench.options.lengths, (True, False)):
                row = cell(folder, length, checkpointing)
                bench.add(row, "model", "length", "checkpointing", "total", "reported_by_the_run")
    bench.write()


if __name__ == "__main__":
    main()
