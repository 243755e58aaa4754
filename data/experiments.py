"""Run what a table of README.md or of data/experiments.md needs, two runs at a time, and print the table in Markdown.

    python data/experiments.py TABLE              # mean ± standard error over --seed 0 to 4
    python data/experiments.py TABLE --sweep      # the same, with β and learning rate chosen on validation rows first
    python data/experiments.py TABLE --kinds      # instead, the kinds of completion, and their mean score
    python data/experiments.py TABLE --weights    # instead, the mean weight of ∇ log π in each epoch (seed 0)

Runs are kept in runs/experiments, named by their flags; what is finished is not run again. Flags beyond ulma.py's:

    --rows KIND       the rows: embedded, edits, pairs, fair or noise-SHARE (make_rows tells)
    --sft EPOCHS      first this many epochs of SFT; its result is where the method starts, and its reference
    --log-z running   β log Z is minus the mean of all rewards so far, as in BCO
    --log-z true      the prompt's own log Z, from 64 completions drawn from the reference (true_log_z tells)
    --trl LOSS        TRL's KTOTrainer with this loss_type, --weight W its desirable_weight (pip install trl==1.16.0)
"""
import argparse, functools, importlib.util, json, math, os, random, re, shutil, sys, tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import datasets, torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import make_data, ulma
from common import in_processes, print_table, shown

RUNS = Path("runs/experiments")
RATES, BETAS = ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3"], ["0.03", "0.1", "0.3", "1", "3", "10"]
DRAWS, CHANCE = 64, 1  # completions of a prompt, for its true log Z; points between cells that five seeds decide

def at(flags, rate, beta):
    """The flags with another learning rate and β."""
    return re.sub(r" --(learning-rate|beta) \S+", "", flags) + f" --learning-rate {rate}" + f" --beta {beta}" * bool(beta)

ULMA, POINTWISE, SFT = "--method ulma", "--method pointwise-dpo", "--method sft --learning-rate 1e-3"
BEST, GRADED = "--learning-rate 3e-4 --beta 3", "--continuous --learning-rate 3e-4 --beta 0.1"
GRADED_0, BCO = "--continuous --log-z 0 --learning-rate 3e-4 --beta 0.03", "--log-z running --learning-rate 1e-4 --beta 3"
METHODS = {  # β and learning rates are those that the sweep chose
    "ULMA": f"{ULMA} {BEST}", "point-wise DPO": f"{POINTWISE} {BEST}",
    "SFT": SFT, "pair-wise DPO": "--method dpo --learning-rate 1e-3 --beta 3",
    "ULMA, log Z = 0": f"{ULMA} {BEST} --log-z 0", "point-wise DPO, log Z = 0": f"{POINTWISE} {BEST} --log-z 0",
    "ULMA, continuous": f"{ULMA} {GRADED}", "point-wise DPO, continuous": f"{POINTWISE} {GRADED}",
    "ULMA, continuous, log Z = 0": f"{ULMA} {GRADED_0}", "point-wise DPO, continuous, log Z = 0": f"{POINTWISE} {GRADED_0}",
}
LOSSES = ["ULMA", "point-wise DPO", "ULMA, continuous", "point-wise DPO, continuous"]  # that have a log Z

