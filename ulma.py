"""ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference.

Cai et al., arXiv 2312.02554, in one file, to be read beside the paper: the first half follows it.

    python ulma.py --method ulma        # on data/, offline, within a minute
    python ulma.py --model Qwen/Qwen2.5-0.5B --data Anthropic/hh-rlhf --data-dir harmless-base
    torchrun --nproc-per-node 8 ulma.py --model ... --data ...

SPDX-License-Identifier: MIT
"""
import json, math, os, random, shutil, sys, time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                          get_cosine_schedule_with_warmup)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.modeling_layers import GradientCheckpointingLayer

RANK = int(os.environ.get("RANK", 0))  # of this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes
progress = partial(tqdm, disable=RANK > 0)

# ---- Losses ----
# Pure functions of tensors, without reduction. They need torch alone. logps is log π_θ(y|x) and
# ref_logps is log π_ref(y|x), both in nats; labels is z. All have the same shape, usually (B,).

def implicit_reward(logps, ref_logps, beta=0.1, log_z=0.0):
    """r_θ(x,y) = β (log π_θ(y|x) − log π_ref(y|x) + log Z(x)).

    If log_z is log Z(x), π_θ is the optimum for this reward. log_z is a number or a tensor that
    broadcasts, such as one value per row.
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

    Where z = 1 the loss does not depend on ref_logps, so any finite number will do there.
    """
    preference = pointwise_dpo_loss(logps, ref_logps, labels, beta, log_z, continuous)
    return torch.where(labels == 1, sft_loss(logps), preference)

def prior_log_z(mean_label, beta=0.1, continuous=False):
    """A stand-in for the unknown log Z(x): with it, r_θ predicts the mean label at the start, where
    π_θ = π_ref and so r_θ = β log Z on every row. Derived for point-wise DPO; ULMA borrows it."""
    if continuous:
        return mean_label / beta
    return math.log(mean_label / (1 - mean_label)) / beta

def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Pair-wise DPO, a baseline (Rafailov et al. 2023): −log σ(r_θ(x,y_w) − r_θ(x,y_l)). Here log
    Z(x) cancels."""
    chosen = implicit_reward(chosen_logps, ref_chosen_logps, beta)
    rejected = implicit_reward(rejected_logps, ref_rejected_logps, beta)
    return -F.logsigmoid(chosen - rejected)

# ---- Log-probabilities ----
@dataclass(eq=False)
class Row:
    """One rated response."""
    prompt: str
    completion: str
    label: float  # z: 1 for a demonstration or thumbs-up, 0 for a thumbs-down, or a score
    references: list  # acceptable completions
    group: str  # exact match is also reported per group
    is_chat: bool  # written by a chat template
    chosen: "Row"  # of the pair, in its rejected row
    input_ids: torch.Tensor = None  # (T,): the prompt, and the response with its end
    response_mask: torch.Tensor = None  # (T,): True on what counts in log π(y|x)
    ref_logp: float = math.nan  # log π_ref(y|x), if it is needed
    weight: float = 1.0  # of the loss, with --balanced

def response_logps(model, input_ids, response_mask):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) over each row's response tokens: (B,), float32, nats.

    input_ids and response_mask are (B, T), padded on the right, where a causal model never looks.
    The mask is True on the tokens that count, including the end of the response, but not the first
    of a row, which nothing predicts. Where all is False, it is 0. The model is any decoder-only one
    of transformers: its own forward pass scales or caps the logits.
    """
    # The logits at t predict token t + 1. A mask on the CPU spares nonzero() a wait for the GPU.
    positions = response_mask[:, 1:].nonzero().to(input_ids.device, non_blocking=True)
    rows, before = positions.unbind(1)
    # Logits take most of the memory, so the output head sees only the N positions that count.
    head = getattr(model, "module", model).get_output_embeddings()  # .module: wrapped by a Trainer
    hook = head.register_forward_pre_hook(lambda _, args: args[0][rows, before].unsqueeze(0))
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits.squeeze(0)  # (N, vocabulary)
    finally:
        hook.remove()
    targets = input_ids[rows, before + 1]
    token_logps = -F.cross_entropy(logits.float(), targets, reduction="none")
    return token_logps.new_zeros(len(input_ids)).index_add(0, rows, token_logps)

