"""ULMA's claims, one a test: the losses against the paper's equations, then what carries them (see ulma.py).

    python -m pytest -q
"""
import gzip
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import ulma
from ulma import implicit_reward, pointwise_dpo_loss, response_logps, sft_loss, ulma_loss

HERE = Path(ulma.__file__).parent
LOSSES = {"pointwise-dpo": pointwise_dpo_loss, "ulma": ulma_loss}


def draw(n=64, seed=0):
    """Random log π_θ, log π_ref and labels 0/1: (n,), float64."""
    generator = torch.Generator().manual_seed(seed)
    logps, ref_logps = -8 * torch.rand(2, n, generator=generator, dtype=torch.float64)
    return logps.requires_grad_(), ref_logps, torch.randint(0, 2, (n,), generator=generator)


def sigma(x):
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------------------------------------------------------------
# The equations


def test_the_reward_is_beta_times_the_log_ratio_plus_beta_log_z():
    assert implicit_reward(torch.tensor(-2.0), torch.tensor(-5.0), beta=0.5, log_z=1.0).item() == 2.0  # ½ (−2 + 5 + 1)
    logps, ref_logps, _ = draw()
    for i, r in enumerate(implicit_reward(logps, ref_logps, 0.3, -1.7)):
        assert r.item() == pytest.approx(0.3 * (logps[i].item() - ref_logps[i].item()) + 0.3 * -1.7, rel=1e-12)


def test_log_z_may_be_one_value_a_row():
    logps, ref_logps, _ = draw(4)
    log_z = torch.tensor([0.0, 1.0, -2.0, 3.0])
    for i, r in enumerate(implicit_reward(logps, ref_logps, 0.1, log_z)):
        assert r.item() == pytest.approx(implicit_reward(logps[i], ref_logps[i], 0.1, log_z[i].item()).item(), abs=1e-12)


@pytest.mark.parametrize("beta, log_z", [(0.1, 0.0), (0.5, 2.0), (1.0, -3.0)])
def test_every_loss_is_its_equation(beta, log_z):
    logps, ref_logps, labels = draw()
    graded = torch.rand(64, dtype=torch.float64).where(labels == 0, 1.0)
    for i in range(len(logps)):
        logp, ref_logp, z, score = logps[i].item(), ref_logps[i].item(), labels[i].item(), graded[i].item()
        r = beta * (math.log(math.exp(logp) / math.exp(ref_logp)) + log_z)
        binary = -(z * math.log(sigma(r)) + (1 - z) * math.log(1 - sigma(r)))
        at = (logps[i], ref_logps[i])
        assert sft_loss(logps[i]).item() == pytest.approx(-logp)
        assert pointwise_dpo_loss(*at, labels[i], beta, log_z).item() == pytest.approx(binary)
        assert pointwise_dpo_loss(*at, graded[i], beta, log_z, continuous=True).item() == pytest.approx((score - r) ** 2)
        assert ulma_loss(*at, labels[i], beta, log_z).item() == pytest.approx(z * -logp + (1 - z) * binary)
        assert ulma_loss(*at, graded[i], beta, log_z, continuous=True).item() == pytest.approx(-logp if score == 1 else (score - r) ** 2)


def test_hand_worked_values():
    # π_θ = ½, π_ref = ⅛, β = ½, log Z = 0: r = ½ log 4 = log 2, σ(r) = ⅔.
    logps, ref_logps = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.125, 0.125]).double().log()
    labels = torch.tensor([1, 0])
    assert pointwise_dpo_loss(logps, ref_logps, labels, 0.5).tolist() == pytest.approx([math.log(3 / 2), math.log(3)])
    assert ulma_loss(logps, ref_logps, labels, 0.5).tolist() == pytest.approx([math.log(2), math.log(3)])
    continuous = [(1 - math.log(2)) ** 2, math.log(2) ** 2]
    assert pointwise_dpo_loss(logps, ref_logps, labels, 0.5, continuous=True).tolist() == pytest.approx(continuous)
    # And with log Z = log 4: r = ½ (log 4 + log 4) = log 4, σ(r) = ⅘.
    assert pointwise_dpo_loss(logps, ref_logps, labels, 0.5, math.log(4)).tolist() == pytest.approx([math.log(5 / 4), math.log(5)])


def test_the_default_beta_is_the_papers_and_log_z_is_0():
    logps, ref_logps, labels = draw()
    for loss in LOSSES.values():
        assert torch.equal(loss(logps, ref_logps, labels), loss(logps, ref_logps, labels, 0.1, 0.0, False))


def test_losses_are_unreduced_and_a_unit_may_be_a_token():
    logps, ref_logps, labels = (t.view(8, 8) for t in draw())
    for loss in LOSSES.values():
        for continuous in (False, True):
            whole = loss(logps, ref_logps, labels, continuous=continuous)
            flat = loss(logps.flatten(), ref_logps.flatten(), labels.flatten(), continuous=continuous)
            assert whole.shape == (8, 8) and torch.equal(whole.flatten(), flat)


