"""ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference.

A reference implementation of Cai et al., arXiv 2312.02554, in one file, to read beside the paper.

    python ulma.py --method ulma                  # the example in data/, offline, half a minute
    python ulma.py --model Qwen/Qwen2.5-0.5B --data ratings.jsonl --learning-rate 1e-5

The first half is the paper: its losses, the log-probabilities that they need, training and
evaluation. The second half reads data and runs the command line. For adapters, checkpoints and
several GPUs there is data/trainer.py, which imports this file.

One choice in the losses is not the paper's: log Z(x) is unknown, and a constant that follows from
the labels stands for it (see prior_log_z). The authors' code takes 0 for it (--log-z 0). Their code
also takes the mean over a response's tokens where the paper has the sum (--average), and averages
positive and negative responses separately (--balanced).
"""
# SPDX-License-Identifier: MIT

import json
import math
import os
import random
import re
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.nn.functional as F
from datasets.exceptions import DatasetsError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.hf_argparser import HfArgumentParser
from transformers.optimization import get_cosine_schedule_with_warmup

# ---- Losses ----
# The losses return one value for each response, not a mean. This section needs torch and math
# alone: copy from it what you like. logps is log π_θ(y|x) and ref_logps is log π_ref(y|x), in nats;
# labels is z. All three have the same shape, usually (B,).


def implicit_reward(logps, ref_logps, beta=0.1, log_z=0.0):
    """r_θ(x, y) = β (log π_θ(y|x) − log π_ref(y|x) + log Z(x)).

    If log_z is the true log Z(x), this is the reward for which π_θ is the best policy under the
    KL penalty. log_z is a number, or a tensor with one value for each response.
    """
    return beta * (logps - ref_logps + log_z)


def sft_loss(logps):
    """SFT: −log π_θ(y|x), for demonstrations."""
    return -logps


def pointwise_dpo_loss(logps, ref_logps, labels, beta=0.1, log_z=0.0, continuous=False):
    """Point-wise DPO.

    Binary: −z log σ(r_θ) − (1 − z) log(1 − σ(r_θ)), for z from 0 to 1.
    Continuous: (z − r_θ)², for any z.
    """
    reward = implicit_reward(logps, ref_logps, beta, log_z)
    z = labels.to(logps.dtype)
    if continuous:
        return (z - reward) ** 2
    return F.binary_cross_entropy_with_logits(reward, z, reduction="none")