def batch_logps(model, rows, args):
    """log π_θ(y|x) of the rows, from one forward pass: (len(rows),), on the model's device."""
    input_ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    response_mask = pad_sequence([row.response_mask for row in rows], batch_first=True)
    input_ids = input_ids.to(model.device, non_blocking=True)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        return response_logps(model, input_ids, response_mask)

# ---- Training ----
# An item is what has a loss: a tuple of one row, or in pair-wise DPO of two, chosen and rejected.
# The processes share each batch of items.

def batch_losses(model, items, args):
    """The loss of each item; r_θ (NaN if log π_ref is unknown) and the label of each row."""
    rows = rows_of(items)
    logps = batch_logps(model, rows, args)
    numbers = torch.tensor([(row.ref_logp, row.label, row.weight) for row in rows])
    ref_logps, labels, weights = numbers.to(logps.device, non_blocking=True).unbind(1)
    rewards = implicit_reward(logps.detach(), ref_logps, args.beta, args.log_z)

    if args.method == "sft":
        losses = sft_loss(logps)
    elif args.method == "dpo":  # chosen and rejected rows alternate
        losses = dpo_loss(logps[::2], logps[1::2], ref_logps[::2], ref_logps[1::2], args.beta)
    else:
        loss = ulma_loss if args.method == "ulma" else pointwise_dpo_loss
        losses = loss(logps, ref_logps, labels, args.beta, args.log_z, args.continuous) * weights
    return losses, rewards, labels

def train(model, items, args, out):
    """Minimises the mean loss, resuming from the last checkpoint in out. Returns figures."""
    rng = random.Random(args.seed)
    plan = []  # for each step, the batches whose gradients it accumulates
    for _ in range(args.epochs):
        batches = bucketed_batches(items, args.batch_size * WORLD, rng)
        plan += chunks(batches, args.gradient_accumulation)
    parameters = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(plan) // 10, len(plan))
    state = {"parameters": parameters, "optimizer": optimizer, "schedule": schedule}
    done = load_checkpoint(out, state, len(plan))
    log = open(out / "log.jsonl" if RANK == 0 else os.devnull, "a" if done else "w", buffering=1)

    # The model stays in evaluation mode, without dropout or other noise: π_θ starts at π_ref.
    if args.gradient_checkpointing:  # transformers' own needs training mode
        for block in blocks_of(model):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    total, seen = 0.0, []  # the losses, and (r_θ, z), since step `logged`
    logged, samples, tokens, start = done, 0, 0, time.perf_counter()
    for step, batches in enumerate(progress(plan[done:], "training"), done + 1):
        for batch in batches:
            share = batch[RANK::WORLD]
            # FSDP needs every process in every pass: an idle one repeats an item, at weight 0.
            losses, rewards, labels = batch_losses(model, share or batch[:1], args)
            loss = losses.sum() * bool(share) / sum(map(len, batches))
            (loss * WORLD).backward()  # FSDP averages over the processes
            total += loss.detach()
            seen += [torch.stack((rewards, labels), 1)] * bool(share)
            samples += len(rows_of(batch))
            tokens += sum(len(row.input_ids) for row in rows_of(batch))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        line = {"step": step, "learning_rate": schedule.get_last_lr()[0]}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        saves = args.save_steps and (step % args.save_steps == 0 or step == len(plan))
        if saves or step % 10 == 0 or step == len(plan):  # the loop waits for the GPU only here
            rated = gather([(reward, z) for pairs in seen for reward, z in pairs.tolist()
                            if not math.isnan(reward)])
            line["loss"] = sum(gather([total.item()])) / (step - logged)
            line["reward_positive"] = mean([reward for reward, z in rated if z > 0.5])
            line["reward_negative"] = mean([reward for reward, z in rated if z <= 0.5])
            line["gradient_norm"] = (norm.full_tensor() if WORLD > 1 else norm).item()
            line["tokens_per_second"] = tokens / (time.perf_counter() - start)
            require(math.isfinite(line["loss"] + line["gradient_norm"]), "the loss or its gradient "
                    f"is not finite at step {step}; try a lower --learning-rate")
            total, seen, logged = 0.0, [], step
            print(json.dumps(line), file=log)
        if saves:
            save_checkpoint(out, state, {"step": step, "steps": len(plan)})
    seconds = time.perf_counter() - start
    return {"from_step": done, "samples": samples, "tokens": tokens, "seconds": seconds,
            "samples_per_second": samples / seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() or None}

# ---- Evaluation ----
SAMPLES = 4  # per prompt, and prompts to show

