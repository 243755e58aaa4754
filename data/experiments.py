"""Run what a table of README.md or of data/experiments.md needs, and print the table in Markdown.

    python data/experiments.py TABLE              # mean ± standard error over --seed 0 to 4
    python data/experiments.py TABLE --sweep      # first choose β and rate, on validation rows
    python data/experiments.py TABLE --kinds      # instead, kinds of completion, and their score
    python data/experiments.py TABLE --weights    # instead, the mean weight of ∇ log π (seed 0)

Two runs go at a time. They are kept in runs/experiments, named by their flags; what is finished is
not run again. Flags beyond ulma.py's:

    --rows KIND       the rows: embedded, edits, pairs, fair or noise-SHARE (make_rows tells)
    --sft EPOCHS      first this many epochs of SFT: where the method starts, and its reference
    --log-z running   β log Z is minus the mean of all rewards so far, as in BCO
    --log-z true      the prompt's own log Z, from 64 draws of the reference (true_log_z tells)
    --fine-grained    of rejected responses only what the edit removes counts (only_edits tells)
    --trl LOSS        TRL's KTOTrainer with this loss_type (pip install trl==1.16.0),
    --weight W        and with this desirable_weight
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from unittest.mock import patch

import datasets
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import make_data
from common import in_processes, print_table, shown

import ulma

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/experiments")
RATES = ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3"]
BETAS = ["0.03", "0.1", "0.3", "1", "3", "10"]
DRAWS = 64  # completions of a prompt, for its true log Z
CHANCE = 1  # points between cells that five seeds decide


def at(flags, rate, beta):
    """The flags with another learning rate and β."""
    others = re.sub(r" --(learning-rate|beta) \S+", "", flags)
    return f"{others} --learning-rate {rate}" + f" --beta {beta}" * bool(beta)


ULMA, POINTWISE = "--method ulma", "--method pointwise-dpo"
SFT = "--method sft --learning-rate 1e-3"
BEST = "--learning-rate 3e-4 --beta 3"
GRADED = "--continuous --learning-rate 3e-4 --beta 0.1"
GRADED_0 = "--continuous --log-z 0 --learning-rate 3e-4 --beta 0.03"
BCO = "--log-z running --learning-rate 1e-4 --beta 3"
METHODS = {  # β and learning rates are those that the sweep chose
    "ULMA": f"{ULMA} {BEST}",
    "point-wise DPO": f"{POINTWISE} {BEST}",
    "SFT": SFT,
    "pair-wise DPO": "--method dpo --learning-rate 1e-3 --beta 3",
    "ULMA, log Z = 0": f"{ULMA} {BEST} --log-z 0",
    "point-wise DPO, log Z = 0": f"{POINTWISE} {BEST} --log-z 0",
    "ULMA, continuous": f"{ULMA} {GRADED}",
    "point-wise DPO, continuous": f"{POINTWISE} {GRADED}",
    "ULMA, continuous, log Z = 0": f"{ULMA} {GRADED_0}",
    "point-wise DPO, continuous, log Z = 0": f"{POINTWISE} {GRADED_0}",
}
# Losses that have a log Z.
LOSSES = ["ULMA", "point-wise DPO", "ULMA, continuous", "point-wise DPO, continuous"]

TABLES = {
    "methods": METHODS,
    "steps": {
        "ULMA": METHODS["ULMA"],
        "SFT": SFT,
        "SFT in as many steps as ULMA": "--method sft --epochs 30 --learning-rate 3e-4",
        "SFT, then point-wise DPO": f"{POINTWISE} --sft 5 --learning-rate 1e-4 --beta 10",
        "the same in as many steps as ULMA": (
            f"{POINTWISE} --sft 6 --epochs 4 --learning-rate 3e-5 --beta 10"
        ),
        "SFT, then pair-wise DPO": "--method dpo --sft 5 --learning-rate 1e-4 --beta 3",
        "this too in as many steps as ULMA": (
            "--method dpo --sft 5 --epochs 25 --learning-rate 3e-5 --beta 10"
        ),
    },
    "rivals": {
        "ULMA": METHODS["ULMA"],
        "KTO": f"--trl kto {BEST}",
        "KTO, weight 5": f"--trl kto --weight 5 {BEST}",
        "APO-zero": f"--trl apo_zero_unpaired {BEST}",
        "APO-zero, weight 5": f"--trl apo_zero_unpaired --weight 5 {BEST}",
        "BCO": f"{POINTWISE} {BCO}",
        "BCO, balanced": f"{POINTWISE} --balanced {BCO}",
    },
    "log-z": {name: METHODS[name] for loss in LOSSES for name in (loss, f"{loss}, log Z = 0")}
    | {
        f"{name}, log Z {kind}": at(f"{METHODS[name]} --log-z {kind}", *cell.split("/"))
        for kind, cells in {
            "running": "1e-4/0.1 1e-4/3 3e-4/0.03 1e-3/0.03",
            "true": "3e-4/3 3e-4/3 3e-4/0.1 3e-4/0.3",
        }.items()
        for name, cell in zip(LOSSES, cells.split())
    },
    "reduction": {  # of binary labels the prior log Z is 0
        f"{name}, balanced{log_z}": f"{METHODS[name]} --balanced{log_z}"
        for name in LOSSES
        for log_z in ("", " --log-z 0")
        if "continuous" in name or not log_z
    },
    "setting": {
        name: f"{POINTWISE} --learning-rate 1e-4 --beta 0.1{flag}"
        for name, flag in {
            "log Z by the prior": "",
            "log Z = 0": " --log-z 0",
            "balanced": " --balanced",
        }.items()
    },
    "fair": {
        f"{name}{flag}": METHODS[name] + flag for name in LOSSES for flag in ("", " --balanced")
    }
    | {
        f"{name}, fair{flag}": f"{METHODS[name]} --rows fair{flag}"
        for name in LOSSES[2:]
        for flag in ("", " --balanced")
    }
    | {"ULMA, continuous, fair": at(f"{METHODS['ULMA, continuous']} --rows fair", "1e-3", "0.03")},
    "pairs": {
        "point-wise DPO, the rows of the pairs": (
            f"{POINTWISE} --rows pairs --learning-rate 1e-3 --beta 3"
        ),
    },
    "edits": {
        name: f"--method {flags} --rows edits --learning-rate 1e-3"
        for name, flags in {
            "ULMA": "ulma --beta 0.1",
            "ULMA, fine-grained": "ulma --fine-grained --beta 0.3",
            "point-wise DPO": "pointwise-dpo --beta 0.3",
            "SFT": "sft",
            "point-wise DPO, fine-grained": "pointwise-dpo --fine-grained --beta 1",
        }.items()
    },
    "noise": {
        f"{name}, {share} wrong": f"{flags} --rows noise-{share}"
        for share in ("0.1", "0.2", "0.4")
        for name, flags in [
            ("ULMA", f"{ULMA} --learning-rate 3e-4 --beta 1"),
            ("SFT", SFT),
            ("point-wise DPO", f"{POINTWISE} --learning-rate 3e-4 --beta 1"),
        ]
    },
}


def make_rows(kind, validation):
    """Make rows of a kind, or of their validation part, unless they are there. Their folder."""
    folder = RUNS / "rows" / (kind + "-validation" * validation)
    part = folder.with_name(f"{folder.name}.part")
    if not folder.exists():
        noise = kind.partition("noise-")[2] or "0"
        flag = "--validation" if validation else "--rows"
        make_data.main([flag, str(part), "--noise", noise])
        rows = make_data.read(part / "train.jsonl")
        demonstrated = {row["prompt"] for row in rows if row["label"]}
        if kind == "pairs":
            rows = [row for row in rows if row["prompt"] in demonstrated]
        if kind == "fair":  # brief demonstrations are demonstrations, too
            rows = [{**row, "score": 1.0} if row["label"] else row for row in rows]
        make_data.write(part / "train.jsonl", rows)
        part.rename(folder)  # now that they are whole
    return folder / "edits" if kind == "edits" else folder


def read_flags(flags):
    """Part the flags of this script from those of ulma.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fine-grained", action="store_true")
    defaults = {"rows": "embedded", "sft": "", "log-z": "", "trl": "", "weight": "1", "epochs": "5"}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    options, others = parser.parse_known_args(flags.split())
    if options.log_z:
        others += ["--log-z", "0" if options.log_z in ("running", "true") else options.log_z]
    return options, [*others, "--epochs", options.epochs]


