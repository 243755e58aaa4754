"""ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference, in one file.

Cai et al., arXiv 2312.02554, to be read with the paper in the other window. The first half is the paper, in its order;
below a line that says so comes what any such program needs: data, processes, models, checkpoints, options (--help).
With --save-steps, an interrupted run goes on when the same command is given again. SPDX-License-Identifier: MIT

    python ulma.py --method ulma --output-dir runs/first                  # on data/, offline, in under a minute
    python ulma.py --eval-only --model runs/first --reference data/base   # any model, against any reference
    python ulma.py --model Qwen/Qwen2.5-0.5B --data Anthropic/hh-rlhf --data-dir harmless-base
    torchrun --nproc-per-node 8 ulma.py --model ... --data ...            # the same on eight GPUs
"""
import gc, json, math, os, random, shutil, sys, tempfile, time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal, Optional

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg, HfArgumentParser

# ---- Losses ---------------------------------------------------------------------------------------------------------
# Pure functions of tensors, unreduced. logps is log π_θ(y|x), ref_logps log π_ref(y|x), in nats, labels z.
# All have one shape, usually (B,), an element for a response; an element may as well be a token. They need torch alone.


def implicit_reward(logps, ref_logps, beta=0.1, log_z=0.0):
    """r_θ(x,y) = β (log π_θ(y|x) − log π_ref(y|x) + log Z(x)), in units of reward.

    With the true log Z(x) it is the reward that π_θ is optimal for. log_z is a number, or a tensor that broadcasts,
    such as one value a row: (B,), or (B, 1) over tokens.
    """
    return beta * (logps - ref_logps + log_z)


def sft_loss(logps):
    """SFT: −log π_θ(y|x), for demonstrations."""
    return -logps


def pointwise_dpo_loss(logps, ref_logps, labels, beta=0.1, log_z=0.0, continuous=False):
    """Point-wise DPO. Binary: −z log σ(r_θ) − (1−z) log(1 − σ(r_θ)). Continuous: (z − r_θ)².

    labels may be bool, int or float: 0 or 1, or in between a probability, for the binary loss, any for the continuous.
    """
    reward = implicit_reward(logps, ref_logps, beta, log_z)
    z = labels.to(logps.dtype)
    if continuous:
        return (z - reward) ** 2
    return F.binary_cross_entropy_with_logits(reward, z, reduction="none")


def ulma_loss(logps, ref_logps, labels, beta=0.1, log_z=0.0, continuous=False):
    """ULMA: SFT where z = 1, point-wise DPO elsewhere.

    Where labels == 1 the loss does not depend on ref_logps: any finite number will do there. A binary label strictly
    between 0 and 1 is not mixed with SFT: it gets point-wise DPO's cross-entropy.
    """
    preference = pointwise_dpo_loss(logps, ref_logps, labels, beta, log_z, continuous)
    return torch.where(labels == 1, sft_loss(logps), preference)


def prior_log_z(mean_label, beta=0.1, continuous=False):
    """A log Z(x) for when the true one is unknown: the one that makes r_θ predict the mean label where π_θ = π_ref.

    So β log Z = logit(mean label), or the mean label for the continuous loss: the intercept of a regression of z on the
    log-ratio (which is 0 on every row at the start). On balanced binary labels that is 0, as in the authors' code.
    Derived for point-wise DPO; ULMA, whose preference term sees no positives, borrows it.
    """
    if continuous:
        return mean_label / beta
    return math.log(mean_label / (1 - mean_label)) / beta