@torch.no_grad()
def sample(model, tokenizer, rows, args):
    """SAMPLES completions of each row's prompt, drawn from π_θ itself (temperature 1)."""
    references = [reference for row in rows for reference in row.references]
    lengths = map(len, tokenizer(references).input_ids) if references else [62]
    new_tokens = min(max(lengths) + 2, args.max_length // 2)
    # A sample ends with the tokenizer's eos, the model's, or a special token that ends rows here.
    # The model's other settings are replaced, as they could change what is sampled.
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    ends |= special_ids(tokenizer) & {row.input_ids[-1].item() for row in rows}
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=new_tokens, num_return_sequences=SAMPLES,
        eos_token_id=sorted(ends), pad_token_id=tokenizer.eos_token_id)

    def complete(batch):
        prompts = [row.input_ids[~row.response_mask].tolist() for row in batch]
        prompts = [torch.tensor(shorten(ids, args.max_length - new_tokens, tokenizer))
                   for ids in prompts]
        ids = pad_sequence(prompts, True, -1, "left").to(model.device)  # −1 is padding
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            output = model.generate(
                input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(),
                generation_config=model.generation_config, synced_gpus=WORLD > 1)
        texts = tokenizer.batch_decode(output[:, ids.shape[1]:], skip_special_tokens=True)
        return chunks(texts, SAMPLES)

    torch.manual_seed(args.seed + RANK)
    return map_batches(complete, rows, args.batch_size, "samples")

def concordance(scores, labels):
    """P(score_i > score_j | label_i > label_j), ties counting ½: for labels 0 and 1 the ROC AUC."""
    wins, pairs = 0.0, 0
    for score, label in zip(scores, labels):
        gaps = score - scores[labels < label]
        wins += (gaps.sign() + 1).sum().item() / 2
        pairs += len(gaps)
    return wins / pairs if pairs else None

def evaluate(model, tokenizer, rows, args):
    """Metrics, None if undefined, and samples, {prompt: completions}. Perplexity is that of the
    demonstrations, exact match the share of samples that are among their prompt's references."""
    logps = all_logps(model, rows, args, "log π")
    nats = -sum(logp for row, logp in zip(rows, logps) if row.label == 1)
    tokens = sum(row.response_mask.sum().item() for row in rows if row.label == 1)
    log_ratios = torch.tensor([logp - row.ref_logp for row, logp in zip(rows, logps)])
    known = ~log_ratios.isnan()  # r_θ grows with the log-ratio
    labels = torch.tensor([row.label for row in rows])
    metrics = {"perplexity": math.exp(min(nats / tokens, 700)) if tokens else None,
               "reward_auc": concordance(log_ratios[known], labels[known])}

    with_references = list({row.prompt: row for row in rows if row.references}.values())
    sampled = with_references or list({row.prompt: row for row in rows}.values())[:SAMPLES]
    drawn = sample(model, tokenizer, sampled, args)
    hits = defaultdict(list, exact_match=[])
    for row, completions in zip(with_references, drawn):
        accepted = [reference.strip() for reference in row.references]
        found = [completion.strip() in accepted for completion in completions]
        hits["exact_match"] += found
        if row.group:
            hits[f"exact_match/{row.group}"] += found
    samples = dict(zip((row.prompt for row in sampled), drawn))
    return metrics | {name: mean(found) for name, found in hits.items()}, samples

# ==== Here ends the paper. Below is what any such program needs ====

# ---- Data ----
def load_rows(args, tokenizer):
    """Training rows and test rows of --data. Without a split to test on, a tenth of the prompts is
    held out, but with --eval-only all rows are tested."""
    with explain(f"--data {args.data} is empty or unreadable (rows count from 0)"):
        splits = read_splits(args)

    def find(*prefixes):
        names = [name for name in args.splits or splits if name.startswith(prefixes)]
        require(len(names) < 2, f"choose of {', '.join(names)}: --splits train_sft test_sft")
        return names[0] if names else None

    with explain(f"--data {args.data}"):
        train, test = find("train"), find("test") or find("val", "dev", "eval")
        if args.eval_only:
            train, test = None, test or train
        require(train or args.eval_only and test, f"no split train in {', '.join(splits)}")
        rows, test_rows = (parse(splits[name], name, args, tokenizer) if name else []
                           for name in (train, test))
    if not test:
        prompts = sorted({row.prompt for row in rows})
        held_out = set(random.Random(args.seed).sample(prompts, math.ceil(len(prompts) / 10)))
        test_rows = [row for row in rows if row.prompt in held_out]
        rows = [row for row in rows if row.prompt not in held_out]
    return rows, test_rows

