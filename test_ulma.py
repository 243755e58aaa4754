"""ULMA's claims, one a test: the losses against the paper's equations, then what carries them, in ulma.py's order."""
import contextlib, copy, itertools, json, math, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: a name that is no folder fails at once
import datasets
import tokenizers
import torch
import transformers
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

import ulma
sys.path.insert(0, str(Path(ulma.__file__).parent / "data"))
import make_data
from ulma import (concordance, dpo_loss, implicit_reward, pointwise_dpo_loss, prior_log_z, response_logps, sft_loss,
                  ulma_loss, unlikelihood_loss)

HERE = Path(ulma.__file__).parent
TOKENIZER = AutoTokenizer.from_pretrained(HERE / "data" / "base")
LOSSES = {"pointwise-dpo": pointwise_dpo_loss, "ulma": ulma_loss}

def draw(n=64, seed=0):
    """Random log π_θ, log π_ref and labels 0/1: (n,), float64."""
    generator = torch.Generator().manual_seed(seed)
    logps, ref_logps = -8 * torch.rand(2, n, generator=generator, dtype=torch.float64)
    return logps.requires_grad_(), ref_logps, torch.randint(0, 2, (n,), generator=generator)

def sigma(x):
    return 1 / (1 + math.exp(-x))

def grad(loss, logps):
    return torch.autograd.grad(loss.sum(), logps)[0].tolist()

# ---- The equations, their gradients and the paper's claims ----------------------------------------------------------
def test_the_reward_is_beta_times_log_ratio_plus_log_z():
    assert implicit_reward(torch.tensor(-2.0), torch.tensor(-5.0), beta=0.5, log_z=1.0).item() == 2.0  # ½ (−2 + 5 + 1)
    logps, ref_logps, _ = draw(4)
    for log_z in (torch.full((4,), -1.7), torch.tensor([0.0, 1.0, -2.0, 3.0])):  # a constant, or one a row
        expected = [0.3 * (a - b + c) for a, b, c in zip(logps.tolist(), ref_logps.tolist(), log_z.tolist())]
        assert implicit_reward(logps, ref_logps, 0.3, log_z).tolist() == pytest.approx(expected)

@pytest.mark.parametrize("beta, log_z", [(0.1, 0.0), (0.5, 2.0), (1.0, -3.0)])
def test_every_loss_is_its_equation(beta, log_z):
    logps, ref_logps, labels = draw()
    graded = torch.rand(64, dtype=torch.float64).where(labels == 0, 1.0)
    for i in range(len(logps)):
        logp, ref_logp, z, score = logps[i].item(), ref_logps[i].item(), labels[i].item(), graded[i].item()
        r = beta * (math.log(math.exp(logp) / math.exp(ref_logp)) + log_z)
        binary = -(z * math.log(sigma(r)) + (1 - z) * math.log(1 - sigma(r)))
        squared = -logp if score == 1 else (score - r) ** 2
        at = (logps[i], ref_logps[i])
        assert sft_loss(logps[i]).item() == pytest.approx(-logp)
        assert pointwise_dpo_loss(*at, labels[i], beta, log_z).item() == pytest.approx(binary)
        assert pointwise_dpo_loss(*at, graded[i], beta, log_z, True).item() == pytest.approx((score - r) ** 2)
        assert ulma_loss(*at, labels[i], beta, log_z).item() == pytest.approx(z * -logp + (1 - z) * binary)
        assert ulma_loss(*at, graded[i], beta, log_z, continuous=True).item() == pytest.approx(squared)
        assert unlikelihood_loss(logps[i], labels[i]).item() == pytest.approx(-logp if z else logp)

def test_pairwise_dpo_is_its_equation_and_gradient_and_log_z_cancels():
    (logps_w, ref_w, _), (logps_l, ref_l, _) = draw(seed=1), draw(seed=2)
    loss = dpo_loss(logps_w, logps_l, ref_w, ref_l, 0.3)
    gaps = (implicit_reward(logps_w, ref_w, 0.3, 7.0) - implicit_reward(logps_l, ref_l, 0.3, 7.0)).tolist()
    assert loss.tolist() == pytest.approx([-math.log(sigma(gap)) for gap in gaps])
    gradients = torch.autograd.grad(loss.sum(), (logps_w, logps_l))  # −β σ(r_l − r_w) (∇_w − ∇_l)
    assert gradients[0].tolist() == pytest.approx([-0.3 * sigma(-gap) for gap in gaps])
    assert gradients[1].tolist() == pytest.approx([0.3 * sigma(-gap) for gap in gaps])

def test_the_losses_are_those_of_the_authors_code():
    """On negatives −log σ(−βΔ − c), on positives −log σ(βΔ + c) or −log π; their constant c is β log Z here."""
    logps, ref_logps, labels = draw()
    delta, b, c = (logps - ref_logps).detach(), 0.3, -0.4
    negative, positive = -logsigmoid(-b * delta - c), -logsigmoid(b * delta + c)
    pointwise, ulma_ = (loss(logps, ref_logps, labels, b, c / b) for loss in LOSSES.values())
    torch.testing.assert_close(pointwise, torch.where(labels == 1, positive, negative))
    torch.testing.assert_close(ulma_, torch.where(labels == 1, -logps, negative))

@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("loss", LOSSES.values())
def test_losses_are_unreduced_for_labels_of_any_type_and_any_shape(loss, continuous):
    logps, ref_logps, labels = draw()
    expected = loss(logps, ref_logps, labels, 0.1, 0.0, continuous)  # the defaults
    for kind, shape in itertools.product((torch.bool, torch.int64, torch.float32), ((64,), (8, 8))):
        value = loss(logps.view(shape), ref_logps.view(shape), labels.to(kind).view(shape), continuous=continuous)
        assert torch.equal(value, expected.view(shape))