def folder_of(flags, seed, validation):
    """The folder of a run, which is (flags, seed, validation)."""
    names = sorted(set(flags.removeprefix("--").split(" --")) - {"epochs 5", "rows embedded"})
    return RUNS / ("validation" if validation else "test") / f"{', '.join(names)}, seed {seed}"


def stage_one(flags, seed, validation):
    """The run that a run starts from, if any."""
    options, _ = read_flags(flags)
    if not options.sft:
        return None
    return f"{SFT} --epochs {options.sft} --rows {options.rows}", seed, validation


@functools.cache
def kind_of(prompt, completion):
    """The kind of completion by the rule."""
    row = {"prompt": prompt}
    return make_data.kind_of(make_data.verb_of(row), make_data.noun_of(row), completion.strip())


@functools.cache
def draws():
    """{prompt: the scores of completions drawn from the base model}, of every training prompt.

    Garbled ones score 0.
    """
    path = RUNS / "draws.json"
    if not path.exists():
        args = ulma.read_options(["--data", "data", "--batch-size", "8"])
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        items, _ = ulma.load_items(args, tokenizer)
        rows = list({row.prompt: row for row in ulma.rows_of(items)}.values())
        model = ulma.load_model(args.model, args, tokenizer)
        with patch("ulma.SAMPLES", DRAWS):
            drawn = ulma.sample(model, tokenizer, rows, args)
        scores = {}
        for row, texts in zip(rows, drawn):
            kinds = [kind_of(row.prompt, text) for text in texts]
            scores[row.prompt] = [make_data.SCORES.get(kind, 0.0) for kind in kinds]
        path.write_text(json.dumps(scores))
    return json.loads(path.read_text())


