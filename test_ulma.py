"""ULMA's claims, one a test: the losses against the paper's equations, then what carries them (see ulma.py).

    python -m pytest -q
"""
import copy
import functools
import gzip
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: a name that is no folder fails at once
import datasets
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import ulma
from ulma import (concordance, dpo_loss, implicit_reward, pointwise_dpo_loss, prior_log_z, response_logps, sft_loss,
                  ulma_loss, unlikelihood_loss)

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
        one = implicit_reward(logps[i], ref_logps[i], 0.1, log_z[i].item())
        assert r.item() == pytest.approx(one.item(), abs=1e-12)


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
        square = pointwise_dpo_loss(*at, graded[i], beta, log_z, continuous=True)
        assert square.item() == pytest.approx((score - r) ** 2)
        assert ulma_loss(*at, labels[i], beta, log_z).item() == pytest.approx(z * -logp + (1 - z) * binary)
        squared = -logp if score == 1 else (score - r) ** 2
        assert ulma_loss(*at, graded[i], beta, log_z, continuous=True).item() == pytest.approx(squared)
        assert unlikelihood_loss(logps[i], labels[i]).item() == pytest.approx(-logp if z else logp)


def test_pairwise_dpo_is_its_equation_and_its_gradient():
    (logps_w, ref_w, _), (logps_l, ref_l, _) = draw(seed=1), draw(seed=2)
    loss = dpo_loss(logps_w, logps_l, ref_w, ref_l, 0.3)
    gaps = [0.3 * ((a - b) - (c - d)) for a, b, c, d in zip(*(t.tolist() for t in (logps_w, ref_w, logps_l, ref_l)))]
    assert loss.tolist() == pytest.approx([-math.log(sigma(gap)) for gap in gaps])
    assert grad(loss, logps_w) == pytest.approx([-0.3 * sigma(-gap) for gap in gaps])  # −β σ(r_l − r_w) (∇_w − ∇_l)
    loss = dpo_loss(logps_w, logps_l, ref_w, ref_l, 0.3)
    assert grad(loss, logps_l) == pytest.approx([0.3 * sigma(-gap) for gap in gaps])


def test_log_z_cancels_between_the_two_responses_of_a_pair_but_not_in_a_single_one():
    (logps_w, ref_w, _), (logps_l, ref_l, _) = draw(seed=1), draw(seed=2)
    gap = implicit_reward(logps_w, ref_w, 0.3, 7.0) - implicit_reward(logps_l, ref_l, 0.3, 7.0)
    torch.testing.assert_close(-gap.sigmoid().log(), dpo_loss(logps_w, logps_l, ref_w, ref_l, 0.3))
    single = pointwise_dpo_loss(logps_w, ref_w, torch.ones(64), 0.3, 7.0)
    assert not torch.allclose(single, pointwise_dpo_loss(logps_w, ref_w, torch.ones(64), 0.3))


def test_hand_worked_values():
    # π_θ = ½, π_ref = ⅛, β = ½, log Z = 0: r = ½ log 4 = log 2, σ(r) = ⅔.
    logps, ref_logps = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.125, 0.125]).double().log()
    labels = torch.tensor([1, 0])
    assert pointwise_dpo_loss(logps, ref_logps, labels, 0.5).tolist() == pytest.approx([math.log(3 / 2), math.log(3)])
    assert ulma_loss(logps, ref_logps, labels, 0.5).tolist() == pytest.approx([math.log(2), math.log(3)])
    continuous = [(1 - math.log(2)) ** 2, math.log(2) ** 2]
    assert pointwise_dpo_loss(logps, ref_logps, labels, 0.5, continuous=True).tolist() == pytest.approx(continuous)
    # And with log Z = log 4: r = ½ (log 4 + log 4) = log 4, σ(r) = ⅘.
    with_log_z = pointwise_dpo_loss(logps, ref_logps, labels, 0.5, math.log(4))
    assert with_log_z.tolist() == pytest.approx([math.log(5 / 4), math.log(5)])


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
            as_bool, as_int, as_float = (loss(logps, ref_logps, labels.to(kind), continuous=continuous)
                                         for kind in (torch.bool, torch.int64, torch.float32))
            assert torch.equal(as_bool, as_int) and torch.equal(as_bool, as_float)


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
    rewards = [0.3 * (a - b + 0.5) for a, b in zip(logps.tolist(), ref_logps.tolist())]
    expected = [-2 * 0.3 * (z - r) for z, r in zip(scores.tolist(), rewards)]
    loss = pointwise_dpo_loss(logps, ref_logps, scores, 0.3, 0.5, continuous=True)
    assert grad(loss, logps) == pytest.approx(expected)


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
    preference = pointwise_dpo_loss(logps, ref_logps, zeros, 0.2, 1.0, continuous)
    assert torch.equal(ulma_loss(logps, ref_logps, zeros, 0.2, 1.0, continuous), preference)


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
    negatives = ulma_loss(logps, logps.detach(), labels)[labels == 0].tolist()
    assert negatives == pytest.approx([math.log(2)] * len(negatives))


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_label_priors_log_z_zeroes_the_mean_gradient_over_rewards_and_log_z_0_does_not(continuous, share):
    labels = (torch.arange(60) < 60 * share).double()
    prior = prior_log_z(labels.mean().item(), 0.3, continuous)
    for log_z, balanced in ((prior, True), (0.0, share == 0.5 and not continuous)):
        logps = torch.zeros(60, dtype=torch.float64, requires_grad=True)  # π_θ = π_ref
        pull = sum(grad(pointwise_dpo_loss(logps, torch.zeros(60), labels, 0.3, log_z, continuous), logps))
        assert (abs(pull) < 1e-9) is balanced


def test_on_balanced_binary_labels_the_label_priors_log_z_is_the_papers_0():
    assert prior_log_z(0.5) == 0 and prior_log_z(0.2, beta=2.0) == pytest.approx(math.log(0.25) / 2)


