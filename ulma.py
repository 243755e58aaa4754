"""ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference.

Cai et al., arXiv 2312.02554, in one file, to be read beside the paper: the first half follows it.

    python ulma.py --method ulma        # on data/, offline, within a minute
    python ulma.py --model Qwen/Qwen2.5-0.5B --data Anthropic/hh-rlhf --data-dir harmless-base

It departs from the paper in one thing: a constant, by default prior_log_z, stands for log Z(x).
The authors' code takes 0 for it (--log-z 0), the mean over response tokens for log π (--average),
and averages positives and negatives apart (--balanced).
"""
# SPDX-License-Identifier: MIT

import glob
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from argparse import SUPPRESS
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging
from transformers.hf_argparser import HfArgumentParser
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.optimization import get_cosine_schedule_with_warmup

# ---- Losses ----
# Per response, without reduction; copied elsewhere, they need torch alone. logps is log π_θ(y|x),
# ref_logps log π_ref(y|x), both in nats, and labels z: of one shape, usually (B,).


def implicit_reward(logps, ref_logps, beta=0.1, log_z=0.0):
    """r_θ(x,y) = β (log π_θ(y|x) − log π_ref(y|x) + log Z(x)).

    π_θ is optimal for it if log_z is log Z(x): a number, or a tensor with one per row.
    """
    return beta * (logps - ref_logps + log_z)


def sft_loss(logps):
    """SFT: −log π_θ(y|x), for demonstrations."""
    return -logps


def pointwise_dpo_loss(logps, ref_logps, labels, beta=0.1, log_z=0.0, continuous=False):
    """Point-wise DPO. Binary: −z log σ(r_θ) − (1−z) log(1 − σ(r_θ)). Continuous: (z − r_θ)².

    Labels are 0, 1, or a probability in between, of any type; in the continuous loss, any number.
    """
    reward = implicit_reward(logps, ref_logps, beta, log_z)
    z = labels.to(logps.dtype)
    if continuous:
        return (z - reward) ** 2
    return F.binary_cross_entropy_with_logits(reward, z, reduction="none")


def ulma_loss(logps, ref_logps, labels, beta=0.1, log_z=0.0, continuous=False):
    """ULMA: SFT where z = 1, point-wise DPO elsewhere.

    Where z = 1 ref_logps is not used: any finite number will do, but NaN spoils the gradient.
    """
    preference = pointwise_dpo_loss(logps, ref_logps, labels, beta, log_z, continuous)
    return torch.where(labels == 1, sft_loss(logps), preference)


def prior_log_z(mean_label, beta=0.1, continuous=False):
    """A constant for the unknown log Z(x). It is not in the paper.

    Before the first step π_θ = π_ref, so that r_θ = β log Z on every row. With this constant the
    mean label is then predicted: by σ(r_θ), or by r_θ itself in the continuous loss.
    """
    if continuous:
        return mean_label / beta
    return math.log(mean_label / (1 - mean_label)) / beta


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Pair-wise DPO (Rafailov et al. 2023): −log σ(r_θ(x,y_w) − r_θ(x,y_l)). log Z(x) cancels."""
    chosen = implicit_reward(chosen_logps, ref_chosen_logps, beta)
    rejected = implicit_reward(rejected_logps, ref_rejected_logps, beta)
    return -F.logsigmoid(chosen - rejected)


# ---- Log-probabilities ----


@dataclass(eq=False)  # rows are told apart by identity
class Row:
    """One rated response."""

    prompt: str
    input_ids: torch.Tensor  # (T,): the prompt, and the response with its end
    response_mask: torch.Tensor  # (T,): True on the tokens that count in log π(y|x)
    label: float  # z: 1 for a demonstration or thumbs-up, 0 for a thumbs-down, or a score
    weight: float = 1.0  # multiplies the loss
    answers: tuple = ()  # acceptable responses, for exact match
    group: str = None  # exact match is also given by group
    ref_logp: float = math.nan  # log π_ref(y|x), once it is known


def collate(rows):
    """A batch: input_ids and response_mask, (B, T), right-padded; each row's numbers, (B,)."""
    batch = {}
    for name in ("input_ids", "response_mask"):
        batch[name] = pad_sequence([getattr(row, name) for row in rows], batch_first=True)
    for name in ("label", "weight", "ref_logp"):
        batch[name] = torch.tensor([getattr(row, name) for row in rows])
    return batch


