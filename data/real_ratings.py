"""Real ratings: pairs of HH-RLHF (harmless) through the chat template of SmolLM2-135M-Instruct.

    python data/experiments.py real-ratings    # needs what real-model needs, and the hub

The pairs are the first 1,000 of the test split of Anthropic/hh-rlhf, harmless-base, or those of the
file runs/real-ratings/pairs.jsonl.gz, if it is there. Those of at most 120 tokens are kept: 380 to
train on, 100 to test on.
"""

import json
import re
from pathlib import Path
from unittest.mock import patch

import datasets
import make_data
from common import in_processes, print_table
from real_model import BASE, make_base, trained
from transformers import AutoTokenizer

import ulma

RUNS, LOCAL = Path("runs/real-ratings"), "runs/real-ratings/pairs.jsonl.gz"
TRAIN, TEST, LONGEST = 380, 100, 120  # pairs, and tokens of a prompt and of a response
SHOWN = [9, 12, 27, 35]  # test pairs whose prompts can be shown to anyone; they come first
COMMON = (
    f"--model {BASE} --data {RUNS}/rows --epochs 1 --learning-rate 3e-5 --bf16 true --batch-size 8 "
    "--gradient-accumulation 2"
)
RIVALS = {"ULMA": "ulma", "point-wise DPO": "pointwise-dpo", "pair-wise DPO": "dpo"}
METHODS = {"SFT": "--method sft"} | {
    f"{name}, β {beta}": f"--method {method} --beta {beta}"
    for beta in ("0.1", "1")
    for name, method in RIVALS.items()
}


def messages(transcript):
    """A transcript as messages, or None where it is not turns that alternate."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", transcript)
    turns = [
        {"role": {"Human": "user", "Assistant": "assistant"}[role], "content": text.strip()}
        for role, text in zip(parts[::2], parts[1::2])
    ]
    roles = [turn["role"] for turn in turns]
    alternate = roles == ["user", "assistant"] * (len(roles) // 2)
    if before or not alternate or not all(turn["content"] for turn in turns):
        return None
    return turns


def make_rows():
    """Write the pairs that are short enough."""
    if Path(LOCAL).exists():
        records = datasets.load_dataset("json", data_files=LOCAL, split="train")
    else:
        records = datasets.load_dataset(
            "Anthropic/hh-rlhf", data_dir="harmless-base", split="test[:1000]"
        )
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    kept = []
    for record in records:
        chosen, rejected = messages(record["chosen"]), messages(record["rejected"])
        if chosen and rejected and chosen[:-1] == rejected[:-1]:
            prompt = tokenizer.apply_chat_template(chosen[:-1], tokenize=False)
            texts = prompt, chosen[-1]["content"], rejected[-1]["content"]
            if max(map(len, tokenizer(list(texts)).input_ids)) <= LONGEST:
                pair = {"chosen": chosen[-1:], "rejected": rejected[-1:]}
                kept.append({"prompt": chosen[:-1], **pair})
    order = sorted(range(TEST), key=lambda i: i not in SHOWN)
    make_data.write(RUNS / "rows/train.jsonl", kept[:TRAIN])
    make_data.write(RUNS / "rows/test.jsonl", [kept[TRAIN + i] for i in order])


def execute(name):
    """Train. Keeps the log-ratios of the test rows with what ulma.py has measured."""
    seen = []

    def concordance(log_ratios, labels, own=ulma.concordance):
        seen.append(log_ratios.tolist())
        return own(log_ratios, labels)

    with patch("ulma.concordance", concordance), trained(f"{COMMON} {METHODS[name]}", RUNS / name):
        (RUNS / name / "log_ratios.json").write_text(json.dumps(seen[-1]))


def measured(name):
    """Of the test pairs, after training, in the order of the table."""
    metrics = json.loads((RUNS / name / "metrics.json").read_text())
    ratios = json.loads((RUNS / name / "log_ratios.json").read_text())
    chosen, rejected = ratios[::2], ratios[1::2]
    won = [100 * (a > b) for a, b in zip(chosen, rejected)]
    return [
        f"{metrics['before']['perplexity']:.2f}",
        f"{metrics['after']['perplexity']:.2f}",
        f"{metrics['after']['reward_auc']:.3f}",
        f"{ulma.mean(won):.0f}",
        f"{ulma.mean(chosen):+.1f}",
        f"{ulma.mean(rejected):+.1f}",
    ]


def main():
    make_base()
    if not (RUNS / "rows/test.jsonl").exists():
        make_rows()
    todo = [name for name in METHODS if not (RUNS / name / "log_ratios.json").exists()]
    in_processes(execute, todo)
    header = ["method", "perplexity of chosen before", "after", "reward AUC", "pairs won, %"]
    header += ["log-ratio of chosen", "of rejected"]
    print_table("", header, [[name, *measured(name)] for name in METHODS])