def unlikelihood_loss(logps, labels):
    """Unlikelihood, a baseline: −log π_θ(y|x) where z = 1, +log π_θ(y|x) elsewhere, which nothing bounds from below."""
    return torch.where(labels == 1, -logps, logps)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Pair-wise DPO, a baseline (Rafailov et al. 2023): −log σ(r_θ(x,y_w) − r_θ(x,y_l)), in which log Z(x) cancels."""
    chosen = implicit_reward(chosen_logps, ref_chosen_logps, beta)
    rejected = implicit_reward(rejected_logps, ref_rejected_logps, beta)
    return -F.logsigmoid(chosen - rejected)


# ---- Log-probabilities ----------------------------------------------------------------------------------------------
def response_logps(model, input_ids, response_mask):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) over each row's response tokens: (B,), float32, nats.

    input_ids and response_mask are (B, T), padded on the right, where a causal model never looks. response_mask is true
    on the tokens that count, the end of sequence among them, and never on a row's first, which nothing predicts; a row
    with none gives 0. The model is any decoder-only one of transformers: its own forward scales or caps the logits.
    """
    # The logits at t predict token t + 1. With a mask that is on the CPU nothing here waits for the GPU.
    row, before = response_mask[:, 1:].nonzero().to(input_ids.device, non_blocking=True).unbind(1)
    # Most of the memory goes into logits: let the output head see only the N positions that count.
    head = getattr(model, "module", model).get_output_embeddings()  # .module: where a Trainer wraps it
    hook = head.register_forward_pre_hook(lambda module, args: args[0][row, before].unsqueeze(0))
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits.squeeze(0)  # (N, V)
    finally:
        hook.remove()
    token_logps = -F.cross_entropy(logits.float(), input_ids[row, before + 1], reduction="none")
    return token_logps.new_zeros(len(input_ids)).index_add(0, row, token_logps)


# ---- Training -------------------------------------------------------------------------------------------------------
# A Row (see Data) is a rated response: `rated` tells which of its `input_ids` count, `label` is z, and `ref_logp` is
# log π_ref(y|x), None where no loss reads it. One process takes a batch whole; of several (WORLD) each takes its share.


def row_losses(model, rows, options):
    """The loss of --method for each row: (len(rows),). Sets row.reward: r_θ, if row.ref_logp is known."""
    both = responses(rows)  # the rows; in pair-wise DPO all chosen, then all rejected
    logps = batch_logps(model, both)
    ref_logps = torch.tensor([row.ref_logp or 0.0 for row in both]).to(logps.device, non_blocking=True)  # 0 if unknown
    labels = torch.tensor([row.label for row in both]).to(logps.device, non_blocking=True)
    for row, reward in zip(both, implicit_reward(logps.detach(), ref_logps, options.beta, options.log_z)):
        row.reward = reward

    if options.method == "sft":
        return sft_loss(logps)
    if options.method == "unlikelihood":
        return unlikelihood_loss(logps, labels)
    if options.method == "dpo":
        chosen, rejected = logps.chunk(2)
        ref_chosen, ref_rejected = ref_logps.chunk(2)
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, options.beta)
    loss = pointwise_dpo_loss if options.method == "pointwise-dpo" else ulma_loss
    return loss(logps, ref_logps, labels, options.beta, options.log_z, options.continuous)


def train(model, rows, options, out):
    """Minimises the mean of row_losses, from the checkpoint in `out` on, if any. Returns figures for metrics.json."""
    rng = random.Random(options.seed)
    plan = []  # all steps, each a list of --gradient-accumulation batches
    for _ in range(options.epochs):
        plan += chunks(bucketed_batches(rows, options.batch_size * WORLD, rng), options.gradient_accumulation)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(plan) // 10, len(plan))
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done, log = load_checkpoint(out, state, len(plan))
    log_file = open(out / "log.jsonl" if RANK == 0 else os.devnull, "w", buffering=1)  # a line at a time
    log_file.writelines(log)
    total_loss, seen, logged = 0.0, [], done  # since the last line of the log, which was at step `logged`
    samples, tokens, start = 0, 0, time.perf_counter()
    model.train()  # with dropout at 0 (see load_model), so that π_θ starts at π_ref
    steps = tqdm(plan[done:], "train", len(plan), initial=done, unit="step", disable=RANK > 0)
    for step, batches in enumerate(steps, done + 1):
        for batch in batches:
            mine, weights = share(batch)  # weight 0: only there to fill up the share
            losses = row_losses(model, mine, options) * weights.to(model.device, non_blocking=True)
            loss = losses.sum() / sum(map(len, batches))  # batches and processes add up to the mean over the step
            (loss * WORLD).backward()  # FSDP takes the mean over the processes
            total_loss += loss.detach()
            samples += len(responses(batch))
            tokens += sum(len(row.input_ids) for row in responses(batch))
            counted = responses(mine[:int(weights.sum())])
            seen += [(row.label, row.reward) for row in counted if row.ref_logp is not None]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        line = {"step": step, "learning_rate": schedule.get_last_lr()[0]}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        saves = options.save_steps > 0 and (step % options.save_steps == 0 or step == len(plan))
        if saves or step % 10 == 0 or step == len(plan):  # the only wait for the GPU
            line["loss"] = sum(gather([total_loss.item()])) / (step - logged)
            line["reward_positive"] = mean(gather([reward.item() for label, reward in seen if label > 0.5]))
            line["reward_negative"] = mean(gather([reward.item() for label, reward in seen if label <= 0.5]))
            line["gradient_norm"] = (norm.full_tensor() if WORLD > 1 else norm).item()
            line["tokens_per_second"] = tokens / (time.perf_counter() - start)
            check(math.isfinite(line["loss"] + line["gradient_norm"]),
                  f"the loss or its gradient is not finite at step {step}; try a lower --learning-rate")
            total_loss, seen, logged = 0.0, [], step
            log.append(json.dumps(line) + "\n")
            log_file.write(log[-1])
        if saves:
            save_checkpoint(out, state, {"step": step, "steps": len(plan), "log": log})
    seconds = time.perf_counter() - start
    return {"from_step": done, "samples": samples, "tokens": tokens, "seconds": seconds,
            "samples_per_second": samples / seconds, "peak_memory_bytes": torch.cuda.max_memory_allocated() or None}