def response_logps(model, input_ids, response_mask):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) over each row's response tokens: (B,), float32, nats.

    input_ids and response_mask are (B, T), padded on the right, where a causal model never looks.
    The mask is True on what counts, the end of the response included, but not on a row's first
    token, which nothing predicts; where all is False, the sum is 0. The model is any decoder-only
    one of transformers: its own forward pass scales or caps the logits.
    """
    require(not isinstance(model, torch.nn.DataParallel), "several GPUs: start it with torchrun")
    # The logits at t predict token t + 1. If the mask is on the CPU, nonzero() awaits no GPU.
    predicted = response_mask[:, 1:].bool()
    rows, positions = predicted.nonzero().to(input_ids.device, non_blocking=True).unbind(1)
    # Logits take most of the memory, so the output head sees only the N positions that count.
    head = getattr(model, "module", model).get_output_embeddings()  # a Trainer wraps .module
    hook = head.register_forward_pre_hook(lambda _, args: args[0][rows, positions].unsqueeze(0))
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits.squeeze(0)  # (N, vocabulary)
    finally:
        hook.remove()
    targets = input_ids[rows, positions + 1]
    token_logps = torch.zeros(predicted.shape, device=logits.device)
    token_logps[rows, positions] = -F.cross_entropy(logits.float(), targets, reduction="none")
    return token_logps.sum(1)


def batch_logps(model, batch, args):
    """log π_θ(y|x) of a batch's rows, from one forward pass: (B,), on the model's device."""
    input_ids = batch["input_ids"].to(model.device, non_blocking=True)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        logps = response_logps(model, input_ids, batch["response_mask"])
    if args.average:  # the mean over response tokens, not the sum
        logps = logps / batch["response_mask"].sum(1).to(logps.device, non_blocking=True)
    return logps


@torch.no_grad()
def all_logps(model, rows, args, title):
    """log π_θ(y|x) of all rows: (len(rows),), on the CPU."""
    size, score = args.batch_size, lambda rows: batch_logps(model, collate(rows), args)
    logps = torch.stack(map_batches(score, rows, size, title)).cpu()
    require(logps.isfinite().all(), "log π(y|x) is not finite: --learning-rate, or the weights?")
    return logps


# ---- Training ----
# An item has one loss: it is a tuple of one row, or in pair-wise DPO of two, chosen and rejected.


def rows_of(items):
    return [row for item in items for row in item]


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def mean(values):
    return sum(values) / len(values) if values else None


def bucketed_batches(items, batch_size, rng):
    """Random batches of items of like length, which need little padding."""
    batches = []
    for window in chunks(rng.sample(items, len(items)), 50 * batch_size):
        window.sort(key=lambda item: max(len(row.input_ids) for row in item))
        batches += chunks(window, batch_size)
    return rng.sample(batches, len(batches))


def batch_losses(model, items, args):
    """The loss of each item; r_θ (NaN if log π_ref is unknown) and the label of each row."""
    batch = collate(rows_of(items))
    logps = batch_logps(model, batch, args)
    numbers = torch.stack([batch[name] for name in ("ref_logp", "label", "weight")])
    ref_logps, labels, weights = numbers.to(logps.device, non_blocking=True)
    rewards = implicit_reward(logps.detach(), ref_logps, args.beta, args.log_z)
    if args.method == "dpo":  # chosen and rejected rows alternate
        losses = dpo_loss(logps[::2], logps[1::2], ref_logps[::2], ref_logps[1::2], args.beta)
        weights = (weights[::2] + weights[1::2]) / 2
    elif args.method == "sft":
        losses = sft_loss(logps)
    else:
        loss = ulma_loss if args.method == "ulma" else pointwise_dpo_loss
        losses = loss(logps, ref_logps, labels, args.beta, args.log_z, args.continuous)
    return weights * losses, rewards, labels


def train(model, items, args, out, losses_of=batch_losses):
    """Minimises the mean loss, going on from the last checkpoint in out. Returns figures.

    Another losses_of, with the arguments and results of batch_losses, is another loss.
    """
    rng = random.Random(args.seed)
    plan = []  # for each step, the batches whose gradients it accumulates
    for _ in range(args.epochs):
        plan += chunks(bucketed_batches(items, args.batch_size, rng), args.gradient_accumulation)
    parameters = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.0, fused=True)
    # The warm-up, a tenth of the steps, starts at 0, as a Trainer's does: step 1 is idle.
    schedule = get_cosine_schedule_with_warmup(optimizer, len(plan) // 10, len(plan))
    state = {"parameters": parameters, "optimizer": optimizer, "schedule": schedule}
    done, digest = load_checkpoint(out, state, items)
    samples, tokens, start = 0, 0, time.perf_counter()
    logged, total, seen = done, 0.0, []  # the losses and the (r_θ, z) since step `logged`
    for step, batches in enumerate(bar := tqdm(plan[done:], "training"), done + 1):
        count = sum(map(len, batches))
        for batch in batches:
            losses, rewards, labels = losses_of(model, batch, args)
            loss = losses.sum() / count
            loss.backward()
            total += loss.detach()
            seen.append(torch.stack((rewards, labels)))
            samples += len(rewards)
            tokens += sum(len(row.input_ids) for row in rows_of(batch))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        line = {"step": step, "learning_rate": schedule.get_last_lr()[0]}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        saves = args.save_steps and (step % args.save_steps == 0 or step == len(plan))
        if saves or step % 10 == 0 or step == len(plan):  # the loop waits for the GPU only here
            rewards, labels = torch.cat(seen, 1).cpu()
            known, positive = ~rewards.isnan(), labels > 0.5
            line["loss"] = total.item() / (step - logged)
            line["reward_positive"] = mean(rewards[known & positive].tolist())
            line["reward_negative"] = mean(rewards[known & ~positive].tolist())
            line["gradient_norm"] = norm.item()
            line["tokens_per_second"] = tokens / (time.perf_counter() - start)
            told = f"loss or gradient is not finite at step {step}; try a lower --learning-rate"
            require(math.isfinite(line["loss"] + line["gradient_norm"]), told)
            bar.set_postfix(loss=line["loss"])
            write(out / "log.jsonl", [line], "a")
            logged, total, seen = step, 0.0, []
        if saves:
            save_checkpoint(out, state, {"step": step, "rows": digest})
    seconds = time.perf_counter() - start
    return {"from_step": done, "samples": samples, "tokens": tokens, "seconds": seconds}


# ---- Evaluation ----
SAMPLES = 4  # responses per prompt, and prompts to show


@torch.no_grad()
def sample(model, tokenizer, rows, args):
    """For each row SAMPLES times (response, tokens, has it ended?), from π_θ at temperature 1."""
    # A sample ends with any token that ends a row. Of the model's own settings none is kept.
    ends = {tokenizer.eos_token_id, *(row.input_ids[-1].item() for row in rows)}
    settings = {"do_sample": True, "top_k": 0, "num_return_sequences": SAMPLES}
    settings |= {"eos_token_id": sorted(ends), "max_new_tokens": args.max_new_tokens}
    model.generation_config = GenerationConfig(**settings)

    def respond(batch):
        prompts = [row.input_ids[~row.response_mask].to(model.device) for row in batch]
        ids = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            output = model.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long())
        drawn = []
        for tokens in output[:, ids.shape[1] :].tolist():
            response = list(takewhile(lambda token: token not in ends, tokens))
            has_ended = len(response) < len(tokens)
            drawn.append((tokenizer.decode(response).strip(), len(response), has_ended))
        return chunks(drawn, SAMPLES)

    torch.manual_seed(args.seed)
    return map_batches(respond, rows, args.batch_size, "samples")


def concordance(scores, labels):
    """P(score_i > score_j | label_i > label_j), ties counting ½: for labels 0 and 1 the ROC AUC."""
    wins, pairs = 0.0, 0
    for score, label in zip(scores, labels):
        gaps = score - scores[labels < label]
        wins += (gaps.sign() + 1).sum().item() / 2
        pairs += len(gaps)
    return wins / pairs if pairs else None


def evaluate(model, tokenizer, rows, args):
    """Metrics, None where they are undefined, and samples, {prompt: responses}.

    Perplexity is the demonstrations', exact match the share of samples among the prompt's answers.
    """
    logps = all_logps(model, rows, args, "log π")
    numbers = [(row.ref_logp, row.label, row.response_mask.sum()) for row in rows]
    ref_logps, labels, tokens = torch.tensor(numbers).unbind(1)
    good, known = labels == 1, ~ref_logps.isnan()
    nats = -(logps * tokens if args.average else logps)[good].sum() / tokens[good].sum()
    metrics = {
        "perplexity": math.exp(min(nats, 700)) if any(good) else None,
        "reward_auc": concordance((logps - ref_logps)[known], labels[known]),  # as r_θ orders them
    }
    with_answers = list({row.prompt: row for row in rows if row.answers}.values())
    asked = with_answers or list({row.prompt: row for row in rows}.values())[:SAMPLES]
    texts, lengths, ended = zip(*chain(*sample(model, tokenizer, asked, args)))
    metrics |= {"sample_length": mean(lengths), "sample_ended": mean(ended)}
    metrics["sample_distinct"] = len(set(texts)) / len(texts)
    responses = chunks(texts, SAMPLES)
    hits = defaultdict(list, exact_match=[])
    for row, texts in zip(with_answers, responses):
        found = [text in row.answers for text in texts]
        hits["exact_match"] += found
        if row.group is not None:
            hits[f"exact_match/{row.group}"] += found
    metrics |= {name: mean(found) for name, found in hits.items()}
    return metrics, {row.prompt: texts for row, texts in zip(asked, responses)}


# ==== Here ends the paper. Below is what any such program needs ====


def map_batches(function, rows, batch_size, title):
    """The function's value for each row, from batches; the longest, which may not fit, first."""
    values = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids), reverse=True)
    for batch in tqdm(chunks(order, batch_size), title):
        values |= zip(batch, function([rows[i] for i in batch]))
    return [values[i] for i in range(len(rows))]


