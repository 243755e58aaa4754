"""The records of the studies: what they train on, and what they ask (--records KIND).

Kinds, and how they differ from the first one:

    data            those of data/train.jsonl for seed 0; for other seeds drawn in the same way
    share-PERCENT   this share of the kinds of request has demonstrations
    negatives-N     N thumbs-down
    mistakes-N      thumbs-down of N of the four sorts of mistakes; the seed draws which
    own-LABEL       the rated responses are the base model's own, and LABEL is that of a thumbs-up;
                    own-none leaves the thumbs-up out
    noisy-LABEL     the same, but a fifth of these ratings, drawn by the seed, is wrong
    demonstrations  no thumbs-down
    pairs           only prompts with a demonstration and a thumbs-down
    noise-SHARE     this share of the demonstrations is bad responses
    full-score      all demonstrations have score 1, brief ones, too
    edits           pairs: thumbs-down, and the acceptable response with the fewest edits
    spread          unselected responses, of which 5 to 95 % are acceptable, by kind of request
"""

import functools
import random
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_data

import ulma

RATED = 120  # at most as many prompts are looked at in rated
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPREAD_BASE = Path("runs/studies/spread-base")
MISTAKES = (("over-refusal", "complies"), ("rude",), ("wrong thing",), ("wrong request",))


def training_and_test(kind, seed, validation):
    """Records to train on, and prompts to test with their acceptable answers.

    For validation the training records are parted by combination of request and thing.
    """
    name, _, value = kind.partition("-")
    verbs = demonstrated(int(value)) if name == "share" else make_data.DEMONSTRATED
    if name == "spread":
        verbs = [verb for verb, share in spread_shares().items() if share > 0.5]
    train = training(name, value, seed, verbs)
    if validation:
        return make_data.validation(train, verbs)
    test = make_data.test_rows(random.Random(make_data.SEED + 1), make_data.split()[1], verbs)
    return train, test


def training(name, value, seed, verbs):
    """Records to train on; verbs are the kinds of request that have demonstrations."""
    rng = random.Random(make_data.SEED + 1000 * seed)
    if name == "spread":
        return spread(rng, verbs)
    if name == "negatives":
        return make_data.train_rows(rng, verbs, int(value))
    if name == "mistakes":
        return make_data.train_rows(rng, verbs, mistakes=sum(sorts_of(seed, int(value)), ()))
    train = make_data.train_rows(rng, verbs)
    if name in ("own", "noisy"):
        return with_own_responses(train, seed, value, 0.2 if name == "noisy" else 0.0)
    if name == "demonstrations":
        return [record for record in train if record["label"]]
    if name == "pairs":
        asked = {record["prompt"] for record in train if record["label"]}
        return [record for record in train if record["prompt"] in asked]
    if name == "noise":
        return make_data.noisy(rng, train, float(value))
    if name == "full":
        return [{**record, "score": 1.0} if record["label"] else record for record in train]
    if name == "edits":
        return make_data.edits(random.Random(make_data.SEED + 4 + 1000 * seed), train)
    return train


def acceptable(record):
    """The acceptable completions of a record's prompt."""
    texts = make_data.acceptable(make_data.verb_of(record), make_data.noun_of(record))
    return [f" {text}" for text in texts]


def rated(learnt, seed):
    """Training prompts of kinds without demonstrations.

    They have a thumbs-down, or would have one, if the records were those of --records data.
    """
    disliked = [record for record in learnt if record["label"] == 0]
    if not disliked:
        whole, _ = training_and_test("data", seed, False)
        disliked = [record for record in whole if record["label"] == 0]
    return [record for record in disliked if record["group"] == "undemonstrated"][:RATED]


def sorts_of(seed, count):
    """The sorts of mistakes that have thumbs-down; more of them include the fewer."""
    return random.Random(seed).sample(MISTAKES, len(MISTAKES))[:count]