def recover(continuous, drop_log_z=False, beta=0.5):
    """(π* = π_ref exp(r/β) / Z, the policy that minimises the exact expected loss): over six responses, float64."""
    ref = torch.tensor([0.30, 0.25, 0.20, 0.12, 0.08, 0.05], dtype=torch.float64)
    reward = torch.tensor([-1.0, 0.5, 1.5, -0.3, 0.9, 2.0], dtype=torch.float64)
    z = (ref * (reward / beta).exp()).sum()
    optimum = ref * (reward / beta).exp() / z
    log_z = 0.0 if drop_log_z else z.log()
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0,
                               line_search_fn="strong_wolfe")

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
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
ARCHITECTURES = {  # several of these scale or cap their logits, in ways that change the result
    "gpt2": dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": TINY, "qwen3": TINY, "gemma2": {**TINY, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {**TINY, "logit_scale": 0.25}, "granite": {**TINY, "logits_scaling": 3.0}}


def tiny(name, **changes):
    """A random model, in train mode, with logits far from uniform."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 20
    ulma.disable_dropout(model)
    return model.train()


def batch(side, prompts=(5, 1, 3, 7), responses=(4, 6, 1, 0)):
    """input_ids, attention_mask, response_mask with padding on one side, and the unpadded (prompt, response) rows."""
    rng, width = random.Random(0), max(p + r for p, r in zip(prompts, responses))
    rows = [([rng.randrange(3, 61) for _ in range(p)], [rng.randrange(3, 61) for _ in range(r)])
            for p, r in zip(prompts, responses)]

    def padded(values):
        pads = [[0] * (width - len(v)) for v in values]
        return torch.tensor([pad + v if side == "left" else v + pad for v, pad in zip(values, pads)])

    return (padded([p + r for p, r in rows]), padded([[1] * len(p + r) for p, r in rows]),
            padded([[0] * len(p) + [1] * len(r) for p, r in rows]), rows)


def token_by_token(model, rows):
    """Σ log π(y_t | x, y_<t), each term from a forward pass of its own over an unpadded prefix."""
    def term(prefix, token):
        return model(input_ids=torch.tensor([prefix])).logits[0, -1].log_softmax(-1)[token]

    return torch.stack([sum((term(p + r[:t], r[t]) for t in range(len(r))), torch.zeros(())) for p, r in rows])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_response_logps_is_the_sum_over_response_tokens_alone(name, side):
    model = tiny(name)
    input_ids, attention_mask, response_mask, rows = batch(side)
    expected, actual = token_by_token(model, rows), response_logps(model, input_ids, attention_mask, response_mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.dtype == torch.float32 and actual[3] == 0  # the last row has no response
    gradients = (torch.autograd.grad(total.sum(), list(model.parameters())) for total in (actual, expected))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_a_rows_log_probability_is_that_of_its_completion_and_with_length_normalize_the_mean_over_its_tokens():
    model, rows = tiny("llama"), batch("right")[3][:3]
    data = [{"input_ids": p + r, "length": len(p + r), "prompt_length": len(p)} for p, r in rows]
    total, average = (ulma.batch_logps(model, data, ulma.Options(length_normalize=mean)) for mean in (False, True))
    torch.testing.assert_close(total, token_by_token(model, rows), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(average, total / torch.tensor([len(r) for _, r in rows]))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_masks_may_be_of_any_type_and_with_padding_on_the_right_attention_mask_may_be_none(kind):
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


@pytest.mark.parametrize("name, rates", [("gpt2", ("attn_pdrop", "resid_pdrop", "embd_pdrop")),
                                         ("llama", ("attention_dropout",))])
def test_dropout_is_off_in_training_too(name, rates):
    model = tiny(name, **{rate: 0.5 for rate in rates})
    input_ids, attention_mask, response_mask, _ = batch("right")
    assert model.training
    assert torch.equal(*(response_logps(model, input_ids, attention_mask, response_mask) for _ in range(2)))


# ---------------------------------------------------------------------------------------------------------------------
# Data


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def point(i, label=1, **more):
    return {"prompt": f"Question {i}?", "completion": f" Answer {i}.", "label": label, **more}


@functools.cache
def base_tokenizer():
    return ulma.load_tokenizer(str(HERE / "data" / "base"))


def load(data, tokenizer=None, **options):
    return ulma.load_rows(ulma.Options(data=str(data), **options), tokenizer or base_tokenizer())


def error_of(capsys, call, *args, **kwargs):
    """The one line that a user's mistake gets."""
    with pytest.raises(SystemExit) as stop:
        call(*args, **kwargs)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def test_a_pointwise_row_is_taken_as_it_is(tmp_path):
    labels = [1, 0] * 10
    train_rows, test_rows = load(write(tmp_path / "rows.jsonl", [point(i, label) for i, label in enumerate(labels)]))
    assert sorted(r["prompt"] for r in train_rows + test_rows) == sorted(f"Question {i}?" for i in range(20))
    assert all(r["label"] == labels[int(r["prompt"][9:-1])] for r in train_rows + test_rows)


@pytest.mark.parametrize("with_prompt", [False, True])
def test_a_pair_becomes_two_pointwise_rows(tmp_path, with_prompt):
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:"
    rows = [{"chosen": f"{prompt} Take care.", "rejected": f"{prompt} Go away."}]
    if with_prompt:
        rows = [{"prompt": prompt, "chosen": " Take care.", "rejected": " Go away."}]
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    for part in load(tmp_path / "data"):
        assert [(r["prompt"], r["completion"], r["label"]) for r in part] == [
            (prompt, " Take care.", 1), (prompt, " Go away.", 0)]


def test_gz_files_and_folders_hold_the_same_rows(tmp_path):
    lines = "".join(json.dumps(point(i)) + "\n" for i in range(20))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines)
    from_file, from_folder = load(tmp_path / "rows.jsonl.gz"), load(tmp_path / "folder")
    assert [[r["prompt"] for r in part] for part in from_file] == [[r["prompt"] for r in part] for part in from_folder]


def test_edited_data_is_read_anew(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n")
    for label in (1, 0):
        write(tmp_path / "train.jsonl", [point(i, label) for i in range(4)])
        assert {r["label"] for r in load(tmp_path)[0]} == {label}


def test_without_a_test_split_a_seeded_tenth_of_the_prompts_is_held_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", [point(i % 50, label=i % 2) for i in range(200)])
    (train_rows, test_rows), again, other = load(path), load(path), load(path, seed=1)
    train_prompts, test_prompts = ({r["prompt"] for r in part} for part in (train_rows, test_rows))
    assert len(train_prompts) == 45 and len(test_prompts) == 5 and not train_prompts & test_prompts
    assert len(train_rows) == 180 and len(test_rows) == 20
    assert again == (train_rows, test_rows) and other != again


def test_dpo_takes_every_positive_with_every_negative_of_its_prompt_and_sft_the_demonstrations():
    rows = [{"prompt": p, "label": z} for p, z in (("a", 1), ("a", 0), ("a", 0), ("b", 1), ("c", 0))]
    assert ulma.make_examples(rows, "dpo") == [(rows[0], rows[1]), (rows[0], rows[2])]
    assert ulma.make_examples(rows, "sft") == [(rows[0],), (rows[3],)]
    assert ulma.make_examples(rows, "ulma") == [(row,) for row in rows]


def words(opens=False, closes=False):
    """A tokenizer to which the word "7" is token 7; <bos> is 1, <eos> 2, and it may open and close texts with them."""
    names = {**{str(i): i for i in range(3, 61)}, "<unk>": 0, "<bos>": 1, "<eos>": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    single = ["<bos>"] * opens + ["$A"] + ["<eos>"] * closes
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>",
                                                **{"bos_token": "<bos>"} if opens else {})


@pytest.mark.parametrize("max_length, prompt, response", [
    (8, [10, 11, 12, 13], [20, 21, 22, 2]), (7, [11, 12, 13], [20, 21, 22, 2]), (5, [12, 13], [20, 21, 22]),
    (2, [13], [20])])
def test_truncation_keeps_the_end_of_the_prompt_and_the_start_of_the_completion(max_length, prompt, response):
    row = {"prompt": "10 11 12 13", "completion": "20 21 22", "where": "row 1", "chat": False}
    ulma.tokenize([row], words(), max_length)
    assert row["input_ids"] == prompt + response and row["prompt_length"] == len(prompt)


@pytest.mark.parametrize("opens, closes, prompt", [
    (True, False, "10 11"), (True, False, "<bos> 10 11"), (True, True, "10 11"), (False, True, "10 11"),
    (False, False, "10 11")])
@pytest.mark.parametrize("completion", ["20", "20 <eos>"])
def test_bos_appears_once_if_the_tokenizer_has_one_and_eos_closes_the_completion_alone(opens, closes, prompt, completion):
    row = {"prompt": prompt, "completion": completion, "where": "row 1", "chat": False}
    ulma.tokenize([row], words(opens, closes), 9)
    assert row["input_ids"] == [1] * opens + [10, 11, 20, 2] and row["prompt_length"] == 2 + opens


def test_bos_stays_when_the_prompt_loses_its_start():
    row = {"prompt": "10 11 12 13", "completion": "20 21", "where": "row 1", "chat": False}
    ulma.tokenize([row], words(opens=True), 6)
    assert row["input_ids"] == [1, 12, 13, 20, 21, 2] and row["prompt_length"] == 3


@pytest.mark.parametrize("scheme", ["legacy", "first", "always"])
@pytest.mark.parametrize("completion", [" Sure.", "Sure.", "  Sure.", "\nSure.", "é 漢", "\tSure."])
def test_no_space_comes_between_prompt_and_completion_from_a_tokenizer_that_puts_one_before_a_text(scheme, completion):
    """As Llama 2's do. Where a token spans the line break that is used to avoid it, a space is better than a loss."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", "\t", "\n\t", *(chr(i) for i in range(33, 127)), *(f"<0x{i:02X}>" for i in range(256))]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [("\n", "\t")],
                                                         byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy":
        prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
        backend.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    else:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = tokenizers.decoders
    backend.decoder = parts.Sequence([parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    row = {"prompt": "Human: Hi\n\nAssistant:", "completion": completion, "where": "row 1", "chat": False}
    ulma.tokenize([row], tokenizer, 99)
    space = " " * completion.startswith("\t")
    assert tokenizer.decode(row["input_ids"]) == row["prompt"] + space + completion + "</s>"


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def chat_tokenizer(template=CHATML, **special):
    """data/base's tokenizer with a chat template and the special tokens of such models."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "data" / "base")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"], **special})
    tokenizer.chat_template = template
    return tokenizer


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("columns", [
    {"prompt": [message("user", "Hi"), message("assistant", "Hello"), message("user", "Bye")],
     "chosen": [message("assistant", "Take care.")], "rejected": [message("assistant", "Go away.")]},
    {"chosen": [message("user", "Hi"), message("assistant", "Hello"), message("user", "Bye"),
                message("assistant", "Take care.")],
     "rejected": [message("user", "Hi"), message("assistant", "Hello"), message("user", "Bye"),
                  message("assistant", "Go away.")]}])
def test_a_conversation_goes_through_the_chat_template_of_the_tokenizer(tmp_path, columns):
    tokenizer = chat_tokenizer()
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", [columns])
    rows, _ = load(tmp_path / "data", tokenizer)
    ulma.tokenize(rows, tokenizer, 512)
    prompt = ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
              "<|im_start|>assistant\n")
    for row, text, label in zip(rows, ("Take care.<|im_end|>", "Go away.<|im_end|>"), (1, 0)):
        assert tokenizer.decode(row["input_ids"]) == prompt + text and row["label"] == label
        assert tokenizer.decode(row["input_ids"][row["prompt_length"]:]) == text
        assert row["input_ids"].count(tokenizer.eos_token_id) == 4