# ---- Evaluation -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def sample(model, tokenizer, rows, options, title):
    """Draws completions of the rows' prompts at temperature 1, that is from π_θ itself: lists in row.samples[title]."""
    lengths = [len(ids) + 2 for row in rows if row.references for ids in tokenizer(row.references).input_ids]
    new_tokens = min(max(lengths, default=64), options.max_length // 2)
    torch.manual_seed(options.seed + RANK)
    rows = sorted(rows, key=lambda row: row.prompt_length, reverse=True)
    for batch in tqdm(chunks(rows, 8 * options.batch_size * WORLD), f"{title}: generation", disable=RANK > 0):
        prompts = [row.input_ids[:row.prompt_length][-(options.max_length - new_tokens):] for row in share(batch)[0]]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,  # all neutral
            num_return_sequences=SAMPLES, max_new_tokens=new_tokens,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, synced_gpus=WORLD > 1)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        for row, completions in zip(batch, gather(chunks(texts, SAMPLES))):
            row.samples[title] = completions


def concordance(scores, labels):
    """P(score_i > score_j | label_i > label_j), ties ½: for labels 0 and 1 the ROC AUC. None without such a pair."""
    wins, pairs = 0.0, 0
    for score, label in zip(scores, labels):
        lower = scores[labels < label]
        wins += ((score > lower).sum() + (score == lower).sum() / 2).item()
        pairs += len(lower)
    return wins / pairs if pairs else None


def evaluate(model, tokenizer, rows, options, title):
    """{metric: value, None where there is nothing to compute it of}: perplexity of demonstrations, reward AUC, exact
    match of all prompts and of each group. Leaves row.logp, and completions in row.samples[title]."""
    compute_logps(model, rows, options, "logp")
    demonstrations = [row for row in rows if row.label == 1]
    nats, tokens = -sum(row.logp for row in demonstrations), sum(row.rated.sum().item() for row in demonstrations)
    metrics = {"perplexity": math.exp(min(nats / tokens, 700)) if tokens else None}  # more than that overflows

    if title == "before" and not options.reference:  # the model still is the reference
        for row in rows:
            row.ref_logp = row.logp
    compared = [row for row in rows if row.ref_logp is not None]
    log_ratios = torch.tensor([row.logp - row.ref_logp for row in compared])  # ordered as r_θ
    metrics["reward_auc"] = concordance(log_ratios, torch.tensor([row.label for row in compared]))

    with_references = list({row.prompt: row for row in rows if row.references}.values())  # one row of each prompt
    asked = with_references or list({row.prompt: row for row in rows}.values())[:SAMPLES]
    sample(model, tokenizer, asked, options, title)
    hits = defaultdict(list, exact_match=[])  # listed even if no row has references: then None
    for row in with_references:
        found = [text.strip() in map(str.strip, row.references) for text in row.samples[title]]
        hits["exact_match"] += found
        if row.group:
            hits[f"exact_match/{row.group}"] += found
    return metrics | {name: mean(values) for name, values in hits.items()}