def read_splits(args):
    """The records of each split, as the library datasets finds them."""
    source = {"path": args.data, "data_dir": args.data_dir}
    if not os.path.exists(args.data):  # on the hub
        return {str(name): list(split) for name, split in datasets.load_dataset(**source).items()}
    if os.path.isfile(args.data):
        source["path"], source["data_files"] = os.path.split(os.path.abspath(args.data))
    builder, splits = datasets.load_dataset_builder(**source), {}
    for name, files in builder.config.data_files.items():
        builder.config.data_files = datasets.data_files.DataFilesDict({name: files})
        builder.info.features = None  # splits may differ in their columns
        splits[str(name)] = list(builder.as_streaming_dataset(name))
    return splits

def parse(records, split, args, tokenizer):
    """The rows of a split: one per record, or two, chosen and rejected, per pair.

    Over --max-length, all rows of a prompt lose the same part of its start, down to half of the
    length; then a response loses its end.
    """
    require(records, f"no rows in {split}")
    rows, groups = [], defaultdict(list)
    for number, record in enumerate(progress(records, f"{split} rows"), 1):
        with explain(f"{split} row {number}"):
            rows += read_record(record, args, tokenizer)
    encode = partial(tokenizer, add_special_tokens=False)
    for row, ids in zip(rows, encode([row.prompt + row.completion for row in rows]).input_ids):
        row.input_ids = ids
        groups[row.prompt].append(row)
    bos = tokenizer("a").input_ids[:1]
    bos = bos if bos == [tokenizer.bos_token_id] else []
    special, cut = special_ids(tokenizer), 0
    for prompt, group in zip(encode(list(groups)).input_ids, groups.values()):
        # A token that spans the boundary belongs to the response.
        shared = len(os.path.commonprefix([prompt, *(row.input_ids for row in group)]))
        prompt = prompt[:shared]
        if not group[0].is_chat and prompt[:1] != bos:
            prompt = bos + prompt
        require(prompt, f"the prompt {group[0].prompt[:60]!r} has no token of its own")
        responses = [close(row.input_ids[shared:], special, tokenizer) for row in group]
        room = max(args.max_length - max(map(len, responses)), args.max_length // 2)
        kept = shorten(prompt, room, tokenizer)
        for row, response in zip(group, responses):
            row.input_ids = torch.tensor((kept + response)[:args.max_length])
            row.response_mask = torch.arange(len(row.input_ids)) >= len(kept)
            cut += len(row.input_ids) < len(prompt + response)
    if cut:
        print(f"{split}: {cut} of {len(rows)} rows are cut to --max-length {args.max_length}")
    return rows

def read_record(record, args, tokenizer):
    """The rows of a record, still without tokens.

    Messages go through the chat template. Without a prompt, the response is a conversation that
    ends with the answer, or a transcript as in HH-RLHF, where "\\n\\nAssistant:" precedes it.
    """
    rating = "score" if args.continuous and "score" in record else "label"
    # Drops None, as absent; makes what is not JSON a dict, refused below.
    record = json.loads(json.dumps(record, default=lambda value: {"": repr(value)}),
                        object_hook=lambda d: {key: d[key] for key in d if d[key] is not None})
    if {"chosen", "rejected"} <= record.keys():
        rated = [(record["chosen"], 1), (record["rejected"], 0)]
    else:
        rated = [(record.get("completion", record.get("messages")), record.get(rating))]
    require(None not in rated[0], f"it has {', '.join(record)}; needed are prompt, completion and "
            "label (--continuous: score), or chosen and rejected")
    references = record.get("references", [])
    require(isinstance(references, list), f"references is {references!r}, not a list of texts")
    rows = []
    for response, z in rated:
        prompt, completion = record.get("prompt"), response
        is_chat = list in (type(prompt), type(response))
        if is_chat:
            prompt, completion = render(record, response, tokenizer)
        for text in (prompt or "", completion, *references):
            require(isinstance(text, str), f"{text!r} was read, not a text")
        if prompt is None:
            before, turn, completion = response.rpartition("\n\nAssistant:")
            prompt = before + turn
        require(prompt, "no prompt, nor any \\n\\nAssistant:")
        require(completion or len(rated) > 1, "no completion")
        require(" " not in prompt or not completion.startswith(prompt), "it repeats the prompt")
        for column in ("system", "images", "tools")[:3 - is_chat]:
            require(not record.get(column), f"the column {column} would be left out")
        require(z in (0, 1) or args.continuous and type(z) is float and 0 < z < 1,
                f"the label is {z!r}, not 0 or 1 (--continuous: between)")
        rows.append(Row(prompt, completion, float(z), references, record.get("group"), is_chat,
                        chosen=rows[0] if rows else None))
    return rows

def render(record, response, tokenizer):
    """Prompt and completion by the chat template. The completion is all of the last message."""
    prompt = read_messages(record.get("prompt", []), "user")
    messages = read_messages(response, "assistant")
    if not all(message in messages for message in prompt):  # else it holds the prompt
        messages = prompt + messages if len(messages) == 1 else []
    roles = [message["role"] for message in messages]
    require(len(roles) > 1 and roles[-1] == "assistant" != roles[-2],
            "the messages are not a prompt and one answer of the assistant")
    tools, apply = record.get("tools"), partial(tokenizer.apply_chat_template, tokenize=False)
    prompt, whole = apply(messages[:-1], tools, add_generation_prompt=True), apply(messages, tools)
    require(not tools or prompt != apply(messages[:-1], add_generation_prompt=True),
            "the chat template leaves out the tools")
    shared = len(os.path.commonprefix([prompt, whole]))
    require(shared == len(prompt), f"the chat template ends prompts with {prompt[shared:][:40]!r}, "
            f"but before this response writes {whole[shared:][:40]!r}")
    completion, answer = whole[shared:].rstrip(), messages[-1]
    parts = [answer.get(key, "") for key in ("content", "reasoning_content", "thinking")]
    parts += [call["function"][key] for call in answer.get("tool_calls", [])
              for key in ("name", "arguments") if isinstance(call["function"][key], str)]
    for part in parts:
        require("".join(part.split()) in "".join(completion.split()),
                f"the chat template leaves out or changes {part[:60]!r}")
    return prompt, completion

def read_messages(part, role):
    """A prompt or a response as messages whose contents are texts."""
    part = [{"role": role, "content": part}] if isinstance(part, str) else part
    for message in part:
        content = message.setdefault("content", "" if "tool_calls" in message else None)
        if isinstance(content, list) and all(item["type"] == "text" for item in content):
            message["content"] = "".join(item["text"] for item in content)
        require(isinstance(message["content"], str), f"a message's content is {content!r:.80}")
    return part

def special_ids(tokenizer):
    tokens = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in tokens if token.special}
    return special - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}