@pytest.mark.parametrize("opens", [True, False])
def test_bos_comes_from_the_template_alone_and_one_that_writes_no_eos_gets_it(opens):
    template = ("{{ bos_token }}" * opens + "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                "{% if add_generation_prompt %}[assistant]{% endif %}")
    tokenizer = chat_tokenizer(template, bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    row = {"prompt": [message("user", "Hi")], "completion": [message("assistant", "Hello")], "label": True}
    rows = ulma.pointwise_rows(row, "row 1", ulma.Options(), tokenizer)
    ulma.tokenize(rows, tokenizer, 512)
    assert tokenizer.decode(rows[0]["input_ids"]) == "<s>" * opens + "[user]Hi[assistant]Hello</s>"


@pytest.mark.parametrize("row", [
    {"prompt": "Hi", "completion": [message("assistant", "Hello")]}, {"prompt": [message("user", "Hi")], "completion": []},
    {"prompt": [message("user", "Hi")], "completion": [{"role": "assistant"}]},
    {"prompt": [message("user", "Hi")], "completion": [{"role": "assistant", "content": None}]},
    {"prompt": [message("user", "Hi")], "completion": ["Hello"]},
    {"prompt": [message("user", "Hi")], "completion": [message("user", "Hi"), message("assistant", "Hello")]}])
def test_what_is_no_conversation_is_named(capsys, row):
    raising = CHATML.replace("{{ m.content }}", "{{ m.content if m.content is string else raise_exception('no text') }}")
    for template in (CHATML, raising):
        assert "row 1" in error_of(capsys, ulma.pointwise_rows, {**row, "label": 1}, "row 1", ulma.Options(),
                                   chat_tokenizer(template))


def test_conversations_and_texts_in_one_file_both_get_their_special_tokens(run, tmp_path, monkeypatch):
    tokenizer, seen = chat_tokenizer(bos_token="<s>"), {}
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chat = {"prompt": [message("user", "Hi")], "completion": [message("assistant", "Hello")], "label": 0}
    write(tmp_path / "data" / "test.jsonl", [point(1), chat, point(2), chat])
    monkeypatch.setattr(ulma, "evaluate", lambda model, tokenizer, rows, *_: seen.update(rows=rows) or (
        {"perplexity": None}, {"Hi": {"sampled": [""], "greedy": [""]}}))
    run("--eval-only", "--model", tmp_path / "model", "--data", tmp_path / "data", "--max-length", 64)
    assert [r["input_ids"].count(tokenizer.bos_token_id) for r in seen["rows"]] == [1, 0, 1, 0]


def test_conversations_need_a_chat_template(capsys):
    row = {"prompt": [message("user", "Hi")], "completion": [message("assistant", "Hello")], "label": 1}
    assert "chat template" in error_of(capsys, ulma.pointwise_rows, row, "row 1", ulma.Options(), base_tokenizer())


def test_response_may_stand_for_completion(tmp_path):
    rows = [{"prompt": f"Question {i}?", "response": f" Answer {i}.", "label": True} for i in range(9)]
    train_rows, _ = load(write(tmp_path / "rows.jsonl", rows))
    assert all(r["completion"] == r["prompt"].replace("Question", " Answer").replace("?", ".") for r in train_rows)


def test_a_data_set_may_have_several_folders_or_configurations(tmp_path):
    """Anthropic/hh-rlhf has folders, others configurations."""
    for folder in ("harmless-base", "helpful-base"):
        write(tmp_path / folder / "train.jsonl", [point(i, prompt=f"{folder} {i}") for i in range(9)])
    configs = "".join(f"- config_name: {folder}\n  data_files: {folder}/*.jsonl\n" for folder in ("harmless-base", "helpful-base"))
    assert all("harmless" in r["prompt"] for part in load(tmp_path, data_dir="harmless-base") for r in part)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert all("helpful" in r["prompt"] for part in load(tmp_path, data_config="helpful-base") for r in part)


def test_a_data_set_from_the_hub_is_read_by_its_configuration_and_folder_and_its_rows_are_numbered(monkeypatch, capsys):
    def hub(path, name, data_dir):
        assert (path, name, data_dir) == ("someone/rows", "graded", None)
        return datasets.DatasetDict({split: datasets.Dataset.from_list([point(i, labels[i]) for i in range(3)])
                                     for split in ("train", "test")})

    monkeypatch.setattr(ulma, "load_dataset", hub)
    for labels in ([1, 0, 1], [1, 0, 7]):
        call = functools.partial(load, "someone/rows", data_config="graded")
        if labels[2] == 7:
            assert "someone/rows, train row 3: the label is 7" in error_of(capsys, call)
        else:
            assert [[r["label"] for r in part] for part in call()] == [labels, labels]


def test_a_row_without_prompt_tokens_is_an_error_that_names_it(capsys):
    rows = [{"prompt": " ", "completion": "20", "where": "row 7", "chat": False}]
    assert "row 7" in error_of(capsys, ulma.tokenize, rows, words(), 9)


def test_the_response_is_the_completion_and_its_end_of_sequence_token():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "data" / "base")
    row = {"prompt": "\n\nHuman: How do I clean a lamp?\n\nAssistant:", "completion": " Dust it.", "where": "row 1", "chat": False}
    ulma.tokenize([row], tokenizer, 512)
    assert tokenizer.decode(row["input_ids"][:row["prompt_length"]]) == row["prompt"]
    assert tokenizer.decode(row["input_ids"][row["prompt_length"]:]) == row["completion"] + tokenizer.eos_token


@pytest.mark.parametrize("bad, told", [
    ({"label": 2}, "the label is 2"), ({"label": None}, "the label is None"), ({"label": 0.5}, "--continuous"),
    ({"completion": ""}, "the completion is ''"), ({"prompt": None}, "the prompt is None"),
    ({"references": "Answer."}, "a list of texts"), ({"references": ["\ud800"]}, "a list of texts"),
    ({"prompt": "half \ud800"}, "Unicode text")])
def test_a_malformed_row_stops_the_run_before_the_model_loads_and_is_named(tmp_path, capsys, monkeypatch, bad, told):
    monkeypatch.setattr(ulma, "load_model", lambda *_: pytest.fail("the model was loaded"))
    path = write(tmp_path / "rows.jsonl", [point(1), point(2), {**point(3), **bad}])
    message = error_of(capsys, ulma.main, ["--data", str(path), "--output-dir", str(tmp_path / "out")])
    assert f"{path}, line 3" in message and told in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, text, told", [
    ("a.jsonl", "", "holds no rows"), ("a.jsonl", "\n \n", "holds no rows"), ("a.jsonl", '{"prompt": "x"\n', "line 1"),
    ("a.jsonl", json.dumps(point(1)) + "\n\n" + json.dumps(point(2))[:-9] + "\n", "line 3"),
    ("a.jsonl", json.dumps(point(1)) + "\nnull\n", "line 2: write one JSON object"), ("a.jsonl.gz", "no gzip", "gzip"),
    ("a.jsonl", '{"promt": "x", "completion": "y", "label": 1}\n', "completion, label, promt; needed are prompt"),
    ("a.jsonl", '{"prompt": "x", "completion": "y", "score": 0.5}\n', "--continuous"),
    ("a.jsonl", 9 * '{"prompt": "x", "completion": "y", "label": 1}\n', "'train': 0, 'test': 9")])
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, capsys, name, text, told):
    (tmp_path / name).write_text(text)
    message = error_of(capsys, load, tmp_path / name)
    assert f"{tmp_path / name}" in message and told in message


