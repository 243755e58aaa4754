"""A run of a study trains, measures, and keeps its figures in results.jsonl. Two go at a time.

A run is (flags, seed, validation): the flags of losses.py and of ulma.py, the seed of the training
records, of their order and of the samples, and whether it is tested on validation prompts. What
stands in results.jsonl is not run again.
"""

import contextlib
import io
import json
import multiprocessing
import os
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from losses import Losses, only_edits, parse_flags
from records import DEVICE, base_of, kind_of, make_data, rows_of, samples_of, training_and_test
from tqdm import tqdm
from transformers import AutoTokenizer

import ulma

RESULTS = Path(__file__).with_name("results.jsonl")
RATED = 120  # training prompts on which acceptance is measured with --kinds


def read_flags(flags):
    """{name: value, or nothing}."""
    return dict(part.partition(" ")[::2] for part in flags.removeprefix("--").split(" --"))


def write_flags(values):
    return " ".join(f"--{name} {value}".strip() for name, value in values.items())


def named(run):
    """A run with its flags in the order of the alphabet, so that it has one name."""
    flags, seed, validation = run
    return write_flags(dict(sorted(read_flags(flags).items()))), seed, validation


def stored():
    """{run: its figures}."""
    if not RESULTS.exists():
        return {}
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {(line["flags"], line["seed"], line["validation"]): line["figures"] for line in lines}


def perform(runs, title):
    """Finish the runs that are not stored; returns {run: figures} of all that are."""
    done = stored()
    runs = [run for run in dict.fromkeys(map(named, runs)) if run not in done]
    for run in runs:
        base_of(parse_flags(run[0])[0].records)  # trained once, before the runs share it
    for run, figures in in_processes(execute, runs, title):
        line = dict(zip(("flags", "seed", "validation"), run)) | {"figures": figures}
        ulma.write(RESULTS, [line], "a")
        done[run] = figures
    return done


def in_processes(function, runs, title):
    """Yields (run, what the function returns), of every run; two at a time."""
    # of the pool's processes
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if runs:
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            results = pool.imap(Quietly(function), runs, chunksize=1)
            yield from zip(runs, tqdm(results, title, len(runs)))