def test_labels_may_be_bool_int_or_float():
    logps, ref_logps, labels = draw()
    for loss in LOSSES.values():
        for continuous in (False, True):
            results = [loss(logps, ref_logps, labels.to(kind), continuous=continuous) for kind in (torch.bool, torch.int64, torch.float32)]
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---------------------------------------------------------------------------------------------------------------------
# The gradients, with respect to log π_θ(y|x)


def grad(loss, logps):
    return torch.autograd.grad(loss.sum(), logps)[0].tolist()


def test_the_sft_gradient_is_minus_1():
    logps, _, _ = draw()
    assert grad(sft_loss(logps), logps) == [-1.0] * 64


def test_the_pointwise_dpo_gradient_is_minus_beta_times_z_minus_sigma():
    logps, ref_logps, labels = draw()
    rewards = [0.3 * (a - b + 0.5) for a, b in zip(logps.tolist(), ref_logps.tolist())]
    expected = [-0.3 * (1 - sigma(r)) if z else 0.3 * sigma(r) for r, z in zip(rewards, labels.tolist())]
    assert grad(pointwise_dpo_loss(logps, ref_logps, labels, 0.3, 0.5), logps) == pytest.approx(expected)


def test_the_continuous_gradient_is_minus_2_beta_times_z_minus_r():
    logps, ref_logps, _ = draw()
    scores = torch.rand(64, dtype=torch.float64)
    expected = [-2 * 0.3 * (z - 0.3 * (a - b + 0.5)) for a, b, z in zip(logps.tolist(), ref_logps.tolist(), scores.tolist())]
    assert grad(pointwise_dpo_loss(logps, ref_logps, scores, 0.3, 0.5, continuous=True), logps) == pytest.approx(expected)


def test_ulma_follows_demonstrations_without_the_brake_that_pointwise_dpo_puts_on_them():
    logps, ref_logps, labels = draw()
    preference = grad(pointwise_dpo_loss(logps, ref_logps, labels, 0.3), logps)
    expected = [-1.0 if z else g for z, g in zip(labels.tolist(), preference)]
    assert grad(ulma_loss(logps, ref_logps, labels, 0.3), logps) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_stay_finite_for_log_ratios_of_ten_thousand(dtype):
    for ratio in (-1e4, 1e4):
        for loss in LOSSES.values():
            for continuous in (False, True):
                logps = torch.full((2,), ratio, dtype=dtype, requires_grad=True)
                value = loss(logps, torch.zeros(2, dtype=dtype), torch.tensor([0, 1]), 1.0, continuous=continuous)
                value.sum().backward()
                assert value.isfinite().all() and logps.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# The paper's claims


@pytest.mark.parametrize("continuous", [False, True])
def test_ulma_is_sft_on_demonstrations_and_pointwise_dpo_on_the_rest(continuous):
    logps, ref_logps, _ = draw()
    ones, zeros = torch.ones(64), torch.zeros(64)
    assert torch.equal(ulma_loss(logps, ref_logps, ones, 0.2, 1.0, continuous), sft_loss(logps))
    assert torch.equal(ulma_loss(logps, ref_logps, zeros, 0.2, 1.0, continuous), pointwise_dpo_loss(logps, ref_logps, zeros, 0.2, 1.0, continuous))


def test_in_continuous_ulma_only_a_score_of_exactly_1_is_a_demonstration():
    logps, ref_logps, _ = draw(2)
    scores = torch.tensor([1.0, 0.999])
    loss = ulma_loss(logps, ref_logps, scores, continuous=True)
    assert loss[0] == -logps[0] and loss[1] == pointwise_dpo_loss(logps, ref_logps, scores, continuous=True)[1]


def test_a_demonstrations_loss_does_not_depend_on_the_reference():
    logps, ref_logps, _ = draw()
    assert torch.equal(ulma_loss(logps, ref_logps, torch.ones(64)), ulma_loss(logps, torch.zeros(64), torch.ones(64)))


def test_where_policy_and_reference_agree_every_binary_preference_term_is_log_2():
    logps, _, labels = draw()
    assert pointwise_dpo_loss(logps, logps.detach(), labels).tolist() == pytest.approx([math.log(2)] * 64)
    assert ulma_loss(logps, logps.detach(), labels)[labels == 0].tolist() == pytest.approx([math.log(2)] * (labels == 0).sum())


def recover(continuous, drop_log_z=False, beta=0.5):
    """(π* = π_ref exp(r/β) / Z, the policy that minimises the exact expected loss): over six responses, float64."""
    ref = torch.tensor([0.30, 0.25, 0.20, 0.12, 0.08, 0.05], dtype=torch.float64)
    reward = torch.tensor([-1.0, 0.5, 1.5, -0.3, 0.9, 2.0], dtype=torch.float64)
    z = (ref * (reward / beta).exp()).sum()
    optimum = ref * (reward / beta).exp() / z
    log_z = 0.0 if drop_log_z else z.log()
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe")

    def expected_loss():  # over responses from π_ref, and over labels: z ~ Bernoulli(σ(r)), or z = r + noise
        solver.zero_grad()
        logps = logits.log_softmax(0)
        if continuous:
            loss = pointwise_dpo_loss(logps, ref.log(), reward, beta, log_z, True)
        else:
            good = pointwise_dpo_loss(logps, ref.log(), torch.ones(6), beta, log_z)
            bad = pointwise_dpo_loss(logps, ref.log(), torch.zeros(6), beta, log_z)
            loss = reward.sigmoid() * good + (1 - reward.sigmoid()) * bad
        total = (ref * loss).sum()
        total.backward()
        return total

    solver.step(expected_loss)
    return optimum, logits.softmax(0).detach()