def test_only_the_test_rows_need_references_and_hidden_files_are_no_data(tmp_path):
    write(tmp_path / "train.jsonl", [point(i) for i in range(4)])
    write(tmp_path / "test.jsonl", [point(i, references=[" Yes."] * i) for i in range(4)])
    write(tmp_path / ".cache" / "train.jsonl", [])
    (tmp_path / ".train.jsonl.swp").write_bytes(b"\0")
    assert [len(r["references"]) for r in load(tmp_path)[1]] == [0, 1, 2, 3]


def test_evaluation_takes_a_test_split_alone(run, tmp_path):
    write(tmp_path / "test.jsonl", [point(i, i % 2) for i in range(4)])
    assert run("--eval-only", "--data", tmp_path)[0]["eval"]["reward_auc"] == 0.5


def mutated(text, rng):
    """The bytes of a .jsonl file, damaged in one to four ways."""
    data = text.encode()
    for _ in range(rng.randrange(1, 5)):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        lines = data.split(b"\n")
        k = rng.randrange(len(lines))
        way = rng.randrange(5)
        if way == 0 and i < len(data):  # a bit flipped
            data = data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:]
        elif way == 1:  # a line cut
            data = b"\n".join([*lines[:k], lines[k][:rng.randrange(len(lines[k]) + 1)], *lines[k + 1:]])
        elif way == 2:  # some bytes gone
            data = data[:i] + data[min(j, i + 50):]
        elif way == 3:  # odd bytes put in
            odd = ["NaN", "1e999", "9" * 30, "null", "\0", "\ufeff", "\ud800", "\u202e", "\u2028", "{", "]", '"', "\r", "\n\n"]
            data = data[:i] + rng.choice(odd).encode("utf-8", "surrogatepass") + data[i:]
        else:  # a value of another type, a column renamed or gone
            try:
                row = json.loads(lines[k])
                name = rng.choice(list(row))
                odd = [None, 3, -1, 0.5, 1e300, 10**30, "", "x", [], ["x"], {}, {"role": "user"}, [{"role": "user"}], math.nan,
                       "2020-01-01", "\ud800", 99999 * "x"]
                row[name + rng.choice(["", "", "s"])] = rng.choice([row.pop(name), *odd])
                data = b"\n".join([*lines[:k], json.dumps(row).encode(), *lines[k + 1:]])
            except (ValueError, IndexError, AttributeError):
                pass
    return data


@pytest.mark.parametrize("kind", ["pointwise", "pair", "conversation", "graded"])
def test_of_a_mutated_file_every_row_is_read_or_a_line_is_named(tmp_path, capsys, kind):
    """1,000 files in all; FUZZ=2500 python -m pytest -k mutated for ten thousand."""
    make = {"pointwise": lambda i: point(i, i % 2, references=["é", "😀"] * (i % 2)),
            "pair": lambda i: {"chosen": f"Human: {i}\n\nAssistant: Yes", "rejected": f"Human: {i}\n\nAssistant: No"},
            "conversation": lambda i: {"prompt": [message("user", f"Hi {i}")], "label": bool(i % 2),
                                       "completion": [message("assistant", "Hello")]},
            "graded": lambda i: {"prompt": f"Question {i}?", "response": f" Answer {i}.", "score": i / 9}}[kind]
    text, tokenizer = "".join(json.dumps(make(i), ensure_ascii=False) + "\n" for i in range(9)), chat_tokenizer()
    for seed in range(int(os.environ.get("FUZZ", 250))):
        path, data = tmp_path / "rows.jsonl", mutated(text, random.Random(f"{kind} {seed}"))
        path.write_bytes(data)
        try:
            rows = [row for part in load(path, tokenizer, continuous=kind == "graded") for row in part]
        except SystemExit as stop:
            lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
            assert stop.code == 2 and len(lines) == 1 and str(path) in lines[0], (seed, lines)
        else:
            written = [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
            assert len(rows) == len(written) * (2 if kind == "pair" else 1), seed
            if kind in ("pointwise", "graded"):
                expected = [(r["prompt"], r.get("completion", r.get("response")), round(r.get("label", r.get("score")), 6))
                            for r in written]
                assert sorted((r["prompt"], r["completion"], round(r["label"], 6)) for r in rows) == sorted(expected), seed


def test_a_transcript_without_an_assistant_turn_is_named(tmp_path, capsys):
    rows = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "Hi"}]
    assert "line 1" in error_of(capsys, load, write(tmp_path / "rows.jsonl", rows))


def test_batches_hold_every_row_once_an_epoch_in_an_order_of_the_seeds_and_alike_in_length():
    rng = random.Random(0)
    examples = [({"id": i, "length": rng.randrange(5, 500)},) for i in range(1003)]
    batches = ulma.bucketed_batches(examples, 8, random.Random(1))
    assert sorted(r["id"] for batch in batches for r, in batch) == list(range(1003))
    assert sorted(map(len, batches)) == [3] + [8] * 125
    again, other = (ulma.bucketed_batches(examples, 8, random.Random(seed)) for seed in (1, 2))
    assert batches == again != other
    padded = sum(len(batch) * max(r["length"] for r, in batch) for batch in batches)
    assert padded < 1.1 * sum(r["length"] for r, in examples)