def test_the_gradients_are_the_papers():
    """SFT −1; binary −β (z − σ(r)); continuous −2β (z − r); ULMA follows demonstrations without that brake."""
    logps, ref_logps, labels = draw()
    scores = torch.rand(64, dtype=torch.float64)
    rewards = [0.3 * (a - b + 0.5) for a, b in zip(logps.tolist(), ref_logps.tolist())]
    binary = [-0.3 * (1 - sigma(r)) if z else 0.3 * sigma(r) for r, z in zip(rewards, labels.tolist())]
    squared = [-2 * 0.3 * (z - r) for z, r in zip(scores.tolist(), rewards)]
    assert grad(sft_loss(logps), logps) == [-1.0] * 64
    assert grad(pointwise_dpo_loss(logps, ref_logps, labels, 0.3, 0.5), logps) == pytest.approx(binary)
    assert grad(pointwise_dpo_loss(logps, ref_logps, scores, 0.3, 0.5, True), logps) == pytest.approx(squared)
    unbraked = [-1.0 if z else g for z, g in zip(labels.tolist(), binary)]
    assert grad(ulma_loss(logps, ref_logps, labels, 0.3, 0.5), logps) == pytest.approx(unbraked)

@pytest.mark.parametrize("loss", LOSSES.values())
def test_gradients_stay_finite_for_log_ratios_of_ten_thousand(loss):
    for dtype, ratio, continuous in itertools.product((torch.float32, torch.bfloat16), (-1e4, 1e4), (False, True)):
        logps = torch.full((2,), ratio, dtype=dtype, requires_grad=True)
        value = loss(logps, torch.zeros(2, dtype=dtype), torch.tensor([0, 1]), 1.0, continuous=continuous)
        assert value.isfinite().all() and torch.tensor(grad(value, logps)).isfinite().all()

@pytest.mark.parametrize("continuous", [False, True])
def test_ulma_reads_no_reference_of_demonstrations_and_mixes_nothing_in_between(continuous):
    logps, ref_logps, _ = draw()
    assert torch.equal(ulma_loss(logps, torch.zeros(64), torch.ones(64), 0.2, 1.0, continuous), sft_loss(logps))
    nearly = torch.full((64,), 0.999)
    preference = pointwise_dpo_loss(logps, ref_logps, nearly, 0.2, 1.0, continuous)
    assert torch.equal(ulma_loss(logps, ref_logps, nearly, 0.2, 1.0, continuous), preference)

@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_prior_log_z_zeroes_the_mean_coefficient_at_the_start(continuous, share):
    labels = (torch.arange(60) < 60 * share).double()
    prior = prior_log_z(labels.mean().item(), 0.3, continuous)
    for log_z, balanced in ((prior, True), (0.0, share == 0.5 and not continuous)):  # on balanced ones it is 0
        logps = torch.zeros(60, dtype=torch.float64, requires_grad=True)  # π_θ = π_ref
        pull = sum(grad(pointwise_dpo_loss(logps, torch.zeros(60), labels, 0.3, log_z, continuous), logps))
        assert (abs(pull) < 1e-9) is balanced

@pytest.mark.parametrize("continuous", [False, True])
def test_the_optimum_of_alignment_is_recovered_with_the_true_log_z(continuous, beta=0.5):
    """π* = π_ref exp(r/β) / Z over six responses against the minimum of the exact expected loss, float64."""
    ref = torch.tensor([0.30, 0.25, 0.20, 0.12, 0.08, 0.05], dtype=torch.float64)
    reward = torch.tensor([-1.0, 0.5, 1.5, -0.3, 0.9, 2.0], dtype=torch.float64)
    z = (ref * (reward / beta).exp()).sum()
    for log_z, recovered in ((z.log(), True), (0.0, False)):
        logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0,
                                   line_search_fn="strong_wolfe")
        def expected_loss():  # over responses from π_ref, and over labels: z ~ Bernoulli(σ(r)), or z = r + noise
            solver.zero_grad()
            logps = logits.log_softmax(0)
            good, bad = (pointwise_dpo_loss(logps, ref.log(), torch.full((6,), y), beta, log_z) for y in (1, 0))
            loss = reward.sigmoid() * good + (1 - reward.sigmoid()) * bad
            if continuous:
                loss = pointwise_dpo_loss(logps, ref.log(), reward, beta, log_z, True)
            (ref * loss).sum().backward()
            return (ref * loss).sum()
        solver.step(expected_loss)
        distance = (logits.softmax(0) - ref * (reward / beta).exp() / z).abs().max()
        assert distance < 1e-6 if recovered else distance > 0.05

