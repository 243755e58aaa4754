"""ULMA's claims, one a test: the losses against the paper, then the rest in ulma.py's order."""

import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: a name that is no folder fails at once
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the expected values are a CPU's
import datasets
import tokenizers
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ulma
from ulma import dpo_loss, implicit_reward, pointwise_dpo_loss, prior_log_z, sft_loss, ulma_loss

HERE = Path(ulma.__file__).parent
BASE = HERE / "data" / "base"
TOKENIZER = AutoTokenizer.from_pretrained(BASE)
sigma = torch.sigmoid
read_model = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)


# ---- The equations, their gradients and the paper's claims ----
REF = torch.tensor([0.30, 0.25, 0.20, 0.12, 0.08, 0.05], dtype=torch.float64)
MU = torch.tensor([0.1, 0.3, 0.05, 0.25, 0.1, 0.2], dtype=torch.float64)  # of rated responses


def draw(seed=0):  # random log π_θ, log π_ref and labels 0 or 1: (64,), float64
    generator = torch.Generator().manual_seed(seed)
    logps, ref_logps = -8 * torch.rand(2, 64, generator=generator, dtype=torch.float64)
    return logps.requires_grad_(), ref_logps, torch.randint(0, 2, (64,), generator=generator)


def grad(loss, logps):
    return torch.autograd.grad(loss.sum(), logps)[0]


def test_the_reward_is_beta_times_log_ratio_plus_log_z():
    logps, ref_logps = torch.tensor([-2.0, -3.0]), torch.tensor([-5.0, -4.0])
    for log_z, expected in ((1.0, [2.0, 1.0]), (torch.tensor([1.0, -2.0]), [2.0, -0.5])):
        assert implicit_reward(logps, ref_logps, 0.5, log_z).tolist() == expected


@pytest.mark.parametrize("beta, log_z", [(0.1, 0.0), (0.5, 2.0), (1.0, -3.0)])
def test_every_loss_is_its_equation(beta, log_z):
    logps, ref_logps, z = draw()
    scores = torch.rand(64, dtype=torch.float64).where(z == 0, 1.0)
    r = beta * ((logps.exp() / ref_logps.exp()).log() + log_z)
    binary = -(z * sigma(r).log() + (1 - z) * (1 - sigma(r)).log())
    squared = (scores - r) ** 2
    at, more = (logps, ref_logps), (beta, log_z)
    assert_close(sft_loss(logps), -logps)
    assert_close(pointwise_dpo_loss(*at, z, *more), binary)
    assert_close(pointwise_dpo_loss(*at, scores, *more, True), squared)
    assert_close(ulma_loss(*at, z.bool(), *more), -z * logps + (1 - z) * binary)
    assert_close(ulma_loss(*at, scores, *more, True), -logps * z + (1 - z) * squared)


def test_pairwise_dpo_is_its_equation_and_gradient_and_log_z_cancels():
    (logps_w, ref_w, _), (logps_l, ref_l, _) = draw(1), draw(2)
    loss = dpo_loss(logps_w, logps_l, ref_w, ref_l, 0.3)
    gap = implicit_reward(logps_w, ref_w, 0.3, 7.0) - implicit_reward(logps_l, ref_l, 0.3, 7.0)
    assert_close(loss, -sigma(gap).log())
    pull = 0.3 * sigma(-gap)  # −β σ(r_l − r_w) (∇_w − ∇_l)
    assert_close(torch.autograd.grad(loss.sum(), (logps_w, logps_l)), (-pull, pull))


def test_the_gradients_are_the_papers():
    logps, ref_logps, z = draw()
    scores = torch.rand(64, dtype=torch.float64)
    r = 0.3 * (logps - ref_logps + 0.5)
    at, more, binary = (logps, ref_logps), (0.3, 0.5), -0.3 * (z - sigma(r))
    assert_close(grad(sft_loss(logps), logps), -torch.ones_like(logps))
    assert_close(grad(pointwise_dpo_loss(*at, z, *more), logps), binary)
    assert_close(grad(pointwise_dpo_loss(*at, scores, *more, True), logps), -0.6 * (scores - r))
    assert_close(grad(ulma_loss(*at, z, *more), logps), binary.where(z == 0, -1.0))


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_prior_log_z_zeroes_the_mean_coefficient_at_the_start(continuous, share):
    labels = (torch.arange(60) < 60 * share).double()
    prior = prior_log_z(labels.mean().item(), 0.3, continuous)
    for log_z, balanced in ((prior, True), (0.0, share == 0.5 and not continuous)):
        logps = torch.zeros(60, dtype=torch.float64, requires_grad=True)  # π_θ = π_ref
        loss = pointwise_dpo_loss(logps, torch.zeros(60), labels, 0.3, log_z, continuous)
        assert (grad(loss, logps).sum().abs() < 1e-9) == balanced


def optimum(expected_loss):
    """The distribution over six responses at which the expected loss is least."""
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    options = {"max_iter": 2000, "tolerance_grad": 1e-13, "tolerance_change": 0}
    solver = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **options)

    def closure():
        solver.zero_grad()
        loss = expected_loss(logits.log_softmax(0)).sum()
        loss.backward()
        return loss

    solver.step(closure)
    return logits.softmax(0).detach()


def over_labels(loss, share, logps, *more):
    """The loss's expectation where that share of a response's labels is 1."""
    good, bad = (loss(logps, more[0].log(), torch.full((6,), z), *more[1:]) for z in (1, 0))
    return share * good + (1 - share) * bad


@pytest.mark.parametrize("continuous", [False, True])
def test_the_optimum_of_alignment_is_recovered_with_the_true_log_z(continuous, beta=0.5):
    reward = torch.tensor([-1.0, 0.5, 1.5, -0.3, 0.9, 2.0], dtype=torch.float64)
    z = (REF * (reward / beta).exp()).sum()
    for log_z, recovered in ((z.log(), True), (0.0, False)):

        def loss(logps, log_z=log_z):  # of responses from π_ref; z ~ Bernoulli(σ(r)), or r + noise
            if continuous:
                return REF * pointwise_dpo_loss(logps, REF.log(), reward, beta, log_z, True)
            more = reward.sigmoid(), logps, REF, beta, log_z
            return REF * over_labels(pointwise_dpo_loss, *more)

        distance = (optimum(loss) - REF * (reward / beta).exp() / z).abs().max()
        assert distance < 1e-6 if recovered else distance > 0.05


@pytest.mark.parametrize("beta, log_z", [(0.1, 0.0), (0.1, 3.0), (1.0, -2.0), (3.0, 0.5)])
@pytest.mark.parametrize("ref", [REF, REF.flip(0)])
def test_ulmas_own_optimum_is_the_thumbs_up_or_its_formula_where_labels_disagree(beta, log_z, ref):
    def policy(share):
        return optimum(lambda logps: MU * over_labels(ulma_loss, share, logps, ref, beta, log_z))

    up = torch.tensor([0, 1, 0, 1, 1, 0]).double()
    assert_close(policy(up), MU * up / (MU * up).sum(), rtol=0, atol=1e-4)
    share = torch.tensor([0.9, 0.8, 0.95, 0.85, 0.99, 1.0]).double()
    mixed = policy(share)
    r = beta * ((mixed / ref).log() + log_z)
    expected = MU * (share - (1 - share) * beta * sigma(r))
    assert_close(mixed, expected / expected.sum(), rtol=0, atol=1e-6)