def test_the_embedded_rows_are_what_their_script_writes_and_no_test_combination_is_trained_on():
    sys.path.insert(0, str(HERE / "data"))
    import make_data
    made = {"train": make_data.train_rows(random.Random(make_data.SEED)),
            "test": make_data.test_rows(random.Random(make_data.SEED + 1), make_data.split()[1])}
    for split, rows in made.items():
        assert (HERE / "data" / f"{split}.jsonl").read_bytes() == make_data.lines(rows).encode()
        assert all(r["label"] == (r["score"] >= 0.8) and (r["score"] == 1) == (r["kind"] == "full") for r in rows)
    assert all((r["completion"] in r["references"]) == r["label"] for r in made["test"])
    train, test = make_data.split()
    assert not any(set(train[verb]) & set(test[verb]) for verb in make_data.VERBS)
    assert {r["demonstrated"] for r in made["train"] if r["label"]} == {True}
    assert {r["type"] for r in made["train"] if not r["label"]} == set(make_data.VERBS)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, and the command line end to end


def test_reward_auc_is_the_share_of_pairs_in_order_with_ties_a_half():
    def auc(scores, labels):
        return concordance(torch.tensor(scores), torch.tensor(labels))

    assert auc([3.0, 2.0, 1.0], [1, 1, 0]) == 1 and auc([1.0, 2.0], [1, 0]) == 0 and auc([1.0, 1.0], [1, 0]) == 0.5
    assert auc([1.0, 3.0, 2.0, 2.0], [1.0, 0.5, 0.5, 0.0]) == (0 + 0 + 0 + 1 + 0.5) / 5  # equal labels are no pair
    assert auc([1.0, 2.0], [1, 1]) is None


