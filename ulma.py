# SPDX-License-Identifier: MIT
"""ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference, in one file.

Cai et al., arXiv 2312.02554. To be read beside the paper, in its order: the losses, the log-probabilities they are made
of, the data, evaluation, training, the command line.

    python ulma.py --method ulma                                      # on data/, offline, in under a minute
    python ulma.py --method pointwise-dpo --output-dir runs/first     # another loss
    python ulma.py --eval-only --model runs/first                     # any model folder, a finished run's too
    python ulma.py --model Qwen/Qwen2.5-0.5B --data Anthropic/hh-rlhf --beta 0.1 --learning-rate 1e-6 --epochs 1
"""
import json
import math
import os
import random
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser,
                          get_cosine_schedule_with_warmup)
from transformers.hf_argparser import HfArg

# ---------------------------------------------------------------------------------------------------------------------
# The losses: pure functions of tensors, unreduced. logps is log π_θ(y|x), ref_logps log π_ref(y|x), in nats, labels z.
# All have one shape, usually (B,), an element for a response; spans or tokens do as well. They need torch alone.


def implicit_reward(logps, ref_logps, beta=0.1, log_z=0.0):
    """r_θ(x,y) = β (log π_θ(y|x) − log π_ref(y|x) + log Z(x)): the reward that π_θ is optimal for, in nats.

    log_z is log Z(x): a number, or a tensor that broadcasts, such as one value a row: (B,), or (B, 1) over tokens.
    """
    return beta * (logps - ref_logps + log_z)


def sft_loss(logps):
    """SFT: −log π_θ(y|x), for demonstrations."""
    return -logps


def pointwise_dpo_loss(logps, ref_logps, labels, beta=0.1, log_z=0.0, continuous=False):
    """Point-wise DPO. Binary: −z log σ(r_θ) − (1−z) log(1 − σ(r_θ)). Continuous: (z − r_θ)².

    labels may be bool, int or float; they are 0 or 1 for the binary loss, any real number for the continuous one.
    """
    reward, z = implicit_reward(logps, ref_logps, beta, log_z), labels.to(logps.dtype)
    if continuous:
        return (z - reward) ** 2
    return F.binary_cross_entropy_with_logits(reward, z, reduction="none")


def ulma_loss(logps, ref_logps, labels, beta=0.1, log_z=0.0, continuous=False):
    """ULMA: SFT where z = 1, point-wise DPO elsewhere.

    Where labels == 1 the loss does not depend on ref_logps: any finite number will do there.
    """
    preference = pointwise_dpo_loss(logps, ref_logps, labels, beta, log_z, continuous)
    return torch.where(labels == 1, sft_loss(logps), preference)


def prior_log_z(mean_label, beta=0.1, continuous=False):
    """A log Z(x) for when the true one is unknown: the one that makes r_θ predict the mean label where π_θ = π_ref.

    So β log Z = logit(mean label), and the mean label itself for the continuous loss: the intercept of a regression
    of z on the log-ratio, whose slope starts at zero. 0, the paper's setting, on balanced binary labels.
    """
    return (mean_label if continuous else math.log(mean_label / (1 - mean_label))) / beta


def unlikelihood_loss(logps, labels):
    """Unlikelihood, a baseline: −log π_θ(y|x) where z = 1, +log π_θ(y|x) elsewhere, which nothing bounds from below."""
    return torch.where(labels == 1, -logps, logps)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Pair-wise DPO, a baseline (Rafailov et al. 2023): −log σ(r_θ(x,y_w) − r_θ(x,y_l)), in which log Z(x) cancels."""
    chosen, rejected = (implicit_reward(chosen_logps, ref_chosen_logps, beta),
                        implicit_reward(rejected_logps, ref_rejected_logps, beta))
    return -F.logsigmoid(chosen - rejected)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def response_logps(model, input_ids, attention_mask, response_mask):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) over each row's response tokens: (B,), float32, nats.

    input_ids, attention_mask, response_mask are (B, T). response_mask is 1 on the response, its end-of-sequence token
    included; a row without a response gives 0, and the very first token of a row, which nothing predicts, is not
    counted. Padding may be on either side; attention_mask may be None where it is on the right. The model is any
    decoder-only model of transformers: its own forward runs, so logits are scaled or capped as it does.
    """
    if attention_mask is not None:  # padding goes to the right, where a causal model never looks
        order = attention_mask.int().argsort(dim=1, descending=True, stable=True)
        input_ids, response_mask = input_ids.gather(1, order), response_mask.gather(1, order)
    # The logits at t predict token t + 1. A mask left on the CPU saves waiting for the GPU here.
    at = F.pad(response_mask[:, 1:], (0, 1)).flatten().nonzero().squeeze(1).to(input_ids.device, non_blocking=True)
    head = getattr(model, "module", model).get_output_embeddings()
    # Most of the memory goes into logits: let the output head see only the N positions that count.
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[at].unsqueeze(0),))
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits.squeeze(0)  # (N, V)
    finally:
        hook.remove()
    token_logps = -F.cross_entropy(logits.float(), input_ids.flatten()[at + 1], reduction="none")
    return token_logps.new_zeros(input_ids.numel()).scatter(0, at, token_logps).view_as(input_ids).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Data