def ulma_loss(logps, ref_logps, labels, beta=0.1, log_z=0.0, continuous=False):
    """ULMA: SFT where z = 1, point-wise DPO elsewhere.

    Only a label of exactly 1 marks a demonstration. A thumbs-up that should not be imitated can
    have the label 0.99: then it has the loss of point-wise DPO. Where z = 1 ref_logps is not used,
    but must be finite: torch.where passes a NaN of the branch not taken into the gradient.
    """
    preference = pointwise_dpo_loss(logps, ref_logps, labels, beta, log_z, continuous)
    return torch.where(labels == 1, sft_loss(logps), preference)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Pair-wise DPO (Rafailov et al. 2023): −log σ(r_θ(x, y_w) − r_θ(x, y_l)). log Z(x) cancels."""
    chosen = implicit_reward(chosen_logps, ref_chosen_logps, beta)
    rejected = implicit_reward(rejected_logps, ref_rejected_logps, beta)
    return -F.logsigmoid(chosen - rejected)


def prior_log_z(mean_label, beta=0.1, continuous=False):
    """A constant for the unknown log Z(x). It is not in the paper.

    Before the first step π_θ = π_ref, so every response has the reward r_θ = β log Z. This constant
    makes σ(r_θ), or in the continuous loss r_θ itself, equal to the mean label. In the binary loss
    the mean label has to lie between 0 and 1.
    """
    if continuous:
        return mean_label / beta
    return math.log(mean_label / (1 - mean_label)) / beta


# ---- Options and errors ----
HERE = Path(__file__).resolve().parent
EXAMPLE = HERE / "data" / "base"  # a small language model, aligned within half a minute
BF16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """The command line. Functions below take it as `args`."""

    method: Literal["ulma", "pointwise-dpo", "sft"] = "ulma"
    model: str = option(str(EXAMPLE), "a folder or a hub name")
    reference: str | None = option(None, "π_ref, if it is not --model")
    data: str = option(str(HERE / "data"), "a file, a folder or a hub name")
    data_dir: str | None = option(None, "a folder within --data")
    train_split: str = "train"
    test_split: str = option("test", "if there is none, a tenth of the prompts is held out")
    output_dir: str | None = option(None, "by default a new folder in runs/")
    beta: float = option(0.1, "β, the scale of the reward; for the example 3")
    log_z: float | None = option(None, "by default prior_log_z of the mean label")
    continuous: bool = option(
        False, "the continuous losses; z is the score or, without one, the label"
    )
    average: bool = option(False, "log π is the mean over the response's tokens, not the sum")
    balanced: bool = option(False, "rows of label 1 have the same total weight as all others")
    learning_rate: float | None = option(None, "its peak; required, except for the example: 3e-4")
    epochs: int = option(3, "for the example 5")
    batch_size: int = option(
        16, "rows in a forward pass; in sampling, prompts with four samples each"
    )
    gradient_accumulation: int = option(1, "forward passes in a step")
    bf16: bool = option(BF16, "autocast to bfloat16; on by default where the GPU supports it")
    max_length: int = option(512, "in tokens; longer rows are left out")
    max_new_tokens: int = option(64, "tokens after which a sample is cut off")
    seed: int = option(0, "of the batches, the samples and the held-out prompts")
    eval_only: bool = option(False, "evaluate --model, and train nothing")


class Mistake(Exception):
    """An error that the user can fix."""


# These are reported in one line. Any other error may be a bug of ours, and keeps its traceback.
MISTAKES = (Mistake, OSError, DatasetsError, torch.OutOfMemoryError)


def require(condition, message):
    if not condition:
        raise Mistake(message)


# ---- Log-probabilities ----


@dataclass(eq=False)  # compared by identity: == of tensors is not one truth value
class Row:
    """A prompt and one rated response."""

    prompt: str
    input_ids: torch.Tensor  # (T,): the tokens of the prompt, of the response and of its end
    response_mask: torch.Tensor  # (T,): True on what the model has to write, the end included
    label: float  # z, from 0 to 1: 1 is imitated, and 0 is a thumbs-down
    weight: float = 1.0  # multiplies the loss
    ref_logp: float = math.nan  # log π_ref(y|x), once set_reference has been called
    answers: list = field(default_factory=list)  # acceptable responses, for exact match
    group: str | None = None  # exact match is also given for each group
    is_chat: bool = False  # the text comes from a chat template


def pad(tensors, side="right"):
    """Sequences of different lengths as one tensor, filled up with 0: (B, T)."""
    return pad_sequence(tensors, batch_first=True, padding_side=side)


def response_logps(model, input_ids, response_mask):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t), over the response tokens of each row: (B,), in nats.

    input_ids and response_mask have shape (B, T) and are padded on the right, where no response
    token can attend to it. The mask is True on the N tokens that count; it is False on the first
    token of a row, which nothing predicts. Any decoder-only model of transformers will do.
    """
    lengths = response_mask.sum(1).tolist()
    # Row i and position t of the N tokens, row after row. If the mask is on the CPU, nothing here
    # makes the CPU wait for the GPU; a copy without non_blocking would.
    i, t = response_mask.nonzero().to(input_ids.device, non_blocking=True).unbind(1)
    with logits_only_at(model, i, t - 1):  # the logits at t − 1 predict the token at t
        logits = model(input_ids=input_ids, use_cache=False).logits[0]  # (N, vocabulary)
    token_logps = -F.cross_entropy(logits, input_ids[i, t], reduction="none")  # (N,)
    return torch.stack([one_row.sum() for one_row in token_logps.split(lengths)])


@contextmanager
def logits_only_at(model, i, t):
    """Inside this context the model computes logits only at N positions: (1, N, vocabulary).

    Logits at all B × T positions would take most of the memory, and no loss reads them. The output
    head is also kept out of autocast, since bfloat16 rounds a logit of 20 to a multiple of 1/8.
    """
    head = getattr(model, "module", model).get_output_embeddings()  # DDP has the model in .module
    forward = head.forward

    def forward_at(hidden):  # (B, T, width)
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden[i, t].unsqueeze(0).to(head.weight.dtype)).float()

    head.forward = forward_at
    try:
        yield
    finally:
        del head.forward  # that of its class is back


def row_logps(model, rows, args):
    """log π(y|x) of a batch of rows, from one forward pass: (B,), on the model's device.

    With --average it is the mean over the response's tokens.
    """
    device = next(model.parameters()).device  # DDP has no .device
    input_ids = pad([row.input_ids for row in rows]).to(device, non_blocking=True)
    response_mask = pad([row.response_mask for row in rows])
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        logps = response_logps(model, input_ids, response_mask)
    if args.average:
        logps = logps / response_mask.sum(1).to(logps.device, non_blocking=True)
    return logps