# ---- Log-probabilities ----------------------------------------------------------------------------------------------
TINY = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ARCHITECTURES = {  # several of these scale or cap their logits, in ways that change the result
    "gpt2": dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
    "llama": TINY, "qwen3": TINY, "gemma2": {**TINY, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {**TINY, "logit_scale": 0.25}, "granite": {**TINY, "logits_scaling": 3.0}}

def tiny(name, **changes):
    """A random model of a few thousand weights, with logits far from uniform."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**ARCHITECTURES.get(name, {}), **changes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 20
    return model

def batch():
    """input_ids and response_mask, padded on the right, and the unpadded (prompt, response) rows."""
    rows = [([9, 3, 44, 7, 30], [12, 8, 60, 5]), ([17], [33, 4, 21, 50, 6, 11]), ([40, 25, 3], [58]), ([5, 6, 7, 8, 9, 10, 11], [])]
    padded = [p + r + [0] * (9 - len(p + r)) for p, r in rows]
    masks = [[0] * len(p) + [1] * len(r) + [0] * (9 - len(p + r)) for p, r in rows]
    return torch.tensor(padded), torch.tensor(masks), rows

def token_by_token(model, rows):
    """Σ log π(y_t | x, y_<t), each term from a forward pass of its own over an unpadded prefix."""
    def term(prefix, token):
        return model(input_ids=torch.tensor([prefix])).logits[0, -1].log_softmax(-1)[token]
    return torch.stack([sum((term(p + r[:t], r[t]) for t in range(len(r))), torch.zeros(())) for p, r in rows])

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_response_logps_is_the_sum_over_response_tokens_alone(name):
    model = tiny(name)
    input_ids, response_mask, rows = batch()
    expected, actual = token_by_token(model, rows), response_logps(model, input_ids, response_mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.dtype == torch.float32 and actual[3] == 0  # the last row has no response
    gradients = (torch.autograd.grad(total.sum(), list(model.parameters())) for total in (actual, expected))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    noise = torch.where(torch.arange(input_ids.shape[1]) < torch.tensor([[9], [7], [4], [7]]), input_ids, 7)
    assert torch.equal(actual, response_logps(model, noise, response_mask.bool()))  # padding may hold anything

def test_the_output_head_never_sees_a_prompt_or_padding_position():
    model, seen = tiny("qwen3"), []
    input_ids, response_mask, _ = batch()
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    response_logps(model, input_ids, response_mask)
    assert seen == [response_mask.sum()]
    assert model(input_ids=input_ids).logits.shape[:2] == input_ids.shape  # and afterwards the model is as it was

# ---- Rows for the tests below ---------------------------------------------------------------------------------------
def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

def point(i, label=1, **more):
    return {"prompt": f"Question {i}?", "completion": f" Answer {i}.", "label": label, **more}

def stand_in(folder, name="llama", tokenizer=None, dtype=torch.float32, **changes):
    """A folder as from the hub: a random model and its tokenizer."""
    tokenizer = tokenizer or TOKENIZER
    tiny(name, **{"vocab_size": len(tokenizer), **changes}).to(dtype).save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder

def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()

def flat(state):
    return torch.cat([value.flatten() for value in state.values()])

RATED = [{"prompt": f"Question {i % 3}?", "completion": f" Answer {i}{' and more' * (i % 4)}.", "label": int(i % 3 == i // 3),
          "score": [0.0, 0.3, 1.0][(i + i // 3) % 3]} for i in range(10)]

@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A tiny model; ten rated rows to train on, three with references to test on."""
    folder = tmp_path_factory.mktemp("small")
    stand_in(folder / "model")
    write(folder / "data" / "train.jsonl", RATED)
    write(folder / "data" / "test.jsonl", [{**row, "references": [row["completion"]], "group": "abc"[i]}
                                           for i, row in enumerate(RATED[:3])])
    return folder

@pytest.fixture(scope="session")
def run(small, tmp_path_factory):
    """run(flags): the metrics and the output folder of a run of a second."""
    def call(*flags):
        out = tmp_path_factory.mktemp("runs") / "out"
        defaults = ("--model", small / "model", "--data", small / "data", "--max-length", 64, "--epochs", 2,
                    "--learning-rate", 3e-3, "--batch-size", 4, "--beta", 0.7, "--output-dir", out)
        return ulma.main([*map(str, defaults), *map(str, flags)]), out
    return call

@pytest.fixture(scope="session")
def finished(run):
    return run("--method", "pointwise-dpo", "--gradient-checkpointing", "--epochs", 8)

def error_of(capsys, call, *flags):
    """The one line that a user's mistake gets."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if "ulma.py: " in line]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]

# ---- From the option to the weights, through main alone -------------------------------------------------------------
PAPER = {  # the loss of a row, or of a pair, by the paper: d is log π_θ − log π_ref, c is β log Z
    "ulma": lambda logp, d, z, b, c: -logp if z == 1 else -logsigmoid(-(b * d + c)),
    "pointwise-dpo": lambda logp, d, z, b, c: -logsigmoid(b * d + c) if z == 1 else -logsigmoid(-(b * d + c)),
    "sft": lambda logp, d, z, b, c: -logp,
    "unlikelihood": lambda logp, d, z, b, c: -logp if z == 1 else logp,
    "dpo": lambda chosen, rejected, b: -logsigmoid(b * (chosen - rejected)),
    "ulma --continuous": lambda logp, d, z, b, c: -logp if z == 1 else (z - b * d - c) ** 2,
    "pointwise-dpo --continuous": lambda logp, d, z, b, c: (z - b * d - c) ** 2}

@pytest.fixture
def watched(monkeypatch, run):
    """watched(flags): for each step (weights, the gradient as main gives it to clip_grad_norm_), the log, results."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []
    def spy(parameters, bound):
        parameters = list(parameters)
        steps.append(([p.detach().clone() for p in parameters], torch.cat([p.grad.flatten() for p in parameters])))
        return clip(parameters, bound)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    def call(*flags):
        results, out = run("--epochs", 3, "--gradient-accumulation", 3, *flags)
        return steps, read(out / "log.jsonl"), results
    return call

def naive_logp(model, row):
    """log π(y|x) of one row without padding, or of the tokens at row["rated"] of y."""
    prompt = TOKENIZER(row["prompt"]).input_ids
    ids = torch.tensor(prompt + TOKENIZER(row["completion"]).input_ids + [TOKENIZER.eos_token_id])
    logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return sum(logps[t - 1, ids[t]] for t in range(len(prompt), len(ids)) if t - len(prompt) in row.get("rated", range(len(ids))))

def naive_loss(method, model, reference, rows=RATED, beta=0.7):
    """The mean of the paper's loss over all rows, and the mean rewards of positives and of negatives."""
    label = "score" if "continuous" in method else "label"
    logps = [naive_logp(model, row) for row in rows]
    deltas = [logp - naive_logp(reference, row).item() for logp, row in zip(logps, rows)]
    mean_label = sum(row[label] for row in rows) / len(rows)
    c = mean_label if "continuous" in method else math.log(mean_label / (1 - mean_label))
    if method == "dpo":
        losses = [PAPER[method](deltas[i], deltas[j], beta) for i, w in enumerate(rows) for j, l in enumerate(rows)
                  if w["prompt"] == l["prompt"] and w["label"] > l["label"]]
    else:
        losses = [PAPER[method](logp, d, row[label], beta, c) for logp, d, row in zip(logps, deltas, rows)
                  if method != "sft" or row["label"] == 1]
    rewards = [[(beta * d + c).item() for d, row in zip(deltas, rows) if row["label"] == z] for z in (1, 0)]
    return sum(losses) / len(losses), [sum(r) / len(r) for r in rewards]

@pytest.mark.parametrize("method", PAPER)
def test_a_steps_gradient_and_log_are_those_of_the_papers_mean_loss(watched, small, method):
    steps, log, _ = watched("--method", *method.split())
    model, losses = AutoModelForCausalLM.from_pretrained(small / "model"), []
    reference, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for done, (values, gradient) in enumerate(steps):
        for parameter, value in zip(model.parameters(), values):
            assert (parameter - value).norm() < 1e-3
            parameter.data.copy_(value)
        loss, rewards = naive_loss(method, model, reference)
        losses.append((loss.item(), rewards))
        optimizer.zero_grad()
        loss.backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert (gradient - expected).norm() < 1e-3 * expected.norm()
        for parameter in model.parameters():
            parameter.grad /= max(expected.norm(), 1)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * done / 3)) / 2
        optimizer.step()
    assert len(steps) == 3 and [line["step"] for line in log] == [3]
    assert log[0]["loss"] == pytest.approx(sum(loss for loss, _ in losses) / 3, rel=1e-4)
    assert log[0]["gradient_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
    if method in ("ulma", "pointwise-dpo"):
        means = [sum(rewards[i] for _, rewards in losses) / 3 for i in (0, 1)]
        assert log[0]["reward_negative"] == pytest.approx(means[1], rel=1e-3)
        assert log[0]["reward_positive"] == (None if method == "ulma" else pytest.approx(means[0], rel=1e-3))

def test_reward_auc_is_against_the_initial_model_or_the_reference(finished, run, small):
    results, out = finished
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, small / "model"))
    gains = [(naive_logp(model, row) - naive_logp(reference, row)).item() for row in RATED[:3]]
    wins = [gains[i] > gains[j] for i in range(3) for j in range(3) if RATED[i]["label"] > RATED[j]["label"]]
    assert results["before"]["reward_auc"] == 0.5 and results["after"]["reward_auc"] == sum(wins) / len(wins)
    [row] = [row for row in RATED[:3] if row["label"]]  # of demonstrations alone, a token:
    nats = -naive_logp(model, row).item() / (len(TOKENIZER(row["completion"]).input_ids) + 1)
    assert results["after"]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    again = run("--eval-only", "--model", out, "--reference", small / "model")[0]["eval"]
    assert again == pytest.approx(results["after"])
    assert run("--eval-only", "--model", out)[0]["eval"]["reward_auc"] is None

