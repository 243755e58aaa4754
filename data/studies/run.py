"""Make a table of README.md or of a page here: run what it needs, and print it in Markdown.

    python data/studies/run.py TABLE              # mean ± standard error over --seed 0 to 4
    python data/studies/run.py TABLE --sweep      # first choose the settings, on validation rows
    python data/studies/run.py TABLE --kinds      # instead, kinds of completion, and their score
    python data/studies/run.py TABLE --weights    # instead, weights of ∇ log π and log-ratios
    python data/studies/run.py share --picture    # also draws share.svg

A run takes 20 to 40 seconds of one core; two go at a time, and --seeds 2 makes a table of fewer.
They are kept in runs/studies, named by their flags; what is finished is not run again. Flags beyond
ulma.py's:

    --rows KIND       the rows: embedded, edits, pairs, fair, noise-SHARE, share-PERCENT, spread
    --loss kto        KTO's loss; kto-sft adds −log π of thumbs-up
    --loss dpo        pair-wise DPO, on pairs of a good and a bad row with the same prompt
    --up W, --down W  weights of the rows of label 1, and of the others
    --sft EPOCHS      first this many epochs of SFT: where the method starts, and its reference
    --z running       β log Z is minus the mean of all rewards so far, as in BCO
    --z true          the prompt's own log Z, from 64 draws of the reference
    --fine-grained    of rejected responses only what the edit removes counts
"""

import argparse
import configparser
import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_data

import ulma

ROOT, RUNS = ulma.HERE, Path("runs/studies")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWS = 64  # completions of a prompt, for its true log Z
CHANCE, TIES = 1, 3  # points between settings that this many seeds decide


# ---- Settings ----


def read(flags):
    """The flags as {name: value}."""
    return dict(part.partition(" ")[::2] for part in flags.removeprefix("--").split(" --"))


def at(flags, cell):
    """The flags with those of a cell of a grid put in."""
    settings = read(flags) | read(cell)
    return " ".join(f"--{name} {value}".strip() for name, value in settings.items())


def grid(**values):
    """All combinations, each as flags: the last one changes fastest."""
    names = [name.replace("_", "-") for name in values]
    return [
        " ".join(f"--{name} {value}" for name, value in zip(names, cell))
        for cell in itertools.product(*(given.split() for given in values.values()))
    ]


parser = configparser.ConfigParser(delimiters=[":"], interpolation=None)
parser.optionxform = str  # keeps capitals
parser.read_string(Path(__file__).with_name("tables.ini").read_text(encoding="utf-8"))
TABLES = {name: dict(parser[name]) for name in parser.sections()}  # {table: {row: flags}}
ELSEWHERE = {  # the file that makes it
    "rewards": "figures",
    "optimum": "figures",
    "real-demonstrations": "demonstrations",
    "real-model": "real",
}


RATES = "3e-5 1e-4 3e-4 1e-3"


def cells_of(table, flags):
    """The settings that --sweep tries for a row of a table."""
    settings = read(flags)
    if table == "share" and settings.get("method") == "sft":
        short = grid(epochs="5", learning_rate="1e-3 3e-3")
        return short + grid(epochs="30", learning_rate="1e-4 3e-4")
    if table == "share" or "kto-sft" in flags:
        return grid(learning_rate="3e-4", beta="1 3 10") + grid(learning_rate="1e-3", beta="3")
    if table == "prompt-log-z" and "beta" in settings:
        return grid(learning_rate="3e-4", beta="0.3 1 3 10")
    if table == "prompt-log-z":
        return grid(learning_rate="1e-4 3e-4 1e-3 3e-3")
    if "average" in settings:
        fast = grid(learning_rate="1e-3", beta="10 30 100")
        return grid(learning_rate="3e-4", beta="3 10 30 100 300") + fast
    if table in ("average", "brake"):  # given
        return [f"--learning-rate {settings['learning-rate']} --beta {settings['beta']}"]
    if table == "push":
        fine, coarse, betas = "0.03 0.1 0.3 1 3 10", "0.1 1 10", "0.1 0.3 1 3 10 30"
        cells = grid(learning_rate="3e-4 1e-3", down=fine, beta=betas)
        return cells + grid(learning_rate="1e-4", down=coarse, beta=betas)
    if "beta" in settings:
        return grid(learning_rate=RATES, beta="0.1 0.3 1 3 10")
    return grid(learning_rate=f"{RATES} 3e-3")