@torch.no_grad()
def all_logps(model, rows, args, title):
    """log π(y|x) of all rows, in their order: (len(rows),), on the CPU."""
    logps = torch.empty(len(rows))
    for indices in tqdm(batches_longest_first(rows, args.batch_size), title):
        logps[indices] = row_logps(model, [rows[i] for i in indices], args).cpu()
    finite = logps.isfinite().all()
    require(finite, "log π(y|x) is not finite: broken weights, or too high a --learning-rate")
    return logps


def batches_longest_first(rows, batch_size):
    """Batches of indices, the longest rows first: what does not fit into memory fails at once."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids), reverse=True)
    return chunks(order, batch_size)


def chunks(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


def mean(values):
    """The mean, or None if there are no values."""
    return sum(values) / len(values) if values else None


# ---- What a run needs before its first step: log π_ref, weights, log Z ----


def set_reference(reference, rows, args):
    """Stores log π_ref(y|x) in each row, so that training needs no second model in memory."""
    ref_logps = all_logps(reference, rows, args, "log π_ref")
    for row, ref_logp in zip(rows, ref_logps.tolist()):
        row.ref_logp = ref_logp


def balance(rows):
    """Scales the weights so that rows of label 1 have the same total weight as all others.

    The authors' code does so within each batch, where it adds the mean losses of the two classes.
    """
    total = sum(row.weight for row in rows)
    positive = sum(row.weight for row in rows if row.label == 1)
    require(0 < positive < total, "--balanced needs rows of label 1 and other rows")
    for row in rows:
        row.weight *= 0.5 * total / (positive if row.label == 1 else total - positive)


def default_log_z(rows, args):
    """prior_log_z of the weighted mean label, or 0 if no row's loss contains log Z.

    In ULMA demonstrations count, too, although their own loss has no log Z: σ(β log Z) is to match
    the share of good responses among all rows.
    """
    if args.method == "sft" or (args.method == "ulma" and all(row.label == 1 for row in rows)):
        return 0.0
    total = sum(row.weight for row in rows)
    require(total > 0, "the weights of all rows are 0")
    mean_label = sum(row.weight * row.label for row in rows) / total
    if not args.continuous and not 0 < mean_label < 1:
        raise Mistake(f"the mean label is {mean_label:g}, so log Z would be infinite: give --log-z")
    return prior_log_z(mean_label, args.beta, args.continuous)


def prepare(rows, args):
    """Returns the rows that the method trains on. Balances their weights in place, sets log Z."""
    if args.method == "sft":
        require(not args.balanced, "--balanced has no meaning for SFT")
        rows = [row for row in rows if row.label == 1]
        require(rows, f"{args.data} has no row of label 1, which SFT needs")
    if args.balanced:
        balance(rows)
    if args.log_z is None:
        args.log_z = default_log_z(rows, args)
    print(f"{args.method}: {len(rows)} rows, β {args.beta:g}, β log Z {args.beta * args.log_z:.3g}")
    print(f"learning rate {args.learning_rate:g}, {args.epochs:g} epochs")
    return rows


# ---- Training ----


def batch_losses(model, rows, args):
    """The weighted loss and the reward of each row of a batch: (B,), (B,)."""
    logps = row_logps(model, rows, args)
    numbers = torch.tensor([(row.ref_logp, row.label, row.weight) for row in rows])  # (B, 3)
    ref_logps, labels, weights = numbers.to(logps.device, non_blocking=True).unbind(1)
    if args.method == "sft":
        losses = sft_loss(logps)
    else:
        loss_function = ulma_loss if args.method == "ulma" else pointwise_dpo_loss
        losses = loss_function(logps, ref_logps, labels, args.beta, args.log_z, args.continuous)
    rewards = implicit_reward(logps.detach(), ref_logps, args.beta, args.log_z)
    return weights * losses, rewards


def train(model, rows, args, out, losses_of=batch_losses):
    """Each step descends the mean of weight × loss over its rows; every tenth is logged in out.

    The optimiser is AdamW without weight decay; gradients are clipped to a norm of 1. The model
    stays in evaluation mode, for dropout would make π_θ differ from π_ref. To train with a loss of
    your own, pass a function with the arguments and results of batch_losses.
    """
    rng = random.Random(args.seed)
    steps = []  # a step is a list of batches, whose gradients add up; a batch is a list of rows
    for _ in range(args.epochs):
        batches = batches_of_like_length(rows, args.batch_size, rng)
        steps += chunks(batches, args.gradient_accumulation)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.0, fused=True)
    # Warm-up starts at 0: with ten steps or more, the first one leaves the weights as they are.
    schedule = get_cosine_schedule_with_warmup(optimizer, len(steps) // 10, len(steps))
    losses, rewards, labels = [], [], []  # of the rows since the last line of the log
    progress = tqdm(steps, "training")
    for step, batches in enumerate(progress, 1):
        count = sum(len(batch) for batch in batches)
        for batch in batches:
            row_losses, row_rewards = losses_of(model, batch, args)
            (row_losses.sum() / count).backward()
            losses.append(row_losses.detach())
            rewards.append(row_rewards.detach())
            labels += [row.label for row in batch]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        if step % 10 == 0 or step == len(steps):  # reading a value makes the CPU wait for the GPU
            line = {"step": step, "loss": torch.cat(losses).mean().item()}
            line |= {"gradient_norm": norm.item(), "learning_rate": learning_rate}
            finite = math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"])
            require(finite, f"not finite, so try a lower --learning-rate: {line}")
            rated = list(zip(torch.cat(rewards).tolist(), labels))
            line["reward_positive"] = mean([reward for reward, z in rated if z > 0.5])
            line["reward_negative"] = mean([reward for reward, z in rated if z <= 0.5])
            write(out / "log.jsonl", [line], "a")
            progress.set_postfix(loss=line["loss"])
            losses, rewards, labels = [], [], []


def batches_of_like_length(rows, batch_size, rng):
    """Batches of rows of similar length, which need little padding, in random order.

    Rows are sorted by their length times a random factor, so that each epoch has other batches. The
    remainder, a smaller batch, is drawn at random: its rows count for more, and should not always
    be the longest.
    """
    rows = rng.sample(rows, len(rows))  # a shuffled copy
    whole = len(rows) - len(rows) % batch_size
    by_length = sorted(rows[:whole], key=lambda row: len(row.input_ids) * rng.uniform(0.85, 1.15))
    batches = chunks(by_length, batch_size) + chunks(rows[whole:], batch_size)
    return rng.sample(batches, len(batches))


# ---- Evaluation ----
SAMPLES = 4  # for each prompt
PROMPTS = 32  # of the first rows, sampled if no row has acceptable answers


@dataclass
class Sample:
    text: str
    length: int  # in tokens, without the end
    ended: bool  # False if it was cut off at --max-new-tokens


def evaluate(model, tokenizer, rows, args):
    """Metrics, None where they are undefined, and {prompt: texts of its samples}.

    Samples are drawn for the prompts that have acceptable answers or, if there are none, for those
    of the first PROMPTS rows. sample_distinct is the share of different texts among all samples.
    """
    logps = all_logps(model, rows, args, "log π")
    ref_logps = torch.tensor([row.ref_logp for row in rows])
    labels = torch.tensor([row.label for row in rows])
    with_answers = [row for row in rows if row.answers]
    asked = list({row.prompt: row for row in with_answers or rows[:PROMPTS]}.values())
    samples = sample(model, tokenizer, asked, args)
    drawn = [one for samples_of_row in samples for one in samples_of_row]
    metrics = {
        "perplexity": perplexity(logps, labels, rows, args),
        "reward_auc": concordance(logps - ref_logps, labels),  # β and log Z do not change the order
        "sample_length": mean([one.length for one in drawn]),
        "sample_ended": mean([one.ended for one in drawn]),
        "sample_distinct": len({one.text for one in drawn}) / len(drawn),
    }
    matches, texts = defaultdict(list), {}
    for row, samples_of_row in zip(asked, samples):
        texts[row.prompt] = [one.text for one in samples_of_row]
        if row.answers:
            found = [one.ended and one.text in row.answers for one in samples_of_row]
            matches["exact_match"] += found
            if row.group is not None:
                matches[f"exact_match/{row.group}"] += found
    metrics |= {name: mean(found) for name, found in matches.items()}
    return metrics, texts


def perplexity(logps, labels, rows, args):
    """exp of the mean −log π of a token, over the responses of label 1."""
    good = labels == 1
    if not good.any():
        return None
    lengths = torch.tensor([row.response_mask.sum() for row in rows])
    if args.average:  # row_logps has divided by them
        logps = logps * lengths
    nats = -logps[good].sum() / lengths[good].sum()
    return nats.double().exp().item()  # float32 overflows at e^89


def concordance(scores, labels):
    """P(score_i > score_j | label_i > label_j), ties counting ½; for labels 0 and 1 the ROC AUC."""
    if not scores.isfinite().all():  # log π_ref is not known
        return None
    wins, pairs = 0.0, 0
    for score, label in zip(scores, labels):
        lower = scores[labels < label]
        wins += (score > lower).sum().item() + (score == lower).sum().item() / 2
        pairs += len(lower)
    return wins / pairs if pairs else None


@torch.no_grad()
def sample(model, tokenizer, rows, args):
    """For each row a list of SAMPLES responses to its prompt, from π_θ at temperature 1."""
    torch.manual_seed(args.seed)
    # A conversation's end may be another token than the eos_token.
    ends = {tokenizer.eos_token_id} | {row.input_ids[-1].item() for row in rows}
    # Replaced, not passed: generate() fills what it lacks, say top_p, from the model's own.
    stored = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,  # all tokens; generate() has a default of 50
        num_return_sequences=SAMPLES,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id,
    )
    samples = [[] for _ in rows]
    for indices in tqdm(batches_longest_first(rows, args.batch_size), "samples"):
        prompts = [rows[i].input_ids[~rows[i].response_mask] for i in indices]
        input_ids = pad(prompts, "left").to(model.device)
        attention_mask = pad([torch.ones_like(prompt) for prompt in prompts], "left")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            output = model.generate(input_ids, attention_mask=attention_mask.to(model.device))
        new_tokens = output[:, input_ids.shape[1] :].tolist()
        for i, responses in zip(indices, chunks(new_tokens, SAMPLES)):  # a prompt's are adjacent
            samples[i] = [read_sample(tokens, ends, tokenizer) for tokens in responses]
    model.generation_config = stored
    return samples


def read_sample(tokens, ends, tokenizer):
    """Decodes the tokens up to the first end."""
    length = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
    return Sample(tokenizer.decode(tokens[:length]).strip(), length, ended=length < len(tokens))


# ==== The paper's part ends here. Below: reading data, and the command line ====


# ---- Data ----
# A record is one line of the user's data: a rated response, or a pair of responses.
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGES_IN_A_STRING = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")


def load_rows(args, tokenizer):
    """Rows to train on, none with --eval-only, and rows to test on."""
    splits = find_splits(args)
    if args.test_split in splits or args.test_split != "test":  # only the default may be missing
        test_rows = read_split(splits, args.test_split, args, tokenizer)
        if args.eval_only:
            return [], test_rows
        differ = args.train_split != args.test_split
        require(differ, f"--train-split and --test-split are both {args.test_split}")
        return read_split(splits, args.train_split, args, tokenizer), test_rows
    rows = read_split(splits, args.train_split, args, tokenizer)
    prompts = sorted({row.prompt for row in rows})
    require(len(prompts) > 1, f"{args.data} has no test split, and only one prompt")
    held_out = set(random.Random(args.seed).sample(prompts, math.ceil(len(prompts) / 10)))
    print(f"there is no test split, so {len(held_out)} of {len(prompts)} prompts are held out")
    test_rows = [row for row in rows if row.prompt in held_out]
    rows = [row for row in rows if row.prompt not in held_out]
    return [] if args.eval_only else rows, test_rows


def find_splits(args):
    """{name: its files of JSON lines or Parquet}, or else the splits of datasets.load_dataset."""
    path = Path(args.data, args.data_dir or "")
    if path.is_file():
        if args.eval_only:
            print(f"every row of {path} is tested on, even if the model was trained on it")
        return {args.test_split if args.eval_only else args.train_split: [path]}
    is_file_name = path.suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet")
    require(path.exists() or not is_file_name, f"there is no file {path}")
    files = defaultdict(list)
    for file in sorted([*path.glob("*.jsonl"), *path.glob("*.parquet")]):
        name = re.sub(r"-\d+-of-\d+$", "", file.stem)  # train-00000-of-00002 is of train
        files[name].append(file)
    for name, parts in files.items():
        one_format = len({file.suffix for file in parts}) == 1
        require(one_format, f"{args.data} has {name} as JSON lines and as Parquet: keep one")
    return files or datasets.load_dataset(args.data, data_dir=args.data_dir)


def read_records(source, place):
    """Yields (where it stands, record). The source is a list of files, or a table of datasets."""
    if not isinstance(source, list):
        yield from read_table(source, place)
        return
    # Each file by itself, and JSON by json: datasets would cast all to the types that come first.
    for file in source:
        if file.suffix == ".jsonl":
            yield from read_json_lines(file)
        else:
            folder, name = str(file.parent), file.name
            table = datasets.load_dataset(folder, data_files=name, split="train")  # its only split
            yield from read_table(table, file)


def read_table(table, place):
    if table.info.builder_name == "csv":
        raise Mistake(f"{place}: CSV turns the text NA into nothing; write JSON lines")
    label = table.features.get("label")
    if isinstance(label, datasets.ClassLabel):  # it numbers its names in order, so 1 may be bad
        raise Mistake(f"{place}: the label is a {label}; write the numbers 0 and 1")
    for number, record in enumerate(table, 1):
        yield f"{place}, row {number}", record


def read_json_lines(file):
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        where = f"{file}, line {number}"
        try:
            if line.strip():
                yield where, json.loads(line)
        except ValueError as error:  # neither JSON nor UTF-8
            raise Mistake(f"{where}: {error}") from None


def read_split(splits, name, args, tokenizer):
    """The rows of a split. Prints what was left out, and the first row as the model sees it."""
    require(name in splits, f"{args.data} has no split {name}, only {', '.join(splits)}")
    rows, unread, unequal = [], set(), 0
    records = read_records(splits[name], f"{args.data}, {name}")
    for where, record in tqdm(records, f"{name} rows"):
        try:
            found, others = read_record(record, args, tokenizer)
        except Mistake as mistake:
            raise Mistake(f"{where}: {mistake}") from None
        rows += found
        unread |= others
        if len({row.prompt for row in found}) > 1:
            unequal += 1
    short = [row for row in rows if len(row.input_ids) <= args.max_length]
    summary = f"{name}: {len(short)} rows, and {len(rows) - len(short)} left out, over --max-length"
    require(short, f"{args.data}, {summary}")
    chats = sum(row.is_chat for row in short)
    labels = [row.label for row in short]
    between = sum(0 < label < 1 for label in labels)
    ids, mask = short[0].input_ids, short[0].response_mask
    print(summary)
    print(f"  labels of 1: {labels.count(1)}, of 0: {labels.count(0)}, between: {between}")
    print(f"  plain text: {len(short) - chats}; through the chat template: {chats}")
    print(f"  columns not read: {', '.join(sorted(unread)) or 'none'}")
    if unequal:
        print(f"  in {unequal} pairs the prompts differ; each response is read after its own")
    print(f"  first prompt   {tokenizer.decode(ids[~mask])!r}")
    print(f"  first response {tokenizer.decode(ids[mask])!r}")
    return short


def read_record(record, args, tokenizer):
    """The row of a record, or the two rows of a pair; and the columns that were not read."""
    require(isinstance(record, dict), "it is not a JSON object")
    record = {name: value for name, value in record.items() if value not in (None, "", [])}
    label = "score" if args.continuous and "score" in record else "label"
    if "chosen" in record or "rejected" in record:
        require("completion" not in record, "it has a completion and a pair as well")
        is_pair = {"chosen", "rejected"} <= record.keys()
        require(is_pair, "one of chosen and rejected is empty")
        columns = {"chosen", "rejected"}
        rated = [(record["chosen"], 1), (record["rejected"], 0)]
    elif {"completion", label} <= record.keys():
        columns = {"completion", label}
        rated = [(record["completion"], record[label])]
    else:
        raise Mistake(f"it has {', '.join(record)}: no completion with a {label}, and no pair")
    rows = [read_row(record, response, z, args, tokenizer) for response, z in rated]
    return rows, record.keys() - columns - {"prompt", "answers", "group", "weight"}


def read_row(record, response, z, args, tokenizer):
    """The row of one response, whose label is z."""
    if not isinstance(z, int | float) or not 0 <= z <= 1:
        raise Mistake(f"its label is {z!r}, not a number from 0 to 1")
    weight, answers = record.get("weight", 1.0), record.get("answers", [])
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise Mistake(f"its weight is {weight!r}, not a finite number of at least 0")
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise Mistake(f"its answers are {answers!r}, not a list of texts")
    given = record.get("prompt")
    for value in (given, response):
        if isinstance(value, str) and MESSAGES_IN_A_STRING.match(value):
            raise Mistake(f"it has a list of messages in a string: {value!r:.80}")
    is_chat = isinstance(given, list) or isinstance(response, list)
    read = read_chat if is_chat else read_text
    prompt, opening, answer = read(given, response, tokenizer)

    # A chat template writes <bos> and the end itself; of plain text that is the tokenizer's task.
    prompt_ids = tokenizer(prompt, add_special_tokens=not is_chat).input_ids
    ids = tokenizer(prompt + opening + answer, add_special_tokens=not is_chat).input_ids
    if not is_chat and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    doubled = ids[:2] == [tokenizer.bos_token_id] * 2
    require(not doubled, "it begins with the bos_token, which the tokenizer writes, too")
    # A token that spans the boundary between prompt and response belongs to the response.
    start = len(os.path.commonprefix([prompt_ids, ids]))  # of lists, too
    require(start > 0, f"its prompt {prompt[:60]!r} has no token of its own")
    encoded = [tokenizer(opening + text, add_special_tokens=False).input_ids for text in answers]
    return Row(
        prompt=prompt,
        input_ids=torch.tensor(ids),
        response_mask=torch.arange(len(ids)) >= start,
        label=float(z),
        weight=float(weight),
        answers=[tokenizer.decode(answer_ids).strip() for answer_ids in encoded],  # like samples
        group=record.get("group"),
        is_chat=is_chat,
    )


# The next two return (prompt, opening, answer). The prompt is what the model is given. The opening
# is what a template writes before every answer, such as an empty <think> block; plain text has
# none. The model has to write the opening and the answer.


def read_text(prompt, response, tokenizer):
    """Plain text is taken as it stands, but for an eos_token at its end: read_row writes one."""
    require(isinstance(response, str), f"its response is {response!r}, not a text")
    if prompt is None:  # a transcript, as in HH-RLHF: its last turn is the response
        before, turn, response = response.rpartition("\n\nAssistant:")
        prompt = before + turn
        require(prompt, "it has no prompt, and its response no '\\n\\nAssistant:'")
    require(isinstance(prompt, str), f"its prompt is {prompt!r}, not a text")
    require("\n\nHuman:" not in response, "its response has a turn of Human's")
    repeats = len(prompt) > 5 and response.startswith(prompt)  # a shorter one may do so by chance
    require(not repeats, "its response repeats its prompt")
    if response.rstrip().endswith(tokenizer.eos_token):
        response = response.rstrip().removesuffix(tokenizer.eos_token)
    require(response.strip(), "its response is empty")
    return prompt, "", response


def read_chat(prompt, response, tokenizer):
    """Messages go through the chat template. The last one is the answer, with its <|im_end|>."""
    conversation = as_messages(response, "assistant")
    asked = as_messages(prompt or [], "user")
    if len(conversation) == 1:
        conversation = asked + conversation
    else:  # it is whole, and may repeat the prompt, from its start or up to the answer
        count = len(asked)
        repeated = asked in ([], conversation[:count], conversation[-1 - count : -1])
        require(repeated, "its conversation does not contain its prompt")
    require(len(conversation) > 1, "it has no prompt")
    *context, last = conversation
    is_answer = context[-1]["role"] != "assistant" and last["role"] == "assistant"
    require(is_answer, "it does not end with one answer of the assistant")
    text = last["content"].strip()
    require(text, "its response is empty")

    # Every content must stand in the result at least as often as in the messages.
    conversation = [*context, last | {"content": text}]
    prompt_text = through_template(context, tokenizer, add_generation_prompt=True)
    whole = through_template(conversation, tokenizer)
    contents = [message["content"].strip() for message in conversation]
    for content in filter(None, contents):
        if whole.count(content) < sum(other.count(content) for other in contents):
            raise Mistake(f"the template leaves out or changes {content[:60]!r}")
    if not whole.startswith(prompt_text):
        raise Mistake(f"the template's {prompt_text[-40:]!r} is not before the answer")

    # whole = prompt_text + opening + text + after. A rendering with a mark instead of the text has
    # the same after. Its first word is the end; what follows, such as a line break, is not trained.
    mark = "\ue000"
    after = through_template([*context, last | {"content": mark}], tokenizer).rpartition(mark)[2]
    answered = whole.removeprefix(prompt_text).removesuffix(after)
    require(answered.endswith(text), "the template changes the answer")
    first_word = re.match(r"\s*\S+", after)
    end = first_word[0] if first_word else tokenizer.eos_token
    end_ids = tokenizer(end.strip(), add_special_tokens=False).input_ids
    if tokenizer(text + end, add_special_tokens=False).input_ids[-1:] != end_ids:
        raise Mistake(f"the template ends an answer with {end!r}, which is not one token")
    return prompt_text, answered.removesuffix(text), text + end


def through_template(messages, tokenizer, **options):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of the model's, and may raise anything
        raise Mistake(f"the chat template: {error}") from None


def as_messages(value, role):
    """A text, or a list of messages, as messages of a role and a content."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    require(isinstance(value, list), f"{value!r:.80} is neither a text nor a list of messages")
    messages = []
    for message in value:
        require(isinstance(message, dict), f"{message!r:.80} is not a message")
        # The library datasets gives every message every key, with None if it has none.
        given = {key: part for key, part in message.items() if part not in (None, "", [], {})}
        plain = {"role": given.pop("role", None), "content": given.pop("content", "")}
        is_plain = not given and plain["role"] in ROLES and isinstance(plain["content"], str)
        if not is_plain:
            told = f"a message needs a role ({', '.join(ROLES)}) and a text, and nothing else"
            raise Mistake(f"{told}: {message}")
        messages.append(plain)
    return messages


