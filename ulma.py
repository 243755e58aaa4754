"""ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference.

A reference implementation of Cai et al., arXiv 2312.02554, in one file, to read beside the paper.

    python ulma.py --method ulma                  # the example in data/, offline, half a minute
    python ulma.py --model Qwen/Qwen2.5-0.5B --data ratings.jsonl --learning-rate 1e-5

The first half is the paper: its losses, the log-probabilities that they need, training and
evaluation. The second half reads data and runs the command line. For adapters, checkpoints and
several GPUs there is data/trainer.py, which imports this file.

There is one departure from the paper: nobody knows log Z(x), so a constant stands for it (see
prior_log_z). The authors' code departs from the paper in three things, each a flag here: it takes
the mean over a response's tokens instead of the sum (--average), it averages positive and negative
responses separately (--balanced), and it sets log Z to 0 (--log-z 0).
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
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.hf_argparser import HfArgumentParser
from transformers.optimization import get_cosine_schedule_with_warmup

# ---- Losses ----
# Each function returns one loss for each response, not their mean. It needs torch alone, so copy
# it to wherever you need it. logps is log π_θ(y|x) and ref_logps is log π_ref(y|x), in nats;
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

    Where z = 1 the value of ref_logps does not matter, but it has to be finite: NaN would spoil
    the gradient.
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

    Before the first step π_θ = π_ref, so every response has the reward β log Z. With this constant
    that reward predicts the mean label: as σ(r_θ), or as r_θ itself in the continuous loss.
    """
    if continuous:
        return mean_label / beta
    return math.log(mean_label / (1 - mean_label)) / beta


# ---- Options ----
HERE = Path(__file__).resolve().parent
EXAMPLE = HERE / "data" / "base"  # a small language model, aligned within half a minute


def option(default, help):
    return field(default=default, metadata={"help": help})


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
    beta: float | None = option(None, "β, the scale of the reward: 0.1, for the example 3")
    log_z: float | None = option(None, "by default prior_log_z of the mean label")
    continuous: bool = option(False, "the continuous losses; z is the score")
    average: bool = option(False, "log π is the mean over the response's tokens, not the sum")
    balanced: bool = option(False, "responses of label 1 weigh as much in total as all others")
    learning_rate: float | None = option(None, "at its peak; for the example 3e-4")
    epochs: int | None = option(None, "3, for the example 5")
    batch_size: int = option(16, "rows in a forward pass")
    gradient_accumulation: int = option(1, "forward passes in a step")
    bf16: bool = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    max_length: int = option(512, "tokens; longer rows are left out")
    max_new_tokens: int = option(64, "tokens of a sample")
    seed: int = 0
    eval_only: bool = False


class Mistake(Exception):
    """An error that the user can mend."""


# These are printed in one line; any other error is a bug of ours, and keeps its traceback.
MISTAKES = (Mistake, OSError, datasets.exceptions.DatasetsError, torch.OutOfMemoryError)


def require(condition, message):
    if not condition:
        raise Mistake(message)


# ---- Log-probabilities ----


@dataclass(eq=False)
class Row:
    """A prompt and one rated response."""

    prompt: str
    input_ids: torch.Tensor  # (T,): the tokens of the prompt, of the response and of its end
    response_mask: torch.Tensor  # (T,): True on the tokens of the response and of its end
    label: float  # z: 1 for a demonstration or a thumbs-up, 0 for a thumbs-down, or a score
    weight: float = 1.0  # multiplies the loss
    ref_logp: float = math.nan  # log π_ref(y|x), once set_reference has been called
    answers: list = field(default_factory=list)  # acceptable responses, for exact match
    group: str | None = None  # exact match is also given for each group
    kind: str = ""  # plain text, or through the chat template


def pad(tensors, side="right"):
    """Sequences of different lengths as one tensor, filled up with 0: (B, T)."""
    return pad_sequence(tensors, batch_first=True, padding_side=side)