def test_a_line_of_the_log_is_the_mean_since_the_last_at_a_cosines_rate(finished, run):
    steps, other = (read(run("--method", "pointwise-dpo", "--epochs", 8, "--save-steps", 1, "--seed", seed)[1] / "log.jsonl")
                    for seed in (0, 1))
    assert steps[0]["loss"] != other[0]["loss"]
    for line, last in zip(read(finished[1] / "log.jsonl"), (0, 10, 20)):
        losses = [step["loss"] for step in steps[last:line["step"]]]
        assert line["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert line["learning_rate"] == pytest.approx(1.5e-3 * (1 + math.cos(math.pi * (line["step"] - 3) / 22)))

def test_with_a_reference_of_its_own_training_starts_elsewhere(watched, finished, small):
    steps, _, results = watched("--method", "pointwise-dpo", "--model", finished[1], "--reference", small / "model")
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (finished[1], small / "model"))
    loss, _ = naive_loss("pointwise-dpo", model, reference)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert (steps[0][1] - expected).norm() < 1e-3 * expected.norm()
    assert results["before"] == pytest.approx(finished[0]["after"])

def test_the_reference_is_read_once_and_for_rows_whose_loss_needs_it(run, monkeypatch):
    seen, original = [], ulma.compute_logps
    monkeypatch.setattr(ulma, "compute_logps", lambda model, rows, options, name: (
        seen.append((name, [row.label for row in rows])), original(model, rows, options, name)))
    for method, positives, negatives in (("ulma", 0, 7), ("pointwise-dpo", 3, 7), ("sft", 0, 0), ("dpo", 7, 7)):
        run("--method", method)
        [labels] = [labels for name, labels in seen if name == "ref_logp"]
        assert [labels.count(z) for z in (1, 0)] == [positives, negatives]
        seen.clear()

