# SPDX-License-Identifier: MIT
"""ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference, in one file.

Cai et al., arXiv 2312.02554. To be read beside the paper, in its order: the losses, the log-probabilities they are made
of, the data, evaluation, training, the command line.

    python ulma.py --method ulma                                      # on data/, offline, in under a minute
    python ulma.py --method pointwise-dpo --output-dir runs/first     # another loss
    python ulma.py --eval-only --model runs/first                     # any model folder, a finished run's too
    python ulma.py --resume runs/first                                # an interrupted run goes on
    python ulma.py --model Qwen/Qwen2.5-0.5B --data Anthropic/hh-rlhf --data-dir harmless-base --beta 0.1 --epochs 1
    torchrun --nproc-per-node 8 ulma.py --model ...                   # the same on eight GPUs
"""
import gzip
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import zlib
from collections import defaultdict
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice, product
from pathlib import Path
from typing import Literal, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import load_dataset, load_dataset_builder
from huggingface_hub import HfApi, constants
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser,
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
# Small tools, among them those for several processes, which torchrun starts

RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def fail(message):
    """A user's mistake: one line that names it and the mend, exit code 2."""
    if RANK:
        time.sleep(30)  # most often the first process says the same, and its end ends this one
    tqdm.write(f"ulma.py: error: {message}", file=sys.__stderr__ if RANK else sys.stderr)
    sys.exit(2)


def check(right, message):
    if not right:
        fail(message)


def short(error):
    """What the innermost exception says, on one line."""
    return " ".join(f"{error.__cause__ or error}".split())[:300] or type(error.__cause__ or error).__name__


def mean(values):
    """Of numbers; None of none."""
    values = list(values)
    return sum(values) / len(values) if values else None