def response_logps(model, input_ids, response_mask):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t), over the response tokens of each row: (B,), in nats.

    input_ids and response_mask have shape (B, T) and are padded on the right, where a causal model
    never looks. The mask is True on the N tokens that count; it is False on the first token of a
    row, which nothing predicts. The model is any decoder-only one of transformers.
    """
    lengths = response_mask.sum(1).tolist()  # N tokens in all, one row's after another's
    row, position = response_mask.nonzero().to(input_ids.device, non_blocking=True).unbind(1)
    with logits_only_at(model, row, position - 1):  # the logits at t − 1 predict the token at t
        logits = model(input_ids=input_ids, use_cache=False).logits.squeeze(0)  # (N, vocabulary)
    token_logps = -F.cross_entropy(logits, input_ids[row, position], reduction="none")  # (N,)
    return torch.stack([of_row.sum() for of_row in token_logps.split(lengths)])


@contextmanager
def logits_only_at(model, row, position):
    """Within it the model computes its logits only at N positions: (1, N, vocabulary).

    The logits of all B × T positions would take most of the memory, and no loss reads them. The
    output head works in float32: bfloat16 would round a logit of 20 to a multiple of 1/8.
    """
    head = getattr(model, "module", model).get_output_embeddings()  # DDP has the model in .module
    forward = head.forward

    def forward_there(hidden):  # (B, T, width)
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden[row, position].unsqueeze(0).to(head.weight.dtype)).float()

    head.forward = forward_there
    try:
        yield
    finally:
        head.forward = forward


def row_logps(model, rows, args):
    """log π_θ(y|x) of a batch of rows, from one forward pass: (B,), on the model's device."""
    device = next(model.parameters()).device
    input_ids = pad([row.input_ids for row in rows]).to(device, non_blocking=True)
    response_mask = pad([row.response_mask for row in rows])
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        logps = response_logps(model, input_ids, response_mask)
    if args.average:
        logps = logps / response_mask.sum(1).to(logps.device, non_blocking=True)
    return logps


@torch.no_grad()
def all_logps(model, rows, args, title):
    """log π_θ(y|x) of all rows, in their order: (len(rows),), on the CPU."""
    logps = torch.empty(len(rows))
    for indices in tqdm(longest_first(rows, args.batch_size), title):
        logps[indices] = row_logps(model, [rows[i] for i in indices], args).cpu()
    require(logps.isfinite().all(), "log π(y|x) is not finite: try a lower --learning-rate")
    return logps