class Mistake(Exception):
    """What the user can mend. main reports it in one line."""


def require(condition, message):
    if not condition:
        raise Mistake(message)


@contextmanager
def explain(context, kind=Exception):
    """Turns an exception inside, mostly a library's, into a Mistake with a context."""
    try:
        yield
    except kind as error:
        text = " ".join(str(error.__cause__ or error).split())  # datasets wraps what went wrong
        raise Mistake(f"{context}: {text or type(error).__name__}") from None


# ---- Data ----


def load_items(args, tokenizer):
    """The items to train on (none with --eval-only) and to test on."""
    with explain(f"--data {args.data}"):
        splits = read_splits(args)
    test = args.test_split
    if test == "test" and test not in splits:
        test = args.train_split if args.eval_only else None
        print(f"none of {', '.join(splits)} is test: tested on {test or 'a tenth of the prompts'}")
    items = [] if args.eval_only else read_split(splits, args.train_split, args, tokenizer)
    if test is not None:
        test_items = read_split(splits, test, args, tokenizer)
    else:
        prompts = sorted({item[0].prompt for item in items})
        held_out = set(random.Random(args.seed).sample(prompts, math.ceil(len(prompts) / 10)))
        test_items = [item for item in items if item[0].prompt in held_out]
        items = [item for item in items if item[0].prompt not in held_out]
    return items, test_items


