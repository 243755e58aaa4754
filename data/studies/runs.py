"""A run of a study trains, measures, and keeps its figures in results.jsonl. Two go at a time.

What stands in results.jsonl is not run again; store.py says what a run is.
"""

import contextlib
import io
import multiprocessing
import os
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import questions
import records
import torch
from losses import Losses, only_edits, parse_flags
from records import DEVICE, kind_of, rows_of, samples_of
from smollm2 import with_adapters
from store import named, store, stored
from tqdm import tqdm
from transformers import AutoTokenizer

import ulma


def source_of(kind):
    """The module with the records of this kind."""
    return questions if kind.startswith("questions-") else records


def perform(runs, title):
    """Finish the runs that are not stored; returns {run: figures} of all that are."""
    done = stored()
    runs = [run for run in dict.fromkeys(map(named, runs)) if run not in done]
    for run in runs:
        kind = parse_flags(run[0])[0].records
        source_of(kind).base_of(kind)  # made once, before the runs share it
    for run, figures in in_processes(execute, runs, title):
        store(run, figures)
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
    source = source_of(own.records)
    base = str(source.base_of(own.records))
    args = ulma.read_options(["--model", base, "--seed", str(seed), *argv])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = ulma.load_model(args.model, tokenizer).to(DEVICE)
    learnt, asked = source.training_and_test(own.records, seed, validation)
    seen = []
    if not args.eval_only:
        model, seen = align(model, tokenizer, learnt, validation, own, args)
    figures = measure(model, tokenizer, learnt, asked, own, args)
    if seen and source is records:
        figures["classes"] = classes(seen, args.epochs, tokenizer)
    return rounded(figures)


def align(model, tokenizer, learnt, validation, own, args):
    """The trained model, and what its losses have seen; see losses.py."""
    source, rows = source_of(own.records), rows_of(learnt, args, tokenizer)
    if own.fine_grained:
        rows = only_edits(rows)
    if own.z == "true":
        for row, share in zip(rows, acceptance(model, tokenizer, learnt, args, source)):
            row.acceptance = share
    if own.sft:
        kind = "demonstrations" if source is records else "questions-demonstrations"
        shown, _ = source.training_and_test(kind, args.seed, validation)
        first = replace(args, method="sft", epochs=own.sft, log_z=0.0, learning_rate=1e-3)
        model = train(model, rows_of(shown, args, tokenizer), first, own)
    rows = prepare(rows, own, args)
    losses_of = Losses(own, rows)
    rows = list(losses_of.rejected_of) or rows
    ulma.set_reference(model, rows + list(losses_of.rejected_of.values()), args)
    return train(model, rows, args, own, losses_of), losses_of.seen


def train(model, rows, args, own, losses_of=ulma.batch_losses):
    """The trained model. With --lora adapters are trained, and merged into it."""
    if own.lora:
        model = with_adapters(model, args)
    with tempfile.TemporaryDirectory() as out:
        ulma.train(model, rows, args, Path(out), losses_of)
    return model.merge_and_unload() if own.lora else model


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


def measure(model, tokenizer, learnt, asked, own, args):
    """Shares are in %."""
    source, figures = source_of(own.records), {}
    once = list({str(record["prompt"]): record for record in asked}.values())
    shares = acceptance(model, tokenizer, once, args, source)
    figures["all"] = 100 * ulma.mean(shares)
    for group in ("demonstrated", "undemonstrated"):
        of_group = [share for share, record in zip(shares, once) if record["group"] == group]
        figures[group] = 100 * ulma.mean(of_group) if of_group else None
    if source is questions:
        found = defaultdict(list)
        for share, record in zip(shares, once):
            found[record["family"]].append(100 * share)
        figures["families"] = {family: ulma.mean(some) for family, some in found.items()}
    if source is records:
        rows = rows_of(asked, args, tokenizer)
        logps, labels = ulma.all_logps(model, rows, args, "log π"), [row.label for row in rows]
        figures["perplexity"] = ulma.perplexity(logps, torch.tensor(labels), rows, args)
    if own.samples:
        figures |= source.measure_samples(model, tokenizer, once, args)
    if own.draw:
        figures["answers"] = source.draw(model, tokenizer, args)
    if own.kinds:
        figures["kinds"] = kinds(model, tokenizer, once, args)
    if own.kinds or own.rated:
        rated = source.rated(learnt, args.seed)
        figures["rated"] = 100 * ulma.mean(acceptance(model, tokenizer, rated, args, source))
    return figures


def acceptance(model, tokenizer, asked, args, source):
    """For each record the probability that a completion of its prompt is acceptable.

    The acceptable completions can be listed, so it is the sum of theirs; nothing is sampled.
    """
    answers = []
    for record in asked:
        for text in source.acceptable(record):
            answers.append({"prompt": record["prompt"], "completion": text})
    rows = rows_of(answers, args, tokenizer)
    args = replace(args, average=False, batch_size=96)
    shares = ulma.all_logps(model, rows, args, "acceptable").double().exp()
    return shares.view(len(asked), -1).sum(1).tolist()


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
    return round(figures, 4) if isinstance(figures, float) else figures
