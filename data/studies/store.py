"""results.jsonl: the figures of every finished run.

A run is (flags, seed, validation): the flags of losses.py and of ulma.py; the seed of the training
records, of their order and of the samples; and whether it is measured on validation prompts.
"""

import json
from pathlib import Path

import ulma

RESULTS = Path(__file__).with_name("results.jsonl")


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


def store(run, figures):
    line = dict(zip(("flags", "seed", "validation"), run)) | {"figures": figures}
    ulma.write(RESULTS, [line], "a")


def drawn(name, seed):
    """The answers that the run with --draw NAME and this seed has drawn: a list for each prompt."""
    for (flags, run_seed, _), figures in stored().items():
        if read_flags(flags).get("draw") == name and run_seed == seed:
            return figures["answers"]
    raise ValueError(f"no run with --draw {name} and seed {seed} is stored")