def read_splits(args):
    """{split: its records, read when iterated}, as the library datasets finds them."""
    if not os.path.exists(args.data):  # on the hub
        return datasets.load_dataset(args.data, data_dir=args.data_dir)
    folder, file = os.path.abspath(args.data), None
    if os.path.isfile(folder):
        folder, file = os.path.dirname(folder), glob.escape(folder)
    require(file or glob.escape(folder) == folder, "its brackets would be taken for a pattern")
    builder = datasets.load_dataset_builder(folder, data_dir=args.data_dir, data_files=file)
    config, files = builder.config, builder.config.data_files
    config.engine, config.keep_default_na, config.na_values = "python", False, [""]  # strict CSV

    def read(name):
        config.data_files = datasets.data_files.DataFilesDict({name: files[name]})
        builder.info.features = None  # splits may differ in their columns
        yield from builder.as_streaming_dataset(name)

    return {str(name): read(name) for name in files}


def read_split(splits, name, args, tokenizer):
    """The items of a split. Prints what is left out of it."""
    names, place = ", ".join(splits), f"--data {args.data}: {name}"
    require(name in splits, f"{place}: its splits are {names}; see --train-split, --test-split")
    with explain(f"{place} is empty or unreadable (rows count from 0)"):
        records = splits[name] = list(splits[name])  # for a split may be read twice
    items, unread = [], {}
    for number, record in enumerate(tqdm(records, f"{name} rows"), 1):
        record = {key: value for key, value in record.items() if value is not None}
        with explain(f"{place} row {number}", Mistake):
            items += read_record(record, args, tokenizer)
        unread |= record
    kept = [item for item in items if max(len(row.input_ids) for row in item) <= args.max_length]
    require(kept, f"{place} has no row, or none within --max-length")
    left = f"{len(items) - len(kept)} over --max-length, columns {', '.join(unread) or '(none)'}"
    print(f"{place}: {len(kept)} rows or pairs; left out: {left}")
    return kept


