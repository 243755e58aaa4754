"""Time ulma.py beside the trainers of TRL, on the same model, rows and batches (pip install trl).

    python data/studies/speed.py        # three rounds, each side in a process of its own

The model is a Llama of 33 million untrained weights. Its vocabulary of 50,304 is that of small real
models, for much of the time and the memory of training goes into the output head. The rows are
those of data/, three to a row, which makes them about as long as those of HH-RLHF. Point-wise DPO
is compared with the KTOTrainer and its loss apo_zero_unpaired, which does the same work: one pass
for log π_ref, and one to train. Times are of these passes alone, without loading.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from datasets import load_dataset
from records import make_data
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ulma

ROWS, BATCH, ROUNDS = 48, 8, 3
SIZES = {"vocab_size": 50304, "hidden_size": 384, "intermediate_size": 1024}
SIZES |= {"num_hidden_layers": 8, "num_attention_heads": 6, "tie_word_embeddings": True}


def prepare(folder):
    """The model, and two sets of rows: all, and those of label 1."""
    tokenizer = AutoTokenizer.from_pretrained(ulma.EXAMPLE)
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**SIZES, **ends, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    some = make_data.read(ulma.HERE / "data/train.jsonl")[: 3 * ROWS]
    rows = []
    for i, parts in enumerate(ulma.chunks(some, 3)):
        prompt = "".join(part["prompt"] + part["completion"] for part in parts[:2])
        last = {"prompt": prompt + parts[2]["prompt"], "completion": parts[2]["completion"]}
        rows.append(last | {"label": i % 2})
    make_data.write(folder / "all/train.jsonl", rows)
    make_data.write(folder / "good/train.jsonl", [row for row in rows if row["label"]])


def time_ulma(method, folder):
    """Rows a second of ulma.py, and its memory."""
    data = folder / ("good" if method == "sft" else "all")
    with tempfile.TemporaryDirectory() as out:
        flags = f"--method {method} --model {folder} --data {data} --epochs 1 --batch-size {BATCH}"
        flags += f" --learning-rate 1e-5 --output-dir {out}/run"
        peak = run([sys.executable, ulma.__file__, *flags.split()])
        train = json.loads(Path(out, "run/metrics.json").read_text())["train"]
    return train["samples"] / (train["seconds"] + train["reference_seconds"]), peak


def time_trl(method, folder):
    """Rows a second of TRL, and its memory; in a process that calls trl."""
    with tempfile.TemporaryDirectory() as out:
        peak = run([sys.executable, __file__, method, str(folder), out])
        return json.loads(Path(out, "speed.json").read_text()), peak


def run(command):
    """Runs a command, and returns the greatest memory of its process, in GiB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    ulma.require(status == 0, f"failed: {' '.join(command)}")
    return used.ru_maxrss / 2**20


def trl(method, folder, out):
    """Trains as TRL does, and writes rows a second."""
    from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    data = Path(folder, "good" if method == "sft" else "all", "train.jsonl")
    rows = load_dataset("json", data_files=str(data), split="train")
    rows = rows.map(lambda row: {"label": bool(row["label"])})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    common = {"output_dir": out, "per_device_train_batch_size": BATCH, "num_train_epochs": 1}
    common |= {"learning_rate": 1e-5, "report_to": [], "save_strategy": "no", "bf16": False}
    common |= {"use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False}
    common |= {"max_length": 512}
    start = time.perf_counter()  # log π_ref may be computed before train()
    if method == "sft":
        config = SFTConfig(completion_only_loss=True, **common)
        rows = rows.remove_columns("label")
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    else:
        config = KTOConfig(loss_type="apo_zero_unpaired", precompute_ref_log_probs=True, **common)
        trainer = KTOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    Path(out, "speed.json").write_text(json.dumps(len(rows) / (time.perf_counter() - start)))


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        found = {}
        for _ in range(ROUNDS):
            for method in ("pointwise-dpo", "sft"):
                for side in (time_ulma, time_trl):
                    found.setdefault((method, side), []).append(side(method, folder))
        for method in ("pointwise-dpo", "sft"):
            ours, theirs = (found[method, side] for side in (time_ulma, time_trl))
            ratios = [a / b for (a, _), (b, _) in zip(ours, theirs)]
            memory = [a / b for (_, a), (_, b) in zip(ours, theirs)]
            print(
                f"{method}: {median(ratios):.1f} times the speed ({min(ratios):.1f} to "
                f"{max(ratios):.1f}), {median(memory):.2f} of the memory"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:  # the process that time_trl starts
        trl(*sys.argv[1:])
    else:
        main()