@pytest.mark.parametrize("method", ["ulma", "pointwise-dpo", "dpo"])
def test_fine_grained_training_counts_the_edited_tokens_and_evaluation_all(watched, small, tmp_path, monkeypatch, method):
    pairs = [dict(prompt=f"Question {i}?", chosen=chosen, rejected=rejected) for i, (chosen, rejected) in enumerate((
        ("4567", "4967"), ("45", "4589"), ("456", "46")))]  # a digit is a token; from the last nothing is removed
    rows = [dict(pair, completion=pair["chosen"], label=1) for pair in pairs]
    rows += [dict(pair, completion=pair["rejected"], label=0, rated=rated) for pair, rated in zip(pairs, ([1], [2, 3]))]
    shutil.copy(write(tmp_path / "train.jsonl", pairs), tmp_path / "test.jsonl")
    counted = []  # at evaluation, of the rejected responses
    monkeypatch.setattr(ulma, "sample", lambda model, tokenizer, rows, *_: counted.extend(sum(row.rated) for row in rows))
    steps, _, _ = watched("--method", method, "--fine-grained", "--data", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(small / "model")
    loss, _ = naive_loss(method, model, copy.deepcopy(model), rows)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert (steps[0][1] - expected).norm() < 1e-3 * expected.norm() and counted == [5, 5, 3] * 2

def test_bfloat16_stays_near_float32_in_log_probabilities_and_training(run, small):
    options = ulma.Options(bf16=True, max_length=64)
    rough = ulma.load_model(small / "model", options, TOKENIZER)
    exact = ulma.load_model(small / "model", ulma.Options(max_length=64), TOKENIZER)
    rows = [row for record in RATED for row in ulma.parse(record, options, None)]
    ulma.tokenize(rows, TOKENIZER, 64)
    a, b = ulma.batch_logps(rough, rows), ulma.batch_logps(exact, rows)
    assert 0 < (a - b).abs().max() < 0.02 * b.abs().max() and {p.dtype for p in rough.parameters()} == {torch.float32}
    start, one, two = (flat(weights(folder)) for folder in (small / "model", run()[1], run("--bf16")[1]))
    assert 0 < (one - two).norm() < 0.2 * (one - start).norm()

# ---- Data -----------------------------------------------------------------------------------------------------------
def load(data, tokenizer=None, **options):
    return ulma.load_rows(ulma.Options(data=str(data), **options), tokenizer or TOKENIZER)

def texts(rows):
    return [(row.prompt, row.completion, row.label) for row in rows]

PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:"
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CHAT = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello!"), dict(role="user", content="Bye")]

@pytest.mark.parametrize("record", [
    {"prompt": PROMPT, "chosen": " Good.", "rejected": ""}, {"chosen": f"{PROMPT} Good.", "rejected": PROMPT}])
def test_a_pair_becomes_two_pointwise_rows(tmp_path, record):
    _, rows = load(write(tmp_path / "rows.jsonl", [record]))
    assert texts(rows) == [(PROMPT, " Good.", 1), (PROMPT, "", 0)]

def chat_tokenizer(template=CHATML, **special):
    """data/base's tokenizer with a chat template and the special tokens of such models."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "data" / "base")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"], **special})
    tokenizer.chat_template = template
    if "bos_token" in special:
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    return tokenizer

@pytest.mark.parametrize("special, template", [({}, CHATML), ({"bos_token": "<s>"}, "{{ bos_token }}" + CHATML)])
@pytest.mark.parametrize("columns", [
    {"prompt": CHAT, "chosen": [dict(role="assistant", content="Good.")], "rejected": [dict(role="assistant", content="Go.")]},
    {"chosen": [*CHAT, dict(role="assistant", content="Good.")], "rejected": [*CHAT, dict(role="assistant", content="Go.")]}])
def test_a_conversation_goes_through_the_chat_template(tmp_path, columns, special, template):
    tokenizer = chat_tokenizer(template, **special)
    _, rows = load(write(tmp_path / "rows.jsonl", [columns]), tokenizer)
    for row, text in zip(rows, ("Good.<|im_end|>", "Go.<|im_end|>")):
        prompt = ("<s>" * len(special) + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
                  "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(row.input_ids) == prompt + text
        assert tokenizer.decode(row.input_ids[row.rated]) == text
        assert row.prompt_length == (~row.rated).sum()

def test_files_folders_configurations_and_formats_hold_the_same_rows(tmp_path):
    rows = [point(i, i % 2) for i in range(20)]
    write(tmp_path / "file.jsonl", rows)
    for folder in ("one", "two"):
        write(tmp_path / "folder" / folder / "train.jsonl", rows)
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    expected = [texts(part) for part in load(tmp_path / "file.jsonl")]
    assert expected == [texts(part) for part in load(tmp_path / "folder", data_dir="two")]
    assert expected == [texts(part) for part in load(tmp_path / "rows.csv")]
    (tmp_path / "folder" / "README.md").write_text("---\nconfigs:\n- config_name: odd\n  data_files: one/*.jsonl\n---\n")
    assert expected == [texts(part) for part in load(tmp_path / "folder", data_config="odd")]
    write(tmp_path / "folder" / "one" / "train.jsonl", rows[:9])  # an edited file is read anew
    assert len(sum(load(tmp_path / "folder", data_config="odd"), [])) == 9

def test_a_data_set_from_the_hub_is_read_by_name_and_its_rows_named(monkeypatch):
    def hub(path, name, data_dir):
        assert (path, name, data_dir) == ("someone/rows", "graded", None)
        rows = datasets.Dataset.from_list([point(0), point(1, 0), point(2, bad)])
        return datasets.DatasetDict({"train": rows, "test": rows})
    monkeypatch.setattr(datasets, "load_dataset", hub)
    bad = 1
    assert [row.label for row in sum(load("someone/rows", data_config="graded"), [])] == [1, 0, 1] * 2
    bad = 7
    with pytest.raises(ulma.Mistake, match="someone/rows, train row 3: the label is 7"):
        load("someone/rows", data_config="graded")

def test_without_a_test_split_a_seeded_tenth_of_the_prompts_is_held_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", [point(i % 50, label=i % 2) for i in range(200)])
    (train_rows, test_rows), again, other = load(path), load(path), load(path, seed=1)
    train_prompts, test_prompts = ({row.prompt for row in part} for part in (train_rows, test_rows))
    assert len(train_prompts) == 45 and len(test_prompts) == 5 and not train_prompts & test_prompts
    assert texts(again[1]) == texts(test_rows) != texts(other[1])

def words(opens=False, closes=False):
    """A tokenizer to which the word "7" is token 7; <bos> is 1, <eos> 2, and it may open and close texts with them."""
    names = {**{str(i): i for i in range(3, 61)}, "<unk>": 0, "<bos>": 1, "<eos>": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<bos>"] * opens + ["$A"] + ["<eos>"] * closes, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>",
                                                **{"bos_token": "<bos>"} if opens else {})

def tokenized(prompt, completion, tokenizer, max_length):
    row = ulma.Row(prompt, completion, 1.0, [], None)
    ulma.tokenize([row], tokenizer, max_length)
    return row.input_ids[~row.rated].tolist(), row.input_ids[row.rated].tolist()

@pytest.mark.parametrize("max_length, prompt, response", [
    (8, [10, 11, 12, 13], [20, 21, 22, 2]), (7, [11, 12, 13], [20, 21, 22, 2]), (5, [12, 13], [20, 21, 22]),
    (2, [13], [20])])
def test_prompts_lose_their_start_and_completions_their_end(max_length, prompt, response):
    assert tokenized("10 11 12 13 ", "20 21 22", words(), max_length) == (prompt, response)
    with_bos = [1, *prompt[1:]] if len(prompt) < 4 else [1, 11, 12, 13]
    assert tokenized("10 11 12 13 ", "20 21 22", words(opens=True), max_length) == (with_bos, response)

@pytest.mark.parametrize("opens, closes", [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize("prompt", ["10 11 ", "<bos> 10 11 "])
@pytest.mark.parametrize("completion, ids", [("20", [20, 2]), ("20 <eos>", [20, 2]), ("", [2])])
def test_bos_appears_once_and_eos_closes_the_response_alone(opens, closes, prompt, completion, ids):
    bos = [1] * (opens or "bos" in prompt)
    assert tokenized(prompt, completion, words(opens, closes), 9) == ([*bos, 10, 11], ids)

def test_a_token_that_spans_the_boundary_belongs_to_the_response():
    assert tokenized("10 1", "1 20", words(), 9) == ([10], [11, 20, 2])
    with pytest.raises(ulma.Mistake, match="no token of its own"):
        tokenized("1", "1 20", words(), 9)

def test_batches_hold_every_row_once_in_seeded_order_alike_in_length():
    rng = random.Random(0)
    rows = [ulma.Row(str(i), "", 1.0, [], None, input_ids=torch.zeros(rng.randrange(5, 500))) for i in range(1003)]
    batches, again, other = (ulma.bucketed_batches(rows, 8, random.Random(seed)) for seed in (1, 1, 2))
    assert batches == again != other
    assert sorted(int(row.prompt) for batch in batches for row in batch) == list(range(1003))
    assert sorted(map(len, batches)) == [3] + [8] * 125
    padded = sum(len(batch) * max(len(row.input_ids) for row in batch) for batch in batches)
    assert padded < 1.1 * sum(len(row.input_ids) for row in rows)

@pytest.mark.parametrize("rejected, chosen, rated", [
    ("20 31 22", "20 21 22", [31]), ("20 31 22 33", "20 21 22 23", [31, 33]), ("20 31 22", "20 22", [31]),  # replaced, deleted
    ("20 22", "20 21 22", []), ("20 21", "20 21", []),  # inserted, all shared: nothing to push down
    ("31 32", "21 22 23", [31, 32]), ("20 " * 250, "31 " + "20 " * 250, []),  # nothing shared; however often a token comes
    ("20 " * 299 + "23", "31 " + "20 " * 299 + "23", [23])])  # after truncation to 300 tokens
def test_of_a_rejected_response_the_tokens_count_that_the_edit_removed(capsys, rejected, chosen, rated):
    rows = list(ulma.parse({"prompt": "10 11 ", "chosen": chosen, "rejected": rejected}, ulma.Options(), None))
    ulma.tokenize(rows, words(), 302)
    kept = ulma.rate_edits_only([*rows, ulma.Row("", "", 0.0, [], None, rated=torch.tensor([True]))])
    ids, mask = rows[1].input_ids, rows[1].rated
    assert ids[mask].tolist() == rated and sum(rows[0].rated) == len(rows[0].rated) - 2
    assert len(kept) == 2 + bool(rated) and f"{1 - bool(rated)} of 1 rejected left out" in capsys.readouterr().out
    model = tiny("llama")
    gradient, = torch.autograd.grad(response_logps(model, ids[None], mask[None]).sum(), [model.get_input_embeddings().weight])
    reached = ids[:mask.nonzero().max()] if rated else []
    assert {i for i in range(61) if gradient[i].any()} == {*map(int, reached)}  # what those tokens depend on, and no more

def made(folder, *flags):
    """The rows that data/make_data.py writes into the folder."""
    make_data.main(["--rows", str(folder), *flags])
    return {name: read(folder / f"{name}.jsonl") for name in ("train", "test", "edits/train", "edits/test")}

def test_the_embedded_rows_are_what_their_script_writes(tmp_path):
    rows, (train, test) = made(tmp_path), make_data.split()
    for name in rows:
        assert (HERE / "data" / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
    assert all((row["completion"] in row["references"]) == row["label"] for row in rows["test"])
    assert not any(set(train[verb]) & set(test[verb]) for verb in make_data.VERBS)  # no test combination is trained on
    assert {row["group"] for row in rows["train"] if row["label"]} == {"demonstrated"}
    edits, disliked = rows["edits/train"], [(row["prompt"], row["completion"]) for row in rows["train"] if row["label"] == 0]
    assert all((edit["prompt"], edit["rejected"]) in disliked for edit in edits) and len(edits) == 200
    assert all(edit["chosen"].strip() in make_data.acceptable(edit["type"], make_data.noun_of(edit)) for edit in edits)
    assert {[edit["type"] for edit in edits].count(verb) for verb in make_data.VERBS} == {8, 9}  # of every type alike

def test_noise_makes_that_share_of_the_demonstrations_bad_and_nothing_else(tmp_path):
    exact, noisy = made(tmp_path / "exact"), made(tmp_path / "noisy", "--noise", "0.2")
    changed = [(a, b) for a, b in zip(exact.pop("train"), noisy.pop("train")) if a != b]
    assert len(changed) == 32 and noisy == exact  # of 160
    for before, after in changed:
        assert before["label"] == after["label"] == after["score"] == 1 and before["prompt"] == after["prompt"]
        assert after["completion"].strip() not in make_data.acceptable(after["type"], make_data.noun_of(after))
    with pytest.raises(SystemExit):
        make_data.main(["--noise", "0.2"])  # the embedded rows stay exact

# ---- Evaluation -----------------------------------------------------------------------------------------------------
def test_reward_auc_is_the_share_of_pairs_in_order_with_ties_a_half():
    def auc(scores, labels):
        return concordance(torch.tensor(scores), torch.tensor(labels))
    assert auc([3.0, 2.0, 1.0], [1, 1, 0]) == 1 and auc([1.0, 2.0], [1, 0]) == 0 and auc([1.0, 1.0], [1, 0]) == 0.5
    assert auc([1.0, 3.0, 2.0, 2.0], [1.0, 0.5, 0.5, 0.0]) == (0 + 0 + 0 + 1 + 0.5) / 5  # equal labels are no pair
    assert auc([1.0, 2.0], [1, 1]) is None

def test_exact_match_counts_the_completions_that_are_references(run, tmp_path, monkeypatch):
    answers = {"Question 0?": " Yes.", "Question 1?": "Yes. ", "Question 2?": " No."}
    rows = [{"prompt": p, "completion": " Yes.", "label": i % 2, "references": [" Yes.", " Sure."], "group": "ab"[i // 2]}
            for i, p in enumerate(answers)]
    def generate(model, input_ids, num_return_sequences, **_):
        prompts = TOKENIZER.batch_decode(input_ids, skip_special_tokens=True)
        added = TOKENIZER([answers[p.strip()] for p in prompts for _ in range(num_return_sequences)], padding=True)
        return torch.cat([input_ids.repeat_interleave(num_return_sequences, 0), torch.tensor(added.input_ids)], 1)
    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    metrics = run("--eval-only", "--data", write(tmp_path / "test.jsonl", rows).parent)[0]["eval"]
    assert metrics["exact_match"] == pytest.approx(2 / 3)
    assert metrics["exact_match/a"] == 1 and metrics["exact_match/b"] == 0

def test_samples_come_from_the_policy_whatever_the_models_own_defaults(run, small, tmp_path):
    shutil.copytree(small / "model", tmp_path / "model")
    odd = transformers.GenerationConfig(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=9.0, eos_token_id=1)
    odd.save_pretrained(tmp_path / "model")
    plain, odd = ((run("--eval-only", "--model", folder)[1] / "samples.jsonl").read_text()
                  for folder in (small / "model", tmp_path / "model"))
    assert plain == odd and len(set(json.loads(plain.splitlines()[0])["eval"])) == ulma.SAMPLES

# ---- Models, and mistakes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name, rates", [("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
                                         ("llama", {"attention_dropout": 0.5})])
def test_a_model_in_bfloat16_shards_is_trained_in_float32_without_dropout(run, tmp_path, name, rates, tied):
    tokenizer = chat_tokenizer(None)
    tokenizer.pad_token = None
    folder = stand_in(tmp_path / "model", name, tokenizer, torch.bfloat16, tie_word_embeddings=tied, **rates)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    calm = stand_in(tmp_path / "calm", name, tokenizer, torch.bfloat16, tie_word_embeddings=tied, **dict.fromkeys(rates, 0.0))
    (_, out), (_, other) = run("--model", folder), run("--model", calm)
    before, after, twin = weights(folder), weights(out), weights(other)
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    assert all(value.isfinite().all() and torch.equal(value, twin[key]) for key, value in after.items())
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32

def without_a_head(folder):
    tiny("llama", vocab_size=768, tie_word_embeddings=False).model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)

def pickled(folder):
    stand_in(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(tiny("llama", vocab_size=768).state_dict(), folder / "pytorch_model.bin")

@pytest.mark.parametrize("make, told", [
    (lambda folder: stand_in(folder, "bert", hidden_size=32, num_attention_heads=2, max_position_embeddings=99), "decoder-only"),
    (without_a_head, "lm_head.weight"), (pickled, "safetensors"), (Path.mkdir, "tokenizer"),
    (lambda folder: stand_in(folder, vocab_size=99), "fewer embeddings than tokens"),
    (lambda folder: stand_in(folder, max_position_embeddings=32), "it takes 32 tokens")])
def test_a_model_that_cannot_be_trained_is_refused(run, tmp_path, capsys, make, told):
    make(tmp_path / "model")
    assert told in error_of(capsys, run, "--model", tmp_path / "model")

GOOD = json.dumps(point(1))

@pytest.mark.parametrize("flags, told", [
    (("--beta", "0"), "--beta"), (("--max-length", "1"), "--max-length"), (("--log-z", "much"), "--log-z"),
    (("--data", "nowhere"), "nowhere"), (("--model", "nowhere"), "nowhere"), (("--methd", "sft"), "--methd"),
    (("--data", __file__), "test_ulma.py"), (("--data-dir", "x"), "x"), (("--output-dir", f"{__file__}/x"), "x"),
    (("--output-dir", "", "--save-steps", "9"), "--save-steps"), (("--fine-grained",), "needs pairs"), (("--output-dir", HERE), "name a new"),
    *((("--data", text), told) for text, told in (
        (GOOD[:-9], "rows from 0"), (f"{GOOD}\n{GOOD[:-9]}", "row 1"), ("", "is empty"), (GOOD.replace("Answer", "\xe9"), "utf-8"),
        (GOOD.replace("prompt", "promt"), "promt, completion, label; needed are prompt"),
        (f'{GOOD}\n{GOOD.replace(": 1}", ": 2}")}', "train row 2: the label is 2"),
        (GOOD.replace(": 1}", ": 0.5}"), "--continuous"), (GOOD.replace(" Answer 1.", ""), "no completion"),
        (GOOD.replace("Question 1?", ""), "no prompt"), (GOOD.replace('" Answer 1."', "5"), "no completion"),
        (json.dumps(point(1, references="Yes.")), "a list of texts"),
        ('{"chosen": "Hi", "rejected": "\\n\\nAssistant: x"}', "Assistant:"),
        (json.dumps({"prompt": CHAT, "completion": CHAT[1:2], "label": 1}), "chat_template"),
        ("\n".join([GOOD] * 9), "needs rows of label 1")))])
def test_a_mistake_gets_one_line_that_names_it_and_nothing_is_written(run, capsys, tmp_path, flags, told):
    if flags[0] == "--data" and flags[1][:1] in "{":
        (tmp_path / "rows.jsonl").write_text(flags[1], encoding="latin-1")
        flags = ("--data", tmp_path / "rows.jsonl", "--output-dir", tmp_path / "out")
    assert told in error_of(capsys, run, *flags)
    assert not (tmp_path / "out").exists()

def test_a_model_that_breaks_is_told_and_never_replaces_a_checkpoint(run, capsys, monkeypatch, tmp_path):
    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, bound: (
        clip(parameters, bound) * (math.nan if next(calls) == 4 else 1)))
    assert "not finite at step 4" in error_of(capsys, run, "--save-steps", 2, "--output-dir", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert "--learning-rate" in error_of(capsys, run, "--learning-rate", 1e30)

def test_ctrl_c_and_a_full_memory_are_told_in_one_line(run, capsys, monkeypatch):
    for error, told in ((KeyboardInterrupt, "the same command"), (torch.OutOfMemoryError, "--batch-size")):
        monkeypatch.setattr(ulma, "row_losses", lambda *_: (_ for _ in ()).throw(error))
        assert told in error_of(capsys, run)

# ---- Interruptions, and several processes ---------------------------------------------------------------------------
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"

def begin(small, out, *flags, launcher=()):
    """A run of 40 short steps in a process of its own, or in two."""
    command = [sys.executable, *launcher, "ulma.py", "--model", small / "model", "--data", small / "data", "--max-length", 64,
               "--epochs", 8, "--batch-size", 2, "--learning-rate", 1e-3, "--save-steps", 3, "--output-dir", out, *flags]
    return subprocess.Popen([*map(str, command)], cwd=HERE, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})

def end(*processes):
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error

def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)

def figures(out):
    """What two runs of the same have in common: the log, but for times, and the metrics."""
    metrics = json.loads((out / "metrics.json").read_text())
    return [{**line, "tokens_per_second": 0} for line in read(out / "log.jsonl")], metrics["before"], metrics["after"]

def same(one, other):
    mine, yours = weights(one), weights(other)
    assert all(torch.equal(mine[name], yours[name]) for name in mine) and figures(one) == figures(other)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())

def test_a_run_killed_at_any_moment_ends_as_one_that_never_was(small, tmp_path):
    """KILLS=20 python -m pytest -k killed_at_any: so many kills at random moments; one if not told."""
    never = tmp_path / "never"
    end(begin(small, never, "--save-steps", 1))
    for kill in range(int(os.environ.get("KILLS", 1))):
        out = tmp_path / f"run-{kill}"
        process = begin(small, out, "--save-steps", 1)
        wait_for((out / "metrics.json").exists, process)
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.communicate()
        if "after" not in json.loads((out / "metrics.json").read_text()):  # else it had finished
            end(begin(small, out, "--save-steps", 1))
            same(out, never)

def test_two_processes_equal_one_and_go_on_after_a_kill(small, tmp_path):
    """Pair-wise DPO on seven pairs, one held out: of the last batch of three, one process has one row, filled up."""
    pairs = write(tmp_path / "pairs.jsonl", [{**point(i), "chosen": f" {i}.", "rejected": f" {i}{'!' * i}?"} for i in range(8)])
    flags = "--data", pairs, "--fine-grained", "--method", "dpo", "--gradient-accumulation", 2, "--gradient-checkpointing"
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    alone, pair = begin(small, one, *flags, "--batch-size", 4), begin(small, two, *flags, launcher=TORCHRUN)
    end(alone, pair)
    process = begin(small, killed, *flags, launcher=TORCHRUN)
    wait_for(lambda: list(killed.glob("checkpoint-*")), process)
    for command in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's children outlive it
        with contextlib.suppress(OSError):  # it may have ended
            if str(killed).encode() in command.read_bytes():
                os.kill(int(command.parent.name), signal.SIGKILL)
    process.communicate()
    end(begin(small, killed, *flags, launcher=TORCHRUN))
    same(killed, two)
    start, single, double = (flat(weights(folder)) for folder in (small / "model", one, two))
    assert (single - double).norm() < 1e-3 * (single - start).norm()
    for mine, yours in zip(figures(one)[0], figures(two)[0]):
        assert mine["loss"] == pytest.approx(yours["loss"], rel=1e-4)
        assert mine["reward_negative"] == pytest.approx(yours["reward_negative"], rel=1e-3, abs=1e-5)
    assert figures(one)[2]["perplexity"] == pytest.approx(figures(two)[2]["perplexity"], rel=1e-4)

@pytest.fixture
def stopped(run, monkeypatch, capsys, tmp_path):
    """The folder of a run whose disk is full at the third checkpoint."""
    save, calls = torch.save, itertools.count(1)
    def full(state, path):
        save(state, path)
        if next(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    message = error_of(capsys, run, "--save-steps", 1, "--output-dir", tmp_path / "out")
    assert message.endswith("make room, then give the same command again: [Errno 28] No space left on device")
    monkeypatch.undo()
    return tmp_path / "out"

def test_the_same_command_goes_on_and_any_other_is_refused(stopped, run, capsys, finished):
    again = "--save-steps", 1, "--output-dir", stopped
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-2"]
    assert "another's" in error_of(capsys, run, *again, "--beta", 1)
    assert run(*again)[0]["train"]["from_step"] == 2
    same(stopped, run("--save-steps", 1)[1])
    assert "another's" in error_of(capsys, run, *again)

def test_a_checkpoint_of_other_data_or_processes_or_with_code_is_refused(stopped, run, capsys, monkeypatch, small):
    file = stopped / "checkpoint-2" / "0-of-1.pt"
    state, flags = torch.load(file, weights_only=True), ("--save-steps", 1, "--output-dir", stopped)
    torch.save({**state, "steps": 99}, file)
    assert "it is of 99 steps, not 6" in error_of(capsys, run, *flags)
    torch.save({"step": print}, file)
    assert "delete it to begin anew: Weights only load failed" in error_of(capsys, run, *flags)
    file.rename(file.with_name("1-of-2.pt"))
    assert "0-of-1.pt" in error_of(capsys, run, *flags)

# ---- What the README says -------------------------------------------------------------------------------------------
def test_the_readmes_command_aligns_the_embedded_model(tmp_path):
    command = [sys.executable, "ulma.py", "--method", "ulma", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    before, after = results["before"], results["after"]
    assert 0.20 < before["exact_match"] < 0.35 and after["exact_match"] >= 0.8
    assert after["exact_match/undemonstrated"] > before["exact_match/undemonstrated"] + 0.3
    assert after["reward_auc"] > 0.95 and after["perplexity"] < before["perplexity"]
    assert "β 3, β log Z -1.61, learning rate 0.0003, 5 epochs" in done.stdout  # and not the paper's defaults

def test_the_readmes_trainer_has_ulmas_loss_with_accumulation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(HERE / "data")
    [snippet] = re.findall(r"```python\n(import torch\n.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(snippet.splitlines()) <= 30
    names, base = {}, AutoModelForCausalLM.from_pretrained(HERE / "data" / "base")
    exec(snippet, names)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    prompt, text, _ = names["rows"][0]
    first = (-naive_logp(base, {"prompt": prompt, "completion": text}).item() + math.log(2)) / 2
    assert losses[0] == pytest.approx(first, rel=1e-3) and losses[-1] < losses[0]