def read_record(record, args, tokenizer):
    """A record's items: a rated response, or a pair. What is read is taken out."""
    told = f"it has {', '.join(record)}; needed, not empty: prompt, completion, label, or a pair"
    require("__index_level_0__" not in record, "it has more fields than the header")
    prompt, group = record.pop("prompt", None), record.pop("group", None)
    answers, weight = record.pop("answers", []), record.pop("weight", 1.0)
    are_texts = isinstance(answers, list) and all(isinstance(text, str) for text in answers)
    require(are_texts, f"answers is {answers!r}, not a list of texts")
    require(isinstance(weight, (int, float)) and 0 <= weight < math.inf, f"weight is {weight!r}")
    if "chosen" in record and "rejected" in record:
        rated = [(record.pop("chosen"), 1), (record.pop("rejected"), 0)]
    else:
        rating = "score" if args.continuous and "score" in record else "label"
        require(record.get("completion") and rating in record, told)
        rated = [(record.pop("completion"), record.pop(rating))]
    rows = []
    for response, z in rated:
        is_score = args.continuous and isinstance(z, float) and 0 < z < 1
        require(z in (0, 1) or is_score, f"the label is {z!r}, not 0 or 1 (--continuous: between)")
        start, opening, before, answer = render(prompt, response, tokenizer)
        ids, mask = encode(start, opening, before + answer, tokenizer)
        texts = [tokenizer(before + text, add_special_tokens=False).input_ids for text in answers]
        texts = [tokenizer.decode(tokens).strip() for tokens in texts]  # as samples are decoded
        rows.append(Row(opening, ids, mask, float(z), float(weight), texts, group))
    if len({row.prompt for row in rows}) > 1:  # log Z(x) would not cancel
        return [(row,) for row in rows]
    return [tuple(rows)]