@functools.cache
def true_log_z(prompt, beta, continuous):
    """log Z(x) = log E exp(score / β); of labels, logit(share of acceptable draws) / β.

    For the share, half a draw is added to either side.
    """
    scores = torch.tensor(draws()[prompt])
    if continuous:
        return (torch.logsumexp(scores / beta, 0) - math.log(DRAWS)).item()
    return torch.logit(((scores >= 0.8).sum() + 0.5) / (DRAWS + 1)).item() / beta


def execute(run):
    """Train and evaluate, in a process of the pool."""
    flags, seed, validation = run
    options, argv = read_flags(flags)
    out, weights = folder_of(*run), {}
    shutil.rmtree(out, ignore_errors=True)
    argv += ["--data", str(make_rows(options.rows, validation))]
    argv += ["--seed", str(seed), "--output-dir", str(out)]
    if options.sft:
        argv += ["--model", str(folder_of(*stage_one(*run)))]
    with tempfile.TemporaryDirectory() as model:
        if options.trl:
            train_by_trl(options, argv, model)
            argv = argv[argv.index("--data") :]
            argv += ["--eval-only", "--model", model, "--reference", "data/base"]
            ulma.run(ulma.read_options(argv))
        else:
            weights = train(options, ulma.read_options(argv))
    (out / "weights.json").write_text(json.dumps(weights))


def class_of(row, tokenizer):
    """The class of a training row, in a table of weights."""
    response = tokenizer.decode(row.input_ids[row.response_mask][:-1])
    is_good = kind_of(row.prompt, response) in ("full", "brief")
    kind = "acceptable" if is_good else "not acceptable"
    return f"label {row.label:g}, {kind}, {row.group or 'all'}"


def only_edits(items):
    """--fine-grained (Xu et al., arXiv 2406.02756): a mask for rejected responses.

    Of each only the tokens count that an edit to the chosen one removes. Where that is none, the
    rejected response is left out.
    """
    kept = []
    for chosen, *rejected in items:
        after = chosen.input_ids[chosen.response_mask].tolist()
        for row in rejected:
            before = row.input_ids[row.response_mask].tolist()
            counts = row.response_mask[-len(before) :]  # a view: what is set in it, is set there
            matcher = SequenceMatcher(None, before, after, autojunk=False)
            for match in matcher.get_matching_blocks():
                counts[match.a : match.a + match.size] = False
        kept.append((chosen, *(row for row in rejected if row.response_mask.any())))
    return kept