def report(results, rows):
    """Prints the metrics of each evaluation, {title: metrics}, as a table, and some completions side by side."""
    print("\n" + " " * 28 + "".join(f"{title:>12}" for title in results))
    for name in list(results.values())[0]:
        values = [metrics[name] for metrics in results.values()]
        print(f"{name:28}" + "".join(f"{'n/a':>12}" if value is None else f"{value:12.3f}" for value in values))
    sampled = [row for row in rows if row.samples]
    for row in sampled[::max(1, math.ceil(len(sampled) / SAMPLES))]:
        print("\n" + " ".join(row.prompt.split())[-110:])
        for title in results:
            print(f"{title:>8}:  {row.samples[title][0].strip()}")


# ==== Here ends what the paper needs. What follows is practice: data, processes, models, checkpoints, options =========

SAMPLES = 4  # completions of a prompt, prompts shown, and prompts that get completions where none has references
RANK = int(os.environ.get("RANK", 0))  # this process among the WORLD that torchrun starts
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ---- Data -----------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Row:
    """A rated response on its way from file to loss."""
    prompt: str
    completion: str
    label: float  # z: a score, with --continuous
    references: list  # acceptable completions, for exact match
    group: Optional[str]  # exact match is also told for each
    input_ids: Optional[torch.Tensor] = None  # (T,), prompt and response
    rated: Optional[torch.Tensor] = None  # (T,), bool, the tokens that count in log π(y|x): the row's response mask
    prompt_length: int = 0  # in tokens
    logp: Optional[float] = None  # log π_θ(y|x) at the last evaluation
    ref_logp: Optional[float] = None  # log π_ref(y|x)
    reward: Optional[torch.Tensor] = None  # r_θ(x,y) at the last training step
    rejected: Optional["Row"] = None  # in pair-wise DPO
    edited: Optional["Row"] = None  # the `chosen` of its record, if this is the `rejected`
    samples: dict = field(default_factory=dict)  # completions drawn, by evaluation


def responses(rows):
    """The rows and, in pair-wise DPO, behind them their rejected ones."""
    return rows + [row.rejected for row in rows if row.rejected is not None]