class Quietly:
    """A function that is called without its output."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *given):
        torch.set_flush_denormal(True)  # as ulma.main does
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return self.function(*given)


def execute(run):
    """The figures of a run."""
    flags, seed, validation = run
    own, argv = parse_flags(flags)
    args = ulma.read_options(["--model", str(base_of(own.records)), "--seed", str(seed), *argv])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    records, asked = training_and_test(own.records, seed, validation)
    rows, test_rows = rows_of(records, args, tokenizer), rows_of(asked, args, tokenizer)
    if own.fine_grained:
        rows = only_edits(rows)
    model = ulma.load_model(args.model, tokenizer).to(DEVICE)
    if own.z == "true":
        for row, share in zip(rows, acceptance(model, tokenizer, records, args)):
            row.acceptance = share
    rows = prepare(rows, own, args)
    losses_of = Losses(own, rows)
    rows = list(losses_of.rejected_of) or rows
    with tempfile.TemporaryDirectory() as out:
        if own.sft:
            demonstrations = [row for row in rows if row.label == 1]
            first = replace(args, method="sft", epochs=own.sft, learning_rate=1e-3)
            ulma.train(model, demonstrations, first, Path(out))
        rejected = list(losses_of.rejected_of.values())
        ulma.set_reference(model, rows + rejected + test_rows, args)
        if not own.untrained:
            ulma.train(model, rows, args, Path(out), losses_of)
    return rounded(measure(model, tokenizer, records, asked, test_rows, own, args, losses_of.seen))


def prepare(rows, own, args):
    """ulma.prepare, and then --up and --down, which log Z does not depend on."""
    if args.log_z is None and not any(row.label for row in rows):
        # Without a label 1 log Z is what it is with 160 demonstrations beside 800 thumbs-down.
        args.log_z = ulma.prior_log_z(1 / 6, args.beta)
    rows = ulma.prepare(rows, args)
    for row in rows:
        row.weight *= own.up if row.label == 1 else own.down
    return rows


# ---- Figures ----


def measure(model, tokenizer, records, asked, test_rows, own, args, seen):
    """Shares are in %."""
    asked = list({record["prompt"]: record for record in asked}.values())
    shares = acceptance(model, tokenizer, asked, args)
    figures = {"all": 100 * ulma.mean(shares)}
    for group in ("demonstrated", "undemonstrated"):
        of_group = [share for share, record in zip(shares, asked) if record["group"] == group]
        figures[group] = 100 * ulma.mean(of_group) if of_group else None
    logps = ulma.all_logps(model, test_rows, args, "log π")
    labels = torch.tensor([row.label for row in test_rows])
    ref_logps = torch.tensor([row.ref_logp for row in test_rows])
    figures["perplexity"] = ulma.perplexity(logps, labels, test_rows, args)
    figures["reward AUC"] = ulma.concordance(logps - ref_logps, labels)
    if own.kinds:
        figures["kinds"] = kinds(model, tokenizer, asked, args)
        rated = rated_prompts(records, args.seed)
        figures["rated"] = 100 * ulma.mean(acceptance(model, tokenizer, rated, args))
    if seen:
        figures["classes"] = classes(seen, args.epochs, tokenizer)
    return figures


def rated_prompts(records, seed):
    """Training prompts of kinds without demonstrations.

    They have a thumbs-down, or would have one, if the records were those of --records data.
    """
    disliked = [record for record in records if record["label"] == 0]
    if not disliked:
        records, _ = training_and_test("data", seed, False)
        disliked = [record for record in records if record["label"] == 0]
    return [record for record in disliked if record["group"] == "undemonstrated"][:RATED]


def acceptance(model, tokenizer, records, args):
    """For each record the probability that a completion of its prompt is acceptable.

    The acceptable completions can be listed, so it is the sum of theirs; nothing is sampled.
    """
    answers = []
    for record in records:
        texts = make_data.acceptable(make_data.verb_of(record), make_data.noun_of(record))
        answers += [{"prompt": record["prompt"], "completion": f" {text}"} for text in texts]
    rows = rows_of([answer | {"label": 1} for answer in answers], args, tokenizer)
    args = replace(args, average=False, batch_size=96)
    shares = ulma.all_logps(model, rows, args, "acceptable").double().exp()
    return shares.view(len(records), -1).sum(1).tolist()


def kinds(model, tokenizer, asked, args):
    """{group: {kind of completion: its share of the samples, in %}}: one sample of a prompt."""
    args = replace(args, batch_size=120)
    drawn = samples_of(model, tokenizer, rows_of(asked, args, tokenizer), args, 1)
    found = defaultdict(list)
    for record, [sample] in zip(asked, drawn):
        found[record["group"]].append(kind_of(record["prompt"], sample.text))
    return {
        group: {kind: 100 * some.count(kind) / len(some) for kind in sorted(set(some))}
        for group, some in found.items()
    }


def classes(seen, epochs, tokenizer):
    """{class of rows: mean weights in the first and the last epoch, mean log-ratio in the last}."""
    found = defaultdict(list)
    for row, weight, ratio in seen:
        response = tokenizer.decode(row.input_ids[row.response_mask][:-1])
        is_good = kind_of(row.prompt, response) in ("full", "brief")
        kind = "acceptable" if is_good else "not acceptable"
        found[f"label {row.label:g}, {kind}, {row.group or 'all'}"].append((weight, ratio))
    means = {}
    for name, pairs in found.items():
        size = len(pairs) // epochs  # the rows of an epoch
        first_weights, _ = zip(*pairs[:size])
        last_weights, last_ratios = zip(*pairs[-size:])
        means[name] = [ulma.mean(some) for some in (first_weights, last_weights, last_ratios)]
    return means


def rounded(figures):
    """Figures with four decimals."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return figures if figures is None else round(figures, 4)