def train(options, args):
    """Run ulma.py as asked for. Returns, by class of rows, the mean weights of ∇ log π by epoch."""
    seen, logps, classes, weights = [], [], {}, defaultdict(list)
    load_items, batch_logps = ulma.load_items, ulma.batch_logps

    def keep_classes(args, tokenizer):
        items, test_items = load_items(args, tokenizer)
        classes.update((row, class_of(row, tokenizer)) for row in ulma.rows_of(items))
        return only_edits(items) if options.fine_grained else items, test_items

    def keep_logps(*given, **named):
        logps[:] = [batch_logps(*given, **named)]
        return logps[0]

    def watch_losses(model, items, args):
        rows = ulma.rows_of(items)
        if options.log_z == "running":  # up to the batch before
            args = replace(args, log_z=-(ulma.mean(seen) or 0.0) / args.beta)
        elif options.log_z == "true":
            log_z = [true_log_z(row.prompt, args.beta, args.continuous) for row in rows]
            args = replace(args, log_z=torch.tensor(log_z))
        losses, rewards, labels = ulma.batch_losses(model, items, args)
        seen.extend((rewards - args.beta * args.log_z).tolist())
        [gradient] = torch.autograd.grad(losses.sum(), logps, retain_graph=True)
        for row, value in zip(rows, gradient.tolist()):
            weights[classes[row]].append(-value)
        return losses, rewards, labels

    watched = functools.partial(ulma.train, losses_of=watch_losses)
    with (
        patch("ulma.load_items", keep_classes),
        patch("ulma.batch_logps", keep_logps),
        patch("ulma.train", watched),
    ):
        ulma.run(args)
    means = {}
    for name, values in weights.items():
        size = len(values) // args.epochs
        epochs = [values[i : i + size] for i in range(0, len(values), size)]
        means[name] = [ulma.mean(part) for part in epochs]
    return means