# ---- Command line ----


def read_options(argv=None):
    """The options of a command line. Some defaults depend on the model."""
    parser = HfArgumentParser(Options, prog="ulma.py")
    if Path(parser.parse_args(argv).model).resolve() == EXAMPLE:
        parser.set_defaults(beta=3.0, epochs=5, learning_rate=3e-4)
    args = Options(**vars(parser.parse_args(argv)))
    check_numbers(args)
    return args


def check_numbers(args):
    if args.learning_rate is None and not args.eval_only:
        raise Mistake("--learning-rate is needed: try 1e-5 for 7B parameters, 1e-4 for 135M")
    names = "beta learning_rate epochs batch_size gradient_accumulation max_length max_new_tokens"
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise Mistake(f"--{name.replace('_', '-')} is {value}; it must be over 0")
    require(math.isfinite(args.log_z or 0.0), "--log-z must be finite")


def load_tokenizer(name):
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:  # whose message does not always name the model
        raise Mistake(f"the model {name}: {error}") from None
    require(tokenizer.eos_token, f"the tokenizer of {name} has no eos_token")
    return tokenizer


def load_model(name, tokenizer):
    """The model in float32, in evaluation mode: dropout would make π_θ differ from π_ref."""
    vocabulary = load_tokenizer(name).get_vocab()  # a reference must number tokens alike
    require(vocabulary == tokenizer.get_vocab(), f"{name} does not have the vocabulary of --model")
    quantised = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    require(not quantised, f"the weights of {name} are quantised, which is not supported")
    model, loading = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(loading["missing_keys"])
    require(not missing, f"{name} lacks weights: {missing}")
    return model.eval()