def chunks(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def share(items):
    """What falls to this process, perhaps nothing: the shares of all processes, in order, are the items."""
    size = math.ceil(len(items) / PROCESSES)
    return items[RANK * size:(RANK + 1) * size]


def gather(items):
    """The lists of all processes, in order, as one list in each of them; waits for all."""
    lists = [items] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(lists, items)
    return sum(lists, [])


# ---------------------------------------------------------------------------------------------------------------------
# Data

MAX_LOGITS = 2**29  # in one forward pass: 2 GiB in float32, of which training holds a few copies


def render(prompt, completion, tokenizer):
    """Messages, lists of {"role", "content"}, as the texts (prompt, completion) of the tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise ValueError("it has none")
    for message in prompt + completion:
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise TypeError(f"{message} is not two texts")
    if [*completion, {}][0].get("role") != "assistant":
        raise ValueError("the completion is not the assistant's")
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    start = os.path.commonprefix([start, whole])
    text, eos, rest = whole[len(start):].rpartition(tokenizer.eos_token)
    return start, text + eos + (rest if rest.strip() else "")  # some templates break the line at the end


def is_text(value):
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()  # no half of a surrogate pair


def pointwise_rows(row, where, options, tokenizer):
    """The point-wise rows of a row: itself, or the two of a pair (chosen 1, rejected 0); `where` names it in errors.

    A pair without `prompt` is two transcripts, as in HH-RLHF, whose prompt ends at the last "\n\nAssistant:", or two
    lists of messages, whose prompt ends before the last one.
    """
    pair = row.get("chosen") is not None and row.get("rejected") is not None
    label = row.get("score" if options.continuous and "score" in row else "label")
    rated = ([(row["chosen"], 1), (row["rejected"], 0)] if pair else
             [(row.get("completion", row.get("response")), label)])
    references, rows = row.get("references") or [], []
    check(isinstance(references, list) and all(map(is_text, references)),
          f"{where}: references is {references!r}; write a list of texts")
    for completion, label in rated:
        prompt, chat = row.get("prompt"), isinstance(completion, list)
        if chat:
            try:
                prompt, turns = (completion[:-1], completion[-1:]) if prompt is None else (prompt, completion)
                prompt, completion = render(prompt, turns, tokenizer)
            except Exception as error:  # templates raise what they like
                fail(f"{where}: prompt and completion are to be messages, lists of role and content, that the chat "
                     f"template of {options.model} takes: {short(error)}")
        elif pair and prompt is None:
            prompt, turn, completion = str(completion).rpartition("\n\nAssistant:")
            check(turn, f"{where}: {completion[:40]!r} has no \"\\n\\nAssistant:\"; write it, or a column prompt")
            prompt += turn
        for name, text in (("prompt", prompt), ("completion", completion)):
            check(is_text(text) and (text or pair and name == "completion"),  # silence may win or lose
                  f"{where}: the {name} is {text!r}; write Unicode text that is not empty")
        check(isinstance(label, (bool, int, float)) and 0 <= label <= 1 and (options.continuous or label in (0, 1)),
              f"{where}: the label is {label!r}; write 1 (demonstration or thumbs-up) or 0 (thumbs-down), "
              "or with --continuous a score in between")
        rows.append({"prompt": prompt, "completion": completion, "label": label, "where": where, "chat": chat,
                     "references": references, "demonstrated": row.get("demonstrated")})
    return rows


def json_lines(file):
    """(where, row) for each line of a .jsonl or .jsonl.gz file. What datasets has for it names no line."""
    number, row = 1, None
    try:
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line.strip().decode("utf-8-sig"))
                    check(isinstance(row, dict), f"{file}, line {number}: write one JSON object a line, {{...}}")
                    yield f"{file}, line {number}", row
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        fail(f"{file}, line {number}: {str(error).split(': line')[0]}; write one JSON object a line, in UTF-8")
    check(row, f"{file} holds no rows; write some, or delete it")


def load_rows(options, tokenizer):
    """(training rows, test rows) of --data; without a test split, a seeded tenth of the prompts is held out for it."""
    source = {"path": options.data, "name": options.data_config, "data_dir": options.data_dir}
    try:
        if os.path.exists(options.data):  # the files of each split
            is_file = os.path.isfile(options.data)
            found = {"train": [options.data]} if is_file else load_dataset_builder(**source).config.data_files
            splits = {name: [line for file in found[name] for line in json_lines(file)]
                      for name in ("train", "test") if name in found}
        else:  # from the hub, the rows of each split
            found = load_dataset(**source)
            splits = {name: [(f"{options.data}, {name} row {number}", row) for number, row in enumerate(found[name], 1)]
                      for name in ("train", "test") if name in found}
    except Exception as error:  # datasets raises many kinds, with the cause inside
        fail(f"--data {options.data} cannot be read: {short(error)}")
    check("train" in splits or options.eval_only and splits,
          f"--data {options.data} has the splits {', '.join(map(str, found))}; it needs `train`, and may have `test`")
    rows = {"train": [], "test": []}
    for name, lines in splits.items():
        columns = {column for _, row in lines for column in row}
        check(columns >= {"chosen", "rejected"} or columns >= {"prompt"} and columns & {"completion", "response"}
              and columns & {"label", *["score"] * options.continuous},
              f"--data {options.data}, {name}: the columns are {', '.join(sorted(columns))}; needed are prompt, "
              "completion and label (or score, with --continuous), or chosen and rejected")
        rows[name] = [r for where, row in lines for r in pointwise_rows(row, where, options, tokenizer)]
    if "test" not in splits:
        prompts = sorted({r["prompt"] for r in rows["train"]})
        held_out = set(random.Random(options.seed).sample(prompts, math.ceil(len(prompts) / 10)))
        rows = {name: [r for r in rows["train"] if (r["prompt"] in held_out) == (name == "test")] for name in rows}
    sizes = {name: len(rows[name]) for name in rows}
    check(sizes["test"] and (sizes["train"] or options.eval_only), f"--data {options.data}: too few rows, {sizes}")
    return rows["train"], rows["test"]


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
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = not rows[0]["chat"]  # a chat template writes them itself; rows are conversations all or none
    prompts = tokenizer([r["prompt"] for r in rows], add_special_tokens=special).input_ids
    completions = tokenizer([r["completion"] for r in rows], add_special_tokens=False).input_ids
    if tokenizer.tokenize("a")[0].startswith("▁"):  # as Llama 2's, puts a space before a text; not behind a line break
        guard, *guarded = tokenizer(["\n", *("\n" + r["completion"] for r in rows)], add_special_tokens=False).input_ids
        completions = [g[len(guard):] if g[:len(guard)] == guard else c for g, c in zip(guarded, completions)]
    for row, prompt, completion in zip(rows, prompts, completions):
        if special and prompt[-1:] == [eos]:  # some tokenizers close every text
            prompt = prompt[:-1]
        if prompt[:2] == [bos, bos]:  # the row brings its own
            prompt = prompt[1:]
        check(prompt, f"{row['where']}: the prompt {row['prompt']!r} has no tokens; write one that has some")
        if completion[-1:] != [eos]:
            completion = completion + [eos]
        # Too long: the end of the prompt and the start of the completion stay, each with at least half the room.
        room = max(max_length - len(completion), max_length // 2)
        start = prompt[:1] if prompt[0] == bos and room > 1 else []  # what opens every text stays as well
        prompt = start + prompt[len(start):][len(start) - room:]
        row["input_ids"], row["prompt_length"] = (prompt + completion)[:max_length], len(prompt)
        row["length"] = len(row["input_ids"])


def bucketed_batches(examples, batch_size, rng):
    """Batches of examples of like length, little of them padding: shuffle, sort in windows of 50 batches, shuffle."""
    windows = chunks(rng.sample(examples, len(examples)), 50 * batch_size)
    batches = [batch for window in windows
               for batch in chunks(sorted(window, key=lambda e: max(r["length"] for r in e)), batch_size)]
    return rng.sample(batches, len(batches))


def split(batch, model):
    """The batch in parts of at most MAX_LOGITS logits a process, or of one example: most often a single part."""
    longest = max(sum(r["length"] - r["prompt_length"] for r in example) for example in batch)
    size = max(1, MAX_LOGITS // (longest * model.get_output_embeddings().weight.shape[0]))
    return chunks(batch, size * PROCESSES)


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
    parts = [part for batch in chunks(examples, 2 * options.batch_size * PROCESSES) for part in split(batch, model)]
    model.eval()
    for part in tqdm(parts, desc=f"{title}: log-probs", unit="batch", disable=not parts):
        mine = share(part)
        logps = batch_logps(model, [row for row, in mine or part[:1]], options).tolist()  # no process may stay away
        for (row,), logp in zip(part, gather(logps if mine else [])):
            check(math.isfinite(logp),
                  f"{row['where']}: log π(y|x) is {logp}: the model is broken; was --learning-rate too high?")
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
    batches = chunks(sorted(rows, key=lambda r: -r["prompt_length"]), 8 * options.batch_size * PROCESSES)
    for batch in tqdm(batches, desc=f"{title}: generation", unit="batch"):
        mine = share(batch)
        prompts = [r["input_ids"][:r["prompt_length"]][-room:] for r in mine or batch[:1]]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**inputs, synced_gpus=PROCESSES > 1)[:, inputs["input_ids"].shape[1]:]
        texts = gather(tokenizer.batch_decode(output, skip_special_tokens=True) if mine else [])
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
    metrics = {"perplexity": nll.exp().item() if nll.exp().isfinite() else None,
               "reward_auc": concordance(implicit_reward(logps, ref_logps, options.beta), labels)}

    scored = list({r["prompt"]: r for r in rows if r["references"]}.values())
    shown = scored or list({r["prompt"]: r for r in rows}.values())[:SHOWN]
    lengths = [len(ids) for r in scored for ids in tokenizer(r["references"]).input_ids]
    torch.manual_seed(options.seed + RANK)
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
        print(f"{lines[0][0]:38}" + "".join("     n/a" if value is None else f" {value:7.3f}" for _, value in lines))
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


def save_model(model, tokenizer, out):
    """Writes the model, whole again where it is sharded, and its tokenizer, for from_pretrained."""
    weights = None
    if PROCESSES > 1:
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        for name in weights.keys() - {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}:
            del weights[name]  # a tied weight's second name
    model.save_pretrained(out, state_dict=weights, is_main_process=RANK == 0)
    if RANK == 0:
        tokenizer.save_pretrained(out)
    gather([])  # the others wait


def checkpoints(out):
    """The folders out/checkpoint-STEP, in order."""
    folders = [folder for folder in out.glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))


def save_checkpoint(out, state):
    """Writes out/checkpoint-STEP, a file a process. A rename makes it whole; only then those before are deleted."""
    partial, before = out / "partial-checkpoint", checkpoints(out)
    partial.mkdir(exist_ok=True)
    with open(partial / f"{RANK}.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    gather([])
    if RANK == 0:  # all files are there
        partial.rename(out / f"checkpoint-{state['step']}")
        for folder in before:
            shutil.rmtree(folder)


def load_checkpoint(out, rows):
    """The state in the last checkpoint of the run in out; an empty one if there is none."""
    if RANK == 0:
        shutil.rmtree(out / "partial-checkpoint", ignore_errors=True)
    *_, folder = None, *checkpoints(out)
    if not folder:
        return {}
    processes = len(list(folder.iterdir()))
    check(processes == PROCESSES, f"{folder} is of {processes} processes, not {PROCESSES}; start as many")
    try:
        state = torch.load(folder / f"{RANK}.pt", weights_only=True)
    except Exception:  # a damaged file raises many kinds, some of which advise to trust it
        fail(f"{folder} cannot be read: damaged, or of another kind of machine; delete it to start from the beginning")
    check(state.get("rows") == rows, f"{folder} is of other rows than --data has now; put those back, or start anew")
    return state


def train(model, examples, options, out, state):
    """Minimises the mean of method_loss over the examples, in place, from state["step"] on; updates the state.

    Ctrl-C makes it end the step, write a checkpoint and raise KeyboardInterrupt.
    """
    cuda = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.0, fused=cuda)
    global_batch = options.batch_size * PROCESSES
    steps = options.epochs * math.ceil(len(examples) / global_batch / options.gradient_accumulation)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for name in parts.keys() & state.keys():  # from a checkpoint
        parts[name].load_state_dict(state.pop(name))
    for set_state, random_state in zip((torch.set_rng_state, torch.cuda.set_rng_state), state.get("random", [])):
        set_state(random_state)
    stop, interrupted, handler = False, [], signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    rng, recent, start = random.Random(options.seed), defaultdict(list), time.perf_counter() - state["seconds"]
    log_file = open(out / "log.jsonl" if RANK == 0 else os.devnull, "w", buffering=1)
    log_file.writelines(state["log"])
    progress = tqdm(total=steps, initial=state["step"], desc=f"train: {options.method}", unit="step")
    model.train(options.gradient_checkpointing)  # which works in train mode only
    plan = (step for _ in range(options.epochs)
            for step in chunks(bucketed_batches(examples, global_batch, rng), options.gradient_accumulation))
    for number, step in islice(enumerate(plan, 1), state["step"], None):  # a resumed run shuffles alike, and skips
        for part in [part for batch in step for part in split(batch, model)]:
            mine = share(part)
            rows = [row for column in zip(*(mine or part[:1])) for row in column]  # of pairs first the positives
            columns = torch.tensor([[r["label"], r["ref_logp"]] for r in rows])
            labels, ref_logps = columns.to(model.device, non_blocking=True).T
            logps = batch_logps(model, rows, options)
            losses = method_loss(logps, ref_logps, labels, options)
            weight = PROCESSES if mine else 0  # no process may stay away; FSDP takes the mean over them
            (losses.sum() * weight / sum(map(len, step))).backward()  # the mean over the step's examples
            if mine:
                rewards = implicit_reward(logps, ref_logps, options.beta, options.log_z)
                recent["where"] += [f"step {number}, {example[0]['where']}" for example in mine]
                recent["loss"].append(losses.detach())
                recent["positive"] += [r["label"] > 0.5 if reads_reference(r, options.method) else None for r in rows]
                recent["reward"].append(rewards.detach())
            state["tokens"] += sum(r["length"] for example in part for r in example)
        recent["norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.update()
        stop = bool(gather(interrupted))
        save = stop or options.save_steps and (number % options.save_steps == 0 or number == steps)
        if save or number % LOG_EVERY == 0 or number == steps:  # the only wait for the GPU
            losses, rewards = (gather(list(zip(recent[name], torch.cat(recent[of]).tolist() if recent[of] else [])))
                               for name, of in (("where", "loss"), ("positive", "reward")))
            faults = [where for where, loss in losses if not math.isfinite(loss)]
            faults += [f"step {number}, the gradient"] * (not all(map(math.isfinite, recent["norm"])))
            check(not faults, f"the loss is not finite; try a lower --learning-rate. First at {'; '.join(faults[:8])}")
            state["seconds"] = time.perf_counter() - start
            line = {"step": number, "loss": mean(loss for _, loss in losses),  # rewards: where log π_ref was computed
                    "reward_positive": mean(reward for positive, reward in rewards if positive),
                    "reward_negative": mean(reward for positive, reward in rewards if positive is False),
                    "learning_rate": learning_rate, "tokens_per_second": state["tokens"] / state["seconds"]}
            state["log"].append(json.dumps(line) + "\n")
            log_file.write(state["log"][-1])
            progress.set_postfix({k: f"{v:.3g}" for k, v in line.items() if v is not None and k != "step"})
            recent.clear()
        if save:
            state["random"] = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]
            save_checkpoint(out, {**state, "step": number, **{name: part.state_dict() for name, part in parts.items()}})
        if stop:
            break
    progress.close()
    log_file.close()
    signal.signal(signal.SIGINT, handler)
    if stop:
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Options:
    method: Literal["ulma", "pointwise-dpo", "sft", "unlikelihood", "dpo"] = HfArg(default="ulma", help="the loss")
    model: str = HfArg(default="data/base", help="π_ref, where training starts: a folder or a Hugging Face hub name")
    data: str = HfArg(default="data", help="a folder, a .jsonl or .jsonl.gz file, or a hub name")
    data_config: Optional[str] = HfArg(default=None, help="the configuration of --data, where it has several")
    data_dir: Optional[str] = HfArg(default=None, help="the folder within --data, where only that is meant")
    output_dir: str = HfArg(default="", help="for the model and its records; if not given, a new folder in runs/")
    beta: Optional[float] = HfArg(default=None, help="β, the strength of the KL regulariser; 3, with --continuous 0.1")
    log_z: str = HfArg(default="auto", help="log Z(x); auto: β log Z = logit(mean label), the mean if --continuous")
    continuous: bool = HfArg(default=False, help="squared-error losses on the column `score` (else `label`), 0 to 1")
    length_normalize: bool = HfArg(default=False, help="log π(y|x) as a mean over tokens, not the paper's sum")
    learning_rate: Optional[float] = HfArg(default=None, help="the peak; 3e-4, for sft and dpo 1e-3, unlikelihood 3e-5")
    epochs: int = HfArg(default=5, help="passes over the training rows")
    batch_size: int = HfArg(default=16, help="rows a forward pass, in each process")
    gradient_accumulation: int = HfArg(default=1, help="forward passes an optimiser step")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory for a third more compute")
    max_length: int = HfArg(default=512, help="tokens a row; prompts lose their start, completions their end")
    seed: int = HfArg(default=0, help="of the shuffling, the held-out prompts and the samples")
    save_steps: int = HfArg(default=0, help="optimiser steps between checkpoints; 0: only Ctrl-C writes one")
    resume: str = HfArg(default="", help="the output folder of an interrupted run, to go on with it; takes its options")
    eval_only: bool = HfArg(default=False, help="evaluate --model and stop")


def load_tokenizer(name):
    """The model's tokenizer, with a padding token."""
    try:
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises many kinds
        fail(f"--model {name}: its configuration or tokenizer cannot be loaded: {short(error)}")
    size = config.get_text_config().vocab_size
    check(not config.is_encoder_decoder, f"--model {name} is an encoder-decoder; name a decoder-only model")
    check(tokenizer("a", add_special_tokens=False).input_ids, f"--model {name} has no tokenizer; save its own there")
    check(tokenizer.eos_token, f"--model {name}: its tokenizer has no eos_token, which closes a response; set one")
    check(len(tokenizer) <= size,
          f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its embedding {size}; resize the embedding")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(name, options, device):
    """The model, its weights in float32, from safetensors; sharded over the processes if there are several."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True,
                                                              output_loading_info=True)
    except Exception as error:  # transformers raises many kinds
        fail(f"--model {name} cannot be loaded: {short(error)}")
    longest = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    check(options.max_length <= longest, f"--max-length {options.max_length} is over the {longest} that {name} takes")
    missing = sorted(loading["missing_keys"])
    check(not missing, f"--model {name} lacks weights of a causal language model: {', '.join(missing[:3])}")
    disable_dropout(model)
    if options.gradient_checkpointing:  # by its name in transformers 5, or that in 4
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    if PROCESSES == 1:
        model.to(device)
    else:  # FSDP2: each block, then what is left. On CUDA what is gathered for a forward pass is bfloat16.
        policy = MixedPrecisionPolicy(*[torch.bfloat16, torch.float32] * (device.type == "cuda"))
        for module in [*next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), model]:
            fully_shard(module, reshard_after_forward=True, mp_policy=policy)
    with torch.no_grad():
        first = model.eval()(input_ids=torch.tensor([[1, 0], [1, 2]], device=device)).logits[:, 0]
    check(not (first[0] - first[1]).abs().max() > 2e-2 * first.abs().max(),
          f"--model {name} sees the tokens to come, as an encoder does; name a decoder-only model")
    return model


def peak_memory(device):
    """Bytes: the most that CUDA's allocator gave since its reset; elsewhere the most this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse(argv):
    """(options, output folder) of a command line, checked as far as that goes without data and model."""
    parser = HfArgumentParser(Options, description=__doc__.splitlines()[0])
    parser.error = fail
    options = Options(**vars(parser.parse_args(argv)))
    if options.resume:
        out, begun = Path(options.resume), load_metrics(Path(options.resume))
        check(options == Options(resume=options.resume), "--resume takes the options of that run; leave out the others")
        check(begun["options"], f"--resume {out} holds no run that has begun; name a run's output folder")
        check(not begun.keys() & {"after", "eval"}, f"--resume {out}: that run is finished")
        return Options(**{**begun["options"], "resume": options.resume}), out
    if options.beta is None:  # these defaults are the best of one sweep on data/: see the README
        options.beta = 0.1 if options.continuous else 3.0
    if options.learning_rate is None:
        options.learning_rate = {"sft": 1e-3, "dpo": 1e-3, "unlikelihood": 3e-5}.get(options.method, 3e-4)
    least = {"beta": 0, "learning_rate": 0, "epochs": 0, "batch_size": 0, "gradient_accumulation": 0, "max_length": 1,
             "save_steps": -1, "seed": -1}
    for name, bound in least.items():
        value = getattr(options, name)
        check(bound < value < 2**63,
              f"--{name.replace('_', '-')} is {value}; write a number over {bound} and under 2**63")
    check(options.log_z == "auto" or options.method in ("ulma", "pointwise-dpo"),
          f"--log-z is not in the loss of --method {options.method}; leave it out")
    check(not (options.eval_only and options.save_steps), "--eval-only has nothing to save; leave out --save-steps")
    if os.path.isfile(options.data):
        named = options.data.endswith((".jsonl", ".jsonl.gz"))
        check(named, f"--data {options.data} is no .jsonl or .jsonl.gz file; convert it")
        check(not (options.data_config or options.data_dir), "--data is a file; leave out --data-config and --data-dir")
    kind = "eval" if options.eval_only else options.method
    out = Path(gather([options.output_dir or f"runs/{kind}-{time.strftime('%y%m%d-%H%M%S')}"])[0])
    there = next(path for path in (out, *out.parents) if path.exists())
    check(there.is_dir() and os.access(there, os.W_OK) and not (there == out and any(out.iterdir())),
          f"--output-dir {out} cannot be made or has files in it; name a new or an empty folder")
    return options, out


def save_metrics(out, results):
    """Writes out/metrics.json, all or nothing."""
    if RANK == 0:
        (out / "metrics.tmp").write_text(json.dumps(results, indent=2) + "\n")
        os.replace(out / "metrics.tmp", out / "metrics.json")


def load_metrics(folder):
    """What a run has written to folder/metrics.json; with empty options if there is no such thing."""
    try:
        results = json.loads((folder / "metrics.json").read_text())
        return {**results, "options": {**results["options"]}}
    except (OSError, ValueError, KeyError, TypeError):  # also those of something else's metrics.json
        return {"options": {}}


def run(options, out):
    """Data, model, evaluation, training, evaluation. Returns what metrics.json holds."""
    for what, name in (("model", options.model), ("dataset", options.data)):
        if not os.path.exists(name) and not constants.HF_HUB_OFFLINE:
            try:  # asks once, where the loaders would go on asking for a minute
                HfApi().repo_info(name, repo_type=what, timeout=5)
            except Exception as error:  # whatever a network does
                fail(f"{name} is no file or folder, and the hub does not give a {what} of that name ({short(error)}); "
                     "if the hub's cache has it, set HF_HUB_OFFLINE=1")
    tokenizer = load_tokenizer(options.model)
    train_rows, test_rows = load_rows(options, tokenizer)
    examples, mean_label = make_examples(train_rows, options.method), mean(r["label"] for r in train_rows) or 0.0
    needs = {"sft": "rows of label 1", "dpo": "a positive and a negative of one prompt"}
    check(options.eval_only or examples and (options.method in ("sft", "dpo") or 0 < mean_label < 1),
          f"--method {options.method} needs {needs.get(options.method, 'positives and negatives')} to train on; "
          f"--data {options.data} has none (its mean label is {mean_label:g})")
    auto = prior_log_z(mean_label, options.beta, options.continuous) if 0 < mean_label < 1 else 0.0
    try:
        options.log_z = auto if options.log_z == "auto" else float(options.log_z)
        check(abs(options.beta * options.log_z) < 2**63, f"--log-z is {options.log_z}; write auto or a number")
    except ValueError:
        fail(f"--log-z is {options.log_z}; write auto or a number")

    mps = torch.backends.mps.is_available()
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # same seed, same machine: the same weights
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check that costs time
    rows = train_rows + test_rows
    for chat in {r["chat"] for r in rows}:
        tokenize([r for r in rows if r["chat"] == chat], tokenizer, options.max_length)
    model = load_model(options.model, options, device)
    fingerprint = zlib.crc32(json.dumps([[r["prompt"], r["completion"], r["label"]] for r in rows]).encode())
    state = load_checkpoint(out, fingerprint) if options.resume else {}
    base = load_metrics(Path(options.model))["options"].get("model")  # of a finished run: the model it started from
    reference = load_model(base, options, device) if options.eval_only and base else None
    if RANK == 0:  # a name made of the time may be taken by now
        out.mkdir(parents=True, exist_ok=bool(options.output_dir or options.resume))
    kind = "eval" if options.eval_only else options.method
    where = f"{PROCESSES} x {device}" if PROCESSES > 1 else device
    print(f"{kind}: β {options.beta:g}, β log Z {options.beta * options.log_z:.3g}, on {where}\n"
          f"{options.model}: {model.num_parameters():,} parameters\n"
          f"{options.data}: {len(train_rows)} training rows, mean label {mean_label:.3f}; {len(test_rows)} test rows\n"
          f"to be saved to {out}")

    record = {**asdict(options), "resume": ""}
    record |= {name: os.path.abspath(record[name]) for name in ("model", "data") if os.path.exists(record[name])}
    results, generations = state.get("results", {"options": record}), state.get("generations", {})
    if options.eval_only:
        if reference:
            score(reference, test_rows, options, "ref_logp", "reference")
            del reference  # its memory is needed
        results["eval"], generations["eval"] = evaluate(model, tokenizer, test_rows, options, "eval")
    else:
        if not state:
            save_metrics(out, results)  # from here on --resume finds the options
            results["before"], generations["before"] = evaluate(model, tokenizer, test_rows, options, "before")
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            read = {id(r): r for example in examples for r in example if reads_reference(r, options.method)}
            score(model, list(read.values()), options, "ref_logp", "reference")
            state = {"step": 0, "tokens": 0, "seconds": 0.0, "reference_seconds": time.perf_counter() - start,
                     "log": [], "results": results, "generations": generations, "rows": fingerprint,
                     "ref_logps": [r.get("ref_logp", 0.0) for r in rows]}  # 0: nothing reads it
        for row, ref_logp in zip(rows, state["ref_logps"]):
            row["ref_logp"] = ref_logp
        train(model, examples, options, out, state)
        samples = sum(map(len, examples)) * options.epochs
        results["train"] = {"samples": samples, "tokens": state["tokens"], "seconds": state["seconds"],
                            "reference_seconds": state["reference_seconds"],
                            "samples_per_second": samples / state["seconds"], "peak_memory_bytes": peak_memory(device)}
        save_model(model, tokenizer, out)
        results["after"], generations["after"] = evaluate(model, tokenizer, test_rows, options, "after")
    if RANK == 0:
        samples = [{"prompt": prompt, **{column: texts[prompt] for column, texts in generations.items()}}
                   for prompt in next(iter(generations.values()))]
        (out / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        save_metrics(out, results)
        for folder in checkpoints(out):
            shutil.rmtree(folder)
    report({column: results[column] for column in generations}, generations)
    print(f"\nsaved to {out}")
    return results


def main(argv=None):
    """The command line. Of several processes the first speaks for all."""
    out, quiet = Path(), open(os.devnull, "w") if RANK else None
    try:
        if PROCESSES > 1:
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
        with redirect_stdout(quiet or sys.stdout), redirect_stderr(quiet or sys.stderr):
            options, out = parse(argv)
            results = run(options, out)
        if PROCESSES > 1:
            dist.destroy_process_group()
        return results
    except KeyboardInterrupt:
        reason, code = "interrupted", 130
    except Exception as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides a full disk
        reason, code = f"error: {short(cause)}", 2
        if "out of memory" in reason:
            fail(f"{reason}; start anew with --gradient-checkpointing, a smaller --batch-size or --max-length")
        if not isinstance(cause, OSError) and "No space left" not in reason:
            raise
    shutil.rmtree(out / "partial-checkpoint", ignore_errors=True)
    if not RANK or code == 2:
        begun = (out / "metrics.json").exists()
        tqdm.write(f"ulma.py: {reason}{f'; to go on: python ulma.py --resume {out}' if begun else ''}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where there is no β
    main()
