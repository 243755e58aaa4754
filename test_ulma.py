"""One test for each claim of ulma.py: the losses against the paper's equations, then the rest of
the file in its order.

    python -m pytest -q -k equation     # the losses alone, in seconds
    python -m pytest -q                 # everything, with the tests in data/
"""

import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: a name that is no folder fails at once
# The expected values are a CPU's. For the test of a GPU: CUDA_VISIBLE_DEVICES=0 pytest -k gpu
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import datasets
import tokenizers
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import ulma
from ulma import dpo_loss, implicit_reward, pointwise_dpo_loss, prior_log_z, sft_loss, ulma_loss

TOKENIZER = AutoTokenizer.from_pretrained(ulma.EXAMPLE)


# ---- Losses: the equations ----
BETA, LOG_Z = 0.3, 0.5


@pytest.fixture
def logps():
    """log π_θ of 64 responses, from −8 to 0."""
    generator = torch.Generator().manual_seed(0)
    return (-8 * torch.rand(64, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def ref_logps():
    generator = torch.Generator().manual_seed(1)
    return -8 * torch.rand(64, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels():
    """64 labels, 0 or 1."""
    return (torch.arange(64) % 3 == 2).long()


@pytest.fixture
def scores(labels):
    """64 scores from 0 to 1; the label 1 has the score 1."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(64, generator=generator, dtype=torch.float64).where(labels == 0, 1.0)


def test_equation_of_the_reward():
    logps, ref_logps = torch.tensor([-2.0, -3.0]), torch.tensor([-5.0, -4.0])
    assert implicit_reward(logps, ref_logps, 0.5, 1.0).tolist() == [2.0, 1.0]


def test_equation_of_the_reward_with_a_log_z_for_each_response():
    logps, ref_logps = torch.tensor([-2.0, -3.0]), torch.tensor([-5.0, -4.0])
    log_z = torch.tensor([1.0, -2.0])
    assert implicit_reward(logps, ref_logps, 0.5, log_z).tolist() == [2.0, -0.5]


def test_equation_of_sft(logps):
    assert_close(sft_loss(logps), -logps)


def test_equation_of_pointwise_dpo(logps, ref_logps, labels):
    r = BETA * ((logps.exp() / ref_logps.exp()).log() + LOG_Z)
    sigma = 1 / (1 + (-r).exp())
    expected = -(labels * sigma.log() + (1 - labels) * (1 - sigma).log())
    assert_close(pointwise_dpo_loss(logps, ref_logps, labels, BETA, LOG_Z), expected)


def test_equation_of_pointwise_dpo_continuous(logps, ref_logps, scores):
    r = BETA * ((logps.exp() / ref_logps.exp()).log() + LOG_Z)
    actual = pointwise_dpo_loss(logps, ref_logps, scores, BETA, LOG_Z, continuous=True)
    assert_close(actual, (scores - r) ** 2)


def test_equation_of_ulma(logps, ref_logps, labels):
    r = BETA * ((logps.exp() / ref_logps.exp()).log() + LOG_Z)
    sigma = 1 / (1 + (-r).exp())
    expected = -(labels * logps + (1 - labels) * (1 - sigma).log())
    for z in (labels, labels.bool(), labels.float()):
        assert_close(ulma_loss(logps, ref_logps, z, BETA, LOG_Z), expected)


def test_equation_of_ulma_continuous(logps, ref_logps, scores):
    r = BETA * ((logps.exp() / ref_logps.exp()).log() + LOG_Z)
    expected = torch.where(scores == 1, -logps, (scores - r) ** 2)
    assert_close(ulma_loss(logps, ref_logps, scores, BETA, LOG_Z, continuous=True), expected)


def test_equation_of_pairwise_dpo():
    chosen, rejected = torch.tensor([-2.0, -5.0]), torch.tensor([-3.0, -1.0])
    ref_chosen, ref_rejected = torch.tensor([-4.0, -4.0]), torch.tensor([-2.0, -3.0])
    gap = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    expected = -(1 / (1 + (-gap).exp())).log()
    assert_close(dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3), expected)


# ---- Losses: the gradients in the paper, as factors of ∇ log π_θ(y|x) ----


def factor(losses, logps):
    [gradient] = torch.autograd.grad(losses.sum(), logps)
    return gradient


@pytest.mark.parametrize("loss", [pointwise_dpo_loss, ulma_loss])
@pytest.mark.parametrize("z", [0.0, 1.0])
def test_losses_and_gradients_are_finite_where_sigma_rounds_to_0_or_1(loss, z):
    logps = torch.tensor([-1.0, -900.0], requires_grad=True)
    losses = loss(logps, torch.tensor([-900.0, -1.0]), torch.tensor([z, z]), beta=1.0)
    assert losses.isfinite().all() and factor(losses, logps).isfinite().all()


def test_gradient_of_pointwise_dpo(logps, ref_logps, labels):
    sigma = implicit_reward(logps, ref_logps, BETA, LOG_Z).sigmoid()
    losses = pointwise_dpo_loss(logps, ref_logps, labels, BETA, LOG_Z)
    assert_close(factor(losses, logps), -BETA * (labels - sigma))


def test_gradient_of_pointwise_dpo_continuous(logps, ref_logps, scores):
    r = implicit_reward(logps, ref_logps, BETA, LOG_Z)
    losses = pointwise_dpo_loss(logps, ref_logps, scores, BETA, LOG_Z, continuous=True)
    assert_close(factor(losses, logps), -2 * BETA * (scores - r))


def test_gradient_of_ulma(logps, ref_logps, labels):
    sigma = implicit_reward(logps, ref_logps, BETA, LOG_Z).sigmoid()
    losses = ulma_loss(logps, ref_logps, labels, BETA, LOG_Z)
    assert_close(factor(losses, logps), torch.where(labels == 1, -1.0, BETA * sigma))


def test_gradient_of_pairwise_dpo():
    chosen = torch.tensor([-2.0], requires_grad=True)
    rejected = torch.tensor([-3.0], requires_grad=True)
    ref_chosen, ref_rejected = torch.tensor([-4.0]), torch.tensor([-2.0])
    gap = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA)
    of_chosen, of_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert_close(of_chosen, -BETA * (-gap).sigmoid())
    assert_close(of_rejected, BETA * (-gap).sigmoid())


# ---- Losses: where they are least. Six responses to one prompt ----
REF = torch.tensor([0.30, 0.25, 0.20, 0.12, 0.08, 0.05], dtype=torch.float64)  # π_ref
RATED = torch.tensor([0.1, 0.3, 0.05, 0.25, 0.1, 0.2], dtype=torch.float64)  # shares of the rows
REWARD = torch.tensor([-1.0, 0.5, 1.5, -0.3, 0.9, 2.0], dtype=torch.float64)


def optimum(expected_loss):
    """The distribution over six responses at which the expected loss is least."""
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        solver.zero_grad()
        loss = expected_loss(logits.log_softmax(0))
        loss.backward()
        return loss

    solver.step(closure)
    return logits.softmax(0).detach()


def mean_over_labels(loss, logps, positive, *given):
    """The mean loss of each response, where `positive` is the share of its labels that are 1."""
    of_ones = loss(logps, REF.log(), torch.ones(6), *given)
    of_zeros = loss(logps, REF.log(), torch.zeros(6), *given)
    return positive * of_ones + (1 - positive) * of_zeros


ALIGNED = 0.5  # β of the next two tests
PARTITION = (REF * (REWARD / ALIGNED).exp()).sum()  # Z
OPTIMUM = REF * (REWARD / ALIGNED).exp() / PARTITION  # π*


def test_pointwise_dpo_recovers_the_optimum_of_alignment_with_the_true_log_z():
    def loss(logps, log_z):
        positive = REWARD.sigmoid()
        return (REF * mean_over_labels(pointwise_dpo_loss, logps, positive, ALIGNED, log_z)).sum()

    found = optimum(lambda logps: loss(logps, PARTITION.log()))
    assert_close(found, OPTIMUM, rtol=0, atol=1e-6)
    assert (optimum(lambda logps: loss(logps, 0.0)) - OPTIMUM).abs().max() > 0.05


def test_continuous_pointwise_dpo_recovers_the_same_optimum():
    def loss(logps, log_z):
        return (REF * pointwise_dpo_loss(logps, REF.log(), REWARD, ALIGNED, log_z, True)).sum()

    found = optimum(lambda logps: loss(logps, PARTITION.log()))
    assert_close(found, OPTIMUM, rtol=0, atol=1e-6)
    assert (optimum(lambda logps: loss(logps, 0.0)) - OPTIMUM).abs().max() > 0.05


@pytest.mark.parametrize("beta, log_z", [(0.1, 0.0), (1.0, -2.0), (3.0, 0.5)])
def test_ulma_converges_to_the_positive_responses_where_labels_are_certain(beta, log_z):
    positive = torch.tensor([0, 1, 0, 1, 1, 0]).double()

    def loss(logps):
        return (RATED * mean_over_labels(ulma_loss, logps, positive, beta, log_z)).sum()

    assert_close(optimum(loss), RATED * positive / (RATED * positive).sum(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("beta, log_z", [(0.1, 0.0), (1.0, -2.0), (3.0, 0.5)])
def test_ulmas_optimum_is_the_known_one_where_labels_of_a_response_differ(beta, log_z):
    """π(y) is proportional to RATED(y) (p − (1 − p) β σ(r)), where r depends on π(y) itself.

    The other side is solved for by itself: π(y) for a given multiplier by bisection, and the
    multiplier so that the probabilities sum to 1.
    """
    positive = torch.tensor([0.9, 0.8, 0.95, 0.85, 0.99, 1.0]).double()

    def loss(logps):
        return (RATED * mean_over_labels(ulma_loss, logps, positive, beta, log_z)).sum()

    def right_side(policy):
        r = implicit_reward(policy.log(), REF.log(), beta, log_z)
        return RATED * (positive - (1 - positive) * beta * r.sigmoid())

    def solution(multiplier):
        low, high = torch.full((6,), 1e-12).double(), torch.full((6,), 9.0).double()
        for _ in range(100):  # multiplier × π − right side rises with π
            middle = (low + high) / 2
            above = multiplier * middle > right_side(middle)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return low

    least, most = 1e-3, 1e3
    for _ in range(100):
        multiplier = (least * most) ** 0.5
        if solution(multiplier).sum() > 1:
            least = multiplier
        else:
            most = multiplier
    assert_close(optimum(loss), solution(most), rtol=0, atol=1e-6)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_with_the_prior_log_z_the_first_step_pushes_up_as_much_as_down(share, continuous):
    labels = (torch.arange(60) < 60 * share).double()
    logps = torch.zeros(60, dtype=torch.float64, requires_grad=True)  # π_θ = π_ref
    log_z = prior_log_z(labels.mean().item(), BETA, continuous)
    losses = pointwise_dpo_loss(logps, torch.zeros(60), labels, BETA, log_z, continuous)
    assert factor(losses, logps).sum().abs() < 1e-9


# ---- Log-probabilities ----
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {  # several of these scale or cap their logits, in ways that change the result
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "llama": {},
    "gpt_neox": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
}


def tiny(name, **changes):
    """A random model of a few thousand weights, with logits that are far from uniform."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 61} | ARCHITECTURES.get(name, {}) | changes
    config = transformers.AutoConfig.for_model(name, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 20
    return model


def naive_logp(model, input_ids, start, end):
    """log π of the tokens from start to end, each from a forward pass of its own over a prefix."""
    total = torch.zeros(())
    for t in range(start, end):
        logits = model(input_ids=input_ids[None, :t]).logits[0, -1]
        total = total + logits.log_softmax(-1)[input_ids[t]]
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_response_logps_is_the_sum_over_response_tokens(name):
    model = tiny(name)
    ids = torch.tensor(
        [[9, 3, 44, 7, 30, 12, 8], [17, 33, 4, 21, 50, 0, 0], [5, 8, 60, 9, 7, 2, 0]]
    )
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 4:7] = mask[1, 1:5] = mask[2, 5:6] = True
    naive = [naive_logp(model, ids[0], 4, 7), naive_logp(model, ids[1], 1, 5)]
    naive = torch.stack([*naive, naive_logp(model, ids[2], 5, 6)])
    logps = ulma.response_logps(model, ids, mask)
    assert_close(logps, naive, rtol=1e-4, atol=1e-4)
    gradient = torch.autograd.grad(logps.sum(), list(model.parameters()))
    naive_gradient = torch.autograd.grad(naive.sum(), list(model.parameters()))
    assert_close(gradient, naive_gradient, rtol=1e-3, atol=1e-3)


def test_padding_changes_nothing():
    model, ids = tiny("llama"), torch.tensor([[9, 3, 44, 7, 30, 12]])
    mask = torch.tensor([[False, False, True, True, True, True]])
    alone = ulma.response_logps(model, ids, mask)
    for filling in (0, 7):
        padded_ids = torch.cat([ids, torch.full((1, 4), filling)], 1)
        padded_mask = torch.cat([mask, torch.zeros(1, 4, dtype=torch.bool)], 1)
        assert_close(ulma.response_logps(model, padded_ids, padded_mask), alone)


def test_the_head_is_as_before_after_an_error():
    model, ids = tiny("llama"), torch.tensor([[9, 3, 44]])
    whole = model(ids).logits
    with pytest.raises(RuntimeError), ulma.logits_only_at(model, torch.tensor([0]), 1):
        raise RuntimeError
    assert model(ids).logits.equal(whole)


def test_under_bfloat16_the_head_works_in_float32():
    model, ids = tiny("llama"), torch.tensor([[9, 3, 44, 7]])
    mask = torch.tensor([[False, True, True, True]])
    outputs = []
    model.get_output_embeddings().register_forward_hook(lambda *given: outputs.append(given[2]))
    with torch.autocast("cpu", torch.bfloat16):
        ulma.response_logps(model, ids, mask)
    [logits] = outputs
    assert not logits.equal(logits.bfloat16().float())


# ---- Rows, weights and log Z ----


def row(name="x", length=3, **more):
    """A row whose tokens are 5, 6, …; the first is the prompt."""
    mask = torch.arange(length) > 0
    return ulma.Row(str(name), torch.arange(length) + 5, mask, **{"label": 1.0, **more})


def options(flags=""):
    return ulma.read_options(f"--beta 0.7 {flags}".split())


def test_balanced_gives_positives_the_weight_of_all_others():
    rows = [row(label=1.0, weight=3.0), *(row(label=z, weight=1.0) for z in (0.0, 0.0, 0.5))]
    ulma.balance(rows)
    assert [row.weight for row in rows] == [3.0, 1.0, 1.0, 1.0]
    rows = [row(label=1.0), *(row(label=0.0) for _ in range(4))]
    ulma.balance(rows)
    assert [row.weight for row in rows] == [2.5, 0.625, 0.625, 0.625, 0.625]


def test_balanced_is_refused_in_sft():
    with pytest.raises(ulma.Mistake, match="no meaning for SFT"):
        ulma.prepare([row(label=1.0)], options("--method sft --balanced"))


def test_balanced_needs_both_kinds():
    with pytest.raises(ulma.Mistake, match="--balanced needs"):
        ulma.balance([row(label=1.0), row(label=1.0)])


def test_log_z_is_the_prior_of_the_weighted_mean_label():
    rows = [row(label=1.0, weight=1.0), row(label=0.0, weight=3.0)]
    assert ulma.default_log_z(rows, options()) == pytest.approx(math.log(1 / 3) / 0.7)
    assert ulma.default_log_z(rows, options("--continuous")) == pytest.approx(0.25 / 0.7)


@pytest.mark.parametrize("method", ["ulma", "sft"])
def test_demonstrations_alone_need_no_log_z(method):
    assert ulma.default_log_z([row(label=1.0)], options(f"--method {method}")) == 0.0


def test_weights_that_are_all_0_are_told():
    with pytest.raises(ulma.Mistake, match="weights of all rows are 0"):
        ulma.default_log_z([row(label=1.0, weight=0.0), row(label=0.0, weight=0.0)], options())


@pytest.mark.parametrize("flags, label", [("", 0.0), ("--method pointwise-dpo", 1.0)])
def test_labels_that_are_all_alike_are_told(flags, label):
    with pytest.raises(ulma.Mistake, match="the mean label is"):
        ulma.default_log_z([row(label=label)], options(flags))


# ---- Training: a step of each method against its loss, written out ----


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a tiny random model, whose dropout must not act, and its tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    return stand_in(folder, attention_dropout=0.5)


def stand_in(folder, name="llama", tokenizer=TOKENIZER, dtype=torch.float32, **changes):
    """A folder as from the hub: a random model and its tokenizer."""
    model = tiny(name, **{"vocab_size": len(tokenizer), **changes}).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def rated_rows():
    """Ten rows of different lengths, labels, scores and weights."""
    rows = []
    for i in range(10):
        ids = torch.tensor([20 + i, 30, 40 + i, *range(50, 52 + i % 4), 1])
        mask = torch.arange(len(ids)) > 1 + i % 2
        rows.append(ulma.Row(f"{i % 5}", ids, mask, float(i % 3 == 0), weight=1.0 + i % 2))
    return rows


SCORES = [1.0, 0.2, 0.7, 1.0, 0.0, 0.4, 1.0, 0.9, 0.1, 1.0]


def naive_logps(model, rows, average=False):
    """log π of each row, from a forward pass of its own, token by token."""
    values = []
    for row in rows:
        logps = model(row.input_ids[None]).logits[0].log_softmax(-1)
        terms = []
        for t in range(1, len(row.input_ids)):
            if row.response_mask[t]:
                terms.append(logps[t - 1, row.input_ids[t]])
        terms = torch.stack(terms)
        values.append(terms.mean() if average else terms.sum())
    return torch.stack(values)


@pytest.fixture
def step(small, tmp_path, monkeypatch):
    """step(flags, loss, rows=None): compares the first step's gradient with that of a naive loss.

    The policy is not π_ref: its weights have been changed. loss has a policy's log π, those of
    π_ref, labels and weights; all are tensors, (10,).
    """

    def compare(flags, loss, rows=None):
        rows = rows or rated_rows()
        args = ulma.read_options(
            f"--model {small} --beta 0.7 --epochs 1 --learning-rate 1e-3 "
            f"--batch-size 4 --gradient-accumulation 3 {flags}".split()
        )
        reference = ulma.load_model(small, TOKENIZER)
        policy = ulma.load_model(small, TOKENIZER)
        policy.model.layers[0].mlp.up_proj.weight.data *= 1.3
        rows = ulma.prepare(rows, args)
        ulma.set_reference(reference, rows, args)

        labels = torch.tensor([row.label for row in rows])
        weights = torch.tensor([row.weight for row in rows])
        logps = naive_logps(policy, rows, args.average)
        ref_logps = naive_logps(reference, rows, args.average).detach()
        value = loss(logps, ref_logps, labels, weights)
        naive = torch.autograd.grad(value, list(policy.parameters()))

        gradients = []
        clip = torch.nn.utils.clip_grad_norm_

        def spy(parameters, bound):
            parameters = list(parameters)
            gradients.extend(parameter.grad.clone() for parameter in parameters)
            return clip(parameters, bound)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        ulma.train(policy, rows, args, tmp_path)
        assert_close(gradients, list(naive), rtol=1e-3, atol=1e-4)
        [line] = read(tmp_path / "log.jsonl")
        assert line["loss"] == pytest.approx(value.item(), rel=1e-4)
        rewards = 0.7 * (logps - ref_logps + args.log_z)
        good = labels > 0.5
        assert line["reward_positive"] == pytest.approx(rewards[good].mean().item(), rel=1e-3)
        if not good.all():
            assert line["reward_negative"] == pytest.approx(rewards[~good].mean().item(), rel=1e-3)

    return compare


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_of_sft(step):
    step("--method sft", lambda logps, ref_logps, z, w: (-w * logps).mean())


def test_a_step_of_pointwise_dpo(step):
    def loss(logps, ref_logps, z, w):
        prior = (w * z).sum() / w.sum()
        r = 0.7 * (logps - ref_logps) + prior.logit()
        return (w * -(z * logsigmoid(r) + (1 - z) * logsigmoid(-r))).mean()

    step("--method pointwise-dpo", loss)


def test_a_step_of_ulma(step):
    def loss(logps, ref_logps, z, w):
        prior = (w * z).sum() / w.sum()
        r = 0.7 * (logps - ref_logps) + prior.logit()
        return (w * -(z * logps + (1 - z) * logsigmoid(-r))).mean()

    step("--method ulma", loss)


def test_a_step_of_continuous_ulma(step):
    def loss(logps, ref_logps, z, w):
        prior = (w * z).sum() / w.sum()
        r = 0.7 * (logps - ref_logps) + prior
        return (w * torch.where(z == 1, -logps, (z - r) ** 2)).mean()

    rows = rated_rows()
    for row, score in zip(rows, SCORES):
        row.label = score
    step("--method ulma --continuous", loss, rows)


def test_a_step_of_continuous_pointwise_dpo(step):
    def loss(logps, ref_logps, z, w):
        prior = (w * z).sum() / w.sum()
        r = 0.7 * (logps - ref_logps) + prior
        return (w * (z - r) ** 2).mean()

    rows = rated_rows()
    for row, score in zip(rows, SCORES):
        row.label = score
    step("--method pointwise-dpo --continuous", loss, rows)


def test_a_step_of_the_authors_recipe(step):
    """Half of their loss, which is the mean over positives plus the mean over negatives."""

    def loss(logps, ref_logps, z, w):
        r = 0.7 * (logps - ref_logps)
        positive, negative = -logps[z == 1], -logsigmoid(-r[z == 0])
        return (positive.mean() + negative.mean()) / 2

    rows = rated_rows()
    for row in rows:
        row.weight = 1.0
    step("--method ulma --average --balanced --log-z 0", loss, rows)


def test_training_takes_the_steps_of_adam_with_a_cosine_schedule(small, tmp_path):
    """Two runs of the same steps, one written out: 12 steps, of which one warms up."""
    rows, flags = rated_rows()[:6], "--epochs 6 --batch-size 4 --learning-rate 1e-2 --method sft"
    args = ulma.read_options(f"--model {small} {flags}".split())
    for one in rows:
        one.weight = 1.0
    model, by_hand = ulma.load_model(small, TOKENIZER), ulma.load_model(small, TOKENIZER)
    args.log_z = 0.0
    ulma.train(model, rows, args, tmp_path)
    rng, step = random.Random(0), 0
    optimizer = torch.optim.AdamW(by_hand.parameters(), 1e-2, weight_decay=0.0)
    batches = [ulma.batches_of_like_length(rows, 4, rng) for _ in range(6)]
    for batch in itertools.chain(*batches):
        rate = step if step < 1 else (1 + math.cos(math.pi * (step - 1) / 11)) / 2
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        optimizer.zero_grad()
        (-ulma.row_logps(by_hand, batch, args)).mean().backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        step += 1
    assert step == 12
    assert_close(
        dict(model.named_parameters()), dict(by_hand.named_parameters()), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_the_first_rewards_are_beta_log_z_whatever_is_noisy_in_training_mode(name, tmp_path):
    noise = {"attention_dropout": 0.5, "dropout": 0.5, "router_jitter_noise": 0.1}
    noise |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    args = ulma.read_options(["--epochs=1", "--batch-size=20", "--method=pointwise-dpo"])
    model = ulma.load_model(stand_in(tmp_path / "model", name, **noise), TOKENIZER)
    rows = ulma.prepare(rated_rows(), args)
    ulma.set_reference(model, rows, args)
    ulma.train(model, rows, args, tmp_path)
    [line] = read(tmp_path / "log.jsonl")
    expected = pytest.approx(args.beta * args.log_z, abs=1e-4)
    assert line["reward_positive"] == expected
    assert line["reward_negative"] == expected


def test_a_loss_of_your_own_is_a_function_for_train(small, tmp_path):
    def unlikelihood(model, rows, args):
        logps = ulma.row_logps(model, rows, args)
        return logps, torch.zeros(len(rows))

    args = ulma.read_options(["--epochs=2", "--batch-size=4"])
    model, rows = ulma.load_model(small, TOKENIZER), rated_rows()
    before = ulma.all_logps(model, rows, args, "before")
    ulma.train(model, rows, args, tmp_path, losses_of=unlikelihood)
    assert ulma.all_logps(model, rows, args, "after").mean() < before.mean() - 1


def test_the_readmes_own_loss_is_kto_with_sfts_loss(tmp_path, monkeypatch):
    """The worked example, on forty rows."""
    readme = (ulma.HERE / "README.md").read_text(encoding="utf-8")
    [snippet] = [text for text in readme.split("```") if "def kto_losses" in text]
    load_rows = ulma.load_rows

    def load_few(args, tokenizer):
        rows, test_rows = load_rows(args, tokenizer)
        rows[0].label, rows[1].weight = 0.99, 3.0
        return rows[:40], test_rows[:2]

    monkeypatch.setattr(ulma, "load_rows", load_few)
    monkeypatch.setattr(sys, "argv", ["kto.py", "--epochs", "1"])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet.removeprefix("python\n"), names)
    saved = ulma.load_model("runs/kto", ulma.load_tokenizer("runs/kto"))
    rows, args = names["rows"], names["args"]
    losses, rewards = names["kto_losses"](saved, rows, args)
    for row, loss, reward in zip(rows, losses, rewards):
        logp = ulma.row_logps(saved, [row], args).item()
        r = args.beta * (logp - row.ref_logp)
        kto = 1 / (1 + math.exp(r)) if row.label else 1 / (1 + math.exp(-r))
        sft = -logp if row.label == 1 else 0.0  # a thumbs-up of 0.99 is not imitated
        assert loss.item() == pytest.approx(row.weight * (kto + sft), abs=1e-4)
        assert reward.item() == pytest.approx(r, abs=1e-4)
    assert {row.label for row in rows} == {0, 0.99, 1}


def test_a_loss_that_is_not_finite_stops_training(small, tmp_path):
    def infinite(model, rows, args):
        losses, rewards = ulma.batch_losses(model, rows, args)
        return losses * math.inf, rewards

    args = ulma.read_options(["--epochs=1", "--log-z=0"])
    with pytest.raises(ulma.Mistake, match="not finite"):
        ulma.train(ulma.load_model(small, TOKENIZER), rated_rows(), args, tmp_path, infinite)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_between_two_lines_of_the_log_training_does_not_wait_for_the_gpu(tmp_path):
    args = ulma.read_options(["--epochs=3", "--batch-size=2", "--log-z=0"])
    model = ulma.load_model(ulma.EXAMPLE, TOKENIZER).cuda()
    rows = rated_rows()[:6]  # nine steps
    ulma.set_reference(model, rows, args)
    waiting = []

    def losses_of(*given):
        torch.cuda.set_sync_debug_mode("error")
        waiting.append(given)
        if len(waiting) == 9:  # the last step logs
            torch.cuda.set_sync_debug_mode("default")
        return ulma.batch_losses(*given)

    try:
        ulma.train(model, rows, args, tmp_path, losses_of)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waiting) == 9


# ---- Training: batches ----


def random_rows(count):
    rng = random.Random(0)
    return [row(i, rng.randrange(5, 500)) for i in range(count)]


def test_an_epoch_has_every_row_once_and_one_smaller_batch_at_most():
    rows = random_rows(1003)
    batches = ulma.batches_of_like_length(rows, 8, random.Random(0))
    assert sorted(map(len, batches)) == [3] + [8] * 125
    assert set(itertools.chain(*batches)) == set(rows)


def test_batches_need_little_padding():
    batches = ulma.batches_of_like_length(random_rows(1000), 8, random.Random(0))
    lengths = [[len(row.input_ids) for row in batch] for batch in batches]
    padded = sum(len(batch) * max(batch) for batch in lengths)
    assert padded < 1.2 * sum(map(sum, lengths))


@pytest.mark.parametrize("count", [100, 1000])
def test_rows_that_meet_in_an_epoch_seldom_meet_in_the_next(count):
    rows, rng = random_rows(count), random.Random(0)
    meetings = []
    for _ in range(2):
        batches = ulma.batches_of_like_length(rows, 8, rng)
        pairs = [itertools.permutations(batch, 2) for batch in batches]
        meetings.append(set(itertools.chain(*pairs)))
    assert len(meetings[0] & meetings[1]) < 0.4 * len(meetings[0])


def test_the_rows_of_the_smaller_batch_are_drawn_at_random():
    rows, lengths = random_rows(33), []
    for seed in range(200):
        batches = ulma.batches_of_like_length(rows, 32, random.Random(seed))
        [alone] = min(batches, key=len)
        lengths.append(len(alone.input_ids))
    mean_length = sum(len(row.input_ids) for row in rows) / 33
    assert ulma.mean(lengths) == pytest.approx(mean_length, rel=0.15)


def test_the_order_follows_the_seed():
    rows = random_rows(100)
    one, same, other = (ulma.batches_of_like_length(rows, 8, random.Random(i)) for i in (1, 1, 2))
    assert one == same != other


# ---- Evaluation ----


@pytest.mark.parametrize(
    "scores, labels, share",
    [
        ([3.0, 1.0], [1.0, 0.0], 1.0),
        ([1.0, 3.0], [1.0, 0.0], 0.0),
        ([1.0, 1.0], [1.0, 0.0], 0.5),
        ([1.0, 3.0, 2.0, 2.0], [1.0, 0.5, 0.5, 0.0], 0.3),
        ([1.0, 2.0], [1.0, 1.0], None),
        ([1.0, math.nan], [1.0, 0.0], None),
    ],
)
def test_reward_auc_is_the_share_of_pairs_in_order_with_ties_a_half(scores, labels, share):
    assert ulma.concordance(torch.tensor(scores), torch.tensor(labels)) == share


@pytest.mark.parametrize("flags", ["", "--average"])
def test_perplexity_is_that_of_the_tokens_of_positive_responses(small, flags):
    args, rows = options(flags), rated_rows()
    model = ulma.load_model(small, TOKENIZER)
    metrics, _ = ulma.evaluate(model, TOKENIZER, rows, args)
    good = [row for row in rows if row.label == 1]
    tokens = sum(row.response_mask.sum() for row in good)
    nats = -naive_logps(model, good).sum() / tokens
    assert metrics["perplexity"] == pytest.approx(nats.exp().item(), rel=1e-4)


@pytest.fixture
def generating(monkeypatch):
    """generating(tokens): the model's generate adds these tokens, a list for each prompt."""

    def set_tokens(tokens):
        def generate(model, input_ids, **_):
            added = torch.tensor(tokens)
            return torch.cat([input_ids, added], 1).repeat_interleave(ulma.SAMPLES, 0)

        monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)

    return set_tokens


END = TOKENIZER.eos_token_id
YES = TOKENIZER(" Yes").input_ids
NO = TOKENIZER(" No").input_ids


def asked(count):
    """Rows with acceptable answers, whose responses end as samples do."""
    rows = [row(i, answers=["Yes"], group="ab"[i // 2]) for i in range(count)]
    for one in rows:
        one.input_ids[-1] = END
    return rows


def test_exact_match_is_the_share_of_acceptable_samples(small, generating):
    longest = max(len(YES), len(NO)) + 1
    texts = [text + [END] * (longest - len(text)) for text in (YES, YES, NO, YES)]
    generating(texts)
    model = ulma.load_model(small, TOKENIZER)
    metrics, samples = ulma.evaluate(model, TOKENIZER, asked(4), options())
    assert samples["0"] == ["Yes"] * ulma.SAMPLES
    assert metrics["exact_match"] == 0.75
    assert metrics["exact_match/a"] == 1.0 and metrics["exact_match/b"] == 0.5


def test_a_sample_that_was_cut_off_matches_no_answer(small, generating):
    generating([YES])
    model = ulma.load_model(small, TOKENIZER)
    metrics, samples = ulma.evaluate(model, TOKENIZER, asked(1), options())
    assert samples["0"] == ["Yes"] * ulma.SAMPLES
    assert metrics["exact_match"] == metrics["sample_ended"] == 0.0


def test_samples_have_a_length_an_end_and_a_share_of_distinct_ones(small, generating):
    generating([[37, END, 0], [37, 38, 39], [37, END, 39]])  # the second is cut off
    model = ulma.load_model(small, TOKENIZER)
    metrics, _ = ulma.evaluate(model, TOKENIZER, asked(3), options())
    assert metrics["sample_length"] == pytest.approx(5 / 3)
    assert metrics["sample_ended"] == pytest.approx(2 / 3)
    assert metrics["sample_distinct"] == pytest.approx(2 / 12)


def test_a_sample_ends_as_the_rows_do_if_that_is_not_eos(small, generating):
    generating([[37, 8, END]])
    rows = asked(1)
    rows[0].input_ids[-1] = 8
    [[one, *_]] = ulma.sample(ulma.load_model(small, TOKENIZER), TOKENIZER, rows, options())
    assert one == ulma.Sample(TOKENIZER.decode([37]).strip(), 1, True)


def test_a_prompt_has_the_samples_that_it_has_alone(small):
    model, rows = ulma.load_model(small, TOKENIZER), rated_rows()
    model.lm_head.weight.data *= 1000  # one token is certain
    together = ulma.sample(model, TOKENIZER, rows, options("--max-new-tokens 8"))
    for one, samples in zip(rows, together):
        [alone] = ulma.sample(model, TOKENIZER, [one], options("--max-new-tokens 8"))
        assert [sample.text for sample in alone] == [sample.text for sample in samples]


def test_samples_come_from_the_whole_distribution(small):
    model, rows = ulma.load_model(small, TOKENIZER), random_rows(60)
    model.lm_head.weight.data *= 1e-4  # all tokens almost alike
    samples = ulma.sample(model, TOKENIZER, rows, options("--max-new-tokens 1"))
    assert len({one.text for some in samples for one in some}) > 100


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 1, "min_p": 0.5, "repetition_penalty": 9.0},
        {"num_beams": 8, "max_length": 3, "no_repeat_ngram_size": 2, "suppress_tokens": [5]},
    ],
)
def test_samples_are_the_policys_whatever_the_models_own_settings(small, settings):
    rows, args = rated_rows()[:3], options("--max-new-tokens 8")
    plain = ulma.sample(ulma.load_model(small, TOKENIZER), TOKENIZER, rows, args)
    model = ulma.load_model(small, TOKENIZER)
    model.generation_config = transformers.GenerationConfig(eos_token_id=2, **settings)
    assert ulma.sample(model, TOKENIZER, rows, args) == plain
    assert len({one.text for some in plain for one in some}) > 3
    for name, value in settings.items():
        assert getattr(model.generation_config, name) == value


# ---- Data: files and splits ----


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def point(i, label=1, **more):
    return {"prompt": f"Question {i}?", "completion": f" Answer {i}.", "label": label, **more}


POINTS = [point(i // 2, i % 2) for i in range(20)]


def load(data, flags="", tokenizer=TOKENIZER):
    """The rows to train on and those to test on."""
    return ulma.load_rows(ulma.read_options([f"--data={data}", *flags.split()]), tokenizer)


def decoded(rows, tokenizer=TOKENIZER):
    """The prompt and the response of each row, as its tokens have them."""
    texts = []
    for row in rows:
        prompt, response = row.input_ids[~row.response_mask], row.input_ids[row.response_mask]
        texts.append((tokenizer.decode(prompt), tokenizer.decode(response)))
    return texts


@pytest.fixture
def read_records(tmp_path):
    """read_records(records): the rows of records in a file of JSON lines."""

    def read_records(*records, tokenizer=TOKENIZER, flags=""):
        data = write(tmp_path / "rows.jsonl", records)
        return load(data, f"--eval-only {flags}", tokenizer)[1]

    return read_records


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_json(path, rows):
    path.write_text(json.dumps(rows))


def write_compressed(path, rows):
    datasets.Dataset.from_list(rows).to_json(path, compression="gzip")


@pytest.mark.parametrize(
    "name, write_file",
    [
        ("[a] b.jsonl", write),
        ("rows.parquet", write_parquet),
        ("rows.json", write_json),
        ("rows.jsonl.gz", write_compressed),
    ],
)
def test_a_file_is_one_split(tmp_path, monkeypatch, name, write_file):
    (tmp_path / "sub").mkdir()
    write_file(tmp_path / "sub" / name, POINTS)
    monkeypatch.chdir(tmp_path)
    assert [row.label for row in load(f"sub/{name}", "--eval-only")[1]] == [0, 1] * 10
    assert len(load(f"sub/{name}")[0]) == 18  # a tenth of the prompts is held out


def test_the_files_of_a_folder_are_splits(tmp_path):
    write(tmp_path / "train.jsonl", POINTS)
    write(tmp_path / "test.jsonl", [point(30)])
    write(tmp_path / "other.jsonl", [point(31), point(32)])
    assert [len(rows) for rows in load(tmp_path)] == [20, 1]
    assert [len(rows) for rows in load(tmp_path, "--train-split other")] == [2, 1]
    assert [len(rows) for rows in load(tmp_path, "--test-split other --eval-only")] == [0, 2]
    assert [len(rows) for rows in load(tmp_path.parent, f"--data-dir {tmp_path.name}")] == [20, 1]


def test_several_files_of_a_split_are_read_one_after_the_other(tmp_path):
    for i in range(3):
        write(tmp_path / f"train-0000{i}-of-00003.jsonl", [point(i)])
    write(tmp_path / "test-1-of-2.jsonl", [point(7)])
    write(tmp_path / "test-2-of-2.jsonl", [point(8)])
    rows, test_rows = load(tmp_path)
    assert [row.prompt[9] for row in rows + test_rows] == ["0", "1", "2", "7", "8"]


@pytest.mark.parametrize("flags", ["", "--train-split a --test-split x", "--test-split x"])
def test_a_missing_split_is_told_with_those_that_are_there(tmp_path, flags):
    write(tmp_path / "a.jsonl", POINTS)
    write(tmp_path / "b.jsonl", POINTS)
    with pytest.raises(ulma.Mistake, match=r"has no split .*, only a, b"):
        load(tmp_path, flags)


def test_a_split_to_train_on_and_to_test_on_is_refused(tmp_path):
    write(tmp_path / "test.jsonl", POINTS)
    with pytest.raises(ulma.Mistake, match="are both test"):
        load(tmp_path, "--train-split test")


def test_a_file_is_tested_on_as_a_whole_and_that_is_told(read_records, capsys):
    assert len(read_records(*POINTS)) == 20
    assert "rows.jsonl is tested on, even if" in capsys.readouterr().out


def test_without_a_test_split_a_seeded_tenth_of_the_prompts_is_held_out(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [point(i % 50) for i in range(100)])
    rows, test_rows = load(path)
    prompts, test_prompts = {row.prompt for row in rows}, {row.prompt for row in test_rows}
    assert (len(prompts), len(test_prompts)) == (45, 5) and not prompts & test_prompts
    assert "5 of 50 prompts are held out" in capsys.readouterr().out
    assert {row.prompt for row in load(path)[1]} == test_prompts
    assert {row.prompt for row in load(path, "--seed 1")[1]} != test_prompts


def test_splits_of_parquet_are_read_by_their_names(tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("train_prefs", "test_prefs", "train_sft")):
        path = tmp_path / "data" / f"{name}-00000-of-00001.parquet"
        datasets.Dataset.from_list([point(i)]).to_parquet(path)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for name in ("train_prefs", "test_prefs", "train_sft"):
        card += f"  - split: {name}\n    path: data/{name}-*\n"
    (tmp_path / "README.md").write_text(f"{card}---\n")
    rows, test_rows = load(tmp_path, "--train-split train_prefs --test-split test_prefs")
    assert [row.prompt for row in rows + test_rows] == ["Question 0?", "Question 1?"]


def test_a_missing_file_is_told_and_not_looked_for_on_the_hub(tmp_path):
    for name in ("ratings.jsonl", "ratings.parquet", "ratings.json", "ratings.csv"):
        with pytest.raises(ulma.Mistake, match=f"there is no file .*{name}"):
            load(tmp_path / name)


def test_a_folder_may_have_the_name_of_a_file(tmp_path):
    folder = tmp_path / "ratings.parquet"
    folder.mkdir()
    datasets.Dataset.from_list(POINTS).to_parquet(folder / "train.parquet")
    rows, test_rows = load(folder)
    assert len(rows) + len(test_rows) == len(POINTS)


def test_a_data_set_from_the_hub_is_read_by_its_name(monkeypatch):
    split = datasets.Dataset.from_list(POINTS)

    def load_dataset(path, data_dir):
        assert (path, data_dir) == ("someone/rows", "graded")
        return datasets.DatasetDict(train=split, test=split.select([1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [len(rows) for rows in load("someone/rows", "--data-dir graded")] == [20, 1]


def test_each_parquet_file_keeps_its_own_types(tmp_path):
    """Cast to the first file's type, a label of 5 would be true."""
    first = [point(i, bool(i % 2)) for i in range(4)]
    second = [point(i, label) for i, label in enumerate((1, 5, -1))]
    datasets.Dataset.from_list(first).to_parquet(tmp_path / "train-0-of-2.parquet")
    datasets.Dataset.from_list(second).to_parquet(tmp_path / "train-1-of-2.parquet")
    with pytest.raises(ulma.Mistake, match=r"train-1-of-2.parquet, row 2: its label is 5"):
        load(tmp_path)


def test_pairs_with_different_prompts_are_told(read_records, capsys):
    pair = {"chosen": "Human: A\n\nAssistant: x", "rejected": "Human: B\n\nAssistant: y"}
    read_records(pair, pair, point(1))
    assert "in 2 pairs the prompts differ" in capsys.readouterr().out


def test_a_split_in_two_formats_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", POINTS)
    datasets.Dataset.from_list(POINTS).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ulma.Mistake, match="keep one"):
        load(tmp_path)


@pytest.mark.parametrize("name, separator", [("rows.csv", ","), ("rows.tsv", "\t")])
def test_csv_is_refused(tmp_path, name, separator):
    datasets.Dataset.from_list(POINTS).to_csv(tmp_path / name, sep=separator)
    with pytest.raises(ulma.Mistake, match="write JSON lines"):
        load(tmp_path / name)


def test_a_label_with_the_names_of_classes_is_refused(tmp_path):
    rows = [point(i) | {"label": ["accepted", "rejected"][i % 2]} for i in range(20)]
    table = datasets.Dataset.from_list(rows).class_encode_column("label")
    table.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ulma.Mistake, match=r"accepted.*write the numbers 0 and 1"):
        load(tmp_path / "rows.parquet")


@pytest.mark.parametrize("text", ["2024-01-31", "42", "true", '"yes"', '{"a": 1}', "null", "NA"])
def test_texts_of_json_lines_stay_as_they_stand(read_records, text):
    others = point(2, note=[1]), point(3, note="x")  # a column of two types
    rows = read_records(point(1, completion=text), *others)
    assert decoded(rows)[0] == ("Question 1?", f"{text}<eos>")


def test_a_label_that_is_not_a_number_from_0_to_1_is_refused(read_records):
    for label in (5, -1, 2.5, math.nan, "1", [1]):
        with pytest.raises(ulma.Mistake, match=r"line 2: its label is .* not a number from 0 to 1"):
            read_records(point(1, True), point(2, label))


def test_a_label_between_0_and_1_is_kept_and_told(read_records, capsys):
    rows = read_records(point(1, 1), point(2, 0.99), point(3, 0), point(4, True))
    assert [row.label for row in rows] == [1, 0.99, 0, 1]
    assert "labels of 1: 2, of 0: 1, between: 1" in capsys.readouterr().out


# ---- Data: records ----


def test_columns_that_are_not_read_and_rows_that_are_too_long_are_told(read_records, capsys):
    long = point(8, completion=" more" * 30)
    rows = read_records(*POINTS, long, point(9, image="cat.png"), flags="--max-length 25")
    printed = capsys.readouterr().out
    assert len(rows) == 21 and "21 rows, and 1 left out, over --max-length" in printed
    assert "columns not read: image\n" in printed
    assert "plain text: 21; through the chat template: 0" in printed
    assert "first prompt   'Question 0?'" in printed
    assert "first response ' Answer 0.<eos>'" in printed


def test_a_row_of_just_the_greatest_length_is_kept(read_records):
    [one] = read_records(POINTS[0])
    assert read_records(POINTS[0], flags=f"--max-length {len(one.input_ids)}")


def test_a_score_is_read_with_continuous_alone(read_records):
    record = point(1, label=0, score=0.25)
    assert [row.label for row in read_records(record)] == [0.0]
    assert [row.label for row in read_records(record, flags="--continuous")] == [0.25]
    del record["score"]
    assert [row.label for row in read_records(record, flags="--continuous")] == [0.0]


def test_a_pair_is_two_rated_responses(read_records):
    record = {"prompt": "Hi", "chosen": " Good.", "rejected": " Bad.", "weight": 2}
    rows = read_records(record, point(1))
    assert decoded(rows)[:2] == [("Hi", " Good.<eos>"), ("Hi", " Bad.<eos>")]
    assert [(row.label, row.weight) for row in rows] == [(1, 2), (0, 2), (1, 1)]


def test_empty_chosen_and_rejected_beside_a_completion_are_no_pair(read_records):
    rows = read_records(point(1, 0, chosen="", rejected=""))
    assert decoded(rows) == [("Question 1?", " Answer 1.<eos>")]


def test_a_transcript_of_hh_rlhf_ends_with_its_response(read_records):
    opening = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:"
    rows = read_records({"chosen": f"{opening} Good.", "rejected": f"{opening} Bad."})
    assert decoded(rows) == [(opening, " Good.<eos>"), (opening, " Bad.<eos>")]


def words(single="$A"):
    """A tokenizer to which the word "7" is token 7; single says what it writes around a text."""
    names = ["<unk>", "<bos>", "<eos>", *map(str, range(3, 61)), "[gMASK]", "<sop>"]
    numbers = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single, special_tokens=list(numbers.items()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    "single, prompt, response",
    [
        ("$A", "10 11", "20 <eos>"),
        ("<bos> $A", "<bos> 10 11", "20 <eos>"),
        ("<bos> $A <eos>", "<bos> 10 11", "20 <eos>"),
        ("<eos> $A", "<eos> 10 11", "20 <eos>"),
        ("[gMASK] <sop> $A", "[gMASK] <sop> 10 11", "20 <eos>"),
    ],
)
def test_a_text_begins_as_the_tokenizer_begins_one_and_ends_once(
    read_records, single, prompt, response
):
    for completion in ("20", "20 <eos>", "20 <eos>\n"):
        record = {"prompt": "10 11 ", "completion": completion, "label": 1}
        rows = read_records(record, tokenizer=words(single))
        assert decoded(rows, words()) == [(prompt, response)]


def test_a_text_that_has_its_bos_already_is_refused(read_records):
    record = {"prompt": "<s>Hi", "completion": "x", "label": 1}
    with pytest.raises(ulma.Mistake, match="begins with the bos_token"):
        read_records(record, tokenizer=chat_tokenizer(None, bos="<s>"))


def test_a_token_across_the_boundary_belongs_to_the_response(read_records):
    record = {"prompt": "10 1", "completion": "1 20", "label": 1}
    assert decoded(read_records(record, tokenizer=words()), words()) == [("10", "11 20 <eos>")]


def test_a_prompt_without_a_token_of_its_own_is_refused(read_records):
    with pytest.raises(ulma.Mistake, match="no token of its own"):
        read_records({"prompt": "1", "completion": "1 20", "label": 1}, tokenizer=words())


# ---- Data: conversations ----
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
BYE = "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"


def chat_tokenizer(template=CHATML, bos=None, eos="<|im_end|>"):
    """data/base's tokenizer with a chat template, more tokens and, if it is given, BOS."""
    tokenizer = AutoTokenizer.from_pretrained(ulma.EXAMPLE)
    extra = ["<|im_start|>", "<|im_end|>", "<|end|>", "<turn>", "<eot>", "<b>", "</b>"]
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": extra})
    tokenizer.chat_template = template
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
        opened = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = opened
    return tokenizer


def chat(*contents):
    """Messages of the user and the assistant in turn."""
    messages = []
    for i, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return messages


def answer(content="x", **more):
    message = {"role": "assistant", "content": content, **more}
    return {"prompt": chat("Hi"), "completion": [message], "label": 1}


ASKED = chat("Hi", "Hello!", "Bye")
GOOD, BAD = [{"role": "assistant", "content": "Good."}], [{"role": "assistant", "content": "Bad."}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"prompt": "Bye", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},  # UltraFeedback
        {"prompt": ASKED, "completion": "Good.", "label": True, "rejected": None},
        {"prompt": [m | {"name": None, "tool_calls": []} for m in ASKED], "completion": GOOD}
        | {"label": 1},
        {"prompt": None, "completion": ASKED + GOOD, "label": True},
    ],
)
def test_a_conversation_is_read_in_every_form(read_records, record):
    prompt = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n{BYE}"
    expected = [(prompt, "Good.<|im_end|>"), (prompt, "Bad.<|im_end|>")]
    rows = read_records(record, tokenizer=chat_tokenizer())
    assert decoded(rows, chat_tokenizer()) == expected[: len(rows)]
    assert len(rows) == (2 if "chosen" in record else 1)


@pytest.mark.parametrize("content", ["Good.", "<b>Good.</b>", "One<|im_start|> or <b>", "end"])
@pytest.mark.parametrize(
    "template, bos, eos, prompt, before, end",
    [
        (CHATML, None, "<|im_end|>", BYE, "", "<|im_end|>"),
        (CHATML, None, "<eos>", BYE, "", "<|im_end|>"),
        (PHI3, None, "<eos>", "<|user|>\nBye<|end|>\n<|assistant|>\n", "", "<|end|>"),
        (GEMMA, "<bos>", "<eos>", "<bos><turn>user\nBye<eot>\n<turn>assistant\n", "", "<eot>"),
        (PLAIN, "<s>", "<eos>", "user: Bye\n", "assistant: ", "<eos>"),
        (QWEN3, None, "<|im_end|>", BYE, THINK, "<|im_end|>"),
    ],
)
def test_a_response_ends_with_its_turn_whatever_is_in_it(
    read_records, template, bos, eos, prompt, before, end, content
):
    tokenizer = chat_tokenizer(template, bos, eos)
    record = {"prompt": "Bye", "completion": [{"role": "assistant", "content": content}]}
    record |= {"label": 1, "answers": [content, "Fine."]}
    rows = read_records(record, tokenizer=tokenizer)
    assert decoded(rows, tokenizer) == [(prompt, before + content + end)]
    assert rows[0].answers == [before + content, f"{before}Fine."]


def test_the_end_of_a_turn_need_not_be_a_special_token(read_records):
    tokenizer = AutoTokenizer.from_pretrained(ulma.EXAMPLE)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    assert decoded(read_records(answer(), tokenizer=tokenizer), tokenizer)[0][1] == "x<|im_end|>"


@pytest.mark.parametrize(
    "old, new, record, told",
    [  # an edit of CHATML, a record, what is told
        ("in messages", "in messages[-2:]", {"prompt": ASKED}, "leaves out or changes"),
        ("m.content", "m.content | upper", {}, "leaves out or changes"),
        (
            "in messages",
            "in messages if m.role != 'system'",
            {"prompt": [{"role": "system", "content": "Hi"}, *chat("Hi")]},  # the same text twice
            "leaves out or changes",
        ),
        ("assistant\n{% endif", "assistant\n<think>\n{% endif", {}, "<think>"),
        ("m.content }}", "m.content }}{{ m.content | length }}", answer("Good."), "changes the"),
        ("{% for", "{{ raise_exception('no such role') }}{% for", {}, "no such role"),
        ("", "", answer("</t>x", reasoning="y"), "reasoning"),
        ("", "", answer([{"type": "text", "text": "x"}]), "a message needs a role"),
        ("", "", answer(5), "a message needs a role"),
        ("", "", answer("", tool_calls=[{"function": {"name": "x"}}]), "a message needs a role"),
        ("", "", answer("x", weight=0), "a message needs a role"),
        ("", "", {"prompt": [{"role": "prompter", "content": "Hi"}]}, "a message needs a role"),
        ("", "", {"prompt": [{"role": "User", "content": "Hi"}]}, "a message needs a role"),
        ("", "", {"prompt": ["Hi"]}, "is not a message"),
        ("", "", {"completion": 5}, "nor a list of messages"),
        ("", "", {"completion": None}, "no completion with a label"),
        ("", "", {"prompt": []}, "it has no prompt"),
        ("", "", {"prompt": ASKED[:2]}, "does not end with one answer"),
        ("", "", {"completion": chat("I am the user")}, "does not end with one answer"),
        ("", "", {"prompt": "Ho", "completion": ASKED + GOOD}, "does not contain its prompt"),
        ("", "", {"prompt": json.dumps(ASKED)}, "in a string"),
        ("", "", {"completion": str(GOOD)}, "in a string"),
        ("", "", answer(""), "response is empty"),
        ("", "", answer(" \n"), "response is empty"),
    ],
)
def test_a_conversation_that_would_be_read_otherwise_than_meant_is_refused(
    read_records, old, new, record, told
):
    tokenizer = chat_tokenizer(CHATML.replace(old, new))
    with pytest.raises(ulma.Mistake, match=f"line 1: .*{told}"):
        read_records(answer() | record, tokenizer=tokenizer)


def test_an_end_of_several_tokens_is_refused(read_records):
    """<|im_end|> is no token here: a part of it would end all samples."""
    tokenizer = AutoTokenizer.from_pretrained(ulma.EXAMPLE)
    tokenizer.chat_template = CHATML
    with pytest.raises(ulma.Mistake, match="not one token"):
        read_records(answer(), tokenizer=tokenizer)


# ---- The command line ----
FAST = "--max-length 64 --max-new-tokens 8 --epochs 2 --learning-rate 3e-3 --batch-size 4"


@pytest.fixture
def run(small, tmp_path):
    """run(flags, model=…, data=…): the metrics of a short run, with its results in tmp_path/out."""

    def call(flags="", **paths):
        if "data" not in paths:
            paths["data"] = tmp_path / "points"
            write(paths["data"] / "train.jsonl", POINTS)
            write(paths["data"] / "test.jsonl", [row | {"answers": ["x"]} for row in POINTS[:4]])
        paths = {"model": small, "output_dir": tmp_path / "out"} | paths
        named = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
        return ulma.main([*FAST.split(), *named, *flags.split()])

    return call


def error_of(run, flags="", **paths):
    """The one line that a user's mistake gets."""
    with redirect_stderr(io.StringIO()) as told, pytest.raises(SystemExit) as stop:
        run(flags, **paths)
    [line] = [line for line in told.getvalue().splitlines() if "ulma.py: error: " in line]
    assert stop.value.code == 2
    return line


def test_the_main_command_aligns_the_example(tmp_path):
    argv = [sys.executable, "ulma.py", "--method", "ulma", f"--output-dir={tmp_path / 'out'}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(argv, cwd=ulma.HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    before, after = results["before"], results["after"]
    assert 0.20 < before["exact_match"] < 0.35 and after["exact_match"] >= 0.8
    assert after["exact_match/undemonstrated"] > before["exact_match/undemonstrated"] + 0.3
    assert before["reward_auc"] == 0.5 and after["reward_auc"] > 0.95
    assert after["perplexity"] < before["perplexity"]
    assert "ulma: 960 rows, β 3, β log Z -1.61\n" in done.stdout
    assert "learning rate 0.0003, 5 epochs\n" in done.stdout


def test_defaults_follow_the_model_however_its_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ulma.HERE)
    for model in ("data/base", "./data/../data/base/", str(ulma.EXAMPLE)):
        args = ulma.read_options([f"--model={model}", f"--data={tmp_path}"])
        assert (args.beta, args.learning_rate, args.epochs) == (3.0, 3e-4, 5)
    args = ulma.read_options([f"--model={tmp_path}", "--learning-rate=1e-4", "--data=data"])
    assert (args.beta, args.learning_rate, args.epochs) == (0.1, 1e-4, 3)


def test_another_model_needs_a_learning_rate_but_to_be_evaluated(tmp_path):
    with pytest.raises(ulma.Mistake, match="try 1e-5 for 7B"):
        ulma.read_options([f"--model={tmp_path}"])
    ulma.read_options([f"--model={tmp_path}", "--eval-only"])


def test_a_run_leaves_a_model_and_its_results(run, small, tmp_path):
    results = run("--log-z 0")
    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == results
    assert json.loads((out / "options.json").read_text()) == results["options"]
    assert set(results) == {"options", "before", "after", "train"}
    train = results["train"]
    assert train["samples"] == 40 and train["tokens"] > 40
    assert train["samples_per_second"] == train["samples"] / train["seconds"]
    assert [line["step"] for line in read(out / "log.jsonl")] == [10]
    lines = read(out / "samples.jsonl")
    assert set(lines[0]) == {"prompt", "before", "after"} and len(lines[0]["after"]) == 4
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    before = AutoModelForCausalLM.from_pretrained(small).state_dict()
    changes = [(saved[name] - before[name]).abs().max() for name in before]
    assert saved.keys() == before.keys() and 0 < max(changes) < 1
    assert AutoTokenizer.from_pretrained(out).get_vocab() == TOKENIZER.get_vocab()


def test_the_evaluation_of_a_saved_model_is_that_after_training(run, small, tmp_path):
    after = run("--method pointwise-dpo --epochs 8")["after"]
    paths = {"model": tmp_path / "out", "output_dir": tmp_path / "again"}
    assert run("--eval-only", reference=small, **paths)["eval"] == pytest.approx(after)


def test_with_a_reference_of_its_own_training_starts_elsewhere(run, small, tmp_path):
    first = run("--method sft --epochs 8")
    paths = {"model": tmp_path / "out", "reference": small, "output_dir": tmp_path / "second"}
    second = run("--method pointwise-dpo --log-z 0", **paths)
    assert second["before"] == pytest.approx(first["after"])
    [line] = read(tmp_path / "second" / "log.jsonl")
    assert line["reward_positive"] > 0.1


@pytest.mark.parametrize("name, tied", [("gpt2", True), ("llama", False), ("gpt_neox", False)])
def test_a_model_in_bfloat16_shards_is_trained_and_saved_in_float32(run, tmp_path, name, tied):
    tokenizer = chat_tokenizer(None)
    tokenizer.pad_token = None
    model = stand_in(tmp_path / "m", name, tokenizer, torch.bfloat16, tie_word_embeddings=tied)
    assert len(list(model.glob("model-*.safetensors"))) > 1
    run(model=model)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is None  # as it was


def test_a_folder_in_use_is_refused_and_left_as_it_is(run, tmp_path):
    for name in ("options.json", "notes.txt"):
        out = tmp_path / name[:3]
        write(out / name, ["mine"])
        assert "is not empty" in error_of(run, output_dir=out)
        assert [path.name for path in out.iterdir()] == [name]


def test_of_two_runs_at_once_into_one_folder_the_second_stops(run, tmp_path, monkeypatch):
    """The first writes options.json after the second has seen an empty folder."""
    out, glob = tmp_path / "out", Path.glob

    def glob_as_before(path, pattern):
        if path == out:
            write(out / "options.json", ["the first run's"])
            return []
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", glob_as_before)
    assert "options.json" in error_of(run)
    assert read(out / "options.json") == ["the first run's"]


def test_what_cannot_be_saved_is_found_out_before_training(run, tmp_path, monkeypatch):
    def no_room(*given):
        raise ValueError("no room for the weights")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", no_room)
    assert "cannot be saved in" in error_of(run)
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_when_training_starts_the_folder_has_no_weights(run, tmp_path, monkeypatch):
    def stop(*given):
        raise ulma.Mistake("stopped")

    monkeypatch.setattr(ulma, "train", stop)
    assert "stopped" in error_of(run)
    assert not list((tmp_path / "out").glob("*.safetensors"))


A, B = json.dumps(point(1)), json.dumps(point(2, 0))


@pytest.mark.parametrize(
    "lines, told",
    [
        ("", "train: 0 rows"),
        (f"{A}\n{A[:-9]}", "rows.jsonl, line 2"),
        (A.replace("Answer", "\xe9"), "utf-8"),
        ("[1, 2]", "not a JSON object"),
        (
            A.replace("label", "lable"),
            "it has prompt, completion, lable: no completion with a label",
        ),
        (A.replace(" Answer 1.", ""), "no completion with a label"),
        (A.replace(" Answer 1.", "  "), "response is empty"),
        (A.replace(" Answer 1.", "<eos>"), "response is empty"),
        (A.replace('" Answer 1."', "5"), "response is 5, not a text"),
        (A.replace('"Question 1?"', "5"), "prompt is 5"),
        (A.replace(": 1}", ': "1"}'), "label is '1'"),
        (A.replace(": 1}", ': 1,  "weight": -1}'), "weight is -1"),
        (A.replace(": 1}", ': 1,  "weight": "2"}'), "weight is '2'"),
        (A.replace(": 1}", ': 1,  "weight": NaN}'), "weight is nan"),
        (A.replace(": 1}", ': 1,  "answers": [42]}'), r"answers are \[42\]"),
        (A.replace(": 1}", ': 1,  "answers": "Yes."}'), "answers are 'Yes.'"),
        (f"{A}\n{A.replace(': 1}', ': 2}')}", "line 2: its label is 2"),
        ('{"chosen": " Good.", "rejected": " Bad."}', "no prompt, and its response no"),
        ('{"prompt": "Hi", "chosen": " Good.", "rejected": ""}', "one of chosen and rejected"),
        ('{"prompt": "Hi", "chosen": " Good."}', "one of chosen and rejected"),
        (A.replace(": 1}", ': 1, "chosen": "a", "rejected": "b"}'), "a pair as well"),
        (json.dumps(answer()), "chat_template"),
        (json.dumps(point(1, completion=" long" * 99)), "--max-length"),
        (A.replace('" Answer', '"Question 1? Answer'), "repeats its prompt"),
        ('{"completion": "Hi\\n\\nAssistant: x\\n\\nHuman: y", "label": 1}', "Human's"),
        (
            '{"prompt": "Hi", "completion": "\\n\\nHuman: Hi\\n\\nAssistant: x", "label": 1}',
            "Human's",
        ),
        ("\n".join([A] * 9), "only one prompt"),
        ("\n".join(json.dumps(point(i, 0)) for i in range(9)), "the mean label is 0"),
    ],
)
def test_a_mistake_in_the_data_gets_one_line_and_nothing_is_written(run, tmp_path, lines, told):
    data = tmp_path / "rows.jsonl"
    data.write_text(lines, encoding="latin-1")
    line = error_of(run, data=data)
    assert re.search(told, line)
    assert "rows.jsonl" in line or "mean label" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--beta=0", "--beta"),
        ("--max-length=0", "--max-length"),
        ("--max-new-tokens=0", "--max-new-tokens"),
        ("--epochs=-1", "--epochs"),
        ("--learning-rate=nan", "--learning-rate"),
        ("--log-z=inf", "--log-z"),
        ("--data=nowhere", "nowhere"),
        ("--model=nowhere", "nowhere"),
        ("--data-dir=nowhere", "nowhere"),
        (f"--data={__file__}", "test_ulma"),
        (f"--output-dir={__file__}/x", "test_ulma"),
    ],
)
def test_a_mistake_in_the_command_gets_one_line(run, flags, told):
    assert told in error_of(run, flags)


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--methd=sft", "unrecognized arguments: --methd=sft"),
        ("--lora=4", "unrecognized arguments: --lora=4"),
        ("--method=dpo", "invalid choice: 'dpo'"),
    ],
)
def test_an_unknown_option_is_refused(run, flags, told):
    assert told in error_of(run, flags)