MAX_LOGITS = 2**29  # in one forward pass: 2 GiB in float32, of which training holds a few copies


def fail(message):
    """A user's mistake: one line that names it and the mend, exit code 2."""
    tqdm.write(f"ulma.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def mean(values):
    """Of numbers; None of none."""
    values = list(values)
    return sum(values) / len(values) if values else None


def pointwise_rows(row, where, continuous):
    """The point-wise rows of a row: itself, or the two of a pair (chosen 1, rejected 0); `where` names it in errors.

    A pair without `prompt` is two transcripts, as in HH-RLHF, where the prompt ends at the last "\n\nAssistant:".
    """
    pair = row.get("chosen") is not None and row.get("rejected") is not None
    if pair:
        rated = [(row["chosen"], 1), (row["rejected"], 0)]
    else:
        rated = [(row.get("completion"), row.get("score" if continuous and "score" in row else "label"))]
    references, rows = row.get("references") or [], []
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        fail(f"{where}: references is {references!r}; write a list of texts")
    for completion, label in rated:
        prompt = row.get("prompt")
        if pair and prompt is None:
            prompt, turn, completion = str(completion).rpartition("\n\nAssistant:")
            prompt += turn
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not isinstance(text, str) or not text and not (pair and name == "completion"):  # HH has empty turns
                fail(f"{where}: the {name} is {text!r}; write text that is not empty (columns here: {', '.join(row)})")
        if not isinstance(label, (bool, int, float)) or not 0 <= label <= 1 or not continuous and label not in (0, 1):
            fail(f"{where}: the label is {label!r}; write 1 (demonstration or thumbs-up) or 0 (thumbs-down)"
                 + (", or a score in between" if continuous else "; scores in between need --continuous"))
        rows.append({"prompt": prompt, "completion": completion, "label": label, "where": where,
                     "references": references, "demonstrated": row.get("demonstrated")})
    return rows


def load_rows(options):
    """(training rows, test rows) of --data; without a test split, a seeded tenth of the prompts is held out for it."""
    path = Path(options.data)
    source = {"path": "json", "data_files": options.data} if path.is_file() else {"path": options.data}
    cache = TemporaryDirectory(ignore_cleanup_errors=True)  # that of datasets misses edits to a folder with a README
    try:
        splits = load_dataset(**source, cache_dir=cache.name if path.exists() else None)
    except Exception as error:  # datasets raises many kinds, with the cause inside
        reason = str(error.__cause__ or error) or repr(error.__cause__)
        fail(f"--data {options.data} cannot be read: {' '.join(reason.split())[:300]}")
    if "train" not in splits:
        fail(f"--data {options.data} has the splits {list(splits)}; it needs `train`, and may have `test`")
    train_rows, test_rows = ([r for i, row in enumerate(splits.get(name, ()), 1) for r in
                              pointwise_rows(row, f"{options.data}, {name} row {i}", options.continuous)]
                             for name in ("train", "test"))
    if "test" not in splits:
        prompts = sorted({r["prompt"] for r in train_rows})
        held_out = set(random.Random(options.seed).sample(prompts, math.ceil(len(prompts) / 10)))
        test_rows = [r for r in train_rows if r["prompt"] in held_out]
        train_rows = [r for r in train_rows if r["prompt"] not in held_out]
    if not train_rows or not test_rows:
        fail(f"--data {options.data} leaves {len(train_rows)} rows to train on, {len(test_rows)} to test on; add some")
    return train_rows, test_rows


def make_examples(rows, method):
    """What a term of the loss reads: a row; in SFT a demonstration; in DPO a positive and a negative of one prompt."""
    if method != "dpo":
        return [(r,) for r in rows if method != "sft" or r["label"] == 1]
    prompts = {}
    for r in rows:
        prompts.setdefault(r["prompt"], {True: [], False: []})[r["label"] == 1].append(r)
    return [pair for rated in prompts.values() for pair in product(rated[True], rated[False])]


def tokenize(rows, tokenizer, max_length):
    """Adds input_ids, prompt_length and length to the rows. Prompt and completion apart: no token spans both."""
    prompts = tokenizer([r["prompt"] for r in rows]).input_ids
    completions = tokenizer([r["completion"] for r in rows], add_special_tokens=False).input_ids
    for row, prompt, completion in zip(rows, prompts, completions):
        if prompt[-1:] == [tokenizer.eos_token_id]:  # some tokenizers close every text
            prompt = prompt[:-1]
        if not prompt:
            fail(f"{row['where']}: the prompt {row['prompt']!r} has no tokens; write one that has some")
        completion = completion + [tokenizer.eos_token_id]
        # Too long: the end of the prompt and the start of the completion stay, each with at least half the room.
        prompt = prompt[-max(max_length - len(completion), max_length // 2):]
        row["input_ids"], row["prompt_length"] = (prompt + completion)[:max_length], len(prompt)
        row["length"] = len(row["input_ids"])


def chunks(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def bucketed_batches(examples, batch_size, rng):
    """Batches of examples of like length, little of them padding: shuffle, sort in windows of 50 batches, shuffle."""
    windows = chunks(rng.sample(examples, len(examples)), 50 * batch_size)
    batches = [batch for window in windows
               for batch in chunks(sorted(window, key=lambda e: max(r["length"] for r in e)), batch_size)]
    return rng.sample(batches, len(batches))


def split(batch, model):
    """The batch in parts of at most MAX_LOGITS logits each, or of one example: most often a single part."""
    longest = max(sum(r["length"] - r["prompt_length"] for r in example) for example in batch)
    return chunks(batch, max(1, MAX_LOGITS // (longest * model.get_output_embeddings().weight.shape[0])))


def batch_logps(model, rows, options):
    """log π_θ(y|x) of rows: (len(rows),), on the model's device; a mean over tokens with --length-normalize."""
    cuda = model.device.type == "cuda"
    input_ids = pad_sequence([torch.tensor(r["input_ids"]) for r in rows], batch_first=True)
    response_mask = pad_sequence([torch.arange(r["length"]) >= r["prompt_length"] for r in rows], batch_first=True)
    input_ids = (input_ids.pin_memory() if cuda else input_ids).to(model.device, non_blocking=True)
    with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():  # the weights stay float32
        logps = response_logps(model, input_ids, None, response_mask)
    return logps / response_mask.sum(1).to(logps.device) if options.length_normalize else logps


@torch.no_grad()
def score(model, rows, options, key, title):
    """Sets row[key], log π(y|x), of every row. Longest first: what does not fit in memory fails at once."""
    examples = sorted(((row,) for row in rows), key=lambda e: -e[0]["length"])
    parts = [part for batch in chunks(examples, 2 * options.batch_size) for part in split(batch, model)]
    model.eval()
    for part in tqdm(parts, desc=f"{title}: log-probs", unit="batch", disable=not parts):
        for (row,), logp in zip(part, batch_logps(model, [row for row, in part], options).tolist()):
            if not math.isfinite(logp):
                fail(f"{row['where']}: log π(y|x) is {logp}: the model is broken; was --learning-rate too high?")
            row[key] = logp


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

SAMPLES, SHOWN = 4, 4  # samples a test prompt with references; prompts to show, and to sample where none has references


@torch.no_grad()
def generate(model, tokenizer, rows, max_new_tokens, samples, options, title):
    """{prompt: `samples` completions drawn at temperature 1, or, with 0 samples, the greedy one}, of rows' prompts."""
    own, completions = model.generation_config, {}
    # Swapped, not passed: a model's own defaults (top-p, repetition penalty) would fill in what is left neutral here.
    model.generation_config = GenerationConfig(
        do_sample=samples > 0, num_return_sequences=max(samples, 1), max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **({"top_k": 0} if samples else {}))
    room = max(1, (getattr(model.config, "max_position_embeddings", None) or sys.maxsize) - max_new_tokens)
    model.eval()
    batches = chunks(sorted(rows, key=lambda r: -r["prompt_length"]), 8 * options.batch_size)
    for batch in tqdm(batches, desc=f"{title}: generation", unit="batch"):
        prompts = [r["input_ids"][:r["prompt_length"]][-room:] for r in batch]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        completions.update(zip((r["prompt"] for r in batch), chunks(texts, max(samples, 1))))
    model.generation_config = own
    return completions


def concordance(scores, labels):
    """P(score_i > score_j | label_i > label_j), ties ½: for labels 0 and 1 the ROC AUC. None without such a pair."""
    wins = pairs = 0
    for own, label in zip(scores, labels):
        lower = scores[labels < label]
        wins, pairs = wins + ((own > lower).sum() + (own == lower).sum() / 2).item(), pairs + len(lower)
    return wins / pairs if pairs else None


def exact_match(rows, completions):
    """Shares of the completions that are among the references: of all, of demonstrated and of undemonstrated types."""
    hits = [(r["demonstrated"], text.strip() in {reference.strip() for reference in r["references"]})
            for r in rows for text in completions[r["prompt"]]]
    return {"all": mean(hit for _, hit in hits), "demonstrated": mean(hit for group, hit in hits if group is True),
            "undemonstrated": mean(hit for group, hit in hits if group is False)}


def evaluate(model, tokenizer, rows, options, title):
    """(metrics, generations). The reference is what row["ref_logp"] says, else the model itself."""
    score(model, rows, options, "logp", title)
    for r in rows:
        r.setdefault("ref_logp", r["logp"])
    logps, ref_logps, labels, tokens = torch.tensor(
        [[r["logp"], r["ref_logp"], r["label"], r["length"] - r["prompt_length"]] for r in rows], dtype=torch.float64).T
    sums = logps * tokens if options.length_normalize else logps
    nll = -sums[labels == 1].sum() / tokens[labels == 1].sum()  # nats a token of the demonstrations
    metrics = {"perplexity": nll.exp().item() if 1 in labels else None,
               "reward_auc": concordance(implicit_reward(logps, ref_logps, options.beta), labels)}

    scored = list({r["prompt"]: r for r in rows if r["references"]}.values())
    shown = scored or list({r["prompt"]: r for r in rows}.values())[:SHOWN]
    lengths = [len(ids) for r in scored for ids in tokenizer(r["references"]).input_ids]
    torch.manual_seed(options.seed)
    texts = {how: generate(model, tokenizer, shown, max(lengths, default=62) + 2, samples, options, f"{title}, {how}")
             for how, samples in (("sampled", SAMPLES if scored else 1), ("greedy", 0))}
    if scored:
        metrics["exact_match"] = {how: exact_match(scored, texts[how]) for how in texts}
    return metrics, {r["prompt"]: {how: texts[how][r["prompt"]] for how in texts} for r in shown}


def flatten(metrics):
    """The pairs (name, value) of nested metrics."""
    for key, value in metrics.items():
        yield from ((f"{key}, {name}", v) for name, v in flatten(value)) if isinstance(value, dict) else [(key, value)]


def report(columns, generations):
    """Prints {column: metrics} as a table, and a few of the {column: {prompt: generations}}, side by side."""
    print(f"\n{'':38}" + "".join(f"{column:>8}" for column in columns))
    for lines in zip(*map(flatten, columns.values())):
        print(f"{lines[0][0]:38}" + "".join("     n/a" if value is None else f"{value:8.3f}" for _, value in lines))
    prompts = list(generations[list(columns)[0]])
    for prompt in prompts[::math.ceil(len(prompts) / SHOWN)]:
        print("\n" + " ".join(prompt.split())[-110:])
        for column, texts in generations.items():
            print(f"{column:>8}:  {texts[prompt]['sampled'][0].strip()}")


# ---------------------------------------------------------------------------------------------------------------------
# Training

LOG_EVERY = 10  # steps


def reads_reference(row, method):
    """Whether the row's loss depends on log π_ref: in ULMA not that of demonstrations."""
    return method in ("pointwise-dpo", "dpo") or method == "ulma" and row["label"] != 1


def method_loss(logps, ref_logps, labels, options):
    """The loss of --method, one value an example; for DPO the positives come first, then the negatives."""
    if options.method == "sft":
        return sft_loss(logps)
    if options.method == "unlikelihood":
        return unlikelihood_loss(logps, labels)
    if options.method == "dpo":
        return dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), options.beta)
    loss = ulma_loss if options.method == "ulma" else pointwise_dpo_loss
    return loss(logps, ref_logps, labels, options.beta, options.log_z, options.continuous)


def disable_dropout(model):
    """As in the authors' code, so that π_θ starts at π_ref, in train mode too."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)


def train(model, examples, options, log_file):
    """Minimises the mean of method_loss over the examples, in place. Returns (tokens seen, seconds)."""
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.0,
                                  fused=model.device.type == "cuda")
    steps = options.epochs * math.ceil(len(examples) / options.batch_size / options.gradient_accumulation)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    rng, tokens, recent, start = random.Random(options.seed), 0, defaultdict(list), time.perf_counter()
    progress = tqdm(total=steps, desc=f"train: {options.method}", unit="step")
    model.train(options.gradient_checkpointing)  # which works in train mode only
    for _ in range(options.epochs):
        for step in chunks(bucketed_batches(examples, options.batch_size, rng), options.gradient_accumulation):
            for batch in [part for batch in step for part in split(batch, model)]:
                rows = [row for column in zip(*batch) for row in column]  # of pairs first the positives
                columns = torch.tensor([[r["label"], r.get("ref_logp", 0.0)] for r in rows])  # 0: nothing reads it
                labels, ref_logps = columns.to(model.device, non_blocking=True).T
                logps = batch_logps(model, rows, options)
                losses = method_loss(logps, ref_logps, labels, options)
                (losses.sum() / sum(map(len, step))).backward()  # the mean over the step's examples
                rewards = implicit_reward(logps, ref_logps, options.beta, options.log_z)
                recent["where"] += [f"step {progress.n + 1}, {example[0]['where']}" for example in batch]
                recent["loss"].append(losses.detach())
                recent["row"] += rows
                recent["reward"].append(rewards.detach())
                tokens += sum(r["length"] for r in rows)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()
            if progress.n % LOG_EVERY == 0 or progress.n == steps:  # the only wait for the GPU
                losses, rewards = torch.cat(recent["loss"]).tolist(), torch.cat(recent["reward"]).tolist()
                faults = [where for where, loss in zip(recent["where"], losses) if not math.isfinite(loss)]
                if faults:
                    fail(f"the loss is not finite; try a lower --learning-rate. First at {'; '.join(faults[:8])}")
                known = [(row["label"] > 0.5, reward) for row, reward in zip(recent["row"], rewards)
                         if reads_reference(row, options.method)]  # of other rows no log π_ref was computed
                line = {"step": progress.n, "loss": mean(losses),
                        "reward_positive": mean(reward for positive, reward in known if positive),
                        "reward_negative": mean(reward for positive, reward in known if not positive),
                        "learning_rate": learning_rate, "tokens_per_second": tokens / (time.perf_counter() - start)}
                log_file.write(json.dumps(line) + "\n")
                progress.set_postfix({k: f"{v:.3g}" for k, v in line.items() if v is not None and k != "step"})
                recent.clear()
    progress.close()
    return tokens, time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Options:
    method: Literal["ulma", "pointwise-dpo", "sft", "unlikelihood", "dpo"] = HfArg(default="ulma", help="the loss")
    model: str = HfArg(default="data/base", help="π_ref, where training starts: a folder or a Hugging Face hub name")
    data: str = HfArg(default="data", help="a folder, a .jsonl or .jsonl.gz file, or a hub name")
    output_dir: str = HfArg(default="", help="for the model and its records; if not given, a new folder in runs/")
    beta: Optional[float] = HfArg(default=None, help="β, the strength of the KL regulariser; 3, with --continuous 0.1")
    log_z: str = HfArg(default="auto", help="log Z(x); auto: β log Z = logit(mean label), the mean if --continuous")
    continuous: bool = HfArg(default=False, help="squared-error losses on the column `score` (else `label`), 0 to 1")
    length_normalize: bool = HfArg(default=False, help="log π(y|x) as a mean over tokens, not the paper's sum")
    learning_rate: Optional[float] = HfArg(default=None, help="the peak; 3e-4, for sft and dpo 1e-3, unlikelihood 3e-5")
    epochs: int = HfArg(default=5, help="passes over the training rows")
    batch_size: int = HfArg(default=16, help="rows a forward pass")
    gradient_accumulation: int = HfArg(default=1, help="forward passes an optimiser step")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory for a third more compute")
    max_length: int = HfArg(default=512, help="tokens a row; prompts lose their start, completions their end")
    seed: int = HfArg(default=0, help="of the shuffling, the held-out prompts and the samples")
    eval_only: bool = HfArg(default=False, help="evaluate --model and stop")


def load_model(name, options, device):
    """(tokenizer, model), the weights in float32, from safetensors."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # transformers raises many kinds
        fail(f"--model {name} cannot be loaded: {' '.join(str(error).split())[:300]}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        fail(f"--model {name}: its tokenizer has no end-of-sequence token, which closes a response; set `eos_token`")
    if options.max_length > (getattr(model.config, "max_position_embeddings", None) or sys.maxsize):
        fail(f"--max-length {options.max_length} is over the {model.config.max_position_embeddings} that {name} takes")
    disable_dropout(model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return tokenizer, model.to(device)


def peak_memory(device):
    """Bytes: the most that CUDA's allocator gave since its reset; elsewhere the most this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource  # absent on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv=None):
    options = Options(**vars(HfArgumentParser(Options, description=__doc__.splitlines()[0]).parse_args(argv)))
    if options.beta is None:  # these defaults are the best of one sweep on data/: see the README
        options.beta = 0.1 if options.continuous else 3.0
    if options.learning_rate is None:
        options.learning_rate = {"sft": 1e-3, "dpo": 1e-3, "unlikelihood": 3e-5}.get(options.method, 3e-4)
    least = {"beta": 0, "learning_rate": 0, "epochs": 0, "batch_size": 0, "gradient_accumulation": 0, "max_length": 1}
    for name, bound in least.items():
        if not bound < getattr(options, name) < math.inf:
            fail(f"--{name.replace('_', '-')} is {getattr(options, name)}; write a number over {bound}")
    kind = "eval" if options.eval_only else options.method
    out = Path(options.output_dir or f"runs/{kind}-{time.strftime('%y%m%d-%H%M%S')}")
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        fail(f"--output-dir {out} is there already; name a new or an empty folder")

    train_rows, test_rows = load_rows(options)
    examples, mean_label = make_examples(train_rows, options.method), mean(r["label"] for r in train_rows)
    if not options.eval_only and (not examples or options.method not in ("sft", "dpo") and mean_label in (0, 1)):
        needs = {"sft": "rows of label 1", "dpo": "a positive and a negative of one prompt"}
        fail(f"--method {options.method} needs {needs.get(options.method, 'positives and negatives')}; "
             f"--data {options.data} has none")
    if options.log_z == "auto":
        options.log_z = prior_log_z(mean_label, options.beta, options.continuous) if 0 < mean_label < 1 else 0.0
    try:
        options.log_z = float(options.log_z)
    except ValueError:
        options.log_z = math.nan
    if not math.isfinite(options.log_z):
        fail("--log-z is neither auto nor a finite number")

    mps = torch.backends.mps.is_available()
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # same seed, same machine: the same weights
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check that costs time
    tokenizer, model = load_model(options.model, options, device)
    tokenize(train_rows + test_rows, tokenizer, options.max_length)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{options.method}: β {options.beta:g}, β log Z {options.beta * options.log_z:.3g}, on {device}\n"
          f"{options.model}: {model.num_parameters():,} parameters\n"
          f"{options.data}: {len(train_rows)} training rows, mean label {mean_label:.3f}; {len(test_rows)} test rows")

    results, generations = {"options": asdict(options)}, {}
    record = Path(options.model, "metrics.json")
    base = json.loads(record.read_text()).get("options", {}).get("model") if record.is_file() else None
    if options.eval_only and base:  # a finished run: its reference is the model it started from
        score(load_model(base, options, device)[1], test_rows, options, "ref_logp", "reference")
    first = "eval" if options.eval_only else "before"
    results[first], generations[first] = evaluate(model, tokenizer, test_rows, options, first)
    if not options.eval_only:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        read = {id(r): r for example in examples for r in example if reads_reference(r, options.method)}
        score(model, list(read.values()), options, "ref_logp", "reference")
        reference_seconds = time.perf_counter() - start
        with open(out / "log.jsonl", "w", buffering=1) as log_file:
            tokens, seconds = train(model, examples, options, log_file)
        samples = sum(map(len, examples)) * options.epochs
        results["train"] = {"samples": samples, "tokens": tokens, "seconds": seconds,
                            "reference_seconds": reference_seconds, "samples_per_second": samples / seconds,
                            "peak_memory_bytes": peak_memory(device)}
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        results["after"], generations["after"] = evaluate(model, tokenizer, test_rows, options, "after")
    (out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "samples.jsonl").write_text("".join(
        json.dumps({"prompt": prompt, **{column: texts[prompt] for column, texts in generations.items()}}) + "\n"
        for prompt in generations[first]))
    report({column: results[column] for column in generations}, generations)
    print(f"\nsaved to {out}")
    return results


if __name__ == "__main__":
    main()