# ---- Rows ----


def demonstrated(percent):
    """Kinds of request, this share of either sort; each share holds the smaller ones."""
    among = {0: (), 25: (0,), 50: (0, 2), 75: (0, 1, 2), 100: (0, 1, 2, 3)}[percent]
    return [verb for i, verb in enumerate(make_data.VERBS) if i % 4 in among]


def acceptance():
    """{kind of request: share of acceptable responses}, from 5 to 95 %, for --rows spread."""
    verbs = random.Random(0).sample(make_data.VERBS, len(make_data.VERBS))
    return {verb: 0.05 + 0.9 * i / (len(verbs) - 1) for i, verb in enumerate(verbs)}


def spread_rows():
    """960 unselected responses to 24 kinds of request, and two to each test prompt."""
    shares = acceptance()
    often = [verb for verb in shares if shares[verb] > 0.5]
    train = make_data.mixture(random.Random(0), 960, shares)
    for row in train:
        verb, noun = make_data.verb_of(row), make_data.noun_of(row)
        kind = make_data.kind_of(verb, noun, row["completion"].strip())
        row |= {"label": int(kind in ("full", "brief")), "score": make_data.SCORES[kind]}
        row["group"] = "demonstrated" if verb in often else "undemonstrated"
    return train, often


def make_rows(kind, validation):
    """The folder of rows of a kind, or of their validation part; makes what is missing."""
    folder = RUNS / "rows" / (kind + "-validation" * validation)
    if folder.exists():
        return folder
    name, _, share = kind.partition("-")
    chosen = demonstrated(int(share)) if name == "share" else make_data.DEMONSTRATED
    train = make_data.train_rows(random.Random(make_data.SEED), chosen)
    test = random.Random(make_data.SEED + 1), make_data.split()[1]
    if name == "spread":
        train, chosen = spread_rows()
    if name == "edits":
        train = make_data.edits(random.Random(make_data.SEED + 4), train)
    if validation:
        train, test_rows = make_data.validation(train, chosen)
    else:
        test_rows = make_data.test_rows(*test, chosen)
    if name == "noise":
        train = make_data.noisy(random.Random(make_data.SEED + 5), train, float(share))
    if name == "pairs":
        asked = {row["prompt"] for row in train if row["label"]}
        train = [row for row in train if row["prompt"] in asked]
    if name == "fair":  # brief demonstrations are demonstrations, too
        train = [{**row, "score": 1.0} if row["label"] else row for row in train]
    part = folder.with_name(f"{folder.name}.part")
    make_data.write(part / "train.jsonl", train)
    make_data.write(part / "test.jsonl", test_rows)
    part.rename(folder)  # now that they are whole
    return folder