def demonstrated(percent):
    """Kinds of request, this share of either sort; each share holds the smaller ones."""
    among = {0: (), 25: (0,), 50: (0, 2), 75: (0, 1, 2), 100: (0, 1, 2, 3)}[percent]
    return [verb for i, verb in enumerate(make_data.VERBS) if i % 4 in among]


def with_own_responses(train, seed, label, wrong):
    """The thumbs-down of train become one response of the base model to each of their prompts.

    They are rated by the rule, but for a share of wrong ratings.
    """
    demonstrations = [record for record in train if record["label"]]
    asked = [record for record in train if not record["label"]]
    rated, rng = [], random.Random(f"wrong {seed}")
    for record, response in zip(asked, own_responses(seed), strict=True):
        kind = kind_of(record["prompt"], response)
        is_liked = (kind in ("full", "brief")) != (rng.random() < wrong)
        if response and not (is_liked and label == "none"):
            rating = float(label) if is_liked else 0
            rated.append(record | {"completion": f" {response}", "kind": kind, "label": rating})
    mixed = demonstrations + rated
    random.Random(seed).shuffle(mixed)
    return mixed


@functools.cache
def own_responses(seed):
    """One response of the base model to the prompt of each thumbs-down of this seed."""
    train = make_data.train_rows(random.Random(make_data.SEED + 1000 * seed))
    asked = [record for record in train if not record["label"]]
    args = ulma.read_options(["--batch-size", "64", "--seed", str(seed)])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = ulma.load_model(args.model, tokenizer).to(DEVICE)
    samples = samples_of(model, tokenizer, rows_of(asked, args, tokenizer), args, 1)
    return [one.text for [one] in samples]


def samples_of(model, tokenizer, rows, args, count):
    """ulma.sample, with this many samples of each prompt."""
    usual = ulma.SAMPLES
    ulma.SAMPLES = count
    try:
        return ulma.sample(model, tokenizer, rows, args)
    finally:
        ulma.SAMPLES = usual


def rows_of(records, args, tokenizer):
    """The rows that ulma.py makes of records. A record without a label gets label 1."""
    rows = []
    for record in records:
        rows += ulma.read_record({"label": 1} | record, args, tokenizer)[0]
    return rows


@functools.cache
def kind_of(prompt, completion):
    """The kind of completion by the rule; "other" is what the grammar could not have drawn."""
    record = {"prompt": prompt}
    verb, noun = make_data.verb_of(record), make_data.noun_of(record)
    return make_data.kind_of(verb, noun, completion.strip())


# ---- Kinds of request that differ in how often the base model is right ----


def spread_shares():
    """{kind of request: share of acceptable responses}, from 5 to 95 %."""
    verbs = random.Random(0).sample(make_data.VERBS, len(make_data.VERBS))
    return {verb: 0.05 + 0.9 * i / (len(verbs) - 1) for i, verb in enumerate(verbs)}


def spread(rng, often):
    """960 rated responses."""
    train = make_data.mixture(rng, 960, spread_shares())
    for record in train:
        kind = kind_of(record["prompt"], record["completion"])
        record |= {"label": int(kind in ("full", "brief")), "score": make_data.SCORES[kind]}
        is_often = make_data.verb_of(record) in often
        record["group"] = "demonstrated" if is_often else "undemonstrated"
    return train


def base_of(kind):
    """The folder of the model to start from."""
    if kind != "spread":
        return make_data.HERE / "base"
    if not SPREAD_BASE.exists():
        rows = SPREAD_BASE.with_name("spread-rows")
        mixture = make_data.mixture(random.Random(1), 16000, spread_shares())
        make_data.write(rows / "train.jsonl", mixture)
        flags = f"--method sft --epochs 1 --batch-size 32 --learning-rate 1e-3 --data {rows}"
        part = SPREAD_BASE.with_name("spread-base.part")
        ulma.run(ulma.read_options([*flags.split(), "--output-dir", str(part)]))
        part.rename(SPREAD_BASE)
    return SPREAD_BASE