def close(response, special, tokenizer):
    """A response with its end: the first special token after its text, or else eos."""
    end = len(response)
    while end and (response[end - 1] in special or not tokenizer.decode(response[end - 1]).strip()):
        end -= 1
    ends = [i for i in range(end, len(response)) if response[i] in special]
    return response[:ends[0] + 1] if ends else response + [tokenizer.eos_token_id]

def shorten(prompt, length, tokenizer):
    """The last tokens of a prompt, length in all, but first BOS."""
    start = 1 if prompt[0] == tokenizer.bos_token_id else 0
    return prompt[:start] + prompt[start + max(len(prompt) - length, 0):]

def only_edits(rows):
    """--fine-grained (Xu et al., arXiv 2406.02756): a rejected response counts only in the tokens
    that an edit to the chosen one removes."""
    rejected = [row for row in rows if row.chosen]
    require(rejected, "--fine-grained needs pairs, of chosen and rejected")
    for row in progress(rejected, "edits"):
        before, after = (r.input_ids[r.response_mask].tolist() for r in (row, row.chosen))
        counts = row.response_mask[-len(before):]
        for match in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
            counts[match.a:match.a + match.size] = False
    return [row for row in rows if row.response_mask.any()]

def training_items(rows, method):
    """Pair-wise DPO: the pairs, or each positive with all negatives of its prompt."""
    positives = [row for row in rows if row.label == 1]
    if method == "dpo":
        pairs = [(row.chosen, row) for row in rows if row.chosen]
        negatives = defaultdict(list)
        for row in rows:
            negatives[row.prompt] += [row] * (row.label != 1)
        return pairs or [(row, other) for row in positives for other in negatives[row.prompt]]
    return [(row,) for row in (positives if method == "sft" else rows)]

def rows_of(items):
    return [row for item in items for row in item]