@pytest.mark.parametrize("continuous", [False, True])
def test_with_the_true_log_z_the_optimum_of_kl_regularised_alignment_is_recovered(continuous):
    optimum, policy = recover(continuous)
    assert (optimum - policy).abs().max() < 1e-6


@pytest.mark.parametrize("continuous", [False, True])
def test_without_log_z_it_is_not(continuous):
    optimum, policy = recover(continuous, drop_log_z=True)
    assert (optimum - policy).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities

TINY = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ARCHITECTURES = {  # several of these scale or cap their logits, in ways that change the result
    "gpt2": dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": TINY, "qwen3": TINY, "gemma2": {**TINY, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {**TINY, "logit_scale": 0.25}, "granite": {**TINY, "logits_scaling": 3.0}}


def tiny(name, **changes):
    """A random model, in train mode, with logits far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes}))
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 20
    ulma.disable_dropout(model)
    return model.train()


def batch(side, prompts=(5, 1, 3, 7), responses=(4, 6, 1, 0)):
    """input_ids, attention_mask, response_mask with padding on one side, and the unpadded (prompt, response) rows."""
    rng, width = random.Random(0), max(map(sum, zip(prompts, responses)))
    rows = [([rng.randrange(3, 61) for _ in range(p)], [rng.randrange(3, 61) for _ in range(r)]) for p, r in zip(prompts, responses)]
    tensors = []
    for fill in (lambda p, r: p + r, lambda p, r: [1] * len(p + r), lambda p, r: [0] * len(p) + [1] * len(r)):
        padded = [[0] * (width - len(fill(p, r))) + fill(p, r) if side == "left" else fill(p, r) + [0] * (width - len(fill(p, r)))
                  for p, r in rows]
        tensors.append(torch.tensor(padded))
    return (*tensors, rows)


def token_by_token(model, rows):
    """Σ log π(y_t | x, y_<t), each term from a forward pass of its own over an unpadded prefix."""
    return torch.stack([sum((model(input_ids=torch.tensor([p + r[:t]])).logits[0, -1].log_softmax(-1)[r[t]] for t in range(len(r))),
                            torch.zeros(())) for p, r in rows])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_response_logps_is_the_sum_over_response_tokens_alone(name, side):
    model = tiny(name)
    input_ids, attention_mask, response_mask, rows = batch(side)
    expected, actual = token_by_token(model, rows), response_logps(model, input_ids, attention_mask, response_mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.dtype == torch.float32 and actual[3] == 0  # the last row has no response
    one, other = ([g for g in torch.autograd.grad(total.sum(), list(model.parameters()))] for total in (actual, expected))
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_masks_may_be_of_any_type_and_attention_mask_may_be_none_if_padding_is_on_the_right(kind):
    model = tiny("llama")
    input_ids, attention_mask, response_mask, rows = batch("right")
    expected = response_logps(model, input_ids, attention_mask, response_mask)
    assert torch.equal(expected, response_logps(model, input_ids, attention_mask.to(kind), response_mask.to(kind)))
    assert torch.equal(expected, response_logps(model, input_ids, None, response_mask))


def test_what_the_padding_holds_does_not_matter():
    model = tiny("gpt2")
    for side in ("left", "right"):
        input_ids, attention_mask, response_mask, _ = batch(side)
        noise = torch.where(attention_mask == 1, input_ids, torch.randint(3, 61, input_ids.shape))
        assert torch.equal(*(response_logps(model, ids, attention_mask, response_mask) for ids in (input_ids, noise)))


def test_the_output_head_never_sees_a_prompt_or_padding_position():
    model, seen = tiny("qwen3"), []
    input_ids, attention_mask, response_mask, _ = batch("left")
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    response_logps(model, input_ids, attention_mask, response_mask)
    assert seen == [response_mask.sum()]
    assert model(input_ids=input_ids).logits.shape[:2] == input_ids.shape  # and afterwards the model is as it was


def test_gradient_checkpointing_and_frozen_heads_change_nothing():
    model = tiny("llama")
    input_ids, attention_mask, response_mask, _ = batch("right")
    model.get_output_embeddings().weight.requires_grad_(False)
    grads = []
    for _ in range(2):
        model.zero_grad()
        response_logps(model, input_ids, attention_mask, response_mask).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(*grads)


def test_dropout_is_off_in_training_too():
    torch.manual_seed(0)
    for name in ("gpt2", "llama"):
        model = tiny(name, **({"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5} if name == "gpt2" else {"attention_dropout": 0.5}))
        input_ids, attention_mask, response_mask, _ = batch("right")
        assert model.training
        assert torch.equal(*(response_logps(model, input_ids, attention_mask, response_mask) for _ in range(2)))