@pytest.mark.parametrize("length_normalize, logp", [(False, -6.0), (True, -2.0)])
def test_perplexity_is_a_token_and_of_demonstrations_alone(monkeypatch, length_normalize, logp):
    rows = [{"prompt": "a", "label": label, "length": 5, "prompt_length": 2, "references": []} for label in (1, 0, 0)]
    monkeypatch.setattr(ulma, "score", lambda model, rows, *_: [r.update(logp=logp * r["label"] - 1e-9) for r in rows])
    monkeypatch.setattr(ulma, "generate", lambda model, tokenizer, rows, *_: {r["prompt"]: [""] for r in rows})
    options = ulma.Options(beta=1.0, length_normalize=length_normalize)
    metrics, _ = ulma.evaluate(None, None, rows, options, "test")
    assert metrics == {"perplexity": pytest.approx(math.exp(2)), "reward_auc": 0.5}  # 6 nats over 3 tokens


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a tenth of the embedded data: 24 pairs and 48 thumbs-down to train on, 24 prompts to test on."""
    folder = tmp_path_factory.mktemp("small")
    train, test = ([json.loads(line) for line in (HERE / "data" / f"{split}.jsonl").read_text().splitlines()]
                   for split in ("train", "test"))
    pairs = [r["prompt"] for r in train if r["label"]][:24]
    others = [r for r in train if not r["demonstrated"]][:48]
    write(folder / "train.jsonl", [r for r in train if r["prompt"] in pairs] + others)
    write(folder / "test.jsonl", [r for i in range(0, 480, 20) for r in test[i:i + 2]])
    (folder / "README.md").write_text((HERE / "data" / "README.md").read_text())
    return folder


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """run(flags): the metrics and output folder of a run of a few seconds."""
    def call(*flags):
        out = tmp_path_factory.mktemp("runs") / "out"
        defaults = ("--model", HERE / "data" / "base", "--data", small, "--epochs", 1, "--output-dir", out)
        return ulma.main([*map(str, defaults), *map(str, flags)]), out
    return call


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("flags", [
    ("--method", "ulma"), ("--method", "pointwise-dpo"), ("--method", "sft"), ("--method", "unlikelihood"),
    ("--method", "dpo"), ("--method", "ulma", "--continuous"), ("--method", "pointwise-dpo", "--continuous"),
    ("--method", "ulma", "--length-normalize"),
    ("--log-z", "0", "--gradient-checkpointing", "--gradient-accumulation", "3")],
    ids=" ".join)
def test_every_method_trains_from_end_to_end(run, flags):
    results, out = run(*flags)
    assert json.loads((out / "metrics.json").read_text()) == results
    train = results["train"]
    assert train["samples"] > 0 and train["peak_memory_bytes"] > 2**20 and train["tokens"] > train["samples"]
    for when in ("before", "after"):
        assert results[when]["perplexity"] > 1
        for how in ("sampled", "greedy"):
            groups = results[when]["exact_match"][how]
            assert groups["all"] == pytest.approx((groups["demonstrated"] + groups["undemonstrated"]) / 2)
    assert results["before"]["reward_auc"] == 0.5
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) and line["tokens_per_second"] > 0 for line in log)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 24 and len(samples[0]["before"]["sampled"]) == ulma.SAMPLES
    before, after = weights(HERE / "data" / "base"), weights(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    AutoTokenizer.from_pretrained(out)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(run):
    one, two, other = (weights(run("--seed", seed)[1]) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(run):
    """All 96 rows in one step, at once and as micro-batches of 10 and a last one of 6."""
    start, whole, parts = (torch.cat([w.flatten() for w in weights(folder).values()]) for folder in (
        HERE / "data" / "base", run("--batch-size", 96)[1], run("--batch-size", 10, "--gradient-accumulation", 10)[1]))
    assert (whole - parts).norm() < 0.01 * (whole - start).norm()


def test_batches_of_many_logits_are_split_and_nothing_else_changes(run, monkeypatch):
    start, whole = (torch.cat([w.flatten() for w in weights(folder).values()])
                    for folder in (HERE / "data" / "base", run("--batch-size", 96)[1]))
    monkeypatch.setattr(ulma, "MAX_LOGITS", 768 * 100)
    seen, original = [], ulma.response_logps

    def spy(model, input_ids, attention_mask, response_mask):
        seen.append((len(input_ids), response_mask.sum().item()))
        return original(model, input_ids, attention_mask, response_mask)

    monkeypatch.setattr(ulma, "response_logps", spy)
    parts = torch.cat([w.flatten() for w in weights(run("--batch-size", 96)[1]).values()])
    assert (whole - parts).norm() < 0.01 * (whole - start).norm()
    assert all(rows == 1 or tokens <= 100 for rows, tokens in seen) and max(rows for rows, _ in seen) > 1


def test_reference_log_probabilities_are_computed_once_and_only_for_rows_whose_loss_reads_them(run, monkeypatch):
    seen, original = {}, ulma.score

    def spy(model, rows, options, key, title):
        seen[title] = rows
        return original(model, rows, options, key, title)

    monkeypatch.setattr(ulma, "score", spy)
    for method, positives, negatives in (("ulma", 0, 72), ("pointwise-dpo", 24, 72), ("sft", 0, 0), ("dpo", 24, 24)):
        run("--method", method)
        assert [sum(r["label"] == z for r in seen["reference"]) for z in (1, 0)] == [positives, negatives]


def test_eval_only_gives_a_finished_runs_figures_again(run):
    results, out = run("--learning-rate", 1e-3)
    again, _ = run("--eval-only", "--model", out)
    assert dict(ulma.flatten(again["eval"])) == pytest.approx(dict(ulma.flatten(results["after"])))
    assert again["eval"]["reward_auc"] != 0.5


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_the_rows(run, capsys, monkeypatch):
    monkeypatch.setattr(ulma, "method_loss", lambda logps, *_: logps / 0)
    message = error_of(capsys, run)
    assert "step 1," in message and ", line " in message


def test_a_model_that_the_last_step_broke_is_named_too(run, capsys):
    assert "--learning-rate" in error_of(capsys, run, "--learning-rate", 1e30)


def test_a_finished_run_is_evaluated_from_any_folder_and_a_foreign_record_does_not_matter(run, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    _, out = run("--learning-rate", 1e-3, "--model", "data/base")
    monkeypatch.chdir(tmp_path)
    assert run("--eval-only", "--model", out)[0]["eval"]["reward_auc"] != 0.5
    for record in ("{", "[]", '{"options": "x"}'):
        (out / "metrics.json").write_text(record)
        assert run("--eval-only", "--model", out)[0]["eval"]["reward_auc"] == 0.5


def test_an_output_folder_with_files_in_it_is_never_overwritten(run, tmp_path, capsys):
    write(tmp_path / "kept.jsonl", [point(1)])
    assert str(tmp_path) in error_of(capsys, run, "--output-dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]


@pytest.mark.parametrize("flags, told", [
    (("--beta", "0"), "--beta"), (("--max-length", "1"), "--max-length"), (("--max-length", "4096"), "1024"),
    (("--log-z", "much"), "--log-z"), (("--log-z", "nan"), "--log-z"), (("--data", "nowhere"), "nowhere"),
    (("--model", "nowhere"), "nowhere"), (("--methd", "sft"), "--methd"),
    (("--method", "sft", "--log-z", "1"), "leave it out"), (("--eval-only", "--save-steps", "9"), "--save-steps"),
    (("--data", __file__), ".jsonl"),
    (("--data", HERE / "data" / "train.jsonl", "--data-dir", "x"), "--data-dir"), (("--data-dir", "x"), "any data files"),
    (("--resume", "runs/none"), "leave out the others"), (("--output-dir", f"{__file__}/x"), "--output-dir")])
def test_a_mistake_on_the_command_line_gets_one_clear_line(run, capsys, flags, told):
    assert told in error_of(capsys, run, *flags)


@pytest.mark.parametrize("method, label, told", [
    ("ulma", 1, "positives and negatives"), ("pointwise-dpo", 0, "positives and negatives"), ("sft", 0, "rows of label 1"),
    ("dpo", 1, "a positive and a negative")])
def test_labels_that_a_method_cannot_learn_from_are_refused(run, tmp_path, capsys, method, label, told):
    path = write(tmp_path / "rows.jsonl", [point(i, label) for i in range(9)])
    assert told in error_of(capsys, run, "--method", method, "--data", path)


def test_a_hub_name_that_cannot_be_reached_is_told_at_once(tmp_path):
    """The hub is a port that nothing listens on; its client alone would retry for most of a minute."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    for flag in ("--model", "--data"):
        done = subprocess.run([sys.executable, "ulma.py", flag, "nobody/nothing", "--output-dir", str(tmp_path / "out")],
                              cwd=HERE, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "nobody/nothing" in done.stderr and "Retrying" not in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_out_of_memory_names_the_options_that_help(run, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(ulma, "method_loss", full)
    message = error_of(capsys, run)
    assert all(option in message for option in ("--batch-size", "--gradient-checkpointing", "--max-length"))


# ---------------------------------------------------------------------------------------------------------------------
# Models of all kinds: small stand-ins in the hub's layout


def stand_in(folder, name="llama", tokenizer=None, dtype=torch.float32, **changes):
    """A folder as from the hub: a random model and its tokenizer."""
    tokenizer = tokenizer or base_tokenizer()
    config = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "n_positions": 128, **changes}
    tiny(name, **{k: v for k, v in config.items() if k != "n_positions" or name == "gpt2"}).to(dtype).save_pretrained(
        folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    return folder


def trains(run, folder):
    """The metrics of a run that ends with other, finite weights in float32, which transformers and --eval-only load."""
    results, out = run("--model", folder, "--max-length", 128, "--learning-rate", 1e-3)
    before, after = weights(folder), weights(out)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32
    again, _ = run("--eval-only", "--model", out, "--max-length", 128)
    assert again["eval"]["perplexity"] == pytest.approx(results["after"]["perplexity"])
    return results


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_in_bfloat16_and_in_shards_tied_or_not_is_trained_in_float32(run, tmp_path, name, tied):
    folder = stand_in(tmp_path / "model", name, dtype=torch.bfloat16, tie_word_embeddings=tied)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    trains(run, folder)


@pytest.mark.parametrize("special", [{}, {"bos_token": "<s>"}, {"bos_token": "<s>", "pad_token": "<pad>"}])
def test_a_tokenizer_without_bos_padding_or_chat_template_will_do(run, tmp_path, special):
    tokenizer = chat_tokenizer(None, **special)
    if not special.get("pad_token"):
        tokenizer.pad_token = None
    trains(run, stand_in(tmp_path / "model", tokenizer=tokenizer))


def test_a_conversation_is_trained_on_from_end_to_end(run, tmp_path):
    rows = [{"prompt": [message("user", f"Hi {i}")], "completion": [message("assistant", f"Bye {i}")], "label": i % 2 == 0}
            for i in range(20)]
    folder = stand_in(tmp_path / "model", tokenizer=chat_tokenizer())
    results, out = run("--model", folder, "--data", write(tmp_path / "rows.jsonl", rows), "--max-length", 128)
    assert results["after"]["perplexity"] > 1 and AutoTokenizer.from_pretrained(out).chat_template == CHATML


def encoder(folder):
    transformers.BertForMaskedLM(transformers.BertConfig(
        initializer_range=0.5, vocab_size=768, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(folder)
    base_tokenizer().save_pretrained(folder)


def encoder_decoder(folder):
    transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=768, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2)).save_pretrained(folder)
    base_tokenizer().save_pretrained(folder)


def without_a_head(folder):
    tiny("llama", vocab_size=768, tie_word_embeddings=False).model.save_pretrained(folder)
    base_tokenizer().save_pretrained(folder)


def without_tokenizer(folder):
    tiny("gpt2", vocab_size=768).save_pretrained(folder)


def pickled(folder):
    stand_in(folder)
    torch.save(tiny("llama", vocab_size=768).state_dict(), folder / "pytorch_model.bin")
    for file in folder.glob("*.safetensors*"):
        file.unlink()


@pytest.mark.parametrize("make, told", [
    (encoder, "decoder-only"), (encoder_decoder, "encoder-decoder"), (without_a_head, "lm_head.weight"),
    (without_tokenizer, "tokenizer"), (pickled, "safetensors"), (lambda folder: folder.mkdir(), "cannot be loaded"),
    (lambda folder: stand_in(folder, vocab_size=99), "768 tokens, its embedding 99")])
def test_a_model_that_ulma_cannot_train_is_refused(run, tmp_path, capsys, make, told):
    make(tmp_path / "model")
    assert told in error_of(capsys, run, "--model", tmp_path / "model", "--max-length", 64)


# ---------------------------------------------------------------------------------------------------------------------
# From the option to the weights, through main alone


def log_sigma(x):
    return torch.nn.functional.logsigmoid(torch.as_tensor(x))


PAPER = {  # the loss of a row, or of a pair (chosen, rejected), by the paper: Δ is log π_θ − log π_ref, c is β log Z
    "ulma": lambda logp, d, z, b, c: -logp if z == 1 else -log_sigma(-(b * d + c)),
    "pointwise-dpo": lambda logp, d, z, b, c: -log_sigma(b * d + c) if z == 1 else -log_sigma(-(b * d + c)),
    "sft": lambda logp, d, z, b, c: -logp,
    "unlikelihood": lambda logp, d, z, b, c: -logp if z == 1 else logp,
    "dpo": lambda chosen, rejected, b: -log_sigma(b * (chosen - rejected)),
    "ulma --continuous": lambda logp, d, z, b, c: -logp if z == 1 else (z - b * d - c) ** 2,
    "pointwise-dpo --continuous": lambda logp, d, z, b, c: (z - b * d - c) ** 2}
RATED = [{"prompt": f"Question {i % 3}?", "completion": f" Answer {i}{' and more' * (i % 4)}.", "label": int(i % 3 == i // 3),
          "score": [0.0, 0.3, 1.0][(i + i // 3) % 3]} for i in range(10)]


@pytest.fixture
def watched(tmp_path, monkeypatch, run):
    """watched(flags): for each step (weights, gradient as main gives it to clip_grad_norm_), the start, log, results."""
    folder = stand_in(tmp_path / "model")
    write(tmp_path / "data" / "train.jsonl", RATED)
    write(tmp_path / "data" / "test.jsonl", [{**r, "references": [r["completion"]]} for r in RATED[:3]])
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def spy(parameters, bound):
        parameters = list(parameters)
        steps.append(([p.detach().clone() for p in parameters], torch.cat([p.grad.flatten() for p in parameters])))
        return clip(parameters, bound)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)

    def call(*flags):
        results, out = run("--model", folder, "--data", tmp_path / "data", "--max-length", 64, "--epochs", 3,
                           "--learning-rate", 3e-3, "--batch-size", 4, "--gradient-accumulation", 3, "--beta", 0.7, *flags)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return steps, AutoModelForCausalLM.from_pretrained(folder), log, results
    return call


def naive_logp(model, row):
    """log π(y|x), term by term, of one row without padding."""
    prompt, tokenizer = base_tokenizer()(row["prompt"]).input_ids, base_tokenizer()
    ids = torch.tensor(prompt + tokenizer(row["completion"]).input_ids + [tokenizer.eos_token_id])
    logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return sum(logps[t - 1, ids[t]] for t in range(len(prompt), len(ids)))


def naive_loss(method, model, reference, beta=0.7):
    """The mean of the paper's loss over all of RATED, and the mean rewards of positives and of negatives."""
    label = "score" if "continuous" in method else "label"
    logps = [naive_logp(model, row) for row in RATED]
    deltas = [logp - naive_logp(reference, row).item() for logp, row in zip(logps, RATED)]
    mean_label = sum(row[label] for row in RATED) / len(RATED)
    c = mean_label if "continuous" in method else math.log(mean_label / (1 - mean_label))
    if method == "dpo":
        losses = [PAPER[method](deltas[i], deltas[j], beta) for i, w in enumerate(RATED) for j, l in enumerate(RATED)
                  if w["prompt"] == l["prompt"] and w["label"] > l["label"]]
    else:
        losses = [PAPER[method](logp, d, row[label], beta, c) for logp, d, row in zip(logps, deltas, RATED)
                  if method != "sft" or row["label"] == 1]
    rewards = [[(beta * d + c).item() for d, row in zip(deltas, RATED) if row["label"] == z] for z in (1, 0)]
    return sum(losses) / len(losses), [sum(r) / len(r) for r in rewards]


@pytest.mark.parametrize("method", PAPER)
def test_a_steps_gradient_is_that_of_the_mean_of_the_papers_loss(watched, method):
    steps, model, log, _ = watched("--method", *method.split())
    reference, losses = copy.deepcopy(model), []
    assert len(steps) == 3
    for values, gradient in steps:
        for parameter, value in zip(model.parameters(), values):
            parameter.data.copy_(value)
        loss, rewards = naive_loss(method, model, reference)
        losses.append((loss.item(), rewards))
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert (gradient - expected).norm() < 1e-3 * expected.norm()
    assert [line["step"] for line in log] == [3]
    assert log[0]["loss"] == pytest.approx(sum(loss for loss, _ in losses) / 3, rel=1e-4)
    if method in ("ulma", "pointwise-dpo"):
        means = [sum(rewards[i] for _, rewards in losses) / 3 for i in (0, 1)]
        assert log[0]["reward_negative"] == pytest.approx(means[1], rel=1e-3)
        assert log[0]["reward_positive"] == (None if method == "ulma" else pytest.approx(means[0], rel=1e-3))


def test_after_training_rewards_are_still_measured_against_the_initial_model(watched):
    steps, reference, _, results = watched("--method", "pointwise-dpo", "--epochs", 6)
    model = copy.deepcopy(reference)
    model.load_state_dict(weights(Path(results["options"]["output_dir"])))
    assert results["before"]["reward_auc"] == 0.5
    gains = [(naive_logp(model, row) - naive_logp(reference, row)).item() for row in RATED[:3]]
    wins = [gains[i] > gains[j] for i in range(3) for j in range(3) if RATED[i]["label"] > RATED[j]["label"]]
    assert results["after"]["reward_auc"] == sum(wins) / len(wins)


def test_pairwise_dpo_raises_chosen_over_rejected(run):
    assert run("--method", "dpo", "--learning-rate", 1e-3, "--epochs", 3)[0]["after"]["reward_auc"] > 0.6


def test_exact_match_counts_the_completions_that_are_references(run, tmp_path, monkeypatch):
    answers = {"Question 0?": " Yes.", "Question 1?": "Yes. ", "Question 2?": " No."}
    rows = [{"prompt": p, "completion": " Yes.", "label": i % 2, "references": [" Yes.", " Sure."], "demonstrated": i < 2}
            for i, p in enumerate(answers)]

    def generate(model, input_ids, **_):
        prompts = base_tokenizer().batch_decode(input_ids, skip_special_tokens=True)
        texts = [[answers[p.strip()]] * model.generation_config.num_return_sequences for p in prompts]
        added = base_tokenizer()(sum(texts, []), padding=True, return_tensors="pt").input_ids
        return torch.cat([input_ids.repeat_interleave(len(texts[0]), 0), added], 1)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    results, _ = run("--eval-only", "--data", write(tmp_path / "test.jsonl", rows).parent)
    assert dict(ulma.flatten(results["eval"]))["exact_match, sampled, all"] == pytest.approx(2 / 3)
    assert dict(ulma.flatten(results["eval"]))["exact_match, sampled, demonstrated"] == 1
    assert dict(ulma.flatten(results["eval"]))["exact_match, sampled, undemonstrated"] == 0


def test_the_losses_are_those_of_the_authors_code():
    """On negatives −log σ(−βΔ − c), on positives −log σ(βΔ + c) or −log π; c, the constant, is β log Z here."""
    logps, ref_logps, labels = draw()
    c, b = -0.4, 0.3
    delta = (logps - ref_logps).detach()
    negative, positive = -log_sigma(-b * delta - c), -log_sigma(b * delta + c)
    torch.testing.assert_close(pointwise_dpo_loss(logps, ref_logps, labels, b, c / b), torch.where(labels == 1, positive, negative))
    torch.testing.assert_close(ulma_loss(logps, ref_logps, labels, b, c / b), torch.where(labels == 1, -logps, negative))


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions, and several processes


def begin(out, small, *flags, launcher=()):
    """A run of 60 short steps in a process of its own."""
    command = [sys.executable, *launcher, "ulma.py", "--data", small, "--epochs", 5, "--batch-size", 8, "--output-dir", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command), *map(str, flags)], cwd=HERE, stderr=subprocess.PIPE, text=True,
                            stdout=subprocess.DEVNULL, env=environment)


def resume(out, launcher=()):
    done = subprocess.run([sys.executable, *launcher, "ulma.py", "--resume", str(out)], cwd=HERE, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert not list(out.glob("*checkpoint*"))


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The folder of a run that was never killed, with a checkpoint each step."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = begin(out, small, "--save-steps", 1)
    assert process.wait() == 0, process.communicate()
    return out


def same(one, other):
    """Weights bit for bit, and everything else that is no time."""
    figures = [json.loads((out / "metrics.json").read_text()) for out in (one, other)]
    mine, yours = weights(one), weights(other)
    return (all(torch.equal(mine[name], yours[name]) for name in mine) and losses(one) == losses(other)
            and all(figures[0][when] == figures[1][when] for when in ("before", "after")))


def test_a_run_killed_at_any_moment_and_resumed_ends_as_one_that_was_never_killed(small, whole, tmp_path):
    """KILLS=20 python -m pytest -s -k killed_at_any: so many kills, each at a random moment; three if not told."""
    rng, kills = random.Random(os.environ.get("KILLS")), 0
    while kills < int(os.environ.get("KILLS", 3)):
        out = tmp_path / f"run-{kills}"
        process = begin(out, small, "--save-steps", 1)
        wait_for((out / "metrics.json").exists, process)
        time.sleep(rng.uniform(0, 8))
        process.kill()
        process.communicate()
        if "after" in json.loads((out / "metrics.json").read_text()):  # it had finished
            shutil.rmtree(out)
            continue
        kills += 1
        print(f"kill {kills}:", sorted(f"{path.name} with {len(list(path.iterdir()))} file" for path in out.glob("*checkpoint*")))
        resume(out)
        assert same(out, whole)


def test_ctrl_c_saves_and_says_how_to_go_on(small, whole, tmp_path):
    process = begin(tmp_path / "out", small, "--save-steps", 1)
    wait_for(lambda: (tmp_path / "out" / "log.jsonl").exists() and len(losses(tmp_path / "out")) > 1, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == f"ulma.py: interrupted; to go on: python ulma.py --resume {tmp_path / 'out'}"
    resume(tmp_path / "out")
    assert all(torch.equal(value, weights(tmp_path / "out")[name]) for name, value in weights(whole).items())


@pytest.fixture
def stopped(run, monkeypatch, capsys):
    """The folder of a run whose disk is full at the third checkpoint, after step 3."""
    save, calls = torch.save, []

    def full(state, file):
        calls.append(save(state, file))
        if len(calls) == 3:
            file.truncate(99)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    out = Path(tempfile.mkdtemp()) / "out"
    message = error_of(capsys, run, "--save-steps", 1, "--output-dir", out)
    assert message.endswith(f"No space left on device; to go on: python ulma.py --resume {out}")
    monkeypatch.undo()
    yield out
    shutil.rmtree(out.parent)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_how_to_go_on(stopped, run):
    assert [path.name for path in stopped.glob("*checkpoint*")] == ["checkpoint-2"]
    ulma.main(["--resume", str(stopped)])
    never = weights(run()[1])
    assert all(torch.equal(value, never[name]) for name, value in weights(stopped).items())


def test_a_checkpoint_is_never_overwritten_by_a_model_that_broke(run, capsys, monkeypatch, tmp_path):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(parameters, bound):
        calls.append(0)
        return clip(parameters, bound) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    message = error_of(capsys, run, "--save-steps", 2, "--output-dir", tmp_path / "out")
    assert "step 4, the gradient" in message
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-2"]


def test_a_half_written_checkpoint_is_never_taken_for_a_whole_one(stopped):
    (stopped / "partial-checkpoint").mkdir()
    (stopped / "partial-checkpoint" / "0.pt").write_bytes(b"half")
    (stopped / "checkpoint-2-backup").mkdir()
    assert ulma.load_checkpoint(stopped, torch.load(stopped / "checkpoint-2" / "0.pt", weights_only=True)["rows"])["step"] == 2


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_checkpoint_that_would_run_code_is_refused(stopped, capsys, tmp_path, monkeypatch):
    torch.save({"step": Harmful()}, stopped / "checkpoint-2" / "0.pt")
    monkeypatch.chdir(tmp_path)
    assert "cannot be read" in error_of(capsys, ulma.load_checkpoint, stopped, 0)
    assert not Path("harm").exists()


def test_what_cannot_be_resumed_is_told(stopped, run, capsys, monkeypatch):
    assert "leave out the others" in error_of(capsys, ulma.main, ["--resume", str(stopped), "--beta", "1"])
    assert "no run that has begun" in error_of(capsys, ulma.main, ["--resume", str(stopped.parent)])
    assert "finished" in error_of(capsys, ulma.main, ["--resume", str(run()[1])])
    record = json.loads((stopped / "metrics.json").read_text())
    (stopped / "metrics.json").write_text(json.dumps({"options": {**record["options"], "data": str(HERE / "data")}}))
    assert "other rows" in error_of(capsys, ulma.main, ["--resume", str(stopped)])
    monkeypatch.setattr(ulma, "PROCESSES", 2)
    assert "is of 1 processes, not 2" in error_of(capsys, ulma.load_checkpoint, stopped, 0)


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
several = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 on the CPU is newer")


@several
@pytest.mark.parametrize("flags", [
    ("--length-normalize",), ("--method", "dpo", "--gradient-accumulation", "2", "--gradient-checkpointing")], ids=" ".join)
def test_two_processes_give_the_losses_and_weights_of_one_with_the_same_global_batch(small, tmp_path, flags):
    """97 rows in batches of 2 x 8: the last one holds one row, and one process nothing; of 25 pairs the same.

    Gradients of mean log-probabilities are small: no clipping hides their size.
    """
    data = tmp_path / "data"
    shutil.copytree(small, data)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    write(data / "train.jsonl", [*rows, {**next(r for r in rows if r["demonstrated"] and not r["label"]), "completion": " No."}])
    one, two = tmp_path / "one", tmp_path / "two"
    alone, pair = begin(one, data, "--batch-size", 16, *flags), begin(two, data, *flags, launcher=TORCHRUN)
    assert alone.wait() == 0, alone.communicate()
    _, error = pair.communicate()
    assert pair.returncode == 0, error
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    start, single, double = (torch.cat([w.flatten() for w in weights(folder).values()])
                             for folder in (HERE / "data" / "base", one, two))
    assert (single - double).norm() < 1e-3 * (single - start).norm()
    assert error.count("train: ") and error.count("before: log-probs:   0%") <= 1  # one process alone speaks
    results = [json.loads((out / "metrics.json").read_text()) for out in (one, two)]
    for when in ("before", "after"):
        assert results[0][when]["perplexity"] == pytest.approx(results[1][when]["perplexity"], rel=1e-4)
        assert results[0][when]["exact_match"]["greedy"] == results[1][when]["exact_match"]["greedy"]
    assert results[0]["train"]["tokens"] == results[1]["train"]["tokens"]
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())


@several
def test_two_processes_killed_and_resumed_end_as_if_never_killed(small, tmp_path):
    never, out = tmp_path / "never", tmp_path / "out"
    whole = begin(never, small, "--save-steps", 3, launcher=TORCHRUN)
    process = begin(out, small, "--save-steps", 3, launcher=TORCHRUN)
    wait_for(lambda: list(out.glob("checkpoint-*")), process)
    for command in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's children outlive it
        if str(out).encode() in command.read_bytes():
            os.kill(int(command.parent.name), signal.SIGKILL)
    process.communicate()
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    resume(out, TORCHRUN)
    assert same(out, never)


def test_nothing_unsafe():
    source = (HERE / "ulma.py").read_text()
    assert "trust_remote_code" not in source and source.count("torch.load(") == source.count("weights_only=True") == 1
    assert source.count("AutoModelForCausalLM.from_pretrained(") == source.count("use_safetensors=True") == 1


def test_the_readmes_command_aligns_the_embedded_model(tmp_path):
    command = [sys.executable, "ulma.py", "--method", "ulma", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    before, after = (results[when]["exact_match"]["sampled"] for when in ("before", "after"))
    assert 0.20 < before["all"] < 0.45 and after["all"] >= 0.80
    assert after["undemonstrated"] > before["undemonstrated"] + 0.3
    assert results["after"]["reward_auc"] > 0.95 and results["after"]["perplexity"] < results["before"]["perplexity"]
    assert "exact_match" in done.stdout and "saved to" in done.stdout