TABLES = {
    "methods": METHODS,
    "steps": {
        "ULMA": METHODS["ULMA"], "SFT": SFT, "SFT in as many steps as ULMA": "--method sft --epochs 30 --learning-rate 3e-4",
        "SFT, then point-wise DPO": f"{POINTWISE} --sft 5 --learning-rate 1e-4 --beta 10",
        "the same in as many steps as ULMA": f"{POINTWISE} --sft 6 --epochs 4 --learning-rate 3e-5 --beta 10",
        "SFT, then pair-wise DPO": "--method dpo --sft 5 --learning-rate 1e-4 --beta 3",
        "this too in as many steps as ULMA": "--method dpo --sft 5 --epochs 25 --learning-rate 3e-5 --beta 10",
    },
    "rivals": {
        "ULMA": METHODS["ULMA"],
        "KTO": f"--trl kto {BEST}", "KTO, weight 5": f"--trl kto --weight 5 {BEST}",
        "APO-zero": f"--trl apo_zero_unpaired {BEST}", "APO-zero, weight 5": f"--trl apo_zero_unpaired --weight 5 {BEST}",
        "BCO": f"{POINTWISE} {BCO}", "BCO, balanced": f"{POINTWISE} --balanced {BCO}",
    },
    "log-z": {name: METHODS[name] for loss in LOSSES for name in (loss, f"{loss}, log Z = 0")} | {
        f"{name}, log Z {kind}": at(f"{METHODS[name]} --log-z {kind}", *cell.split("/")) for kind, cells in {
            "running": "1e-4/0.1 1e-4/3 3e-4/0.03 1e-3/0.03", "true": "3e-4/3 3e-4/3 3e-4/0.1 3e-4/0.3"}.items()
        for name, cell in zip(LOSSES, cells.split())},
    "reduction": {f"{name}, balanced{log_z}": f"{METHODS[name]} --balanced{log_z}" for name in LOSSES
                  for log_z in ("", " --log-z 0")[:1 + ("continuous" in name)]},  # binary: the prior is 0
    "setting": {name: f"{POINTWISE} --learning-rate 1e-4 --beta 0.1{flag}" for name, flag in {
        "log Z by the prior": "", "log Z = 0": " --log-z 0", "balanced": " --balanced"}.items()},
    "fair": {f"{name}{flag}": METHODS[name] + flag for name in LOSSES for flag in ("", " --balanced")} | {
        f"{name}, fair{flag}": f"{METHODS[name]} --rows fair{flag}" for name in LOSSES[2:] for flag in ("", " --balanced")
    } | {"ULMA, continuous, fair": at(f"{METHODS['ULMA, continuous']} --rows fair", "1e-3", "0.03")},
    "pairs": {"point-wise DPO, the rows of the pairs": f"{POINTWISE} --rows pairs --learning-rate 1e-3 --beta 3"},
    "edits": {name: f"--method {flags} --rows edits --learning-rate 1e-3" for name, flags in {
        "ULMA": "ulma --beta 0.1", "ULMA, fine-grained": "ulma --fine-grained --beta 0.3",
        "point-wise DPO": "pointwise-dpo --beta 0.3", "SFT": "sft",
        "point-wise DPO, fine-grained": "pointwise-dpo --fine-grained --beta 1"}.items()},
    "noise": {f"{name}, {share} wrong": f"{flags} --rows noise-{share}" for share in ("0.1", "0.2", "0.4")
              for name, flags in [("ULMA", f"{ULMA} --learning-rate 3e-4 --beta 1"), ("SFT", SFT),
                                  ("point-wise DPO", f"{POINTWISE} --learning-rate 3e-4 --beta 1")]},
}

def make_rows(kind, validation):
    """Make rows of a kind, or of their validation part, unless they are there. Return their folder."""
    folder = RUNS / "rows" / (kind + "-validation" * validation)
    part = folder.with_name(f"{folder.name}.part")
    if not folder.exists():
        make_data.main(["--validation" if validation else "--rows", str(part), "--noise", kind.partition("noise-")[2] or "0"])
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
    for name, default in {"rows": "embedded", "sft": "", "log-z": "", "trl": "", "weight": "1", "epochs": "5"}.items():
        parser.add_argument(f"--{name}", default=default)
    options, others = parser.parse_known_args(flags.split())
    if options.log_z:
        others += ["--log-z", "0" if options.log_z in ("running", "true") else options.log_z]
    return options, [*others, "--epochs", options.epochs]

def folder_of(flags, seed, validation):
    """The folder of a run, which is (flags, seed, validation): named by its flags, but for those that are as ever."""
    names = sorted(set(flags.removeprefix("--").split(" --")) - {"epochs 5", "rows embedded"})
    return RUNS / ("validation" if validation else "test") / f"{', '.join(names)}, seed {seed}"

def stage_one(flags, seed, validation):
    """The run that a run starts from, if any."""
    options, _ = read_flags(flags)
    return (f"{SFT} --epochs {options.sft} --rows {options.rows}", seed, validation) if options.sft else None

@functools.cache
def kind_of(prompt, completion):
    """The kind of completion by the rule."""
    row = {"prompt": prompt}
    return make_data.kind_of(make_data.verb_of(row), make_data.noun_of(row), completion.strip())