def train_by_trl(options, argv, out):
    """KTOTrainer, with the rows and the schedule of ulma.py."""
    from trl import KTOConfig, KTOTrainer

    flags = dict(zip(argv[::2], argv[1::2]))
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"], "label": bool(row["label"])}
        for row in make_data.read(Path(flags["--data"]) / "train.jsonl")
    ]
    random.Random(int(flags["--seed"])).shuffle(rows)
    config = KTOConfig(
        out,
        loss_type=options.trl,
        beta=float(flags["--beta"]),
        desirable_weight=float(options.weight),
        learning_rate=float(flags["--learning-rate"]),
        num_train_epochs=int(options.epochs),
        seed=int(flags["--seed"]),
        per_device_train_batch_size=16,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=True,
        report_to=[],
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    trainer = KTOTrainer("data/base", args=config, train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(out)


def perform(runs, title):
    """Finish the runs, two at a time; those that others start from first."""
    if first := [stage_one(*run) for run in runs if stage_one(*run)]:
        perform(first, f"{title}: SFT")
    todo = [run for run in dict.fromkeys(runs) if not (folder_of(*run) / "weights.json").exists()]
    for flags, _, validation in todo:
        options, _ = read_flags(flags)
        if options.trl and not importlib.util.find_spec("trl"):
            sys.exit("KTO and APO-zero need TRL, best alone: pip install trl==1.16.0")
        make_rows(options.rows, validation)
        if options.log_z == "true":
            draws()
    in_processes(execute, todo, title)


def measured(run):
    """What a finished run measured: shares of acceptable completions in %, then other figures."""
    results = json.loads((folder_of(*run) / "metrics.json").read_text())
    results = results.get("after") or results["eval"]
    shares = {key.split("/")[-1]: 100 * results[key] for key in results if "match" in key}
    return shares | {"perplexity": results["perplexity"], "reward AUC": results["reward_auc"]}


def kinds(run):
    """Of a finished run, instead: the mean score, and the share of each kind, in %."""
    return make_data.kind_shares(folder_of(*run))


def sweep(rows):
    """Choose learning rate and β for each row, and print the grid.

    Where the best lies at an edge, a step further; within CHANCE of it five seeds decide.
    """
    grids = {}
    for name, flags in rows.items():
        betas = BETAS[1:-1] if "--beta" in flags else [None]
        grids[name] = [(rate, beta) for rate in RATES[1:-1] for beta in betas]

    def runs_of(name, cell, seeds):
        return [(at(rows[name], *cell), seed, True) for seed in range(seeds)]

    def score(name, cell, seeds=1):
        return ulma.mean([measured(run)["exact_match"] for run in runs_of(name, cell, seeds)])

    def choose(grids, title, seeds=1):
        cells = [(name, cell) for name, grid in grids.items() for cell in grid]
        perform([run for cell in cells for run in runs_of(*cell, seeds)], title)
        return {name: max(grids[name], key=lambda cell: score(name, cell, seeds)) for name in grids}

    for name, cell in choose(grids, "grid").items():
        near = []
        for value, values in zip(cell, (RATES, BETAS)):
            further = {values[1]: values[:1], values[-2]: values[-1:]}
            near.append([value, *further.get(value, [])])
        grids[name] += [(rate, beta) for rate in near[0] for beta in near[1]][1:]
    best = choose(grids, "edges")
    ties = {}
    for name, grid in grids.items():
        near = [cell for cell in grid if score(name, cell) > score(name, best[name]) - CHANCE]
        if len(near) > 1:
            ties[name] = near
    best = {name: at(rows[name], *cell) for name, cell in (best | choose(ties, "ties", 5)).items()}
    for name, grid in grids.items():
        rates, betas = zip(*grid)
        columns = [beta for beta in [None, *BETAS] if beta in betas]
        lines = []
        for rate in [rate for rate in RATES if rate in rates]:
            cells = [(rate, beta) for beta in columns]
            scores = [f"{score(name, cell):.1f}" if cell in grid else "" for cell in cells]
            lines.append([rate, *scores])
        header = ["learning rate", *(f"β {beta}" for beta in columns)]
        print_table(f"\n{name}: `{best[name]}`\n", header, lines)
        for rate, beta in ties.get(name, []):
            print(f"\nFive seeds at {rate} and β {beta}: {score(name, (rate, beta), 5):.1f}")
    return best


def print_results(rows, measure):
    """What five seeds measured.

    The difference from the first row is that in the first figure, seed by seed.
    """
    perform([(flags, seed, False) for seed in range(5) for flags in rows.values()], "runs")
    found = [[measure((flags, seed, False)) for seed in range(5)] for flags in rows.values()]
    main, lines = next(iter(found[0][0])), []
    for (name, flags), runs in zip(rows.items(), found):
        figures = []
        for key in runs[0]:
            digits = 3 if key in ("perplexity", "reward AUC") else 1
            figures.append(shown([run[key] for run in runs], digits))
        less = shown([run[main] - first[main] for run, first in zip(runs, found[0])])
        lines.append([name, *figures, less, f"`{flags}`"])
    print_table("", ["method", *found[0][0], "less the first row", "flags"], lines)


def print_weights(rows):
    """The mean weight of ∇ log π in each epoch, positive where log π is pushed up."""
    perform([(flags, 0, False) for flags in rows.values()], "runs")
    lines = []
    for name, flags in rows.items():
        found = json.loads((folder_of(flags, 0, False) / "weights.json").read_text())
        for kind, weights in sorted(found.items()):
            lines.append([name, kind, " ".join(f"{weight:.2f}" for weight in weights)])
    print_table("", ["method", "rows", "weight in each epoch"], lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modules = ["figure", "real-model", "real-ratings", "real-costs"]
    parser.add_argument("table", choices=[*TABLES, *modules])
    for flag in ("--sweep", "--kinds", "--weights"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    os.chdir(ROOT)
    # of the pool's processes
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.table in modules:
        return importlib.import_module(options.table.replace("-", "_")).main()
    rows = sweep(TABLES[options.table]) if options.sweep else TABLES[options.table]
    if options.weights:
        print_weights(rows)
    else:
        print_results(rows, kinds if options.kinds else measured)


if __name__ == "__main__":
    main()