def longest_first(rows, batch_size):
    """Batches of indices. The longest rows come first: if memory is short, it is so at once."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids), reverse=True)
    return chunks(order, batch_size)


def chunks(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


def mean(values):
    return sum(values) / len(values) if values else None


# ---- What a run needs before its first step: log π_ref, weights, log Z ----


def set_reference(reference, rows, args):
    """Stores log π_ref(y|x) in each row, so that training needs no second model in memory."""
    ref_logps = all_logps(reference, rows, args, "log π_ref")
    for row, ref_logp in zip(rows, ref_logps.tolist()):
        row.ref_logp = ref_logp


def balance(rows):
    """Scales the weights so that rows of label 1 weigh as much in total as all others.

    The authors' code does this within each batch.
    """
    total = sum(row.weight for row in rows)
    positive = sum(row.weight for row in rows if row.label == 1)
    require(0 < positive < total, "--balanced needs rows of label 1 and other rows")
    for row in rows:
        part = positive if row.label == 1 else total - positive
        row.weight *= total / 2 / part


def default_log_z(rows, args):
    """prior_log_z of the weighted mean label, or 0 where the loss has no log Z."""
    only_demonstrations = all(row.label == 1 for row in rows)
    if args.method == "sft" or (args.method == "ulma" and only_demonstrations):
        return 0.0
    mean_label = sum(row.weight * row.label for row in rows) / sum(row.weight for row in rows)
    possible = args.continuous or 0 < mean_label < 1
    require(possible, f"the mean label is {mean_label:g}, which no log Z predicts: give --log-z")
    return prior_log_z(mean_label, args.beta, args.continuous)


def prepare(rows, args):
    """The rows to train on, with their weights; also sets log Z, unless it is given."""
    if args.balanced:
        balance(rows)
    if args.log_z is None:
        args.log_z = default_log_z(rows, args)
    if args.method == "sft":
        rows = [row for row in rows if row.label == 1]
    require(rows, f"{args.data} has no row of label 1, which SFT needs")
    print(f"{args.method}: {len(rows)} rows, β {args.beta:g}, β log Z {args.beta * args.log_z:.3g}")
    print(f"learning rate {args.learning_rate:g}, {args.epochs:g} epochs")
    return rows


# ---- Training ----


def batch_losses(model, rows, args):
    """The weighted loss and the reward of each row of a batch: (B,), (B,)."""
    logps = row_logps(model, rows, args)
    numbers = torch.tensor([(row.ref_logp, row.label, row.weight) for row in rows])
    ref_logps, labels, weights = numbers.to(logps.device, non_blocking=True).unbind(1)
    if args.method == "sft":
        losses = sft_loss(logps)
    else:
        loss = ulma_loss if args.method == "ulma" else pointwise_dpo_loss
        losses = loss(logps, ref_logps, labels, args.beta, args.log_z, args.continuous)
    rewards = implicit_reward(logps.detach(), ref_logps, args.beta, args.log_z)
    return weights * losses, rewards


def train(model, rows, args, out, losses_of=batch_losses):
    """Minimises the mean loss of the rows, and adds a line to out/log.jsonl every ten steps.

    To train with a loss of your own, pass a function with batch_losses's arguments and results.
    """
    rng = random.Random(args.seed)
    steps = []  # a step is a list of batches, whose gradients add up; a batch is a list of rows
    for _ in range(args.epochs):
        batches = batches_of_like_length(rows, args.batch_size, rng)
        steps += chunks(batches, args.gradient_accumulation)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, weight_decay=0.0, fused=True
    )
    # The rate rises from 0 over a tenth of the steps (so step 1 changes nothing), then falls to 0.
    schedule = get_cosine_schedule_with_warmup(optimizer, len(steps) // 10, len(steps))
    losses, rewards, labels = [], [], []  # of the rows since the last line of the log
    progress = tqdm(steps, "training")
    for step, batches in enumerate(progress, 1):
        count = sum(len(batch) for batch in batches)
        for batch in batches:
            batch_loss, batch_rewards = losses_of(model, batch, args)
            (batch_loss.sum() / count).backward()
            losses.append(batch_loss.detach())
            rewards.append(batch_rewards)
            labels += [row.label for row in batch]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == len(steps):  # reading a value makes the CPU wait for the GPU
            line = {"step": step, "learning_rate": learning_rate, "gradient_norm": norm.item()}
            line |= log_line(torch.cat(losses).cpu(), torch.cat(rewards).cpu(), labels)
            finite = math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"])
            require(finite, f"step {step}: the loss is not finite: try a lower --learning-rate")
            write(out / "log.jsonl", [line], "a")
            progress.set_postfix(loss=line["loss"])
            losses, rewards, labels = [], [], []


def log_line(losses, rewards, labels):
    """The mean loss, and the mean reward of rows with high and with low labels."""
    positive = torch.tensor(labels) > 0.5
    return {
        "loss": losses.mean().item(),
        "reward_positive": mean(rewards[positive].tolist()),
        "reward_negative": mean(rewards[~positive].tolist()),
    }


def batches_of_like_length(rows, batch_size, rng):
    """Batches of rows of similar length, which need little padding, in random order.

    Lengths are blurred before they are sorted, so that every epoch has other batches. A last,
    smaller batch is drawn at random, for its rows weigh more than others.
    """
    rows = rng.sample(rows, len(rows))
    whole = len(rows) - len(rows) % batch_size
    by_length = sorted(rows[:whole], key=lambda row: len(row.input_ids) * rng.uniform(0.85, 1.15))
    batches = chunks(by_length, batch_size) + chunks(rows[whole:], batch_size)
    return rng.sample(batches, len(batches))


# ---- Evaluation ----
SAMPLES = 4  # for each prompt


@dataclass
class Sample:
    text: str
    length: int  # in tokens, without the end
    ended: bool  # False if it was cut off at --max-new-tokens


def evaluate(model, tokenizer, rows, args):
    """Metrics, None where they are undefined, and {prompt: texts of its samples}.

    Samples are drawn for the prompts that have acceptable answers or, if none has, for a few.
    sample_distinct is the share of different texts among all samples.
    """
    logps = all_logps(model, rows, args, "log π")
    ref_logps = torch.tensor([row.ref_logp for row in rows])
    labels = torch.tensor([row.label for row in rows])
    asked = list({row.prompt: row for row in rows if row.answers}.values())
    samples = sample(model, tokenizer, asked or rows[:SAMPLES], args)
    drawn = [one for samples_of_row in samples for one in samples_of_row]
    metrics = {
        "perplexity": perplexity(logps, labels, rows, args),
        "reward_auc": concordance(logps - ref_logps, labels),  # rewards have the same order
        "sample_length": mean([one.length for one in drawn]),
        "sample_ended": mean([one.ended for one in drawn]),
        "sample_distinct": len({one.text for one in drawn}) / len(drawn),
    }
    hits = defaultdict(list)
    for row, samples_of_row in zip(asked, samples):
        matches = [one.ended and one.text in row.answers for one in samples_of_row]
        hits["exact_match"] += matches
        if row.group is not None:
            hits[f"exact_match/{row.group}"] += matches
    metrics |= {name: mean(matches) for name, matches in hits.items()}
    texts = [[one.text for one in samples_of_row] for samples_of_row in samples]
    return metrics, {row.prompt: some for row, some in zip(asked or rows, texts)}


def perplexity(logps, labels, rows, args):
    """exp of the mean −log π of a token, over the responses of label 1."""
    lengths = torch.tensor([row.response_mask.sum() for row in rows])
    nats = -logps * lengths if args.average else -logps
    good = labels == 1
    if not good.any():
        return None
    return (nats[good].sum() / lengths[good].sum()).double().exp().item()


def concordance(scores, labels):
    """P(score_i > score_j | label_i > label_j), ties counting ½; for labels 0 and 1 the ROC AUC."""
    wins, pairs = 0.0, 0
    for score, label in zip(scores, labels):
        lower = scores[labels < label]
        wins += (score > lower).sum().item() + (score == lower).sum().item() / 2
        pairs += len(lower)
    return wins / pairs if pairs and scores.isfinite().all() else None


@torch.no_grad()
def sample(model, tokenizer, rows, args):
    """For each row a list of SAMPLES responses to its prompt, from π_θ at temperature 1."""
    torch.manual_seed(args.seed)
    ends = {tokenizer.eos_token_id} | {row.input_ids[-1].item() for row in rows}
    stored = model.generation_config  # its temperature or top_p would change π_θ
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=SAMPLES,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id,
    )
    samples = [[] for _ in rows]
    for indices in tqdm(longest_first(rows, args.batch_size), "samples"):
        prompts = [rows[i].input_ids[~rows[i].response_mask] for i in indices]
        input_ids = pad(prompts, "left").to(model.device)
        attention_mask = pad([torch.ones_like(prompt) for prompt in prompts], "left")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            output = model.generate(input_ids, attention_mask=attention_mask.to(model.device))
        for n, tokens in enumerate(output[:, input_ids.shape[1] :].tolist()):
            length = 0
            while length < len(tokens) and tokens[length] not in ends:
                length += 1
            text = tokenizer.decode(tokens[:length]).strip()
            samples[indices[n // SAMPLES]].append(Sample(text, length, length < len(tokens)))
    model.generation_config = stored
    return samples


# ==== Here ends the paper. Below, data is read, and the command line calls what stands above ====


# ---- Data ----
# A record is what stands in a line of the user's data: a rated response, or a pair of responses.
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")


def load_rows(args, tokenizer):
    """Rows to train on, none with --eval-only, and rows to test on."""
    splits = find_splits(args)
    has_test = args.test_split in splits or args.test_split != "test"
    rows = []
    if not (args.eval_only and has_test):
        rows = read_split(splits, args.train_split, args, tokenizer)
    if has_test:
        return rows, read_split(splits, args.test_split, args, tokenizer)
    prompts = sorted({row.prompt for row in rows})
    held_out = set(random.Random(args.seed).sample(prompts, math.ceil(len(prompts) / 10)))
    print(f"there is no test split, so {len(held_out)} of {len(prompts)} prompts are held out")
    test_rows = [row for row in rows if row.prompt in held_out]
    rows = [row for row in rows if row.prompt not in held_out]
    require(rows, f"{args.data} has no test split, and only one prompt")
    return [] if args.eval_only else rows, test_rows


def find_splits(args):
    """{name: records} for each split. JSON lines are read as they stand, all else by datasets."""
    path = Path(args.data, args.data_dir or "")
    name = args.test_split if args.eval_only else args.train_split  # if there is but one file
    if path.suffix == ".jsonl":
        return {name: json_lines([path])}
    files = defaultdict(list)
    for file in sorted(path.glob("*.jsonl")):
        split = re.sub(r"[-_]?\d+(-of-\d+)?$", "", file.stem)  # train-00000-of-00002 is of train
        files[split].append(file)
    if files:
        return {split: json_lines(parts) for split, parts in files.items()}
    if path.is_file():
        splits = datasets.load_dataset(str(path.parent), data_files={name: path.name})
    else:
        splits = datasets.load_dataset(args.data, data_dir=args.data_dir)
    for split in splits.values():
        label = split.features.get("label")
        is_class = isinstance(label, datasets.ClassLabel)  # whose numbers follow the alphabet
        require(not is_class, f"the label of {args.data} is a {label}: write the numbers 0 and 1")
        is_csv = split.info.builder_name == "csv"
        require(not is_csv, f"{args.data}: CSV loses texts such as NA, so write JSON lines")
    return splits


def json_lines(files):
    """The records in files of JSON lines."""
    for file in files:
        number = 0
        try:
            with file.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):  # noqa: B007
                    if line.strip():
                        yield json.loads(line)
        except ValueError as error:  # neither JSON nor UTF-8
            raise Mistake(f"{file}, line {number} or the next: {error}") from None


def read_split(splits, name, args, tokenizer):
    """The rows of a split. Prints what was left out, and the first row as the model sees it."""
    place = f"{args.data}, {name}"
    require(name in splits, f"{place}: there is no such split, only {', '.join(splits)}")
    rows, too_long, unread = [], 0, set()
    for number, record in enumerate(tqdm(splits[name], f"{name} rows"), 1):
        try:
            found, other_columns = read_record(record, args, tokenizer)
        except Mistake as mistake:
            raise Mistake(f"{place}, row {number}: {mistake}") from None
        unread |= other_columns
        for row in found:
            if len(row.input_ids) <= args.max_length:
                rows.append(row)
            else:
                too_long += 1
    require(rows, f"{place}: there is no row, or none within --max-length {args.max_length}")
    positive, kind = sum(row.label == 1 for row in rows), rows[0].kind
    ids, mask = rows[0].input_ids, rows[0].response_mask
    print(f"{name}: {len(rows)} rows, {positive} with label 1; {too_long} too long, left out")
    print(f"  columns not read: {', '.join(sorted(unread)) or 'none'}; the first row, {kind}:")
    print(f"  prompt   {tokenizer.decode(ids[~mask])!r}")
    print(f"  response {tokenizer.decode(ids[mask])!r}")
    return rows


def read_record(record, args, tokenizer):
    """The row of a record, or the two rows of a pair; and the columns that were not read."""
    require(isinstance(record, dict), "it is no object with columns")
    rest = {name: value for name, value in record.items() if value is not None}
    prompt, completion = rest.pop("prompt", None), rest.pop("completion", None)
    chosen, rejected = rest.pop("chosen", None), rest.pop("rejected", None)
    answers, group = rest.pop("answers", []), rest.pop("group", None)
    weight = rest.pop("weight", 1.0)
    label = "score" if args.continuous and "score" in rest else "label"
    if chosen or rejected:
        require(not completion, "it has a completion and a pair as well")
        rated = [(chosen, 1), (rejected, 0)]
    else:
        rated = [(completion, rest.pop(label, None))]
    is_weight = isinstance(weight, int | float) and 0 <= weight < math.inf
    require(is_weight, f"its weight is {weight!r}, not a number from 0 on")
    require(isinstance(answers, list), f"its answers are {answers!r}, not a list of texts")
    rows = []
    for response, z in rated:
        is_score = args.continuous and isinstance(z, float) and 0 < z < 1
        told = f"its {label} is {z!r}, not 0 or 1 (with --continuous: from 0 to 1, a demonstration)"
        require(z in (0, 1) or is_score, f"{told}; its columns are {', '.join(record)}")
        row = read_row(prompt, response, answers, tokenizer)
        row.label, row.weight, row.group = float(z), float(weight), group
        rows.append(row)
    return rows, set(rest)


def read_row(prompt, response, answers, tokenizer):
    """A row, still without its label."""
    for value in (prompt, response):
        as_text = isinstance(value, str) and MESSAGES_AS_TEXT.match(value)
        require(not as_text, f"it has a list of messages, written as a text: {value!r:.80}")
    is_chat = isinstance(prompt, list) or isinstance(response, list)
    read = read_chat if is_chat else read_text
    prompt_text, opening, answer = read(prompt, response, tokenizer)
    # A chat template writes what begins a text, such as <bos>, itself; else the tokenizer does.
    prompt_ids = tokenizer(prompt_text, add_special_tokens=not is_chat).input_ids
    ids = tokenizer(prompt_text + opening + answer, add_special_tokens=not is_chat).input_ids
    if not is_chat and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    # A token that spans the boundary between prompt and response belongs to the response.
    start = len(os.path.commonprefix([prompt_ids, ids]))
    require(start > 0, f"its prompt {prompt_text[:60]!r} has no token of its own")
    row = Row(prompt_text, torch.tensor(ids), torch.arange(len(ids)) >= start, math.nan)
    row.kind = "through the chat template" if is_chat else "plain text"
    for text in answers:  # as samples are: tokens that have been decoded
        answer_ids = tokenizer(opening + text, add_special_tokens=False).input_ids
        row.answers.append(tokenizer.decode(answer_ids).strip())
    return row


def read_text(prompt, response, tokenizer):
    """Plain text is taken as it stands: the prompt, nothing, the response."""
    require(isinstance(response, str), f"its response is {response!r}, not a text")
    if prompt is None:  # a transcript, as in HH-RLHF: its last turn is the response
        before, turn, response = response.rpartition("\n\nAssistant:")
        prompt = before + turn
    require(isinstance(prompt, str) and prompt, f"its prompt is {prompt!r}, not a text")
    if response.rstrip().endswith(tokenizer.eos_token):
        response = response.rstrip().removesuffix(tokenizer.eos_token)
    require(response.strip(), "its response is empty")
    return prompt, "", response


def read_chat(prompt, response, tokenizer):
    """The prompt, what the chat template writes before the answer, the answer with its end."""
    messages = as_messages(response, "assistant")
    asked = as_messages(prompt or [], "user")
    if len(messages) == 1:
        messages = asked + messages
    require(all(m in messages for m in asked), "its conversation does not hold its prompt")
    *asked, last = messages
    is_answer = asked and asked[-1]["role"] != "assistant" and last["role"] == "assistant"
    require(is_answer, "it does not end with one answer of the assistant")
    answer = last["content"].strip()
    require(answer, "its response is empty")

    opened = through_template(asked, tokenizer, add_generation_prompt=True)
    whole = through_template(messages, tokenizer)
    contents = [message["content"].strip() for message in messages]
    for text in filter(None, contents):
        times = sum(content.count(text) for content in contents)
        require(whole.count(text) >= times, f"the template leaves out or changes {text[:60]!r}")
    require(whole.startswith(opened), f"the template's {opened[-40:]!r} is not before the answer")

    mark = "\ue000"  # in place of the answer, to see what the template writes after it
    marked = through_template([*asked, last | {"content": mark}], tokenizer)
    after = marked.rpartition(mark)[2]
    opening = whole.removeprefix(opened).removesuffix(after).rpartition(answer)[0]
    end = re.match(r"\s*\S+", after)  # such as <|im_end|>
    return opened, opening, answer + (end[0] if end else tokenizer.eos_token)


def through_template(messages, tokenizer, **options):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of the model's, and may raise anything
        raise Mistake(f"the chat template: {error}") from None


def as_messages(value, role):
    """A text, or a list of messages, as messages of a role and a content."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    are_objects = isinstance(value, list) and all(isinstance(part, dict) for part in value)
    require(are_objects, f"{value!r:.80} is neither a text nor a list of messages")
    messages = []
    for message in value:
        given = {key: part for key, part in message.items() if part not in (None, "", [], {})}
        plain = {"role": given.pop("role", None), "content": given.pop("content", "")}
        is_plain = not given and plain["role"] in ROLES and isinstance(plain["content"], str)
        require(is_plain, f"a message has a role of {ROLES} and a text, no more: {message}")
        messages.append(plain)
    return messages