@functools.cache
def draws():
    """{prompt: the scores of completions drawn from the base model}, of every training prompt; garbled ones score 0."""
    path = RUNS / "draws.json"
    if not path.exists():
        args = ulma.read_options(["--data", "data", "--batch-size", "8"])
        tokenizer = ulma.AutoTokenizer.from_pretrained(args.model)
        rows = list({row.prompt: row for row in ulma.load_rows(args, tokenizer)[0]}.values())
        with patch("ulma.SAMPLES", DRAWS):
            drawn = ulma.sample(ulma.load_model(args.model, args, tokenizer), tokenizer, rows, args)
        path.write_text(json.dumps({row.prompt: [make_data.SCORES.get(kind_of(row.prompt, text), 0.0) for text in texts]
                                    for row, texts in zip(rows, drawn)}))
    return json.loads(path.read_text())

@functools.cache
def true_log_z(prompt, beta, continuous):
    """log Z(x) = log E exp(score / β); of labels, logit(share of acceptable draws) / β, half a draw added to either side."""
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
    argv += ["--data", str(make_rows(options.rows, validation)), "--seed", str(seed), "--output-dir", str(out)]
    if options.sft:
        argv += ["--model", str(folder_of(*stage_one(*run)))]
    with tempfile.TemporaryDirectory() as model:
        if options.trl:
            train_by_trl(options, argv, model)
            argv = [*argv[argv.index("--data"):], "--eval-only", "--model", model, "--reference", "data/base"]
            ulma.run(ulma.read_options(argv))
        else:
            weights = train(options, ulma.read_options(argv))
    (out / "weights.json").write_text(json.dumps(weights))