def make_spread_base():
    """π_ref of --rows spread: data/base, trained on 16,000 unlabelled responses; its folder."""
    base = RUNS / "rows" / "spread-base"
    if not base.exists():
        rows = make_data.mixture(random.Random(1), 16000, acceptance())
        make_data.write(RUNS / "rows" / "spread-mixture" / "train.jsonl", rows)
        flags = "--method sft --epochs 1 --batch-size 32 --learning-rate 1e-3".split()
        flags += ["--data", str(RUNS / "rows" / "spread-mixture")]
        part = base.with_name("spread-base.part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
        ulma.run(ulma.read_options([*flags, "--output-dir", str(part)]))
        part.rename(base)
    return base


def base_of(kind):
    """The model to start from, for rows of a kind."""
    return make_spread_base() if kind == "spread" else ROOT / "data/base"


@functools.cache
def kind_of(prompt, completion):
    """The kind of completion by the rule."""
    row = {"prompt": prompt}
    return make_data.kind_of(make_data.verb_of(row), make_data.noun_of(row), completion.strip())


@functools.cache
def draws(kind):
    """{prompt: the scores of completions drawn from the reference}, of every training prompt.

    Garbled ones score 0.
    """
    path = RUNS / f"draws-{kind}.json"
    if not path.exists():
        args = ulma.read_options(["--data", str(make_rows(kind, False)), "--batch-size", "128"])
        base = base_of(kind)
        tokenizer = AutoTokenizer.from_pretrained(base)
        rows, _ = ulma.load_rows(args, tokenizer)
        rows = list({row.prompt: row for row in rows}.values())
        model = ulma.load_model(base, tokenizer).to(DEVICE)
        scores = defaultdict(list)
        for seed in range(DRAWS // ulma.SAMPLES):
            drawn = ulma.sample(model, tokenizer, rows, replace(args, seed=seed))
            for row, samples in zip(rows, drawn):
                for one in samples:
                    score = make_data.SCORES.get(kind_of(row.prompt, one.text), 0.0)
                    scores[row.prompt].append(score)
        path.write_text(json.dumps(scores))
    return json.loads(path.read_text())


@functools.cache
def true_log_z(kind, prompt, beta, continuous):
    """log Z(x) = log E exp(score / β); of labels, logit(share of acceptable draws) / β.

    For the share, half a draw is added to either side.
    """
    scores = torch.tensor(draws(kind)[prompt])
    if continuous:
        return (torch.logsumexp(scores / beta, 0) - math.log(len(scores))).item()
    return torch.logit(((scores >= 0.8).sum() + 0.5) / (len(scores) + 1)).item() / beta


def only_edits(rows):
    """--fine-grained (Xu et al., arXiv 2406.02756): a mask for rejected responses.

    Of each only the tokens count that an edit to the chosen one removes. Where that is none, the
    rejected response is left out. No two pairs have the same prompt.
    """
    chosen_of = {row.prompt: row for row in rows if row.label == 1}
    for row in rows:
        if row.label == 1:
            continue
        chosen = chosen_of[row.prompt]
        after = chosen.input_ids[chosen.response_mask].tolist()
        before = row.input_ids[row.response_mask].tolist()
        counts = row.response_mask[-len(before) :]  # a view: what is set in it, is set there
        matcher = SequenceMatcher(None, before, after, autojunk=False)
        for match in matcher.get_matching_blocks():
            counts[match.a : match.a + match.size] = False
    return [row for row in rows if row.response_mask.any()]


# ---- A run: (flags, seed, validation) ----


def read_flags(flags):
    """The flags of this script, and the arguments that are ulma.py's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fine-grained", action="store_true")
    defaults = {"rows": "embedded", "loss": "", "z": ""}
    defaults |= {"sft": 0, "up": 1.0, "down": 1.0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    return parser.parse_known_args(flags.split())


def folder_of(flags, seed, validation):
    """The folder of a run."""
    settings = {"epochs": "5", "rows": "embedded"} | read(flags)
    for name, default in {"epochs": "5", "rows": "embedded", "up": "1", "down": "1"}.items():
        if settings.get(name) == default:
            del settings[name]
    names = sorted(f"{name} {value}".strip() for name, value in settings.items())
    return RUNS / ("validation" if validation else "test") / f"{', '.join(names)}, seed {seed}"


def kto_losses(model, rows, args, sft=0.0):
    """KTO: 1 − σ(r_θ) on thumbs-up, σ(r_θ) on thumbs-down; and sft × −log π of thumbs-up.

    In place of log Z stands minus an estimate of the KL, never below 0. Here that is always 0,
    which makes it APO-zero.
    """
    logps = ulma.row_logps(model, rows, args)
    numbers = torch.tensor([(row.ref_logp, row.label, row.weight) for row in rows])
    ref_logps, labels, weights = numbers.to(logps.device).unbind(1)
    rewards = ulma.implicit_reward(logps, ref_logps, args.beta)
    losses = 1 - torch.sigmoid(torch.where(labels == 1, rewards, -rewards))
    losses = losses + sft * torch.where(labels == 1, ulma.sft_loss(logps), 0.0)
    return weights * losses, rewards.detach()


def pairs_of(rows):
    """{chosen row: rejected row} for every good and bad row with the same prompt.

    The chosen row of a pair is a copy: a good row that is in two pairs is two keys.
    """
    rejected_of = {}
    for good in rows:
        for bad in rows:
            if good.prompt == bad.prompt and good.label == 1 and bad.label != 1:
                rejected_of[replace(good)] = bad
    return rejected_of


def dpo_losses(model, rows, args, rejected_of):
    """Pair-wise DPO of chosen rows, and the rewards of the chosen and then of the rejected rows."""
    both = rows + [rejected_of[row] for row in rows]
    logps = ulma.row_logps(model, both, args)
    numbers = torch.tensor([(row.ref_logp, row.weight) for row in both])
    ref_logps, weights = numbers.to(logps.device).unbind(1)
    chosen, rejected = logps.chunk(2)
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    losses = ulma.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta)
    pair_weights = weights.view(2, -1).mean(0)
    rewards = ulma.implicit_reward(logps.detach(), ref_logps, args.beta)
    return pair_weights * losses, rewards


def weights_of(rewards, labels, args, loss):
    """The weight of ∇ log π in a descent step, of each row: positive where log π is pushed up."""
    sigma = rewards.sigmoid()
    if loss == "dpo":
        chosen, rejected = rewards.chunk(2)
        push = args.beta * (rejected - chosen).sigmoid()
        return torch.cat((push, -push))
    if loss:
        weights = args.beta * sigma * (1 - sigma) * (2 * labels - 1)
        return weights + labels if loss == "kto-sft" else weights
    weights = args.beta * (labels - sigma)
    if args.continuous:
        weights = 2 * args.beta * (labels - rewards)
    if args.method == "pointwise-dpo":
        return weights
    return torch.where(labels == 1, 1.0, weights)


def study_losses(model, rows, args, own, rejected_of, seen):
    """batch_losses, as this script's flags change it. Adds (row, weight, log-ratio) to seen."""
    if own.z == "running":
        args = replace(args, log_z=running_log_z(seen))
    if own.z == "true":
        log_z = [true_log_z(own.rows, row.prompt, args.beta, args.continuous) for row in rows]
        args = replace(args, log_z=torch.tensor(log_z, device=DEVICE))
    if own.loss:
        args = replace(args, log_z=0.0)
    rated = rows  # the rows that have a reward
    if own.loss == "dpo":
        losses, rewards = dpo_losses(model, rows, args, rejected_of)
        rated = rows + [rejected_of[row] for row in rows]
    elif own.loss:
        losses, rewards = kto_losses(model, rows, args, sft=float(own.loss == "kto-sft"))
    else:
        losses, rewards = ulma.batch_losses(model, rows, args)
    labels = torch.tensor([row.label for row in rated], device=rewards.device)
    weights = weights_of(rewards, labels, args, own.loss).tolist()
    ratios = (rewards / args.beta - args.log_z).tolist()
    for row, weight, ratio in zip(rated, weights, ratios):
        seen.append((row, row.weight * weight, ratio))
    return losses, rewards[: len(rows)]


def running_log_z(seen):
    """Minus the mean log-ratio of all rows up to the batch before."""
    if not seen:
        return 0.0
    return -ulma.mean([ratio for _, _, ratio in seen])


def train(model, rows, args, own, out):
    """ulma.train, as this script's flags change it. Returns (row, weight, log-ratio) of every row.

    Pair-wise DPO takes the pairs among the rows.
    """
    rejected_of = {}
    if own.loss == "dpo":
        rejected_of = pairs_of(rows)
        rows = list(rejected_of)
    seen = []
    losses_of = functools.partial(study_losses, own=own, rejected_of=rejected_of, seen=seen)
    ulma.train(model, rows, args, out, losses_of)
    return seen


def means_by_class(seen, epochs, tokenizer):
    """{class of rows: for each epoch the mean weight and the mean log-ratio}."""
    classes = defaultdict(list)
    for row, weight, ratio in seen:
        response = tokenizer.decode(row.input_ids[row.response_mask][:-1])
        is_good = kind_of(row.prompt, response) in ("full", "brief")
        kind = "acceptable" if is_good else "not acceptable"
        classes[f"label {row.label:g}, {kind}, {row.group or 'all'}"].append((weight, ratio))
    means = {}
    for name, pairs in classes.items():
        parts = ulma.chunks(pairs, len(pairs) // epochs)
        means[name] = [list(map(ulma.mean, zip(*part))) for part in parts]
    return means


def prepare(rows, own, args):
    """ulma.prepare, and then --up and --down, which log Z does not depend on."""
    if args.log_z is None and not any(row.label for row in rows):
        # Without a label 1 log Z is what it is at the other shares.
        args.log_z = ulma.prior_log_z(1 / 6, args.beta, args.continuous)
    rows = ulma.prepare(rows, args)
    for row in rows:
        row.weight *= own.up if row.label == 1 else own.down
    return rows


def execute(run):
    """Train and measure, without evaluating before."""
    flags, seed, validation = run
    own, argv = read_flags(flags)
    out, folder = folder_of(*run), make_rows(own.rows, validation)
    shutil.rmtree(out, ignore_errors=True)
    paths = ["--data", str(folder), "--model", str(base_of(own.rows))]
    settings = ["--learning-rate", "3e-4", "--beta", "3", "--epochs", "5", "--seed", str(seed)]
    args = ulma.read_options([*paths, *settings, *argv])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, test_rows = ulma.load_rows(args, tokenizer)
    if own.fine_grained:
        rows = only_edits(rows)
    rows = prepare(rows, own, args)
    model = ulma.load_model(args.model, tokenizer).to(DEVICE)
    if own.sft:
        demonstrations = [row for row in rows if row.label == 1]
        first = replace(args, method="sft", epochs=own.sft, learning_rate=1e-3)
        ulma.train(model, demonstrations, first, out / "sft")
    ulma.set_reference(model, rows + test_rows, args)
    seen = train(model, rows, args, own, out)
    metrics, samples = ulma.evaluate(model, tokenizer, test_rows, args)
    metrics["classes"] = means_by_class(seen, args.epochs, tokenizer)
    lines = [{"prompt": prompt, "after": texts} for prompt, texts in samples.items()]
    ulma.write(out / "samples.jsonl", lines)
    ulma.write(out / "metrics.json", [metrics])


# ---- Many runs ----


def quietly(function, *given):
    """Call a function without its output, in a process of the pool."""
    torch.set_flush_denormal(True)  # as ulma.main does
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as told,
    ):
        try:
            return function(*given)
        except SystemExit:  # of argparse; it would end the process, and the pool would wait for it
            raise ValueError(told.getvalue()) from None


def in_processes(function, runs, title="runs", runs_a_process=None):
    """Call a function on every run, two at a time."""
    if runs:
        with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=runs_a_process) as pool:
            results = pool.imap(functools.partial(quietly, function), runs, chunksize=1)
            return list(tqdm(results, title, len(runs)))


def perform(runs, title):
    """Finish the runs, two at a time."""
    todo = [run for run in dict.fromkeys(runs) if not (folder_of(*run) / "metrics.json").exists()]
    for flags, _, validation in todo:
        own, _ = read_flags(flags)
        quietly(make_rows, own.rows, validation)
        if own.rows == "spread":
            quietly(make_spread_base)
        if own.z == "true":
            quietly(draws, own.rows)
    in_processes(execute, todo, title)


def measured(run):
    """What a finished run measured: shares of acceptable completions in %, then other figures."""
    results = json.loads((folder_of(*run) / "metrics.json").read_text())
    shares = {key.split("/")[-1]: 100 * results[key] for key in results if "match" in key}
    return shares | {"perplexity": results["perplexity"], "reward AUC": results["reward_auc"]}


def kinds(run):
    """Of a finished run, instead: the mean score, and the share of each kind, in %."""
    samples = make_data.read(folder_of(*run) / "samples.jsonl")
    found = [kind_of(row["prompt"], text) for row in samples for text in row["after"]]
    shares = {kind: 100 * found.count(kind) / len(found) for kind in [*make_data.SCORES, "other"]}
    score = sum(score * shares[kind] for kind, score in make_data.SCORES.items())
    return {"mean score": score} | shares


def error(values):
    """Standard error of the mean."""
    return torch.tensor(values).std().item() / len(values) ** 0.5


def shown(values, digits=1):
    """Mean ± standard error."""
    return f"{ulma.mean(values):.{digits}f} ± {error(values):.{digits}f}"


def print_table(title, header, rows):
    print(f"{title}\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def score(flags, cell, seeds):
    """Exact match on validation rows, in %."""
    runs = [(at(flags, cell), seed, True) for seed in range(seeds)]
    return ulma.mean([measured(run)["exact_match"] for run in runs])


def choose(rows, cells, seeds):
    """{row: the best of its cells}."""
    asked = [(at(rows[name], cell), name) for name in cells for cell in cells[name]]
    perform([(flags, seed, True) for flags, _ in asked for seed in range(seeds)], "sweep")
    return {
        name: max(some, key=lambda cell: score(rows[name], cell, seeds))
        for name, some in cells.items()
    }


def sweep(table, rows):
    """Choose a cell for each row on validation rows, and print the grids.

    One seed makes the grid; between cells within CHANCE of its best TIES seeds decide.
    """
    grids = {name: cells_of(table, flags) for name, flags in rows.items()}
    best, close = choose(rows, grids, 1), {}
    for name, flags in rows.items():
        least = score(flags, best[name], 1) - CHANCE
        close[name] = [cell for cell in grids[name] if score(flags, cell, 1) >= least]
    best |= choose(rows, {name: cells for name, cells in close.items() if len(cells) > 1}, TIES)
    for name, flags in rows.items():
        lines = defaultdict(dict)  # the last flag of a cell gives its column
        for cell in grids[name]:
            line, _, column = cell.rpartition("--")
            lines[line][column] = f"{score(flags, cell, 1):.1f}"
            if len(close[name]) > 1 and cell in close[name]:
                lines[line][column] += f" ({score(flags, cell, TIES):.1f})"
        columns = list(dict.fromkeys(column for line in lines.values() for column in line))
        table = [[line, *(lines[line].get(column, "") for column in columns)] for line in lines]
        print_table(f"\n{name}: `{at(flags, best[name])}`\n", ["flags", *columns], table)
    return {name: at(flags, best[name]) for name, flags in rows.items()}


def print_results(rows, measure, seeds):
    """What the seeds measured.

    Differences are in the first figure, seed by seed: from the first row, and from the row that
    this one varies, which has its name up to the last comma, or else from the last ULMA above.
    """
    perform([(flags, seed, False) for seed in range(seeds) for flags in rows.values()], "runs")
    found = {
        name: [measure((flags, seed, False)) for seed in range(seeds)]
        for name, flags in rows.items()
    }
    columns = list(max((runs[0] for runs in found.values()), key=len))  # share 0 has one group
    first, lines = next(iter(found)), []
    ulma_above = first
    for name, runs in found.items():
        line = [name]
        for key in columns:
            digits = 3 if key in ("perplexity", "reward AUC") else 1
            line.append(shown([run[key] for run in runs], digits) if key in runs[0] else "")
        if name.startswith("ULMA"):
            ulma_above = name
        varied = name.rpartition(", ")[0]
        for other in (first, varied if varied in found else ulma_above):
            pairs = zip(runs, found[other])
            line.append(shown([run[columns[0]] - base[columns[0]] for run, base in pairs]))
        lines.append([*line, f"`{rows[name]}`"])
    header = ["method", *columns, "less the first row", "less what it varies", "flags"]
    print_table("", header, lines)


def print_weights(rows):
    """By epoch: the mean weight of ∇ log π, and the mean log(π_θ/π_ref) in nats. Seed 0."""
    perform([(flags, 0, False) for flags in rows.values()], "runs")
    lines = []
    for name, flags in rows.items():
        found = json.loads((folder_of(flags, 0, False) / "metrics.json").read_text())
        for kind, epochs in sorted(found["classes"].items()):
            weights, ratios = zip(*epochs)
            columns = (f"{x:.2f}" for x in weights), (f"{x:+.1f}" for x in ratios)
            lines.append([name, kind, *map(" ".join, columns)])
    print_table("", ["method", "rows", "weight in each epoch", "log-ratio, nats"], lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=[*TABLES, *ELSEWHERE])
    for flag in ("--sweep", "--kinds", "--weights", "--picture"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    # of the pool's processes
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.table in ELSEWHERE:
        module = importlib.import_module(ELSEWHERE[options.table])
        return getattr(module, options.table.replace("-", "_"))()
    rows = TABLES[options.table]
    if options.sweep:
        rows = sweep(options.table, rows)
    if options.weights:
        print_weights(rows)
    else:
        print_results(rows, kinds if options.kinds else measured, options.seeds)
    if options.picture:
        importlib.import_module("figures").share(rows, options.seeds)


if __name__ == "__main__":
    main()