# ---- Command line ----


def read_options(argv=None):
    """The options of a command line. Some defaults follow the model."""
    parser = HfArgumentParser(Options, prog="ulma.py")
    args = Options(**vars(parser.parse_args(argv)))
    is_example = Path(args.model).resolve() == EXAMPLE
    known = is_example or args.learning_rate or args.eval_only
    require(known, "--learning-rate is needed: try 1e-5 for 7B parameters, 1e-4 for 135M")
    defaults = (3.0, 3e-4, 5) if is_example else (0.1, 1e-5, 3)
    for name, default in zip(("beta", "learning_rate", "epochs"), defaults):
        if getattr(args, name) is None:
            setattr(args, name, default)
    check_numbers(args)
    return args


def check_numbers(args):
    for name in "beta learning_rate epochs batch_size gradient_accumulation max_length".split():
        value = getattr(args, name)
        require(0 < value < math.inf, f"--{name.replace('_', '-')} is {value}; it must be over 0")
    require(math.isfinite(args.log_z or 0.0), "--log-z must be finite")


def load_tokenizer(name):
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:  # which does not always name it
        raise Mistake(f"the model {name}: {error}") from None
    require(tokenizer.eos_token, f"the tokenizer of {name} has no eos_token")
    return tokenizer


def load_model(name, tokenizer):
    """The model in float32, in evaluation mode: dropout would make π_θ differ from π_ref."""
    vocabulary = load_tokenizer(name).get_vocab()
    require(vocabulary == tokenizer.get_vocab(), f"{name} has not the vocabulary of --model")
    quantised = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    require(not quantised, f"the weights of {name} are quantised, so they cannot be trained")
    model, report = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    require(not report["missing_keys"], f"{name} lacks weights: {sorted(report['missing_keys'])}")
    return model.eval()