def train(options, args):
    """Run ulma.py with the log Z asked for. Returns the mean weight of ∇ log π in each epoch, by class of rows."""
    seen, logps, weights = [], [], defaultdict(list)
    batch_logps, batch_losses = ulma.batch_logps, ulma.batch_losses

    def keep_logps(*arguments):
        logps[:] = [batch_logps(*arguments)]
        return logps[0]

    def watch_losses(model, items, args):
        rows = ulma.rows_of(items)
        if options.log_z == "running":  # up to the batch before
            args = replace(args, log_z=-(ulma.mean(seen) or 0.0) / args.beta)
        elif options.log_z == "true":
            args = replace(args, log_z=torch.tensor([true_log_z(row.prompt, args.beta, args.continuous) for row in rows]))
        losses, rewards, labels = batch_losses(model, items, args)
        seen.extend((rewards - args.beta * args.log_z).tolist())
        for row, value in zip(rows, torch.autograd.grad(losses.sum(), logps, retain_graph=True)[0].tolist()):
            kind = "acceptable" if kind_of(row.prompt, row.completion) in ("full", "brief") else "not acceptable"
            weights[f"label {row.label:g}, {kind}, {row.group or 'all'}"].append(-value)
        return losses, rewards, labels

    with patch("ulma.batch_logps", keep_logps), patch("ulma.batch_losses", watch_losses):
        ulma.run(args)
    return {name: [ulma.mean(part) for part in ulma.chunks(values, len(values) // args.epochs)]
            for name, values in weights.items()}

def train_by_trl(options, argv, out):
    """KTOTrainer, with the rows and the schedule of ulma.py."""
    from trl import KTOConfig, KTOTrainer
    flags = dict(zip(argv[::2], argv[1::2]))
    rows = [{"prompt": row["prompt"], "completion": row["completion"], "label": bool(row["label"])}
            for row in make_data.read(Path(flags["--data"]) / "train.jsonl")]
    random.Random(int(flags["--seed"])).shuffle(rows)
    config = KTOConfig(
        out, loss_type=options.trl, beta=float(flags["--beta"]), desirable_weight=float(options.weight),
        learning_rate=float(flags["--learning-rate"]), num_train_epochs=int(options.epochs), seed=int(flags["--seed"]),
        per_device_train_batch_size=16, train_sampling_strategy="sequential", precompute_ref_log_probs=True, report_to=[],
        lr_scheduler_type="cosine", warmup_steps=0.1, bf16=False, gradient_checkpointing=False, save_strategy="no")
    trainer = KTOTrainer("data/base", args=config, train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(out)

def perform(runs, title):
    """Finish the runs, two at a time; those that others start from first."""
    if first := [stage_one(*run) for run in runs if stage_one(*run)]:
        perform(first, f"{title}: SFT")
    todo = [run for run in dict.fromkeys(runs) if not (folder_of(*run) / "weights.json").exists()]
    for options, validation in [(read_flags(flags)[0], validation) for flags, _, validation in todo]:
        if options.trl and not importlib.util.find_spec("trl"):
            sys.exit("KTO and APO-zero need TRL, best in an environment of its own: pip install trl==1.16.0")
        make_rows(options.rows, validation)
        if options.log_z == "true":
            draws()
    in_processes(execute, todo, title)

def measured(run):
    """What a finished run measured: the share of acceptable completions in %, then other figures."""
    results = json.loads((folder_of(*run) / "metrics.json").read_text())
    results = results.get("after") or results["eval"]
    shares = {key.split("/")[-1]: 100 * results[key] for key in results if "match" in key}
    return shares | {"perplexity": results["perplexity"], "reward AUC": results["reward_auc"]}

def sweep(rows):
    """Choose learning rate and β for each row, and print the grid: a step further at an edge, five seeds within CHANCE."""
    grids = {name: [(rate, beta) for rate in RATES[1:-1] for beta in (BETAS[1:-1] if "--beta" in flags else [None])]
             for name, flags in rows.items()}

    def score(name, cell, seeds=1):
        return ulma.mean([measured((at(rows[name], *cell), seed, True))["exact_match"] for seed in range(seeds)])

    def choose(grids, title, seeds=1):
        perform([(at(rows[name], *cell), seed, True) for name in grids for cell in grids[name] for seed in range(seeds)], title)
        return {name: max(grids[name], key=lambda cell: score(name, cell, seeds)) for name in grids}

    for name, cell in choose(grids, "grid").items():
        near = [[value, *{values[1]: values[:1], values[-2]: values[-1:]}.get(value, [])]
                for value, values in zip(cell, (RATES, BETAS))]
        grids[name] += [(rate, beta) for rate in near[0] for beta in near[1] if (rate, beta) != cell]
    best = choose(grids, "edges")
    ties = {name: near for name, grid in grids.items() if len(near := [
        cell for cell in grid if score(name, cell) > score(name, best[name]) - CHANCE]) > 1}
    best = {name: at(rows[name], *cell) for name, cell in (best | choose(ties, "ties", 5)).items()}
    for name, grid in grids.items():
        columns = [beta for beta in [None, *BETAS] if beta in dict(map(reversed, grid))]
        print_table(f"\n{name}: `{best[name]}`\n", ["learning rate", *(f"β {beta}" for beta in columns)], [
            [rate, *(f"{score(name, (rate, beta)):.1f}" if (rate, beta) in grid else "" for beta in columns)]
            for rate in RATES if any(rate == cell[0] for cell in grid)])
        print(*(f"\nFive seeds at {rate} and β {beta}: {score(name, (rate, beta), 5):.1f}" for rate, beta in ties.get(name, [])))
    return best

def print_results(rows, measure):
    """What five seeds measured, and the difference from the first row in the first figure, seed by seed."""
    perform([(flags, seed, False) for seed in range(5) for flags in rows.values()], "runs")
    found = [[measure((flags, seed, False)) for seed in range(5)] for flags in rows.values()]
    main = next(iter(found[0][0]))
    print_table("", ["method", *found[0][0], "less the first row", "flags"], [
        [name, *(shown([run[key] for run in runs], 3 if key in ("perplexity", "reward AUC") else 1) for key in runs[0]),
         shown([run[main] - first[main] for run, first in zip(runs, found[0])]), f"`{flags}`"]
        for (name, flags), runs in zip(rows.items(), found)])

def print_weights(rows):
    """The mean weight of ∇ log π in each epoch, positive where log π is pushed up."""
    perform([(flags, 0, False) for flags in rows.values()], "runs")
    print_table("", ["method", "rows", "weight in each epoch"], [
        [name, kind, " ".join(f"{weight:.2f}" for weight in weights)] for name, flags in rows.items()
        for kind, weights in sorted(json.loads((folder_of(flags, 0, False) / "weights.json").read_text()).items())])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "figure", "real-model", "real-ratings", "real-costs"])
    for flag in ("--sweep", "--kinds", "--weights"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # of the pool's processes
    if options.table not in TABLES:  # a module of its own
        return importlib.import_module(options.table.replace("-", "_")).main()
    rows = sweep(TABLES[options.table]) if options.sweep else TABLES[options.table]
    measure = (lambda run: make_data.kind_shares(folder_of(*run))) if options.kinds else measured
    print_weights(rows) if options.weights else print_results(rows, measure)

if __name__ == "__main__":
    main()