def test_quantised_weights_are_refused(run, tmp_path):
    config = stand_in(tmp_path / "model") / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"quantization_config": None}))
    assert run(model=tmp_path / "model")
    config.write_text(json.dumps(plain | {"quantization_config": {"quant_method": "fp8"}}))
    assert "quantised" in error_of(run, model=tmp_path / "model", output_dir=tmp_path / "other")


def test_missing_weights_are_refused(run, tmp_path):
    config = stand_in(tmp_path / "model", tie_word_embeddings=True) / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"tie_word_embeddings": False}))
    assert "lm_head.weight" in error_of(run, model=tmp_path / "model")


def test_weights_that_are_not_finite_stop_the_run(run, tmp_path):
    model = tiny("llama", vocab_size=768)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = math.nan
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    assert "not finite" in error_of(run, model=tmp_path / "model")


def test_weights_that_are_pickled_are_refused(run, tmp_path):
    model = stand_in(tmp_path / "model")
    torch.save(tiny("llama", vocab_size=768).state_dict(), model / "pytorch_model.bin")
    for file in model.glob("*.safetensors*"):
        file.unlink()
    AutoModelForCausalLM.from_pretrained(model)  # which transformers by itself would read
    assert "safetensors" in error_of(run, model=model)


def test_a_reference_of_another_vocabulary_is_refused(run, tmp_path):
    stand_in(tmp_path / "other", tokenizer=words(), vocab_size=768)
    assert "vocabulary" in error_of(run, reference=tmp_path / "other")


def test_a_full_memory_is_told_in_one_line(run, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ulma, "response_logps", full)
    assert "out of memory" in error_of(run)


@pytest.mark.parametrize("name", ["batches_of_like_length", "Row", "concordance", "read_record"])
def test_a_bug_of_ours_keeps_its_traceback(run, monkeypatch, name):
    def broken(*given, **more):
        raise ZeroDivisionError

    monkeypatch.setattr(ulma, name, broken)
    with pytest.raises(ZeroDivisionError):
        run()


def test_a_terminal_that_knows_no_greek_gets_question_marks(run, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    run()
    assert b"? 0.1, ? log Z" in terminal.buffer.getvalue()