def run(args):
    """Reads data, scores the reference, trains, evaluates. Returns what metrics.json holds."""
    tokenizer = load_tokenizer(args.model)
    rows, test_rows = load_rows(args, tokenizer)
    if not args.eval_only:
        rows = prepare(rows, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = load_model(args.reference or args.model, tokenizer).to(device)
    out = Path(args.output_dir or time.strftime(f"runs/{args.method}-%y%m%d-%H%M%S"))
    require(not any(out.glob("*")), f"--output-dir {out} is not empty")
    write(out / "options.json", [asdict(args)], "x")  # "x": of two runs at once, one stops here
    print(f"--model {args.model} on {device}; results in {out}")

    start = time.perf_counter()
    if args.reference or not args.eval_only:
        set_reference(reference, test_rows, args)
        set_reference(reference, rows, args)
    reference_seconds = time.perf_counter() - start
    if args.reference:
        del reference  # makes room for the next model
        policy = load_model(args.model, tokenizer).to(device)
    else:
        policy = reference  # π_θ starts as π_ref

    results, samples = {"options": asdict(args)}, {}
    if args.eval_only:
        results["eval"], samples["eval"] = evaluate(policy, tokenizer, test_rows, args)
    else:
        for part in (policy.config, policy.generation_config, tokenizer):
            part.save_pretrained(out)  # what cannot be saved is found out before training
        results["before"], samples["before"] = evaluate(policy, tokenizer, test_rows, args)
        start = time.perf_counter()
        train(policy, rows, args, out)
        results["train"] = speed(rows, args, time.perf_counter() - start, reference_seconds)
        policy.save_pretrained(out)
        results["after"], samples["after"] = evaluate(policy, tokenizer, test_rows, args)
    report(results, samples, out)
    return results


def speed(rows, args, seconds, reference_seconds):
    """What training took."""
    samples = args.epochs * len(rows)
    return {
        "samples": samples,
        "tokens": args.epochs * sum(len(row.input_ids) for row in rows),
        "seconds": seconds,
        "reference_seconds": reference_seconds,
        "samples_per_second": samples / seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() or None,
    }


def report(results, samples, out):
    """Writes metrics.json and samples.jsonl; prints metrics and some samples, side by side."""
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
    """The command line. What the user can mend is told in one line, with exit code 2."""
    torch.set_flush_denormal(True)  # arithmetic with denormal numbers is very slow on a CPU
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not know every character
    try:
        return run(read_options(argv))
    except MISTAKES as error:
        if isinstance(error, datasets.exceptions.DatasetsError):
            error = error.__cause__ or error  # what went wrong
        print(f"ulma.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