def run(args):
    """Reads data, scores the reference, trains, evaluates. Returns what metrics.json holds."""
    out = Path(args.output_dir or time.strftime(f"runs/{args.method}-%y%m%d-%H%M%S"))
    require(not any(out.glob("*")), f"--output-dir {out} is not empty")
    tokenizer = load_tokenizer(args.model)
    rows, test_rows = load_rows(args, tokenizer)
    rows = [] if args.eval_only else prepare(rows, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The model is π_ref, and then π_θ as well, unless --reference is another one.
    model = load_model(args.reference or args.model, tokenizer).to(device)
    write(out / "options.json", [asdict(args)], "x")  # fails if another run has just created it
    print(f"--model {args.model} on {device}; results in {out}")

    start = time.perf_counter()
    if args.reference or not args.eval_only:  # SFT needs it for the logged rewards alone
        set_reference(model, test_rows, args)
        set_reference(model, rows, args)
    reference_seconds = time.perf_counter() - start
    if args.reference:
        del model  # never both in memory
        model = load_model(args.model, tokenizer).to(device)

    results, samples = {"options": asdict(args)}, {}
    if args.eval_only:
        results["eval"], samples["eval"] = evaluate(model, tokenizer, test_rows, args)
    else:
        try_to_save(model, tokenizer, out)
        results["before"], samples["before"] = evaluate(model, tokenizer, test_rows, args)
        start = time.perf_counter()
        train(model, rows, args, out)
        seconds = time.perf_counter() - start
        model.save_pretrained(out)
        results["after"], samples["after"] = evaluate(model, tokenizer, test_rows, args)
        results["train"] = {
            "samples": args.epochs * len(rows),
            "tokens": args.epochs * sum(len(row.input_ids) for row in rows),
            "seconds": seconds,
            "reference_seconds": reference_seconds,
            "samples_per_second": args.epochs * len(rows) / seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() or None,  # also of evaluation
        }
    report(results, samples, out)
    return results


def try_to_save(model, tokenizer, out):
    """Saves all but the weights, and these on trial: what cannot be saved fails before training."""
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except Exception as error:  # from several libraries
        raise Mistake(f"the model cannot be saved in {out}: {error}") from None
    for file in out.glob("*.safetensors"):
        file.unlink()


def report(results, samples, out):
    """Writes metrics.json and samples.jsonl; prints the metrics side by side, and some samples."""
    write(out / "metrics.json", [results])
    names = list(samples)  # before and after, or eval
    lines = []
    for prompt in samples[names[0]]:
        lines.append({"prompt": prompt} | {name: samples[name][prompt] for name in names})
    write(out / "samples.jsonl", lines)
    print(f"\n{'':28}" + "".join(f"{name:>12}" for name in names))
    for metric in results[names[0]]:
        values = [results[name][metric] for name in names]
        if None not in values:
            print(f"{metric:28}" + "".join(f"{value:12.3f}" for value in values))
    for line in lines[:: math.ceil(len(lines) / 4)]:
        print("\n" + " ".join(line["prompt"].split())[-90:])
        for name in names:
            print(f"{name:>8}:  {line[name][0]}")


def write(path, values, mode="w"):
    """Writes each value as a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def main(argv=None):
    """The command line. Errors that the user can fix end in one line, and exit code 2."""
    torch.set_flush_denormal(True)  # arithmetic with denormal numbers is very slow on a CPU
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not know every character
    try:
        return run(read_options(argv))
    except MISTAKES as error:
        if isinstance(error, DatasetsError):
            error = error.__cause__ or error  # where the reason is
        print(f"ulma.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