def chunks(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def mean(values):
    return sum(values) / len(values) if values else None


def parse(record, options, tokenizer):
    """Yields the rows of a record: one, or the two of a pair, of which chosen has label 1 and rejected 0.

    Messages go through the chat template. A pair without `prompt` is two conversations, prompted by all but the last
    message, or as in HH-RLHF two transcripts, prompted by what ends at the last "\\n\\nAssistant:"."""
    pair = {"chosen", "rejected"} <= record.keys()
    rating = "score" if options.continuous and "score" in record else "label"
    check(pair or {"prompt", "completion", rating} <= record.keys(), f"the columns are {', '.join(record)}; needed "
          "are prompt, completion and label (or, with --continuous, score), or chosen and rejected")
    answers = [(record["chosen"], 1), (record["rejected"], 0)] if pair else [(record["completion"], record[rating])]
    row = None  # the second row of a pair knows the first
    for completion, z in answers:
        prompt = record.get("prompt")
        if isinstance(completion, list):
            if prompt is None:
                prompt, completion = completion[:-1], completion[-1:]
            opening = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            prompt = os.path.commonprefix([opening, whole])
            completion = whole[len(prompt):].rstrip()  # some templates break the line at the end
        elif pair and prompt is None:
            opening, turn, completion = completion.rpartition("\n\nAssistant:")
            prompt = opening + turn
        check(prompt and isinstance(prompt, str), "no prompt; write a text, or end it with \\n\\nAssistant:")
        check(isinstance(completion, str) and (completion or pair), "no completion; write a text")
        check(z in (0, 1) or (options.continuous and 0 < z < 1), f"the label is {z!r}; write 1 (a demonstration or "
              "thumbs-up) or 0 (a thumbs-down), or with --continuous a score from 0 to 1")
        references = record.get("references") or []
        check(isinstance(references, list), f"references is {references!r}; write a list of texts")
        row = Row(prompt, completion, float(z), references, record.get("group"), edited=row)
        yield row


def tokenize(rows, tokenizer, max_length):
    """Sets input_ids, rated and prompt_length. Too long: prompts lose their start, but not BOS, responses their end.
    A prompt's tokens are those it shares with prompt + completion: one that spans the boundary is the response's."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts = tokenizer([row.prompt for row in rows]).input_ids
    wholes = tokenizer([row.prompt + row.completion for row in rows]).input_ids
    for row, prompt, whole in zip(rows, prompts, wholes):
        while whole[-1:] == [eos]:
            whole.pop()
        shared = len(os.path.commonprefix([prompt, whole]))
        check(shared, f"the prompt {row.prompt[:60]!r} has no token of its own; write a longer one")
        start = 1 if whole[:2] == [bos, bos] else 0  # chat templates write one, too
        prompt, response = whole[start:shared], whole[shared:] + [eos]  # so that the model learns to stop
        room = max(max_length - len(response), max_length // 2)  # each keeps at least half
        opening = 1 if prompt[0] == bos else 0
        prompt = prompt[:opening] + prompt[opening + max(len(prompt) - room, 0):]
        row.prompt_length = len(prompt)
        row.input_ids = torch.tensor((prompt + response)[:max_length])
        row.rated = torch.arange(len(row.input_ids)) >= row.prompt_length


def load_rows(options, tokenizer):
    """(training rows, test rows) of --data; without a test split a seeded tenth of the prompts is held out for it."""
    source = {"path": options.data, "name": options.data_config, "data_dir": options.data_dir}
    with naming(f"--data {options.data} is empty or unreadable (rows from 0)"), tempfile.TemporaryDirectory() as cache:
        if os.path.isfile(options.data):
            source = {"path": cache, "data_files": {"train": os.path.abspath(options.data)}}  # of whatever format
        if os.path.exists(options.data):
            files = datasets.load_dataset_builder(**source)
            splits = {split: list(datasets.load_dataset(files.name, data_files=names, split="train", cache_dir=cache))
                      for split, names in files.config.data_files.items()}  # one at a time: their columns may differ
        else:
            splits = {split: list(records) for split, records in datasets.load_dataset(**source).items()}  # the hub
        check("train" in splits or (options.eval_only and "test" in splits), f"no split train in {[*map(str, splits)]}")
    rows = {"train": [], "test": []}
    for split in rows:
        for number, record in enumerate(splits.get(split, []), 1):
            with naming(f"--data {options.data}, {split} row {number}"):
                rows[split] += parse(record, options, tokenizer)
    tokenize(rows["train"] + rows["test"], tokenizer, options.max_length)
    if "test" not in splits:
        prompts = sorted({row.prompt for row in rows["train"]})
        held_out = set(random.Random(options.seed).sample(prompts, math.ceil(len(prompts) / 10)))
        rows["test"] = [row for row in rows["train"] if row.prompt in held_out]
        rows["train"] = [row for row in rows["train"] if row.prompt not in held_out]
    return rows["train"], rows["test"]


def rate_edits_only(rows):
    """--fine-grained (Xu et al., arXiv 2406.02756): where `chosen` edits `rejected`, the thumbs-down counts only in the
    tokens that the edit removed, each given all before it. Returns the rows in which any token counts."""
    rejected = [row for row in rows if row.edited is not None]
    check(rejected, "--fine-grained needs pairs: the columns chosen and rejected")
    for row in tqdm(rejected, "edits", disable=RANK > 0):
        before, after = (response.input_ids[response.rated].tolist() for response in (row, row.edited))
        for start, _, size in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
            row.rated[row.prompt_length:][start:start + size] = False  # of the response
    kept = [row for row in rows if row.rated.any()]
    print(f"--fine-grained: {len(rows) - len(kept)} of {len(rejected)} rejected left out (nothing removed)")
    return kept


def training_rows(rows, method):
    """The rows that the method trains on; in pair-wise DPO every positive, with every negative of its prompt."""
    positives = [row for row in rows if row.label == 1]
    negatives = defaultdict(list)
    for row in rows:
        if row.label != 1:
            negatives[row.prompt].append(row)
    if method == "dpo":
        return [replace(row, rejected=other) for row in positives for other in negatives[row.prompt]]
    return positives if method == "sft" else rows


def bucketed_batches(rows, batch_size, rng):
    """Batches of rows of like length, little of them padding: shuffle, sort in windows of 50 batches, shuffle."""
    batches = []
    for window in chunks(rng.sample(rows, len(rows)), 50 * batch_size):
        window.sort(key=lambda row: max(len(response.input_ids) for response in responses([row])))
        batches += chunks(window, batch_size)
    return rng.sample(batches, len(batches))


def batch_logps(model, rows):
    """log π_θ(y|x) of rows: (len(rows),), on the model's device."""
    input_ids = torch.nn.utils.rnn.pad_sequence([row.input_ids for row in rows], batch_first=True)
    response_mask = torch.nn.utils.rnn.pad_sequence([row.rated for row in rows], batch_first=True)
    return response_logps(model, input_ids.to(model.device, non_blocking=True), response_mask)


@torch.no_grad()
def compute_logps(model, rows, options, name):
    """Sets row.logp, or row.ref_logp, by `name`. Longest rows first: what does not fit in memory fails at once."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row.input_ids), reverse=True)
    for batch in tqdm(chunks(rows, 2 * options.batch_size * WORLD), name, disable=RANK > 0):
        logps = gather(batch_logps(model, share(batch)[0]).tolist())
        check(math.isfinite(sum(logps)), "log π(y|x) is not finite; was --learning-rate too high?")
        for row, logp in zip(batch, logps):
            setattr(row, name, logp)


# ---- Several processes, and mistakes that a user can mend -----------------------------------------------------------
def share(batch):
    """This process's rows of the batch, and a weight each: shares are equally long, filled up with rows of weight 0."""
    size = math.ceil(len(batch) / WORLD)
    mine = batch[RANK * size:(RANK + 1) * size]
    missing = size - len(mine)
    return mine + batch[:1] * missing, torch.tensor([1.0] * len(mine) + [0.0] * missing)


def gather(items):
    """The lists of all processes, in order, as one list in each of them; waits for all."""
    lists = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(lists, items)
    return sum(lists, [])


def write(path, lines):
    """Writes the file, all or nothing; of several processes the first does."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text("\n".join(lines) + "\n", encoding="utf-8")
        path.with_suffix(".tmp").replace(path)


class Mistake(Exception):
    """What main tells in one line."""


def check(right, message):
    if not right:
        raise Mistake(message)


@contextmanager
def naming(words):
    """Turns any exception raised inside into a Mistake: these words, then the message of the innermost cause."""
    try:
        yield
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        raise Mistake(f"{words}: {' '.join(str(error).split())[:300] or type(error).__name__}") from None


# ---- Models and checkpoints -----------------------------------------------------------------------------------------
def load_model(name, options, tokenizer):
    """The model, its weights in float32, from safetensors; sharded over the processes if there are several."""
    with naming(f"the model {name}"):
        config = AutoConfig.from_pretrained(name)
        config.update({key: 0.0 for key, value in config.to_dict().items() if "drop" in key and type(value) is float})
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        check(not loading["missing_keys"], f"weights are missing, as {min(loading['missing_keys'], default='')}")
        check(len(tokenizer) <= model.get_input_embeddings().num_embeddings, "fewer embeddings than tokens; add some")
        longest = getattr(config.get_text_config(), "max_position_embeddings", options.max_length)
        check(options.max_length <= longest, f"it takes {longest} tokens; give a --max-length up to that")
        if options.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if WORLD == 1:
            model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        else:  # FSDP2: each block, and then what is left
            policy = MixedPrecisionPolicy(torch.bfloat16 if options.bf16 else None, torch.float32)
            blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
            for module in [*blocks, model]:
                fully_shard(module, reshard_after_forward=True, mp_policy=policy)  # by default the root stays whole
        # Autocast caches bfloat16 weights until it ends, so it wraps each forward: a step makes the cache stale.
        model.forward = torch.autocast(model.device.type, torch.bfloat16, enabled=options.bf16)(model.forward)
        with torch.no_grad():  # a causal model's logits at the first token do not depend on the second
            first = model.eval()(input_ids=torch.tensor([[1, 0], [1, 2]], device=model.device)).logits[:, 0]
        check((first[0] - first[1]).abs().max() <= 2e-2 * first.abs().max(),
              "it sees the tokens to come, as an encoder does; name a decoder-only model")
    return model


def save_checkpoint(out, state, figures):
    """Writes out/checkpoint-STEP, a file a process. A rename makes it whole; only then the one before is deleted."""
    partial, before = out / "partial", list(out.glob("checkpoint-*"))
    with naming(f"{partial} cannot be written; make room, then give the same command again"):
        partial.mkdir(exist_ok=True)
        parts = {name: part.state_dict() for name, part in state.items()}
        torch.save(parts | figures, partial / f"{RANK}-of-{WORLD}.pt")
    gather([])  # all files are there
    if RANK == 0:
        partial.rename(out / f"checkpoint-{figures['step']}")
        for folder in before:
            shutil.rmtree(folder)


def load_checkpoint(out, state, steps):
    """Restores the state from the checkpoint in out. Returns the steps done, and their log; 0 and [] without one."""
    folder = max(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]), default=None)
    if folder is None:
        return 0, []
    with naming(f"{folder} cannot be used; delete it to begin anew"):
        saved = torch.load(folder / f"{RANK}-of-{WORLD}.pt", weights_only=True)
        check(saved["steps"] == steps, f"it is of {saved['steps']} steps, not {steps}: the data has changed")
        for name, part in state.items():
            part.load_state_dict(saved[name])
    return saved["step"], saved["log"]


# ---- Command line ---------------------------------------------------------------------------------------------------
@dataclass
class Options:
    method: Literal["ulma", "pointwise-dpo", "sft", "dpo", "unlikelihood"] = HfArg(default="ulma", help="the loss")
    model: str = HfArg(default="data/base", help="where training starts: a folder or a hub name")
    reference: Optional[str] = HfArg(default=None, help="π_ref, of the same tokenizer; if not given, --model")
    data: str = HfArg(default="data", help="a file, a folder or a hub name")
    data_config: Optional[str] = HfArg(default=None, help="the configuration of --data, where it has several")
    data_dir: Optional[str] = HfArg(default=None, help="the folder within --data, where only that is meant")
    output_dir: Optional[str] = HfArg(default=None, help="for model and records; if not given, a new folder in runs/")
    beta: float = HfArg(default=0.1, help="β, the strength of the KL regulariser; on the embedded data 3")
    log_z: Optional[float] = HfArg(default=None, help="log Z(x); if not given, prior_log_z of the mean label")
    continuous: bool = HfArg(default=False, help="squared-error losses on the column score (else label), 0 to 1")
    fine_grained: bool = HfArg(default=False, help="in pairs, push down only what `chosen` does not share")
    learning_rate: float = HfArg(default=1e-5, help="peak, after a tenth of warm-up; on the embedded data 3e-4")
    epochs: int = HfArg(default=3, help="passes over the training rows; on the embedded data 5")
    batch_size: int = HfArg(default=16, help="rows a forward pass, in each process")
    gradient_accumulation: int = HfArg(default=1, help="forward passes an optimiser step")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory for a third more compute")
    bf16: bool = HfArg(default=torch.cuda.is_available(), help="bfloat16 arithmetic on float32 weights")
    max_length: int = HfArg(default=512, help="tokens a row; prompts lose their start, responses their end")
    seed: int = HfArg(default=0, help="of the shuffling, the held-out prompts and the samples")
    save_steps: int = HfArg(default=0, help="steps between checkpoints; 0: none")
    eval_only: bool = HfArg(default=False, help="evaluate --model, and stop")


def run(options):
    """Data, models, evaluation, training, evaluation. Returns what metrics.json holds."""
    with naming(f"--model {options.model}"):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        check(tokenizer.eos_token, "its tokenizer has no eos_token, which closes a response; set one")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    all_rows, test_rows = load_rows(options, tokenizer)
    all_rows = rate_edits_only(all_rows) if options.fine_grained else all_rows
    mean_label = mean([row.label for row in all_rows]) or 0.0
    rows = [] if options.eval_only else training_rows(all_rows, options.method)
    check(options.eval_only or (rows and (options.method == "sft" or 0 < mean_label < 1)),
          f"--method {options.method} needs rows of label 1; all but sft need other rows too, dpo of the same prompt")
    reads = [row for row in responses(rows) if options.method in ("pointwise-dpo", "dpo")
             or (options.method == "ulma" and row.label != 1)]  # whose loss depends on log π_ref
    if options.log_z is None:
        from_labels = reads and options.method != "dpo"
        options.log_z = prior_log_z(mean_label, options.beta, options.continuous) if from_labels else 0.0

    out = Path(gather([options.output_dir or f"runs/{options.method}-{time.strftime('%y%m%d-%H%M%S')}"])[0])
    results = {"options": asdict(options)}
    with naming(f"--output-dir {out} is neither empty nor this run's; name a new folder"):
        if out.exists() and any(out.iterdir()):
            check(json.loads((out / "metrics.json").read_text()) == results, "it is another's, or finished")
    if options.reference:
        compute_logps(load_model(options.reference, options, tokenizer), reads + test_rows, options, "ref_logp")
        gc.collect()  # it is needed no more
    model = load_model(options.model, options, tokenizer)
    with naming(f"--output-dir {out} cannot be written"):
        write(out / "metrics.json", [json.dumps(results, indent=2)])
    print(f"{options.model}: {model.num_parameters():,} parameters, on {WORLD} x {model.device}\n"
          f"{options.data}: {len(all_rows)} training rows, mean label {mean_label:.3f}; {len(test_rows)} test rows\n"
          f"{options.method}: β {options.beta:g}, β log Z {options.beta * options.log_z:.3g}, learning rate "
          f"{options.learning_rate:g}, {options.epochs} epochs, saved to {out}")
    title = "eval" if options.eval_only else "before"
    results[title] = evaluate(model, tokenizer, test_rows, options, title)
    if not options.eval_only:
        start = time.perf_counter()
        if not options.reference:
            compute_logps(model, reads, options, "ref_logp")
        seconds = None if options.reference else time.perf_counter() - start
        results["train"] = {"reference_seconds": seconds, **train(model, rows, options, out)}
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        names = dict(model.named_parameters()) | dict(model.named_buffers())  # without the second name of a tied weight
        weights = {name: value for name, value in weights.items() if name in names}
        model.save_pretrained(out, state_dict=weights, is_main_process=RANK == 0)
        tokenizer.save_pretrained(out)
        results["after"] = evaluate(model, tokenizer, test_rows, options, "after")
    write(out / "samples.jsonl", [json.dumps({"prompt": r.prompt, **r.samples}) for r in test_rows if r.samples])
    write(out / "metrics.json", [json.dumps(results, indent=2)])
    for folder in out.glob("checkpoint-*"):
        if RANK == 0:
            shutil.rmtree(folder)
    report({title: results[title] for title in ("before", "after", "eval") if title in results}, test_rows)
    if WORLD > 1:  # at once: torch 2.13 aborts now and then when processes that used FSDP on a CPU clean up
        sys.stdout.flush()
        os._exit(0)
    return results


def main(argv=None):
    """The command line. Of several processes the first speaks for all."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    torch.set_flush_denormal(True)  # where σ(r) underflows, a CPU would be many times slower
    if WORLD > 1:
        dist.init_process_group()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        parser = HfArgumentParser(Options, description=__doc__.splitlines()[0])
        parser.error = lambda message: check(False, message)
        data = Path(parser.parse_args(argv).data).resolve()
        if Path(__file__).resolve().parent / "data" in (data, *data.parents):  # the embedded data
            parser.set_defaults(beta=3.0, learning_rate=3e-4, epochs=5)  # the best of a sweep, not the paper's
        options = Options(**vars(parser.parse_args(argv)))
        for name in ("beta", "learning_rate", "epochs", "batch_size", "gradient_accumulation"):
            check(0 < getattr(options, name) < math.inf, f"--{name.replace('_', '-')} is to be over 0")
        check(options.max_length > 1, "--max-length is to be over 1")
        check(options.output_dir or options.save_steps == 0, "--save-steps needs --output-dir, to be found again")
        return run(options)
    except Mistake as mistake:
        message = f"error: {mistake}"
    except torch.OutOfMemoryError:
        message = "error: out of memory; try --gradient-checkpointing, a smaller --batch-size or --max-length"
    except KeyboardInterrupt:
        message = "interrupted; with --save-steps, the same command goes on from the last checkpoint"
    time.sleep(5 if RANK > 0 else 0)  # the first most often says the same, and its end makes torchrun end the others
    print(f"ulma.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