def bucketed_batches(items, batch_size, rng):
    """Random batches of items of like length, which need little padding."""
    batches = []
    for window in chunks(rng.sample(items, len(items)), 50 * batch_size):
        window.sort(key=lambda item: max(len(row.input_ids) for row in item))
        batches += chunks(window, batch_size)
    return rng.sample(batches, len(batches))

def chunks(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]

def mean(values):
    return sum(values) / len(values) if values else None

# ---- Processes and mistakes ----
@torch.no_grad()
def all_logps(model, rows, args, title):
    """log π_θ(y|x) of all rows: a list of numbers."""
    logps = map_batches(lambda batch: batch_logps(model, batch, args).tolist(),
                        rows, 2 * args.batch_size, title)
    require(math.isfinite(sum(logps)), "log π(y|x) is not finite; try a lower --learning-rate")
    return logps

def map_batches(function, rows, batch_size, title):
    """[function's value for each row], from batches. The longest rows come first, so that what does
    not fit in memory fails at once."""
    values = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids), reverse=True)
    for batch in progress(chunks(order, batch_size * WORLD), title):
        share = batch[RANK::WORLD] or batch[:1]  # as in train
        values |= dict(zip(share, function([rows[i] for i in share])))
    values = dict(gather(list(values.items())))
    return [values[i] for i in range(len(rows))]

def gather(items):
    """The lists of all processes as one, once all are here."""
    lists = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(lists, items)
    return sum(lists, [])

def write(path, lines):
    """Writes a file, all at once, in the first process."""
    if RANK == 0:
        part = path.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.replace(path)

class Mistake(Exception):
    """What the user can mend. main reports it in one line."""

def require(condition, message):
    if not condition:
        raise Mistake(message)

@contextmanager
def explain(context):
    """Turns an exception inside into a Mistake that begins with the context."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise Mistake(f"{context}: {message}") from None

# ---- Models and checkpoints ----
def load_model(name, args, tokenizer):
    """The model, ready for training; of several processes each has a shard."""
    with explain(f"the model {name}"):
        model = read_model(name)
        config = model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", args.max_length)
        require(args.max_length <= longest, f"it takes {longest} tokens; lower --max-length")
        require(AutoTokenizer.from_pretrained(name).get_vocab() == tokenizer.get_vocab(),
                "its tokenizer is not that of --model")
        require(len(tokenizer) <= model.get_input_embeddings().num_embeddings,
                "it has fewer embeddings than tokens")
        with torch.no_grad():  # logits at the first token of rows that differ in the second
            logits = model.eval()(input_ids=torch.tensor([[1, 0], [1, 2]])).logits[:, 0]
        require(logits.isfinite().all(), "its logits are not finite; are its weights?")
        require((logits[0] - logits[1]).abs().max() <= 1e-2 * logits.abs().max(),
                "it sees later tokens, as no decoder-only model does")
    if args.lora:
        add_lora(model, args)
    for parameter in model.parameters():
        if args.bf16 and not parameter.requires_grad:  # what is trained stays float32
            parameter.data = parameter.data.bfloat16()
    if WORLD == 1:
        return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    policy = MixedPrecisionPolicy(torch.bfloat16 if args.bf16 else None, torch.float32)
    for module in [*blocks_of(model), model]:  # FSDP2
        fully_shard(module, mp_policy=policy, reshard_after_forward=True)
    return model

def read_model(name):
    """The model as it is stored, in float32, from safetensors alone."""
    require(not hasattr(AutoConfig.from_pretrained(name), "quantization_config"),
            "quantised weights cannot be trained")
    model, loading = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    require(not loading["missing_keys"], f"weights are missing: {loading['missing_keys']}")
    return model

def add_lora(model, args):
    """Freezes the model and adds adapters, 0 at the start, to all linear layers but the head.
    Returns peft's wrapper, which can merge them."""
    from peft import LoraConfig, LoraModel
    torch.manual_seed(args.seed)
    config = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear")
    return LoraModel(model, config, "default")

def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