# ---- Log-probabilities ----
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
ARCHITECTURES = {  # several of these scale or cap their logits, in ways that change the result
    "gpt2": GPT2,
    "llama": SIZES,
    "gemma2": SIZES | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "qwen3": SIZES,
    "cohere": SIZES | {"logit_scale": 0.25},
    "granite": SIZES | {"logits_scaling": 3.0},
}


def tiny(name, **changes):  # a random model of a few thousand weights, with logits far from uniform
    torch.manual_seed(0)
    sizes = {"vocab_size": 61} | ARCHITECTURES.get(name, SIZES) | changes
    config = transformers.AutoConfig.for_model(name, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 20
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_response_logps_is_the_sum_over_response_tokens_alone(name):
    model, expected = tiny(name), [torch.zeros(())] * 4
    ids = torch.tensor([[9, 3, 44, 7, 30, 12, 8, 60, 5], [17, 33, 4, 21, 50, 6, 11, 0, 0]])
    ids = torch.cat([ids, ids.flip(1)])
    starts, ends = (5, 1, 3, 7), (9, 7, 4, 7)  # of the responses; the last is empty
    places = torch.arange(9).expand(4, 9)
    mask = (places >= torch.tensor(starts)[:, None]) & (places < torch.tensor(ends)[:, None])
    for i, (start, end) in enumerate(zip(starts, ends)):
        for t in range(start, end):  # each token from a forward pass of its own over a prefix
            logits = model(input_ids=ids[i : i + 1, :t]).logits[0, -1]
            expected[i] = expected[i] + logits.log_softmax(-1)[ids[i, t]]
    expected, actual = torch.stack(expected), ulma.response_logps(model, ids, mask)
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.dtype == torch.float32 and actual[3] == 0
    padded = ids.where(places < torch.tensor(ends)[:, None], 7)  # with whatever
    assert actual.equal(ulma.response_logps(model, padded, mask.long()))
    gradients = [torch.autograd.grad(x.sum(), [*model.parameters()]) for x in (actual, expected)]
    assert_close(*gradients, rtol=1e-3, atol=1e-3)


def row(name="x", length=3, **more):
    mask = torch.arange(length) > 0
    return ulma.Row(str(name), torch.arange(length) + 5, mask, **{"label": 1.0, **more})


def test_collate_pads_rows_on_the_right():
    batch = ulma.collate([row(), row(length=2)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 6, 0]]
    assert batch["response_mask"].tolist() == [[False, True, True], [False, True, False]]


# ---- Runs for the tests below ----
FAST = "--max-length 64 --max-new-tokens 8 --epochs 2 --learning-rate 3e-3 --batch-size 4 --beta .7"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def point(i, label=1, **more):
    return {"prompt": f"Question {i}?", "completion": f" Answer {i}.", "label": label, **more}


def stand_in(folder, name="llama", tokenizer=TOKENIZER, dtype=torch.float32, **changes):
    """A folder as from the hub: a random model and its tokenizer."""
    model = tiny(name, **{"vocab_size": len(tokenizer), **changes}).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


POINTS = [point(i // 2, i % 2) for i in range(20)]
TEXTS = [f" Answer {i}{' and more' * (i % 4)}." for i in range(10)]
RATED = [point(i % 3, int(i % 3 == i // 3), completion=TEXTS[i]) for i in range(10)]
SCORES = [[0.0, 0.3, 1.0][(i + i // 3) % 3] for i in range(10)]
MIXED = [{"label": 1} if score == 1 else {"label": None, "score": score} for score in SCORES]
DATA = {
    "rated": [{**row, "score": score} for row, score in zip(RATED, SCORES)],
    "weighted": [{**row, "score": SCORES[i], "weight": i % 3} for i, row in enumerate(RATED)],
    "mixed": [row | rating for row, rating in zip(RATED, MIXED)],
}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A tiny model; ten rated rows to train on, three with answers to test on."""
    folder = tmp_path_factory.mktemp("small")
    stand_in(folder / "model", attention_dropout=0.5)  # which training is to turn off
    for name, rows in DATA.items():
        write(folder / name / "train.jsonl", rows)
        write(folder / name / "test.jsonl", [{**row, "answers": TEXTS} for row in RATED[:3]])
    return folder


def options(small, flags, paths):
    paths = {"model": small / "model", "data": small / "rated"} | paths
    named = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
    return [*FAST.split(), *named, *flags.split()]


@pytest.fixture(scope="session")
def run(small, tmp_path_factory):
    """run(flags, model=…, data=…): the metrics and the output folder of a run of a second."""

    def call(flags="", **paths):
        paths = {"output_dir": tmp_path_factory.mktemp("runs") / "out"} | paths
        return ulma.main(options(small, flags, paths)), Path(paths["output_dir"])

    return call


def error_of(run, flags="", **paths):  # the one line that a user's mistake gets
    with redirect_stderr(io.StringIO()) as told, pytest.raises(SystemExit) as stop:
        run(flags, **paths)
    [line] = [line for line in told.getvalue().splitlines() if "ulma.py: " in line]
    assert stop.value.code == 2
    return line


# ---- From the option to the weights, through main alone ----
METHODS = ["ulma", "pointwise-dpo", "ulma --continuous", "pointwise-dpo --continuous"]
CASES = [f"{data} {method}" for data in ("rated", "weighted") for method in (*METHODS, "sft")]
CASES += [f"rated {method} --balanced" for method in METHODS]
CASES += [f"rated {method} --average" for method in (METHODS[0], METHODS[3], "dpo")]
CASES += ["rated dpo", "mixed ulma --continuous", "mixed pointwise-dpo --continuous --balanced"]
CASES += ["weighted ulma --balanced --log-z 0"]
CASES += ["rated ulma --average --balanced --log-z 0"]  # the authors' code
NOISY = {"attention_dropout": 0.5, "dropout": 0.5, "router_jitter_noise": 0.1, "vocab_size": 768}
NOISY |= {"query_pre_attn_scalar": 8, "ffn_dim": 48, "word_embed_proj_dim": 32} | SIZES
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def naive_logp(model, row, flags=""):  # log π(y|x) of one row without padding
    prompt = TOKENIZER(row["prompt"]).input_ids
    ids = torch.tensor(prompt + TOKENIZER(row["completion"]).input_ids + [TOKENIZER.eos_token_id])
    logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    terms = torch.stack([logps[t - 1, ids[t]] for t in range(len(prompt), len(ids))])
    return terms.mean() if "--average" in flags else terms.sum()


def naive_loss(flags, model, reference, rows=RATED, beta=0.7):
    """The paper's mean loss over all rows, and the mean rewards of high and of low labels."""
    method, continuous = flags.split()[0], "--continuous" in flags
    z = torch.tensor(SCORES if continuous else [float(row["label"]) for row in rows])
    weight = torch.tensor([row.get("weight", 1) for row in rows])
    good, high = z == 1, z > 0.5
    mean_label = (weight * z).sum() / weight.sum()
    if "--balanced" in flags:
        mean_label = (1 + z[~good].mean()) / 2
    c = mean_label if continuous else mean_label.logit()  # β log Z
    logps = torch.stack([naive_logp(model, row, flags) for row in rows])
    ref_logps = torch.stack([naive_logp(reference, row, flags) for row in rows]).detach()
    rewards = beta * (logps - ref_logps) + (0 if "--log-z 0" in flags else c)
    losses = (z - rewards) ** 2 if continuous else -logsigmoid((2 * z - 1) * rewards)
    if method != "pointwise-dpo":
        losses = torch.where(good, -logps, losses)
    losses = weight * losses
    total = losses[good].mean() if method == "sft" else losses.mean()
    if "--balanced" in flags:  # half of the authors' loss, which is the sum of these means
        total = (losses[good].mean() + losses[~good].mean()) / 2
    if method == "dpo":
        pairs = itertools.product(good.nonzero(), (~good).nonzero())
        gaps = [rewards[i] - rewards[j] for i, j in pairs if i % 3 == j % 3]  # of one prompt
        total = -logsigmoid(torch.cat(gaps)).mean()
    return total, [rewards[high].mean().item(), rewards[~high].mean().item()]


@pytest.fixture
def watched(monkeypatch, run):
    """watched(flags): for each step (weights, gradient before clipping), the log, the results."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def spy(parameters, bound):
        parameters = list(parameters)
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        steps.append(([p.detach().clone() for p in parameters], gradient))
        return clip(parameters, bound)

    def call(flags, **paths):  # a step holds all rows
        steps.clear()
        results, out = run(f"--epochs 3 --gradient-accumulation 3 {flags}", **paths)
        return list(steps), read(out / "log.jsonl"), results

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    return call


@pytest.mark.parametrize("case", CASES)
def test_a_steps_gradient_and_log_are_those_of_the_papers_mean_loss(watched, small, case):
    data, flags = case.split(maxsplit=1)
    steps, [line], _ = watched(f"--method {flags}", data=small / data)
    model, reference, figures = read_model(small / "model"), read_model(small / "model"), []
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for done, (values, gradient) in enumerate(steps):
        for parameter, value in zip(model.parameters(), values):
            assert (parameter - value).norm() < 1e-2
            parameter.data.copy_(value)
        loss, rewards = naive_loss(flags, model, reference, DATA[data])
        figures.append((loss.item(), *rewards))
        optimizer.zero_grad()
        loss.backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert (gradient - expected).norm() < 1e-3 * expected.norm()
        for parameter in model.parameters():
            parameter.grad /= max(expected.norm(), 1)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * done / 3)) / 2
        optimizer.step()
    loss, *rewards = torch.tensor(figures).mean(0).tolist()
    assert len(steps) == line["step"] == 3
    assert line["gradient_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
    assert line["loss"] == pytest.approx(loss, rel=1e-4)
    if "dpo" != flags.split()[0]:  # where a row has several pairs; SFT reads no reference
        expected = [None, None] if flags == "sft" else pytest.approx(rewards, rel=1e-3)
        assert [line["reward_positive"], line["reward_negative"]] == expected


def test_a_pair_weighs_the_mean_of_its_rows(small):
    model, args = read_model(small / "model"), ulma.read_options(["--method=dpo", "--log-z=0"])
    losses = []
    for weights in ((1.0, 1.0), (1.0, 4.0)):
        pair = [row(weight=w, ref_logp=-2.0, length=n) for w, n in zip(weights, (3, 2))]
        losses.append(ulma.batch_losses(model, [tuple(pair)], args)[0])
    assert_close(losses[1], 2.5 * losses[0])


def test_reward_auc_and_perplexity_are_of_the_test_rows_against_the_reference(run, small):
    results, out = run("--method pointwise-dpo --gradient-checkpointing --epochs 8")
    model, reference = read_model(out), read_model(small / "model")
    gains = [naive_logp(model, row) - naive_logp(reference, row) for row in RATED[:3]]
    wins = [bool(gains[0] > gain) for gain in gains[1:]]  # the first row alone has label 1
    assert (results["before"]["reward_auc"], results["after"]["reward_auc"]) == (0.5, sum(wins) / 2)
    nats = -naive_logp(model, RATED[0], "--average").item()
    perplexity = pytest.approx(math.exp(nats), rel=1e-4)
    assert results["after"]["perplexity"] == perplexity
    again = run("--eval-only", model=out, reference=small / "model")[0]["eval"]
    assert again == pytest.approx(results["after"])
    averaged = run("--eval-only --average", model=out)[0]["eval"]
    assert averaged == {**averaged, "perplexity": perplexity, "reward_auc": None}  # no reference


def test_with_a_reference_of_its_own_training_starts_elsewhere(watched, run, small):
    first, trained = run("--method pointwise-dpo --epochs 8")
    paths = {"model": trained, "reference": small / "model"}
    steps, _, results = watched("--method pointwise-dpo --gradient-checkpointing", **paths)
    model, reference = map(read_model, paths.values())
    naive_loss("pointwise-dpo", model, reference)[0].backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (steps[0][1] - expected).norm() < 1e-3 * expected.norm()
    assert results["before"] == pytest.approx(first["after"])
    _, [line], _ = watched("--method sft", **paths)  # which reads it only where it is given
    assert line["reward_positive"] > 0


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "gemma3"])
def test_rewards_start_at_beta_log_z_whatever_is_noisy_in_training_mode(run, tmp_path, name):
    nested = {"text_config": NOISY, "vision_config": VISION}
    stand_in(tmp_path, name, **(nested if name == "gemma3" else NOISY))
    for more in ("", "--gradient-checkpointing"):
        results, out = run(f"--epochs 1 --batch-size 10 {more}", model=tmp_path)
        [line] = read(out / "log.jsonl")
        start = 0.7 * torch.tensor(results["options"]["log_z"]).float()
        assert line["reward_positive"] == line["reward_negative"] == start.item() != 0


def test_checkpointing_runs_each_block_again(run):
    def count(module, *_):
        calls.append(torch.is_grad_enabled() and type(module).__name__ == "LlamaMLP")

    calls = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    run("--gradient-checkpointing")
    hook.remove()
    assert sum(calls) == 2 * 2 * 6  # passes, blocks, steps


def test_another_loss_is_another_function_for_train(small, tmp_path):
    def unlikelihood(model, items, args):
        losses, rewards, labels = ulma.batch_losses(model, items, args)
        return -losses, rewards, labels

    args = ulma.read_options(options(small, "--method sft --log-z 0", {}))
    items = ulma.training_items(ulma.load_items(args, TOKENIZER)[0], "sft")
    model = ulma.load_model(args.model, args, TOKENIZER)
    ulma.train(model, items, args, tmp_path, losses_of=unlikelihood)
    after = ulma.all_logps(model, ulma.rows_of(items), args, "after")
    assert after.mean() < read(tmp_path / "log.jsonl")[-1]["loss"] < -10


def test_batches_hold_every_item_once_in_seeded_order_alike_in_length():
    items = [(row(i, random.Random(i).randrange(5, 500)),) for i in range(1003)]
    batches, again, other = (ulma.bucketed_batches(items, 8, random.Random(i)) for i in (1, 1, 2))
    assert batches == again != other and sorted(map(len, batches)) == [3] + [8] * 125
    assert {item for batch in batches for item in batch} == set(items)
    lengths = [[len(item[0].input_ids) for item in batch] for batch in batches]
    assert sum(len(batch) * max(batch) for batch in lengths) < 1.1 * sum(map(sum, lengths))


DEVICE = """
import collections, json, sys, torch, traceback, ulma
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree, _python_dispatch, backend_registration
backend_registration._setup_privateuseone_for_python_backend("pretend")
torch.get_device_module("pretend").get_amp_supported_dtype = lambda: [torch.bfloat16]
torch.__future__.set_overwrite_module_params_on_conversion(True)
device, waits = FakeTensorMode(), collections.Counter()
def to_fake(x):
    return device.from_tensor(x) if type(x) in (torch.Tensor, torch.nn.Parameter) else x
class Pretend(_python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = _pytree.tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or getattr(x, "type", 0) == "pretend" for x in leaves):
            return op(*args, **kwargs)
        number = op is torch.ops.aten._local_scalar_dense.default
        if number or getattr(kwargs.get("device"), "type", 0) == "cpu":  # the CPU waits
            waits["train" in [frame.name for frame in traceback.extract_stack()]] += 1
            return 0.5 if number else torch.full(args[0].shape, 0.5)
        with device:
            return op(*_pytree.tree_map(to_fake, args), **_pytree.tree_map(to_fake, kwargs))
ulma.sample = lambda model, tokenizer, rows, args: [[("x", 1, True)]] * len(rows)
ulma.save_model = lambda *_: None
with Pretend():
    ulma.main(sys.argv[1:])
print(json.dumps([waits[True], waits[False]]))
"""


def test_on_a_device_without_data_training_waits_only_where_it_logs(small, tmp_path):
    flags = "--method pointwise-dpo --gradient-checkpointing --epochs 5"
    argv = [sys.executable, "-c", DEVICE, *options(small, flags, {"output_dir": tmp_path})]
    output = subprocess.run(argv, cwd=HERE, stdout=subprocess.PIPE, check=True).stdout
    in_train, elsewhere = json.loads(output.splitlines()[-1])
    log = read(tmp_path / "log.jsonl")
    assert [line["step"] for line in log] == [10, 15] and elsewhere > 0
    assert in_train <= 4 * len(log)  # the loss, rewards with labels, the gradient's norm


# ---- Reading and evaluation ----
HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:"
BYE = "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}<eot>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINK = "<think>\n\n</think>\n\n"
LAST = "{% if loop.last and m.role == 'assistant' %}" + THINK + "{% endif %}{{ m.content }}"
QWEN3 = CHATML.replace("{{ m.content }}", LAST)
TURNS = {  # template, BOS, EOS: the prompt, and what is before and after the answer
    (CHATML, None, "<|im_end|>"): (BYE, "", "<|im_end|>"),
    (CHATML, None, "<eos>"): (BYE, "", "<|im_end|>"),
    (PHI3, None, "<eos>"): ("<|user|>\nBye<|end|>\n<|assistant|>\n", "", "<|end|>"),
    (GEMMA, "<bos>", "<eos>"): ("<bos><turn>user\nBye<eot>\n<turn>assistant\n", "", "<eot>"),
    (PLAIN, "<s>", "<eos>"): ("user: Bye\n", "assistant: ", "<eos>"),
    (QWEN3, None, "<|im_end|>"): (BYE, THINK, "<|im_end|>"),
    (None, None, "<eos>"): ("Bye", "", "<eos>"),  # texts
}
TOKENS = [  # what is around texts; a prompt and a response; their tokens
    ("$A", "10 11 ", "20", "10 11", "20 <eos>"),
    ("<bos> $A", "10 11 ", "20", "<bos> 10 11", "20 <eos>"),
    ("<bos> $A", "<bos> 10 11 ", "20 <eos>", "<bos> 10 11", "20 <eos>"),
    ("<bos> $A <eos>", "10 11 ", "20", "<bos> 10 11", "20 <eos>"),
    ("<eos> $A", "10 11 ", "20", "<eos> 10 11", "20 <eos>"),
    ("[gMASK] <sop> $A", "10 11 ", "20", "[gMASK] <sop> 10 11", "20 <eos>"),
    ("<bos> $A", "10 1", "1 20", "<bos> 10", "11 20 <eos>"),  # a token across the boundary
]


def load(data, flags="", tokenizer=TOKENIZER):
    return ulma.load_items(ulma.read_options([f"--data={data}", *flags.split()]), tokenizer)


def items_of(*records, tokenizer=TOKENIZER, flags=""):
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder) / "rows.jsonl", records)
        return load(data, f"--eval-only {flags}", tokenizer)[1]


def decoded(items, tokenizer=TOKENIZER):
    """The prompt and the response of each row, as its tokens have them."""
    rows = [(row.input_ids, row.response_mask) for row in ulma.rows_of(items)]
    return [(tokenizer.decode(ids[~mask]), tokenizer.decode(ids[mask])) for ids, mask in rows]


def chat_tokenizer(template=CHATML, bos=None, eos="<|im_end|>"):
    """data/base's tokenizer with a chat template, more tokens and, if it is given, BOS."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    extra = ["<|im_start|>", "<|im_end|>", "<|end|>", "<turn>", "<eot>", "<b>", "</b>"]
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": extra})
    tokenizer.chat_template = template
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
        opened = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = opened
    return tokenizer


def chat(*contents):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, contents)]


def answer(content="x", prompt="Hi", **more):
    last = {"role": "assistant", "content": content, **more}
    return {"prompt": chat(prompt), "completion": [last], "label": 1}


ASKED = chat("Hi", "Hello!", "Bye")
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("Good.", "Bad."))
FORMS = [
    {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    {"prompt": "Bye", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},  # UltraFeedback
    {"prompt": ASKED, "completion": "Good.", "label": True, "rejected": None},
    {"prompt": [m | {"name": None} for m in ASKED], "completion": GOOD, "label": 1},
    {"prompt": None, "completion": ASKED + GOOD, "label": True},
]
SYSTEM = {"prompt": [{"role": "system", "content": "Hi"}, *chat("Hi")]}  # the same text twice
REFUSED = [  # an edit of CHATML, a record, what is told
    ("in messages", "in messages if m.role != 'system'", SYSTEM, "leaves out or changes"),
    ("in messages", "in messages[-2:]", {"prompt": ASKED}, "leaves out or changes"),
    ("m.content", "m.content | upper", {}, "leaves out or changes"),
    ("m.content", "m.content.split('</t>')[-1]", answer("<t>a</t>b"), "leaves out or changes"),
    ("assistant\n{% endif", "assistant\n<think>\n{% endif", {}, "<think>"),
    ("<|im_start|>assistant\n{% endif", "<|im_start|>bot\n{% endif", {}, "bot"),
    ("{% for", "{{ raise_exception('no such role') }}{% for", {}, "no such role"),
    *(("", "", answer(**{key: "y"}), "role and a content") for key in ("reasoning", "name")),
    *(("", "", answer(text), "role and a content") for text in ([{"type": "text"}], None, 5)),
    ("", "", answer(tool_calls=[{"function": {"name": "x"}}]), "role and a content"),
    *(("", "", {"prompt": asked}, "answer of the assistant") for asked in ([], ASKED[:2])),
    ("", "", {"completion": chat("I am the user")}, "answer of the assistant"),
    ("", "", {"prompt": "Ho", "completion": ASKED + GOOD}, "the prompt"),
    ("", "", {"prompt": "Q: Hi", "completion": "Q: Hi A: Ho"}, "repeats the prompt"),
]
PAIRS = [  # and the labels of their items
    ({"prompt": HH, "chosen": " Good.", "rejected": " Bad.", "score": 5}, [[1, 0]]),
    ({"chosen": f"{HH} Good.", "rejected": f"{HH} Bad."}, [[1, 0]]),  # HH-RLHF
    ({"chosen": f"{HH} Good.", "rejected": HH}, [[1, 0]]),
    ({"chosen": f"{HH} Good.", "rejected": f"{HH.replace('Hello!', 'What?')} Good."}, [[1], [0]]),
    ({"chosen": chat("A", "B", "C", "D"), "rejected": chat("A", "X", "C", "D")}, [[1], [0]]),
    ({"chosen": chat("A", "B"), "rejected": chat("Another", "B")}, [[1], [0]]),
]


@pytest.mark.parametrize("record", FORMS)
def test_a_conversation_is_read_in_every_form(record):
    prompt = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n{BYE}"
    responses = ["Good.<|im_end|>", "Bad.<|im_end|>"][: 1 + ("chosen" in record)]
    [item] = items_of(record, tokenizer=chat_tokenizer())
    assert decoded([item], chat_tokenizer()) == [(prompt, text) for text in responses]


@pytest.mark.parametrize("content", ["Good.", "<b>Good.</b>", "One<|im_start|> or <b>"])
@pytest.mark.parametrize("deployment", TURNS)
def test_a_response_ends_with_its_turn_whatever_tokens_are_in_it(deployment, content):
    opening, before, after = TURNS[deployment]
    tokenizer = chat_tokenizer(*deployment)
    record = answer(content, "Bye") if deployment[0] else point(0, prompt="Bye", completion=content)
    [(row,)] = items_of(record | {"answers": [content, "Fine."]}, tokenizer=tokenizer)
    assert decoded([(row,)], tokenizer) == [(opening, before + content + after)]
    assert list(row.answers) == [before + content, f"{before}Fine."]


@pytest.mark.parametrize("old, new, record, told", REFUSED)
def test_what_would_be_read_otherwise_than_meant_is_refused(old, new, record, told):
    with pytest.raises(ulma.Mistake, match=f"rows.jsonl: train row 1: .*{re.escape(told)}"):
        items_of(answer() | record, tokenizer=chat_tokenizer(CHATML.replace(old, new)))


def words(single="$A"):
    """A tokenizer to which the word "7" is token 7; single says what it writes around texts."""
    names = ["<unk>", "<bos>", "<eos>", *map(str, range(3, 61)), "[gMASK]", "<sop>"]
    numbers = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single, special_tokens=list(numbers.items()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("single, prompt, text, opening, response", TOKENS)
def test_texts_start_as_the_tokenizer_starts_them(single, prompt, text, opening, response):
    items = items_of(point(0, prompt=prompt, completion=text), tokenizer=words(single))
    assert decoded(items, words()) == [(opening, response)]


def test_unknown_tokens_and_prompts_without_a_token_are_refused():
    for prompt, text in (("10 ", "1"), ("10 x ", "11"), ("1", "1 20")):
        with pytest.raises(ulma.Mistake, match=r"does not know|no token of its own"):
            items_of(point(0, prompt=prompt, completion=text), tokenizer=words())


@pytest.mark.parametrize("record, labels", PAIRS)
def test_a_pair_is_one_item_where_its_prompts_are_equal(record, labels):
    items = items_of(record, tokenizer=chat_tokenizer(eos="<eos>"))
    assert [[row.label for row in item] for item in items] == labels
    assert isinstance(record["chosen"], list) or decoded(items)[0] == (HH, " Good.<eos>")
    assert ulma.training_items(items, "dpo") == [item for item in items if len(item) == 2]


def test_without_pairs_dpo_pairs_the_responses_of_each_prompt():
    items = items_of(*(point(i // 3, int(i % 3 == 1), weight=i) for i in range(6)), point(7))
    paired = ulma.training_items(items, "dpo")
    assert [[row.weight for row in pair] for pair in paired] == [[1, 0], [1, 2], [4, 3], [4, 5]]


def test_files_folders_and_formats_hold_the_same_rows(tmp_path):
    table = datasets.Dataset.from_list(POINTS)
    card = "---\nconfigs:\n- config_name: default\n  sep: ';'\n  data_files: rows.csv\n---\n"
    write(tmp_path / "card" / "README.md", []).write_text(card)
    for file, sep in {"card/rows.csv": ";", "rows.csv": ",", "rows.tsv": "\t"}.items():
        table.to_csv(tmp_path / file, sep=sep)
    table.to_parquet(tmp_path / "rows.parquet")
    for file in ("[a] *b*/rows[1].jsonl", "folder/one/train.jsonl", "folder/two/train.jsonl"):
        write(tmp_path / file, POINTS)
    for file in ("[a] *b*/rows[1].jsonl", "rows.csv", "rows.tsv", "rows.parquet", "card", "folder"):
        items = load(tmp_path / file, "--eval-only" + " --data-dir=two" * (file == "folder"))[1]
        rows = [(row.prompt, row.label) for (row,) in items]
        assert rows == [(point["prompt"], point["label"]) for point in POINTS]
    with pytest.raises(ulma.Mistake, match="brackets"):
        load(tmp_path / "[a] *b*")


def test_a_csv_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,label\nA?,NA,1\nB?," ""Yes"", he said",0\n')
    texts = decoded([*itertools.chain(*load(path))], TOKENIZER)
    assert sorted(texts) == [("A?", "NA<eos>"), ("B?", ' "Yes", he said<eos>')]


def test_splits_serve_by_their_names(tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("a", "b", "test")):
        path = tmp_path / "data" / f"{name}-00000-of-00001.parquet"
        datasets.Dataset.from_list([point(i)]).to_parquet(path)
    served = {"--train-split a": "02", "--train-split b --test-split a": "10", "--eval-only": "2"}
    served |= {"--test-split b --eval-only": "1", "--train-split b --test-split b": "11"}
    for flags, numbers in served.items():
        items = itertools.chain(*load(tmp_path, flags))
        assert "".join(row.prompt[9] for (row,) in items) == numbers
    for flags in ("", "--train-split a --test-split x", "--test-split x --eval-only"):
        with pytest.raises(ulma.Mistake, match="its splits are"):
            load(tmp_path, flags)


def test_without_a_test_split_a_seeded_tenth_of_the_prompts_is_held_out(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [point(i % 50) for i in range(100)])
    parts = [load(path, f"--seed={seed}") for seed in (0, 0, 1)]
    one, again, other = ([{item[0].prompt for item in items} for items in part] for part in parts)
    assert one == again != other and list(map(len, one)) == [45, 5] and not one[0] & one[1]
    assert "a tenth" in capsys.readouterr().out


def test_a_data_set_from_the_hub_is_read_by_name(monkeypatch):
    hub = {("someone/rows", "graded"): {"test": datasets.Dataset.from_list(POINTS[:3])}}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, data_dir: hub[path, data_dir])
    items = load("someone/rows", "--data-dir=graded --eval-only")[1]
    assert [row.label for (row,) in items] == [0, 1, 0]


def test_what_is_left_out_is_told(capsys):
    rows = [point(8, completion=" more" * 30), point(9, image="cat.png", history="Hi")]
    long = {"prompt": "Hi", "chosen": " Yes" * 30, "rejected": " No", "rating": 5}
    for records, count, columns in (
        ([*POINTS, *rows], 21, "columns image, history"),
        ([rows[0], *POINTS], 20, "columns (none)"),
        ([long, long | {"chosen": " Yes"}], 1, "columns rating"),
    ):
        assert len(items_of(*records, flags="--max-length 25")) == count
        told = capsys.readouterr().out
        assert f" {count} rows" in told and " 1 over --max-length" in told and columns in told
    [(exact,)] = items_of(POINTS[0])
    assert len(items_of(POINTS[0], flags=f"--max-length {len(exact.input_ids)}")) == 1


def test_reward_auc_is_the_share_of_pairs_in_order_with_ties_a_half():
    graded = [1.0, 3.0, 2.0, 2.0], [1.0, 0.5, 0.5, 0.0], 0.3
    for scores, labels, share in ([3.0, 1.0], [1, 0], 1), ([1.0, 1.0], [1, 1], None), graded:
        assert ulma.concordance(torch.tensor(scores), torch.tensor(labels)) == share


def test_exact_match_counts_answers_special_tokens_and_all(run, tmp_path, monkeypatch):
    tokenizer = chat_tokenizer(None, eos="<eos>")
    model = stand_in(tmp_path / "model", tokenizer=tokenizer)
    rows = [point(i, answers=[" <b>Yes</b>", " Sure."], group="ab"[i // 2]) for i in range(3)]
    texts = [" <b>Yes</b><eos> no", "Sure.<eos>", " Yes<eos>"]
    added = tokenizer(texts, padding=True, return_tensors="pt").input_ids

    def generate(model, input_ids, **_):
        return torch.cat([input_ids, added], 1).repeat_interleave(ulma.SAMPLES, 0)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    metrics, out = run("--eval-only", model=model, data=write(tmp_path / "test.jsonl", rows))
    shares = [metrics["eval"][f"exact_match{name}"] for name in ("", "/a", "/b")]
    assert shares == pytest.approx([2 / 3, 1, 0])
    assert read(out / "samples.jsonl")[0] == {"prompt": "Question 0?", "eval": ["<b>Yes</b>"] * 4}


def test_of_samples_the_length_the_share_that_ended_and_the_distinct_ones_are_told(
    run, tmp_path, monkeypatch
):
    model = stand_in(tmp_path / "model", tokenizer=chat_tokenizer(None, eos="<eos>"))
    end = AutoTokenizer.from_pretrained(model).eos_token_id
    added = torch.tensor([[7, end, 0], [7, 8, 9], [7, end, 9]])  # the second is cut off

    def generate(model, input_ids, **_):
        return torch.cat([input_ids, added], 1).repeat_interleave(ulma.SAMPLES, 0)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    data = write(tmp_path / "test.jsonl", [point(i) for i in range(3)])
    metrics = run("--eval-only", model=model, data=data)[0]["eval"]
    figures = [metrics[f"sample_{name}"] for name in ("length", "ended", "distinct")]
    assert figures == pytest.approx([5 / 3, 2 / 3, 2 / 12])


def test_samples_are_the_policys_whatever_the_models_settings_which_stay(run, small, tmp_path):
    def samples(flags="", **paths):
        lines = read(run(f"--eval-only {flags}", **paths)[1] / "samples.jsonl")
        return [text for line in lines for text in line["eval"]]

    plain, longest = samples(), max(map(len, TOKENIZER.get_vocab()))
    assert len(set(plain)) == 3 * ulma.SAMPLES
    assert max(map(len, samples("--max-new-tokens 1"))) <= longest < max(map(len, plain))
    model = shutil.copytree(small / "model", tmp_path / "model")
    for settings in (
        {"do_sample": True, "top_k": 1, "min_p": 0.5, "repetition_penalty": 9.0},
        {"num_beams": 8, "max_length": 3, "no_repeat_ngram_size": 2, "suppress_tokens": [5]},
    ):
        write(model / "generation_config.json", [{"eos_token_id": 2, **settings}])
        assert samples(model=model) == plain
        saved = run("--epochs 1", model=model)[1] / "generation_config.json"
        assert settings.items() <= json.loads(saved.read_text()).items()


def test_rows_end_alike_as_texts_and_through_a_template(tmp_path, run):
    template = "{% for m in messages %}{{ m.content }}{{ '<eot>' if loop.index > 1 }}{% endfor %}"
    tokenizer, model = chat_tokenizer(template, eos="<end>"), read_model(BASE)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight, end = model.get_input_embeddings().weight.data, tokenizer.convert_tokens_to_ids("<eot>")
    weight[[1, end]] = weight[[end, 1]]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    texts = write(tmp_path / "texts.jsonl", read(HERE / "data" / "test.jsonl")[:80])
    chats = [row | {"prompt": chat(row["prompt"])} for row in read(texts)]
    chats = write(tmp_path / "chats.jsonl", chats)
    flags = "--eval-only --max-length 128 --max-new-tokens 64"
    one = run(flags, model=BASE, data=texts)[0]["eval"]
    other = run(flags, model=tmp_path, data=chats)[0]["eval"]
    assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    assert 0.15 < one["exact_match"] == pytest.approx(other["exact_match"], abs=0.12)


# ---- Models and mistakes ----
A, B = json.dumps(point(1)), json.dumps(point(2, 0))
NUMBERS = "--beta=0 --max-length=0 --max-new-tokens=0 --epochs=-1 --learning-rate=nan --log-z=inf"
NAMES = "--methd=sft --method=rlhf --data=nowhere --model=nowhere --lora=-1"
MISTAKES = {flag: flag.split("=")[0] for flag in f"{NUMBERS} {NAMES}".split()}
MISTAKES |= {f"--balanced --method {method}": "--balanced" for method in ("dpo", "sft")}
MISTAKES |= {f"--data {__file__}": "test_ulma", "--data-dir nowhere": "nowhere"}
MISTAKES |= {
    f"--output-dir {HERE}": "a finished or another",
    f"--output-dir {__file__}/x": "test_ulma",
}
COLUMNS = {  # rows, with | between them; what the line tells
    "": "rows.jsonl: train ",
    f"{A}|{A[:-9]}": "row 1",
    A.replace("Answer", "\xe9"): "utf-8",
    A.replace("label", "lable"): "prompt, completion, lable",
    A.replace(" Answer 1.", ""): "completion",
    A.replace('" Answer 1."', "5"): "5 was read",
    A.replace(" Answer 1.", "2024-01-31"): "datetime(2024, 1, 31",
    A.replace(": 1}", ": 0.5}"): "--continuous",
    A.replace(": 1}", ': "1"}'): "'1'",
    f"{A}|{A.replace(': 1}', ': 2}')}": "train row 2: ",
    '{"chosen": "Hi", "rejected": "\\n\\nAssistant: x"}': "prompt",
    json.dumps(answer()): "chat_template",
    json.dumps(point(1, completion=" long" * 99)): "--max-length",
    "|".join([A] * 9): "label",
    "|".join(json.dumps(point(i)) for i in range(9)): "the mean label is 1",
    "|".join(json.dumps(point(i, 0)) for i in range(9)): "the mean label is 0",
    "|".join([B] * 9): "label",
    "prompt,completion,label|Please, say yes?, Yes.,1": "more fields",
    "prompt,chosen,rejected|Please, hello?, Hi., No.": "more fields",
    'prompt,completion,label|Hi?," It is \\"so\\" here",1': "expected after",  # quotes as Spark's
}
COLUMNS |= {json.dumps(point(1, answers=value)): "answers" for value in ("Yes.", [1], {"a": "b"})}
COLUMNS |= {json.dumps(point(1, weight=value)): "weight" for value in (-1, "2", [1.0])}
UNFIT = [  # a model, how it is made, what its config.json says instead; what the line tells
    ("bert", {"hidden_size": 32, "num_attention_heads": 2}, {}, "decoder-only"),
    ("llama", {"rms_norm_eps": math.nan}, {}, "not finite"),
    ("llama", {"max_position_embeddings": 71}, {}, "71 tokens"),
    ("llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, "lm_head.weight"),
    ("llama", {"attention_bias": True}, {"attention_bias": False}, "bias"),
    ("llama", {}, {"num_hidden_layers": 1}, "layers.1"),
    ("llama", {}, {"architectures": ["LlamaRewardModel"]}, "LlamaRewardModel"),
    ("llama", {}, {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
]


@pytest.mark.parametrize("name, tied", [*itertools.product(("gpt2", "llama"), (True, False))])
def test_a_model_in_bfloat16_shards_is_trained_and_saved_in_float32(run, tmp_path, name, tied):
    tokenizer = chat_tokenizer(None)
    tokenizer.pad_token = None
    model = stand_in(tmp_path, name, tokenizer, torch.bfloat16, tie_word_embeddings=tied)
    assert len(list(model.glob("model-*.safetensors"))) > 1
    _, out = run(model=model)
    before, after = (read_model(folder).state_dict() for folder in (model, out))
    changes = [(after[key] - before[key]).abs().max() for key in before]
    assert before.keys() == after.keys() and 0 < max(changes) < 1
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).pad_token is None  # as it was


@pytest.mark.parametrize("name, made, said, told", UNFIT)
def test_a_model_that_cannot_be_trained_is_refused(run, tmp_path, name, made, said, told):
    config = stand_in(tmp_path, name, **made) / "config.json"
    write(config, [json.loads(config.read_text()) | said])
    assert told in error_of(run, model=tmp_path)


def test_pickled_weights_and_a_reference_with_another_tokenizer_are_refused(run, tmp_path):
    stand_in(tmp_path, tokenizer=words(), vocab_size=768)
    assert "its tokenizer is not" in error_of(run, reference=tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.rename(file.with_suffix(".bin"))
    assert "safetensors" in error_of(run, model=tmp_path)


def test_tokens_without_an_embedding_are_refused_where_a_row_holds_one(run, tmp_path):
    tokenizer = chat_tokenizer(None, eos="<eos>")
    model = stand_in(tmp_path / "model", tokenizer=tokenizer, vocab_size=768)
    assert run(model=model)
    for token in (tokenizer.convert_ids_to_tokens(768), "<b>"):  # of 768, the first without one
        for text in (f" {token}", f"It ends{token}.", f"{token} so"):
            data = write(tmp_path / "rows.jsonl", [*POINTS, point(1, completion=text)])
            assert token in error_of(run, model=model, data=data)


@pytest.mark.parametrize("source", [*MISTAKES, *COLUMNS])
def test_a_mistake_gets_one_line_that_names_it_and_nothing_is_written(run, tmp_path, source):
    paths = {"output_dir": tmp_path / "out"}
    if source in COLUMNS:
        paths["data"] = tmp_path / f"rows.{'csv' if source[:6] == 'prompt' else 'jsonl'}"
        paths["data"].write_text(source.replace("|", "\n"), encoding="latin-1")
    told = error_of(run, "" if source in COLUMNS else source, **paths)
    assert (MISTAKES | COLUMNS)[source] in told and not (tmp_path / "out").exists()


def test_several_processes_are_sent_to_the_trainer(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Trainer in README" in error_of(run)


def test_a_terminal_that_knows_no_greek_gets_question_marks(run, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run() and b"? 0.7, ? log Z" in terminal.buffer.getvalue()


@pytest.mark.parametrize("name", ["bucketed_batches", "Row", "collate", "concordance"])
def test_a_bug_of_ours_keeps_its_traceback(run, monkeypatch, name):
    monkeypatch.setattr(ulma, name, Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        run()


def test_a_full_memory_is_told_in_one_line(run, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(ulma, "response_logps", Mock(side_effect=error))
    assert "out of memory" in error_of(run)


def test_lora_trains_adapters_alone_and_saves_the_merged_model(run, small, monkeypatch, capsys):
    pytest.importorskip("peft")
    train, save = Mock(wraps=ulma.train), Mock(wraps=torch.save)
    monkeypatch.setattr(ulma, "train", train)
    monkeypatch.setattr(torch, "save", save)
    results, out = run("--method sft --lora 2 --save-steps 3 --bf16 --learning-rate 0.03")
    parameters = list(train.call_args.args[0].parameters())
    kinds = {(p.requires_grad, p.dtype) for p in parameters}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    adapters = sum(p.numel() for p in parameters if p.requires_grad)
    assert f"trains {adapters:,} of" in capsys.readouterr().out
    checkpointed = save.call_args.args[0]["parameters"].values()
    assert adapters == sum(value.numel() for value in checkpointed) < 9999
    before, after = (read_model(folder).state_dict() for folder in (small / "model", out))
    for name in before:  # rank 2 in all linear layers but the head
        rank = torch.linalg.matrix_rank(torch.atleast_2d(after[name] - before[name]), rtol=1e-3)
        assert rank == (2 if "proj" in name else 0)
    again = run("--eval-only", model=out, reference=small / "model")[0]["eval"]
    assert again["perplexity"] == pytest.approx(results["after"]["perplexity"], rel=0.02)


# ---- Interruptions, and what the README says ----
SAVING = "--save-steps 1 --log-z 0"
DISKS = [(torch, "save", 2), (transformers.PreTrainedModel, "save_pretrained", 6)]


def outcome(out):  # what equal runs have in common: all but the times, and steps done twice
    metrics = json.loads((out / "metrics.json").read_text())
    log = {line["step"]: {**line, "tokens_per_second": 0} for line in read(out / "log.jsonl")}
    model, files = (out / "model.safetensors").read_bytes(), {path.name for path in out.iterdir()}
    return log, metrics["before"], metrics["after"], model, files


def test_a_run_killed_at_any_moment_ends_as_one_that_never_was(small, tmp_path):
    """KILLS=20 python -m pytest -k killed_at_any: so many kills at random moments; else one."""

    def begin(out):
        argv = options(small, f"{SAVING} --epochs 8 --batch-size 2", {"output_dir": tmp_path / out})
        return subprocess.Popen([sys.executable, "ulma.py", *argv], cwd=HERE)

    never = begin("never")
    for kill in range(int(os.environ.get("KILLS", 1))):
        process = begin(f"{kill}")
        while not (tmp_path / f"{kill}" / "options.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.wait()
        begin(f"{kill}").wait()  # refused, if it was killed too late
        never.wait()
        assert outcome(tmp_path / f"{kill}") == outcome(tmp_path / "never")


@pytest.fixture
def stopped(run, monkeypatch, tmp_path, small):
    """The paths of a run that breaks at step 3: its checkpoint is of step 2."""
    clip = torch.nn.utils.clip_grad_norm_
    breaks = Mock(wraps=clip, side_effect=[DEFAULT, DEFAULT, torch.tensor(math.nan)])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", breaks)
    data = shutil.copytree(small / "rated", tmp_path / "data")
    paths = {"output_dir": tmp_path / "out", "data": data}
    assert re.search("not finite at step 3.*--learning-rate", error_of(run, SAVING, **paths))
    monkeypatch.undo()
    return paths


def test_the_same_command_goes_on_and_any_other_is_refused(stopped, run):
    for more in ("--beta 1", "--seed 1", "--method sft"):
        assert "a finished or another" in error_of(run, f"{SAVING} {more}", **stopped)
    assert run(SAVING, **stopped)[0]["train"]["from_step"] == 2
    assert outcome(stopped["output_dir"]) == outcome(run(SAVING, data=stopped["data"])[1])
    assert "a finished or another" in error_of(run, SAVING, **stopped)


def test_a_checkpoint_of_other_rows_or_with_code_is_refused(stopped, run):
    for change in ({"label": 1}, {"completion": " Other."}, {"weight": 2}):
        write(stopped["data"] / "train.jsonl", [*RATED[:9], RATED[9] | change])
        assert "other rows" in error_of(run, SAVING, **stopped)
    write(stopped["data"] / "train.jsonl", DATA["rated"])
    torch.save({"step": print}, stopped["output_dir"] / "checkpoint.pt")
    assert "begin anew: Weights only" in error_of(run, SAVING, **stopped)


@pytest.mark.parametrize("place, name, step", DISKS)
def test_a_full_disk_costs_no_training(run, monkeypatch, tmp_path, place, name, step):
    effects = [DEFAULT] * (step % 6) + [OSError(28, "No space left on device")]
    monkeypatch.setattr(place, name, Mock(wraps=getattr(place, name), side_effect=effects))
    assert re.search("same command.*No space left", error_of(run, SAVING, output_dir=tmp_path))
    monkeypatch.undo()
    assert run(SAVING, output_dir=tmp_path)[0]["train"]["from_step"] == step
    assert outcome(tmp_path) == outcome(run(SAVING)[1])


def test_the_readmes_command_aligns_the_embedded_model(tmp_path):
    argv = [sys.executable, "ulma.py", "--method", "ulma", f"--output-dir={tmp_path}"]
    done = subprocess.run(argv, cwd=HERE, capture_output=True, text=True)
    results = json.loads((tmp_path / "metrics.json").read_text())
    before, after = results["before"], results["after"]
    assert 0.20 < before["exact_match"] < 0.35 and after["exact_match"] >= 0.8
    assert after["exact_match/undemonstrated"] > before["exact_match/undemonstrated"] + 0.3
    assert after["reward_auc"] > 0.95 and after["perplexity"] < before["perplexity"]
    assert "learning rate 0.0003" in done.stdout and "β 3, β log Z -1.61, 5 epochs" in done.stdout


# ---- The Trainer in the README ----
README = (HERE / "README.md").read_text(encoding="utf-8")
TRAINER_FLAGS = "--max_length 64 --learning_rate 1e-3 --num_train_epochs 10 --beta .7 --use_cpu"
TRAINER_FLAGS += " --gradient_accumulation_steps 2 --train_sampling_strategy sequential"
TRAINER_FLAGS += " --logging_steps 1 --disable_tqdm true"
# accelerate shards on GPUs alone, so it is told that these CPUs are some; DIES_AT is a step.
LAUNCH = """
import os, runpy, sys
import torch
from accelerate.state import DistributedType, PartialState
from transformers import Trainer

prepare, take_step = Trainer.create_accelerator_and_postprocess, Trainer.training_step


def prepare_for_gpus(trainer):
    if trainer.args.fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    prepare(trainer)


def take_step_or_die(trainer, model, *inputs):
    if str(trainer.state.global_step) == os.environ.get("DIES_AT"):
        os.kill(os.getpid(), 9)
    print("the model is a", type(model).__name__)
    return take_step(trainer, model, *inputs)


Trainer.create_accelerator_and_postprocess = prepare_for_gpus
Trainer.training_step = take_step_or_die
sys.argv[:1] = []
runpy.run_path(sys.argv[0], run_name="__main__")
assert not torch.distributed.is_initialized()  # or its threads may abort at exit
"""


@pytest.fixture
def trainer(small, tmp_path):
    """trainer(flags): what the README's trainer.py prints. Its output folder is tmp_path/out."""
    [script] = re.findall(r"```python\n(from dataclasses.*?)```", README, re.DOTALL)
    assert script.count("\n") <= 60
    (tmp_path / "trainer.py").write_text(script)
    (tmp_path / "launch.py").write_text(LAUNCH)
    paths = ["--model", small / "model", "--data", small / "weighted", "--output_dir", "out"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}

    def call(flags, processes=1, code=0, **more):
        argv = [sys.executable, "launch.py", "trainer.py", *paths]
        if processes > 1:
            argv[1:1] = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        argv = list(map(str, [*argv, *TRAINER_FLAGS.split(), *flags.split()]))
        done = subprocess.run(argv, cwd=tmp_path, env=environment | more, capture_output=True)
        assert done.returncode == code, done.stderr.decode()[-3000:]
        return done.stdout.decode()

    return call


@pytest.mark.parametrize(
    "processes, flags, same, kind",
    [
        (1, "--per_device_train_batch_size 2", "", "LlamaForCausalLM"),
        (2, "--per_device_train_batch_size 1", "", "DistributedDataParallel"),
        (2, "--per_device_train_batch_size 1 --fsdp --gradient_checkpointing", "", "FSDPLlama"),
        (1, "--per_device_train_batch_size 2 --lora 2 --method pointwise-dpo", "--lora 2", "Peft"),
    ],
)
def test_the_trainer_leaves_the_weights_and_losses_of_ulma(
    trainer, run, small, tmp_path, monkeypatch, processes, flags, same, kind
):
    if same:
        pytest.importorskip("peft")
        same += " --method pointwise-dpo"
    monkeypatch.setattr(ulma, "bucketed_batches", lambda items, size, _: ulma.chunks(items, size))
    same += " --batch-size 4 --epochs 10 --learning-rate 1e-3"
    _, out = run(same, data=small / "weighted")
    told = trainer(flags, processes)
    assert f"the model is a {kind}" in told
    losses = [float(loss) for loss in re.findall("'loss': '(.*?)'", told)]
    log = read(out / "log.jsonl")  # of every ten steps
    means = [ulma.mean(part) for part in ulma.chunks(losses, 10)]
    assert means == pytest.approx([line["loss"] for line in log], rel=1e-3)
    folders = small / "model", out, tmp_path / ("out/merged" if "--lora" in same else "out")
    initial, expected, actual = (read_model(folder).state_dict() for folder in folders)
    assert_close(actual, expected, rtol=0, atol=1e-5)
    assert max((actual[name] - initial[name]).abs().max() for name in actual) > 1e-3


def test_the_trainer_killed_and_continued_ends_as_one_that_never_was(trainer, tmp_path):
    flags = "--train_sampling_strategy random --per_device_train_batch_size 1 --save_steps 2"
    flags += " --num_train_epochs 2 --output_dir"
    trainer(f"{flags} never")
    trainer(f"{flags} killed", DIES_AT="7", code=-9)
    told = trainer(f"{flags} killed --resume_from_checkpoint killed/checkpoint-6")
    assert told.count("the model is a") == 2 * (10 - 6)  # steps of two batches
    never, killed = (read_model(tmp_path / name).state_dict() for name in ("never", "killed"))
    assert_close(killed, never, rtol=0, atol=0)


def test_one_process_for_several_gpus_is_refused():
    ids, mask = torch.tensor([[9, 3, 44]]), torch.tensor([[False, True, True]])
    with pytest.raises(ulma.Mistake, match="torchrun"):
        ulma.response_logps(torch.nn.DataParallel(tiny("llama")), ids, mask)