def messages_of(value, role):
    """A text, or messages, as messages of a role and a content alone."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    with explain("no messages"):
        messages = [{key: m[key] for key in m if m[key] is not None} for m in value]
    types = [{key: type(text) for key, text in message.items()} for message in messages]
    are_plain = types and all(kinds == {"role": str, "content": str} for kinds in types)
    require(are_plain, f"{value!r:.90}: not messages of a role and a content, both texts")
    return messages


def render(prompt, response, tokenizer):
    """(start tokens, prompt, what the template writes before the answer, the answer and its end)"""
    start, special = special_tokens(tokenizer)
    if not isinstance(prompt, list) and not isinstance(response, list):
        require(isinstance(response, str), f"{response!r} was read, not a text")
        if prompt is None:  # a transcript, as in HH-RLHF
            before, turn, response = response.rpartition("\n\nAssistant:")
            prompt = before + turn
        require(isinstance(prompt, str) and prompt, f"no prompt, or no text: {prompt!r}")
        require(" " not in prompt or not response.startswith(prompt), "it repeats the prompt")
        return start, prompt, "", response.removesuffix(tokenizer.eos_token) + tokenizer.eos_token
    prompt = messages_of(prompt, "user") if prompt else []
    messages = messages_of(response, "assistant")
    if len(messages) == 1:
        messages = prompt + messages
    *asked, last = messages
    require(prompt in ([], asked[-len(prompt) :]), "the conversation does not hold the prompt")
    is_answer = asked and asked[-1]["role"] != last["role"] == "assistant"
    require(is_answer, "it does not end with one answer of the assistant")
    apply = partial(tokenizer.apply_chat_template, tokenize=False)
    mark = "\ue000"  # in place of the answer, to find what the template writes after it
    with explain("the chat template"):
        opening, whole = apply(asked, add_generation_prompt=True), apply(messages)
        after = apply([*asked, {**last, "content": mark}]).rpartition(mark)[2]
    contents = [message["content"].strip() for message in messages]
    for text in filter(None, contents):
        complete = whole.count(text) >= sum(content.count(text) for content in contents)
        require(complete, f"the template leaves out or changes {text[:60]!r}")
    require(whole.startswith(opening), f"the template's {opening[-40:]!r} is not before the answer")
    response = whole[len(opening) :].removesuffix(after)
    before = response.rstrip().removesuffix(contents[-1])
    require(before + contents[-1] == response.rstrip(), "the template changes the answer")
    end = special.search(after)
    end = after[: end.end()] if end else tokenizer.eos_token
    return [], opening, before, response[len(before) :] + end


@cache
def special_tokens(tokenizer):
    """The tokens that begin a text, and a pattern of all special ones."""
    ids, [first, *_] = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    pattern = "|".join(map(re.escape, names | {tokenizer.eos_token}))
    return ids[: ids.index(first)], re.compile(pattern)


def encode(start, opening, response, tokenizer):
    """input_ids and response_mask. A token that spans the boundary belongs to the response."""
    with explain("the tokenizer"):
        texts = tokenizer([opening, opening + response], add_special_tokens=False).input_ids
    before, ids = (ids if ids[: len(start)] == start else start + ids for ids in texts)
    length = len(os.path.commonprefix([before, ids]))
    require(length, f"the prompt {opening[:60]!r} has no token of its own")
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    require(unknown.isdisjoint(ids), "the tokenizer does not know all of it")
    return torch.tensor(ids), torch.arange(len(ids)) >= length


def training_items(items, method):
    """For sft rows of label 1; for dpo the pairs, else pairs of rows of one prompt; else rows."""
    rows, pairs = rows_of(items), [item for item in items if len(item) == 2]
    good = [row for row in rows if row.label == 1]
    if method != "dpo":
        return [(row,) for row in (good if method == "sft" else rows)]
    bad = [row for row in rows if row.label != 1]
    return pairs or [(one, other) for one in good for other in bad if one.prompt == other.prompt]


# ---- Models and checkpoints ----


def load_model(name, args, tokenizer):
    """The model, ready for training, in evaluation mode: without noise π_θ starts at π_ref."""
    with explain(f"the model {name}"):
        model = read_model(name)
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
        require(vocabulary == tokenizer.get_vocab(), "its tokenizer is not that of --model")
        most = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
        require(args.max_length + args.max_new_tokens <= most, f"it takes {most} tokens in all")
    model = add_lora(model, args) if args.lora else model
    for parameter in model.parameters():
        if args.bf16 and not parameter.requires_grad:  # what is trained stays float32
            parameter.data = parameter.data.bfloat16()
    for block in model.modules():  # by hand, as that of transformers needs training mode
        if args.gradient_checkpointing and isinstance(block, GradientCheckpointingLayer):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model.eval().to(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def read_model(name):
    """The model as it is stored, in float32, from safetensors alone."""
    config = AutoConfig.from_pretrained(name)
    require(not hasattr(config, "quantization_config"), "quantised weights cannot be trained")
    require(getattr(config, "is_decoder", True), "it is no decoder-only model")
    model, loading = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys"):
        require(not loading[kind], f"{kind} among its weights: {sorted(loading[kind])[:3]}")
    own, stored = type(model).__name__, config.architectures
    require(own in (stored or [own]), f"of a {stored} only the {own} would be read")
    return model


def add_lora(model, args):
    """The model, frozen, with new adapters that are trained."""
    with explain("--lora"):
        from peft import LoraConfig, PeftModelForCausalLM

        torch.manual_seed(args.seed)
        config = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear")
        return PeftModelForCausalLM(model, config)


def save_model(model, tokenizer, args, out):
    """Writes the stored model in float32, with the trained weights put or merged in."""
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    stored = read_model(args.model)
    stored = add_lora(stored, args) if args.lora else stored
    keys = stored.load_state_dict(trained, strict=False)
    assert not keys.unexpected_keys, keys
    if args.lora:
        stored = stored.merge_and_unload()
    with explain(f"{out}: make room, then give the same command again"):
        stored.save_pretrained(out)
        tokenizer.save_pretrained(out)


def write(path, values, mode="w"):
    """Writes values as lines of JSON."""
    with explain(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.writelines(json.dumps(value) + "\n" for value in values)


def save_checkpoint(out, state, figures):
    """Writes out/checkpoint.pt; until it is whole, the previous one stays."""
    part = out / "checkpoint.part"
    with explain(f"{part}: make room, then give the same command again"):
        torch.save({name: x.state_dict() for name, x in state.items()} | figures, part)
        part.replace(out / "checkpoint.pt")


def load_checkpoint(out, state, items):
    """Restores the last checkpoint, if any. Returns the steps done and a digest of the rows."""
    digest, path = hashlib.sha256(), out / "checkpoint.pt"
    for row in rows_of(items):
        values = row.input_ids.tolist(), row.response_mask.tolist(), row.label, row.weight
        digest.update(repr(values).encode())
    if not path.exists():
        (out / "log.jsonl").unlink(missing_ok=True)
        return 0, digest.hexdigest()
    with explain(f"{path} cannot be used; delete it to begin anew"):
        saved = torch.load(path, weights_only=True)
        require(saved["rows"] == digest.hexdigest(), "it is of other rows")
        for name, part in state.items():
            part.load_state_dict(saved[name])
    return saved["step"], saved["rows"]


# ---- Command line ----
HERE = Path(__file__).resolve().parent


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    method: Literal["ulma", "pointwise-dpo", "sft", "dpo"] = "ulma"
    model: str = arg(str(HERE / "data/base"), "a folder or a hub name")
    reference: str = arg(None, "π_ref, if not --model")
    data: str = arg(str(HERE / "data"), "a file, a folder or a hub name")
    data_dir: str = arg(None, "the folder within --data")
    train_split: str = "train"
    test_split: str = arg("test", "to test on, or else a tenth of the prompts")
    output_dir: str = arg(None, "by default a new folder in runs/")
    beta: float = arg(None, "β, of the KL regulariser: 0.1, on data/ 3")
    log_z: float = arg(None, "by default prior_log_z(mean label)")
    continuous: bool = arg(False, "squared errors; z is the score, if any")
    average: bool = arg(False, "log π is the mean over tokens, not the sum")
    balanced: bool = arg(False, "label 1 weighs as much as the rest")
    learning_rate: float = arg(None, "at its peak: 1e-5, on data/ 3e-4")
    epochs: int = arg(None, "3, on data/ 5")
    batch_size: int = arg(16, "rows or pairs per forward pass")
    gradient_accumulation: int = arg(1, "forward passes per step")
    gradient_checkpointing: bool = arg(False, "less memory, a third more work")
    bf16: bool = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)  # not emulated
    lora: int = arg(0, "rank of adapters; 0: all weights")
    max_length: int = arg(512, "tokens; longer rows are left out")
    max_new_tokens: int = arg(64, "tokens per sample")
    seed: int = 0
    save_steps: int = arg(0, "steps between checkpoints, if any")
    eval_only: bool = False


def read_options(argv):
    parser = HfArgumentParser(Options, prog="ulma.py", usage=SUPPRESS)
    args = Options(**vars(parser.parse_args(argv)))
    is_ours = Path(args.data).resolve().is_relative_to(HERE / "data")  # then the best of a sweep
    for name, best, paper in ("beta", 3.0, 0.1), ("learning_rate", 3e-4, 1e-5), ("epochs", 5, 3):
        if getattr(args, name) is None:
            setattr(args, name, best if is_ours else paper)
    names = "beta learning_rate epochs batch_size gradient_accumulation max_length max_new_tokens"
    for name in names.split():
        require(0 < getattr(args, name) < math.inf, f"--{name.replace('_', '-')} must be over 0")
    require(math.isfinite(args.log_z or 0), "--log-z must be finite")
    require(os.environ.get("WORLD_SIZE", "1") == "1", "several processes: the Trainer in README")
    require(args.output_dir or not args.save_steps, "--save-steps needs --output-dir")
    if args.method in ("sft", "dpo"):
        require(not args.balanced, f"--balanced means nothing to {args.method}")
    return args


def run(args):
    """Data, reference, evaluation, training, evaluation. Returns what metrics.json holds."""
    with explain(f"--model {args.model}"):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        require(tokenizer.eos_token, "its tokenizer has no eos_token")
    items, test_items = load_items(args, tokenizer)
    rows, test_rows = rows_of(items), rows_of(test_items)
    items = training_items(items, args.method)
    positives = sum(row.label == 1 for row in rows)
    for row in rows if args.balanced else ():
        part = positives if row.label == 1 else len(rows) - positives
        row.weight *= len(rows) / 2 / part
    total = sum(row.weight for row in rows) or 1.0
    mean_label = sum(row.weight * row.label for row in rows) / total
    counts = f"{len(rows)} rows, {positives} of label 1, beside {len(test_rows)} to test on"
    require(items or args.eval_only, f"nothing to train {args.method} on: {counts}")
    if args.log_z is None:
        args.log_z = 0.0
        if items and args.method in ("ulma", "pointwise-dpo"):
            require(0 < mean_label < 1, f"the mean label is {mean_label:g}: {counts}")
            args.log_z = prior_log_z(mean_label, args.beta, args.continuous)
    out = Path(args.output_dir or time.strftime(f"runs/{args.method}-%y%m%d-%H%M%S-{os.getpid()}"))
    options = out / "options.json"
    same = options.exists() and options.read_text() == json.dumps(asdict(args)) + "\n"
    resumes = same and not (out / "metrics.json").exists()
    require(resumes or not any(out.glob("*")), f"--output-dir {out} has a finished or another run")
    # One reference pass, so that no second model stays in memory.
    model = load_model(args.reference or args.model, args, tokenizer)
    highest = max(row.input_ids.max() for row in rows + test_rows)
    known = highest < model.get_input_embeddings().num_embeddings
    require(known, f"the model has no embedding for {tokenizer.decode(highest)!r}, held by a row")
    start = time.perf_counter()
    parts = [test_rows] if items or args.reference else []
    if items and (args.reference or args.method != "sft"):
        parts.append(list(dict.fromkeys(rows_of(items))))
    for part in parts:
        for row, logp in zip(part, all_logps(model, part, args, "log π_ref").tolist()):
            row.ref_logp = logp
    figures = {"reference_seconds": time.perf_counter() - start}
    if args.reference:
        del model  # makes room for the next one
        model = load_model(args.model, args, tokenizer)
    print(f"--model {args.model} on {model.device}; results in {out}")
    results, samples = {"options": asdict(args)}, {}
    title = "eval" if args.eval_only else "before"
    results[title], samples[title] = evaluate(model, tokenizer, test_rows, args)
    write(options, [asdict(args)])
    if not args.eval_only:
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        modules = sorted({name.split(".lora_")[0].split(".")[-1] for name in sizes if args.lora})
        trained = f"{sum(sizes.values()):,} of {model.num_parameters():,} parameters"
        print(f"trains {', '.join([trained, *modules])}")
        print(f"{args.method}: {len(items)} items, learning rate {args.learning_rate}")
        print(f"β {args.beta:g}, β log Z {args.beta * args.log_z:.3g}, {args.epochs} epochs")
        figures |= train(model, items, args, out)
        figures["samples_per_second"] = figures["samples"] / figures["seconds"]
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated() or None
        save_model(model, tokenizer, args, out)
        results["after"], samples["after"] = evaluate(model, tokenizer, test_rows, args)
        results["train"] = figures
    lines = [{"prompt": x} | {name: samples[name][x] for name in samples} for x in samples[title]]
    write(out / "samples.jsonl", lines)
    write(out / "metrics.json", [results])
    report({name: results[name] for name in samples}, lines)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return results


def report(results, lines):
    """Prints metrics and some samples, side by side."""
    print(f"\n{'':28}" + "".join(f"{name:>12}" for name in results))
    for metric in next(iter(results.values())):
        values = [metrics[metric] for metrics in results.values()]
        if None not in values:
            print(f"{metric:28}" + "".join(f"{value:12.3f}" for value in values))
    for line in lines[:: math.ceil(len(lines) / SAMPLES)]:
        print("\n" + " ".join(line["prompt"].split())[-90:])
        for name in results:
            print(f"{name:>8}:  {line[name][0]}")


def main(argv=None):
    """The command line. A mistake gets one line, and exit code 2."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.set_verbosity_error()
    torch.set_flush_denormal(True)  # a CPU is many times slower where σ(r) underflows
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know β
    try:
        return run(read_options(argv))
    except (Mistake, torch.OutOfMemoryError) as error:
        print(f"ulma.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