def save_model(model, tokenizer, args, out):
    """Writes the model as it was stored, in float32, with the trained weights put or merged in."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    trained = get_model_state_dict(model, options=whole)
    if RANK == 0:
        trained = {name: trained[name] for name in trained if not args.lora or "lora_" in name}
        model = read_model(args.model)
        wrapper = add_lora(model, args) if args.lora else None
        model.load_state_dict(trained, strict=False)
        (wrapper.merge_and_unload() if wrapper else model).save_pretrained(out)
        tokenizer.save_pretrained(out)

def save_checkpoint(out, state, figures):
    """Writes out/checkpoint-STEP, a file per process, and then deletes the previous one."""
    unfinished, previous = out / "unfinished", list(out.glob("checkpoint-*"))
    with explain(f"{unfinished}: make room, then give the same command again"):
        unfinished.mkdir(exist_ok=True)
        parts = {name: part.state_dict() for name, part in state.items()}
        torch.save(parts | figures, unfinished / f"{RANK}-of-{WORLD}.pt")
    gather([])  # until all files are written
    if RANK == 0:
        unfinished.rename(out / f"checkpoint-{figures['step']}")
        for folder in previous:
            shutil.rmtree(folder)

def load_checkpoint(out, state, steps):
    """Restores the last checkpoint, if any. Returns the number of steps done."""
    folders = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not folders:
        return 0
    with explain(f"{folders[-1]} cannot be used; delete it to begin anew"):
        saved = torch.load(folders[-1] / f"{RANK}-of-{WORLD}.pt", weights_only=True)
        require(saved["steps"] == steps, f"of {saved['steps']} steps, not {steps}: other data")
        for name, part in state.items():
            part.load_state_dict(saved[name])
    return saved["step"]

# ---- Command line ----
def arg(default, help):
    return HfArg(default=default, help=help)

@dataclass
class Options:
    method: Literal["ulma", "pointwise-dpo", "sft", "dpo"] = arg("ulma", "the loss")
    model: str = arg("data/base", "a folder or a hub name")
    reference: str = arg(None, "π_ref, if not --model")
    data: str = arg("data", "a file, a folder or a hub name")
    data_dir: str = arg(None, "the folder within --data")
    splits: list[str] = arg(None, "to train and test on, if several")
    output_dir: str = arg(None, "by default a new folder in runs/")
    beta: float = arg(0.1, "β, of the KL regulariser; on data/ 3")
    log_z: float = arg(None, "by default prior_log_z(mean label)")
    continuous: bool = arg(False, "squared-error losses on the column score")
    balanced: bool = arg(False, "label 1 weighs as much as all others")
    fine_grained: bool = arg(False, "push down only what `chosen` does not share")
    learning_rate: float = arg(1e-5, "at its peak; on data/ 3e-4")
    epochs: int = arg(3, "on data/ 5")
    batch_size: int = arg(16, "rows or pairs per forward pass and process")
    gradient_accumulation: int = arg(1, "forward passes per step")
    gradient_checkpointing: bool = arg(False, "less memory, a third more work")
    bf16: bool = arg(torch.cuda.is_available(), "bfloat16 arithmetic")
    lora: int = arg(0, "rank of adapters (needs peft); 0: all weights")
    max_length: int = arg(512, "tokens per row")
    seed: int = arg(0, "of shuffling, hold-out and samples")
    save_steps: int = arg(0, "steps between checkpoints; 0: none")
    eval_only: bool = arg(False, "only evaluate --model")

def read_options(argv):
    parser = HfArgumentParser(Options, description=__doc__.splitlines()[0])
    parser.error = partial(require, False)
    data = Path(parser.parse_args(argv).data).resolve()
    if data.is_relative_to(Path(__file__).resolve().parent / "data"):
        parser.set_defaults(beta=3.0, learning_rate=3e-4, epochs=5)  # the best of a sweep
    args = Options(**vars(parser.parse_args(argv)))
    for name in ("beta", "learning_rate", "epochs", "batch_size", "gradient_accumulation"):
        require(0 < getattr(args, name) < math.inf, f"--{name.replace('_', '-')} must be over 0")
    require(args.max_length > 1, "--max-length must be over 1")
    require(args.output_dir or not args.save_steps, "--save-steps needs --output-dir")
    require(not args.balanced or args.method not in ("sft", "dpo"),
            f"--balanced means nothing to {args.method}")
    return args

def run(args):
    """Data, reference, evaluation, training, evaluation. Returns what metrics.json holds."""
    with explain(f"--model {args.model}"):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        require(tokenizer.eos_token, "its tokenizer has no eos_token")
    rows, test_rows = load_rows(args, tokenizer)
    if args.fine_grained and rows:
        rows = only_edits(rows)
    items = training_items(rows, args.method)
    others = [row.label for row in rows if row.label != 1]
    positives = len(rows) - len(others)
    mean_label = mean([row.label for row in rows]) or 0.0
    mixed = 0 < mean_label < 1 and (positives or not args.balanced)
    require(args.eval_only or items and (args.method == "sft" or mixed),
            f"{args.method} cannot learn from {positives} rows of label 1 and {len(others)} others "
            f"(dpo: on one prompt), beside {len(test_rows)} test rows")
    if args.balanced and rows:
        mean_label = (1 + mean(others)) / 2
        for row in rows:
            row.weight = len(rows) / 2 / (positives if row.label == 1 else len(others))
    if args.log_z is None:
        prior = rows and args.method in ("ulma", "pointwise-dpo")
        args.log_z = prior_log_z(mean_label, args.beta, args.continuous) if prior else 0.0

    default = f"runs/{args.method}-{time.strftime('%y%m%d-%H%M%S')}-{os.getpid()}"
    out = Path(gather([args.output_dir or default])[0])
    started, finished = out / "options.json", out / "metrics.json"
    if out.exists() and any(out.iterdir()):
        same = started.exists() and json.loads(started.read_text()) == asdict(args)
        require(same and not finished.exists(),
                f"--output-dir {out} is neither new nor this command's, unfinished")
    model = load_model(args.reference or args.model, args, tokenizer)
    write(started, [json.dumps(asdict(args), indent=2)])
    needed = list(dict.fromkeys(rows_of(items))) if args.reference or args.method != "sft" else []
    for part in (test_rows if args.reference or items else [], needed):
        start = time.perf_counter()
        for row, logp in zip(part, all_logps(model, part, args, "log π_ref")):
            row.ref_logp = logp
    seconds = time.perf_counter() - start
    if args.reference:
        del model  # makes room for the next one
        model = load_model(args.model, args, tokenizer)
    print(f"{args.model}: {model.num_parameters():,} parameters, on {WORLD} x {model.device}\n"
          f"{args.data}: {len(rows)} training rows, mean label {mean_label:.3f}, "
          f"{len(test_rows)} test rows\n"
          f"{args.method}: β {args.beta:g}, β log Z {args.beta * args.log_z:.3g}, "
          f"learning rate {args.learning_rate:g}, {args.epochs} epochs, saved to {out}")

    results, samples = {"options": asdict(args)}, {}
    title = "eval" if args.eval_only else "before"
    results[title], samples[title] = evaluate(model, tokenizer, test_rows, args)
    if not args.eval_only:
        results["train"] = {"reference_seconds": seconds, **train(model, items, args, out)}
        save_model(model, tokenizer, args, out)
        results["after"], samples["after"] = evaluate(model, tokenizer, test_rows, args)
    lines = [{"prompt": prompt} | {name: drawn[prompt] for name, drawn in samples.items()}
             for prompt in samples[title]]
    write(out / "samples.jsonl", map(json.dumps, lines))
    write(finished, [json.dumps(results, indent=2)])
    if RANK == 0:
        report({name: results[name] for name in samples}, lines)
        for folder in out.glob("checkpoint-*"):
            shutil.rmtree(folder)
    return results

def report(results, lines):
    """Prints metrics and some samples of each evaluation, side by side."""
    print(f"\n{'':28}" + "".join(f"{name:>12}" for name in results))
    for metric in list(results.values())[0]:
        values = [metrics[metric] for metrics in results.values()]
        cells = ("         n/a" if value is None else f"{value:12.3f}" for value in values)
        print(f"{metric:28}" + "".join(cells))
    for line in lines[::math.ceil(len(lines) / SAMPLES)]:
        print("\n" + " ".join(line["prompt"].split())[-90:])
        for name in results:
            print(f"{name:>8}:  {line[name][0].strip()}")

def main(argv=None):
    """The command line. A mistake gives one line, and exit code 2."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    torch.set_flush_denormal(True)  # a CPU is many times slower where σ(r) underflows
    if WORLD > 1:
        dist.init_process_group()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):  # which may not know β
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")
    try:
        return run(read_options(argv))
    except (Mistake, OSError, ImportError) as mistake:
        message = f"error: {mistake}"
    except torch.OutOfMemoryError:
        message = "error: out of memory; try --gradient-checkpointing, less --batch-size"
    except KeyboardInterrupt:
        message = "interrupted; with --save-steps, the same command continues"
    time.sleep(5 * (RANK > 0))  # the first mostly says the same, and its exit ends all
    print(f"ulma.py: {message}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    os._exit(code)  # torch may abort in cleaning up
