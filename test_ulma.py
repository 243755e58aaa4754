"""ULMA's claims, one a test: the losses against the paper's equations, then the rest in ulma.py's order."""
import contextlib, copy, itertools, json, math, os, random, re, shutil, signal, subprocess, sys, time, weakref
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: a name that is no folder fails at once
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the expected values are a CPU's
import datasets, tokenizers, torch, transformers
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

import ulma
from ulma import (concordance, dpo_loss, implicit_reward, pointwise_dpo_loss, prior_log_z, response_logps,
                  sft_loss, ulma_loss)

HERE = Path(ulma.__file__).parent
TOKENIZER = AutoTokenizer.from_pretrained(HERE / "data" / "base")

def draw(n=64, seed=0):  # random log π_θ, log π_ref and labels 0/1: (n,), float64
    generator = torch.Generator().manual_seed(seed)
    logps, ref_logps = -8 * torch.rand(2, n, generator=generator, dtype=torch.float64)
    return logps.requires_grad_(), ref_logps, torch.randint(0, 2, (n,), generator=generator)
def sigma(x): return 1 / (1 + math.exp(-x))
def grad(loss, logps): return torch.autograd.grad(loss.sum(), logps)[0].tolist()

# ---- The equations, their gradients and the paper's claims -------------------------------------------------
def test_the_reward_is_beta_times_log_ratio_plus_log_z():
    assert implicit_reward(torch.tensor(-2.0), torch.tensor(-5.0), 0.5, 1.0).item() == 2.0  # ½ (−2 + 5 + 1)
    logps, ref_logps, _ = draw(4)
    for log_z in (torch.full((4,), -1.7), torch.tensor([0.0, 1.0, -2.0, 3.0])):  # a constant, or one per row
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
        unbraked = z * -logp + (1 - z) * binary
        assert ulma_loss(*at, labels[i].bool(), beta, log_z).item() == pytest.approx(unbraked)
        assert ulma_loss(*at, graded[i], beta, log_z, True).item() == pytest.approx(squared)

def test_pairwise_dpo_is_its_equation_and_gradient_and_log_z_cancels():
    (logps_w, ref_w, _), (logps_l, ref_l, _) = draw(seed=1), draw(seed=2)
    loss = dpo_loss(logps_w, logps_l, ref_w, ref_l, 0.3)
    gaps = (implicit_reward(logps_w, ref_w, 0.3, 7.0) - implicit_reward(logps_l, ref_l, 0.3, 7.0)).tolist()
    assert loss.tolist() == pytest.approx([-math.log(sigma(gap)) for gap in gaps])
    gradients = torch.autograd.grad(loss.sum(), (logps_w, logps_l))  # −β σ(r_l − r_w) (∇_w − ∇_l)
    assert gradients[0].tolist() == pytest.approx([-0.3 * sigma(-gap) for gap in gaps])
    assert gradients[1].tolist() == pytest.approx([0.3 * sigma(-gap) for gap in gaps])

def test_the_gradients_are_the_papers():
    logps, ref_logps, labels = draw()
    scores = torch.rand(64, dtype=torch.float64)
    rewards = [0.3 * (a - b + 0.5) for a, b in zip(logps.tolist(), ref_logps.tolist())]
    binary = [-0.3 * (1 - sigma(r)) if z else 0.3 * sigma(r) for r, z in zip(rewards, labels.tolist())]
    squared = [-2 * 0.3 * (z - r) for z, r in zip(scores.tolist(), rewards)]
    assert grad(sft_loss(logps), logps) == [-1.0] * 64
    assert grad(pointwise_dpo_loss(logps, ref_logps, labels, 0.3, 0.5), logps) == pytest.approx(binary)
    at_scores = pointwise_dpo_loss(logps, ref_logps, scores, 0.3, 0.5, True)
    assert grad(at_scores, logps) == pytest.approx(squared)
    unbraked = [-1.0 if z else g for z, g in zip(labels.tolist(), binary)]
    assert grad(ulma_loss(logps, ref_logps, labels, 0.3, 0.5), logps) == pytest.approx(unbraked)

@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_prior_log_z_zeroes_the_mean_coefficient_at_the_start(continuous, share):
    labels = (torch.arange(60) < 60 * share).double()
    prior = prior_log_z(labels.mean().item(), 0.3, continuous)
    for log_z, balanced in ((prior, True), (0.0, share == 0.5 and not continuous)):
        logps = torch.zeros(60, dtype=torch.float64, requires_grad=True)  # π_θ = π_ref
        pull = sum(grad(pointwise_dpo_loss(logps, torch.zeros(60), labels, 0.3, log_z, continuous), logps))
        assert (abs(pull) < 1e-9) is balanced

@pytest.mark.parametrize("continuous", [False, True])
def test_the_optimum_of_alignment_is_recovered_with_the_true_log_z(continuous, beta=0.5):
    ref = torch.tensor([0.30, 0.25, 0.20, 0.12, 0.08, 0.05], dtype=torch.float64)
    reward = torch.tensor([-1.0, 0.5, 1.5, -0.3, 0.9, 2.0], dtype=torch.float64)
    z = (ref * (reward / beta).exp()).sum()
    for log_z, recovered in ((z.log(), True), (0.0, False)):
        logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0,
                                   line_search_fn="strong_wolfe")
        def expected_loss():  # over responses from π_ref, and labels: z ~ Bernoulli(σ(r)), or z = r + noise
            solver.zero_grad()
            logps = logits.log_softmax(0)
            good, bad = (pointwise_dpo_loss(logps, ref.log(), torch.full((6,), y), beta, log_z)
                         for y in (1, 0))
            loss = reward.sigmoid() * good + (1 - reward.sigmoid()) * bad
            if continuous:
                loss = pointwise_dpo_loss(logps, ref.log(), reward, beta, log_z, True)
            (ref * loss).sum().backward()
            return (ref * loss).sum()
        solver.step(expected_loss)
        distance = (logits.softmax(0) - ref * (reward / beta).exp() / z).abs().max()
        assert distance < 1e-6 if recovered else distance > 0.05

# ---- Log-probabilities -------------------------------------------------------------------------------------
TINY = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
ARCHITECTURES = {  # several of these scale or cap their logits, in ways that change the result
    "gpt2": dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0, resid_pdrop=0,
                 embd_pdrop=0),
    "llama": TINY, "gemma2": {**TINY, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "qwen3": TINY, "cohere": {**TINY, "logit_scale": 0.25}, "granite": {**TINY, "logits_scaling": 3.0}}

def tiny(name, **changes):  # a random model of a few thousand weights, with logits far from uniform
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**ARCHITECTURES.get(name, {}), **changes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 20
    return model
def batch():  # input_ids and response_mask, padded on the right, and the unpadded (prompt, response) rows
    rows = [([9, 3, 44, 7, 30], [12, 8, 60, 5]), ([17], [33, 4, 21, 50, 6, 11]), ([40, 25, 3], [58]),
            ([5, 6, 7, 8, 9, 10, 11], [])]
    padded = [p + r + [0] * (9 - len(p + r)) for p, r in rows]
    masks = [[0] * len(p) + [1] * len(r) + [0] * (9 - len(p + r)) for p, r in rows]
    return torch.tensor(padded), torch.tensor(masks), rows
def token_by_token(model, rows):
    """Σ log π(y_t | x, y_<t), each term from a forward pass of its own over an unpadded prefix."""
    def term(prefix, token):
        return model(input_ids=torch.tensor([prefix])).logits[0, -1].log_softmax(-1)[token]
    zero = torch.zeros(())
    return torch.stack([sum((term(p + r[:t], r[t]) for t in range(len(r))), zero) for p, r in rows])

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
    assert torch.equal(actual, response_logps(model, noise, response_mask.bool()))  # whatever pads

# ---- Rows for the tests below ------------------------------------------------------------------------------
def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
def read(path): return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
def point(i, label=1, **more):
    return {"prompt": f"Question {i}?", "completion": f" Answer {i}.", "label": label, **more}
def stand_in(folder, name="llama", tokenizer=None, dtype=torch.float32, **changes):
    """A folder as from the hub: a random model and its tokenizer."""
    tokenizer = tokenizer or TOKENIZER
    model = tiny(name, **{"vocab_size": len(tokenizer), **changes}).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder
def read_model(folder): return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
def weights(folder): return read_model(folder).state_dict()
def flat(state): return torch.cat([value.flatten() for value in state.values()])
RATED = [point(i % 3, int(i % 3 == i // 3), completion=f" Answer {i}{' and more' * (i % 4)}.",
               score=[0.0, 0.3, 1.0][(i + i // 3) % 3]) for i in range(10)]
@pytest.fixture(scope="session")
def small(tmp_path_factory):  # a tiny model; ten rated rows to train on, three with references to test on
    folder = tmp_path_factory.mktemp("small")
    stand_in(folder / "model")
    write(folder / "data" / "train.jsonl", RATED)
    write(folder / "data" / "test.jsonl", [{**row, "references": [row["completion"]], "group": "abc"[i]}
                                           for i, row in enumerate(RATED[:3])])
    return folder

@pytest.fixture(scope="session")
def run(small, tmp_path_factory):  # run(flags): the metrics and the output folder of a run of a second
    def call(*flags):
        out = tmp_path_factory.mktemp("runs") / "out"
        defaults = ("--model", small / "model", "--data", small / "data", "--max-length", 64, "--epochs", 2,
                    "--learning-rate", 3e-3, "--batch-size", 4, "--beta", 0.7, "--output-dir", out)
        return ulma.main([*map(str, defaults), *map(str, flags)]), out
    return call

@pytest.fixture(scope="session")
def finished(run):
    return run("--method", "pointwise-dpo", "--gradient-checkpointing", "--epochs", 8)

def error_of(capsys, call, *flags):  # the one line that a user's mistake gets
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "ulma.py: " in line]
    assert stop.value.code == 2
    return line

# ---- From the option to the weights, through main alone ----------------------------------------------------
PAPER = {  # the loss of a row, or of a pair, by the paper: d is log π_θ − log π_ref, c is β log Z
    "ulma": lambda logp, d, z, b, c: -logp if z == 1 else -logsigmoid(-(b * d + c)),
    "pointwise-dpo": lambda logp, d, z, b, c: -logsigmoid(b * d + c) if z == 1 else -logsigmoid(-(b * d + c)),
    "sft": lambda logp, d, z, b, c: -logp,
    "dpo": lambda chosen, rejected, b: -logsigmoid(b * (chosen - rejected)),
    "ulma --continuous": lambda logp, d, z, b, c: -logp if z == 1 else (z - b * d - c) ** 2,
    "pointwise-dpo --continuous": lambda logp, d, z, b, c: (z - b * d - c) ** 2}
PAPER |= {f"{name} --balanced": loss for name, loss in PAPER.items() if name not in ("sft", "dpo")}
@pytest.fixture
def watched(monkeypatch, run):
    """watched(flags): for each step (weights, the gradient given to clip_grad_norm_), the log, results."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []
    def spy(parameters, bound):
        parameters = list(parameters)
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        steps.append(([p.detach().clone() for p in parameters], gradient))
        return clip(parameters, bound)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    def call(*flags):
        results, out = run("--epochs", 3, "--gradient-accumulation", 3, *flags)
        return steps, read(out / "log.jsonl"), results
    return call

def naive_logp(model, row):  # log π(y|x) of one row without padding
    prompt = TOKENIZER(row["prompt"]).input_ids
    ids = torch.tensor(prompt + TOKENIZER(row["completion"]).input_ids + [TOKENIZER.eos_token_id])
    logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return sum(logps[t - 1, ids[t]] for t in range(len(prompt), len(ids)))
def naive_loss(method, model, reference, rows=RATED, beta=0.7):
    """The mean of the paper's loss over all rows, and the mean rewards of positives and of negatives."""
    label = "score" if "continuous" in method else "label"
    z = [row[label] for row in rows]
    logps = [naive_logp(model, row) for row in rows]
    deltas = [logp - naive_logp(reference, row).item() for logp, row in zip(logps, rows)]
    weights, mean_label = [1.0] * len(rows), sum(z) / len(z)
    if "balanced" in method:  # label 1 and all others make up half of the loss each
        weights = [len(z) / 2 / (z.count(1) if y == 1 else len(z) - z.count(1)) for y in z]
        mean_label = sum(w * y for w, y in zip(weights, z)) / len(z)
    c = mean_label if "continuous" in method else math.log(mean_label / (1 - mean_label))
    if method == "dpo":
        losses = [PAPER[method](deltas[i], deltas[j], beta) for i, w in enumerate(rows)
                  for j, l in enumerate(rows) if w["prompt"] == l["prompt"] and w["label"] > l["label"]]
    else:
        losses = [w * PAPER[method](logp, d, y, beta, c) for logp, d, y, w in zip(logps, deltas, z, weights)
                  if method != "sft" or y == 1]
    rewards = [[(beta * d + c).item() for d, row in zip(deltas, rows) if row["label"] == y] for y in (1, 0)]
    return sum(losses) / len(losses), [sum(r) / len(r) for r in rewards]

@pytest.mark.parametrize("method", PAPER)
def test_a_steps_gradient_and_log_are_those_of_the_papers_mean_loss(watched, small, method):
    steps, log, _ = watched("--method", *method.split())
    model, losses = read_model(small / "model"), []
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
    assert method != "sft" or log[0]["reward_positive"] is None  # it reads no reference
    if method in ("ulma", "pointwise-dpo"):
        for i, name in enumerate(("reward_positive", "reward_negative")):
            assert log[0][name] == pytest.approx(sum(rewards[i] for _, rewards in losses) / 3, rel=1e-3)

def test_reward_auc_is_against_the_initial_model_or_the_reference(finished, run, small):
    results, out = finished
    model, reference = read_model(out), read_model(small / "model")
    gains = [(naive_logp(model, row) - naive_logp(reference, row)).item() for row in RATED[:3]]
    wins = [gains[i] > gains[j] for i in range(3) for j in range(3) if RATED[i]["label"] > RATED[j]["label"]]
    assert results["before"]["reward_auc"] == 0.5 and results["after"]["reward_auc"] == sum(wins) / len(wins)
    [row] = [row for row in RATED[:3] if row["label"]]  # of demonstrations alone, a token:
    nats = -naive_logp(model, row).item() / (len(TOKENIZER(row["completion"]).input_ids) + 1)
    assert results["after"]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    again = run("--eval-only", "--model", out, "--reference", small / "model")[0]["eval"]
    assert again == pytest.approx(results["after"])
    assert run("--eval-only", "--model", out)[0]["eval"]["reward_auc"] is None

def test_with_a_reference_of_its_own_training_starts_elsewhere(watched, finished, small, monkeypatch):
    alive, original = weakref.WeakSet(), ulma.load_model
    def load_model(*arguments):
        assert not alive  # the reference has left memory when the policy comes
        alive.add(model := original(*arguments))
        return model
    monkeypatch.setattr(ulma, "load_model", load_model)
    flags = "--method", "pointwise-dpo", "--gradient-checkpointing", "--reference", small / "model"
    steps, _, results = watched("--model", finished[1], *flags)
    loss, _ = naive_loss("pointwise-dpo", model := read_model(finished[1]), read_model(small / "model"))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert (steps[0][1] - expected).norm() < 1e-3 * expected.norm()
    assert results["before"] == pytest.approx(finished[0]["after"])
    _, log, _ = watched("--method", "sft", *flags[2:])  # which reads it only where it is given
    assert log[0]["reward_positive"] > 0

def test_rewards_start_at_zero_whatever_is_noisy_in_training_mode(run, tmp_path):
    text = {**TINY, "vocab_size": 768, "attention_dropout": 0.5, "query_pre_attn_scalar": 8}
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    noisy = {"llama": dict(attention_dropout=0.5), "gemma3": dict(text_config=text, vision_config=vision),
             "opt": dict(dropout=0.5, ffn_dim=48, word_embed_proj_dim=32),
             "mixtral": dict(router_jitter_noise=0.1, num_local_experts=4)}
    data = write(tmp_path / "rows.jsonl", [point(i // 2, i % 2) for i in range(8)])  # balanced: log Z is 0
    for (name, changes), more in itertools.product(noisy.items(), ([], ["--gradient-checkpointing"])):
        folder = stand_in(tmp_path / name, name, **{**TINY, "vocab_size": 768, **changes})
        _, out = run("--model", folder, "--data", data, "--epochs", 1, "--batch-size", 8, *more)
        [line] = read(out / "log.jsonl")
        assert abs(line["reward_positive"]) < 1e-4 and abs(line["reward_negative"]) < 1e-4, name

def test_checkpointing_runs_each_block_again(run, monkeypatch):
    calls, block = [], transformers.models.llama.modeling_llama.LlamaDecoderLayer
    monkeypatch.setattr(block, "forward", lambda *args, original=block.forward, **more: (
        calls.append(torch.is_grad_enabled()), original(*args, **more))[1])
    assert run("--gradient-checkpointing") and sum(calls) == 2 * 2 * 6  # passes, blocks, steps

# ---- Data --------------------------------------------------------------------------------------------------
def load(data, tokenizer=None, **options):
    return ulma.load_rows(ulma.Options(data=str(data), **options), tokenizer or TOKENIZER)
def parse(*records, tokenizer=TOKENIZER, **options):
    return ulma.parse(list(records), "train", ulma.Options(**options), tokenizer)

def texts(rows): return [(row.prompt, row.completion, row.label) for row in rows]

def halves(row): return row.input_ids[~row.response_mask], row.input_ids[row.response_mask]
def decoded(rows, tokenizer): return [tuple(map(tokenizer.decode, halves(row))) for row in rows]
PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:"
def test_a_pair_becomes_two_pointwise_rows():
    for before, opening in ((PROMPT, ""), (None, PROMPT)):  # as in HH-RLHF
        record = {"prompt": before, "chosen": f"{opening} Good.", "rejected": opening}
        assert texts(parse(record)) == [(PROMPT, " Good.", 1), (PROMPT, "", 0)]
    rows = parse(*({"prompt": "Rank!", "chosen": a, "rejected": b} for a, b in ("AB", "BC")))
    assert [a.completion + b.completion for a, b in ulma.training_items(rows, "dpo")] == ["AB", "BC"]
# Chat templates by what sets them apart: the end of a turn, and what comes before and after it.
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PHI3 = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}<eot>\n{% endfor %}"
         "{% if add_generation_prompt %}<turn>assistant\n{% endif %}")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # without any special token
CALLS = "{% for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
CALLING = "{{ tools | tojson }}\n" + CHATML.replace("{{ m.content }}", "{{ m.content }}" + CALLS)
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
FORGETFUL = CHATML.replace("m.content", "m.content.split('</think>')[-1]")

def chat_tokenizer(template, bos=None, eos="<|im_end|>"):
    """data/base's tokenizer with a chat template, special tokens and, if it is given, BOS before texts."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "data" / "base")
    extra = ["<|im_start|>", "<|im_end|>", "<|end|>", "<turn>", "<eot>"]
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": extra})
    tokenizer.chat_template = template
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    return tokenizer
def chat(*contents):
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(contents)]

CHAT, GOOD, BAD = chat("Hi", "Hello!", "Bye"), chat("", "Good.")[1:], chat("", "Go.")[1:]
OPENING = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
OPENING += "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"

CHATML_BYE = OPENING[OPENING.rindex("<|im_start|>user"):]
@pytest.mark.parametrize("template, bos, eos, opening, ending", [
    (CHATML, None, "<|im_end|>", CHATML_BYE, "Good.<|im_end|>"),
    (CHATML, None, "<eos>", CHATML_BYE, "Good.<|im_end|>"),
    (PHI3, None, "<eos>", "<|user|>\nBye<|end|>\n<|assistant|>\n", "Good.<|end|>"),
    (GEMMA, "<bos>", "<eos>", "<bos><turn>user\nBye<eot>\n<turn>assistant\n", "Good.<eot>"),
    (PLAIN, "<s>", "<eos>", "user: Bye\n", "assistant: Good.<eos>")])
def test_tokens_are_those_of_the_template_up_to_the_end_of_the_turn(template, bos, eos, opening, ending):
    tokenizer = chat_tokenizer(template, bos, eos)
    rows = parse({"prompt": chat("Bye"), "completion": GOOD, "label": 1}, tokenizer=tokenizer)
    assert decoded(rows, tokenizer) == [(opening, ending)]
    deployed = tokenizer.apply_chat_template(chat("Bye"), add_generation_prompt=True, return_dict=False)
    assert halves(rows[0])[0].tolist() == deployed

PARTS = [{**m, "content": [{"type": "text", "text": text} for text in m["content"]], "tool_calls": None}
         for m in CHAT]
@pytest.mark.parametrize("record", [
    {"prompt": CHAT, "chosen": GOOD, "rejected": BAD}, {"chosen": CHAT + GOOD, "rejected": CHAT + BAD},
    {"prompt": CHAT, "chosen": CHAT + GOOD, "rejected": CHAT + BAD},
    {"prompt": "Bye", "chosen": CHAT + GOOD, "rejected": CHAT + BAD, "score_chosen": 8.0},  # UltraFeedback
    {"prompt": CHAT, "chosen": "Good.", "rejected": "Go."},
    {"prompt": PARTS, "chosen": GOOD, "rejected": BAD, "tools": None},
    {"completion": CHAT + GOOD, "label": True, "rating": 5}, {"messages": CHAT + GOOD, "label": True}])
def test_a_conversation_is_read_in_every_form(record):
    tokenizer = chat_tokenizer(CHATML)
    answers = ["Good.", "Go."] if "chosen" in record else ["Good."]
    rows = decoded(parse(record, tokenizer=tokenizer), tokenizer)
    assert rows == [(OPENING, f"{answer}<|im_end|>") for answer in answers]

def answer(**more):
    return {"prompt": chat("Hi"), "completion": [{"role": "assistant", "content": "x", **more}], "label": 1}

def test_tools_reach_the_prompt_and_calls_the_response():
    tokenizer, tools = chat_tokenizer(CALLING), [{"type": "function", "function": {"name": "weather"}}]
    call = {"function": {"name": "weather", "arguments": {"at": "Rome"}}}
    [row] = parse({**answer(content=None, tool_calls=[call]), "tools": tools}, tokenizer=tokenizer)
    [(prompt, response)] = decoded([row], tokenizer)
    assert prompt.startswith(f"{json.dumps(tools)}\n<|im_start|>user")
    assert response == 'weather {"at": "Rome"}<|im_end|>'

CALL = {"function": {"name": "weather", "arguments": '{"at": "Rome"}'}}
@pytest.mark.parametrize("template, record, told", [
    (THINKING, answer(), "ends prompts with '<think>\\n', but before this response writes 'x<|im_end|>"),
    (FORGETFUL, answer(content="<think>Why?</think>Yes."), "leaves out or changes '<think>Why?"),
    (CHATML, answer(reasoning_content="Why?"), "leaves out or changes 'Why?'"),
    (CHATML, answer(tool_calls=[CALL]), "leaves out or changes 'weather'"),
    (CALLING, answer(tool_calls=[CALL]), "leaves out or changes '{\"at"),  # it quotes a text, not an object
    (CHATML, answer() | {"tools": [{"type": "function"}]}, "leaves out the tools"),
    (CHATML, {**point(1), "tools": [{}]}, "the column tools would be left out"),
    (CHATML, {**answer(), "system": "Be brief."}, "the column system would be left out"),
    (CHATML, answer(content=[{"type": "image", "url": "x"}]), "a message's content is"),
    (CHATML, answer(content=None), "content is None"), (CHATML, answer(role="user"), "one answer of the"),
    *((CHATML, {"prompt": prompt, "completion": completion, "label": 1}, "one answer of the assistant")
      for prompt, completion in ((CHAT[:1], CHAT[1:] + GOOD), ("Ho", CHAT + GOOD), (CHAT[:2], GOOD),
                                 (CHAT[:2], CHAT[2:] + GOOD))),
    (None, {"prompt": "A: Hi", "completion": "A: Hi B: Ho", "label": 1}, "it repeats the prompt"),
    (None, answer(), "chat_template")])
def test_a_conversation_that_would_be_read_otherwise_than_meant_is_refused(template, record, told):
    with pytest.raises(ulma.Mistake, match=re.escape(told)) as mistake:
        parse(point(0), record, tokenizer=chat_tokenizer(template))
    assert str(mistake.value).startswith("train row 2: ")

def test_files_folders_and_formats_hold_the_same_rows(tmp_path):
    rows = [point(i, i % 2) for i in range(20)]
    for file in ("rows.jsonl", "folder/one/train.jsonl", "folder/two/train.jsonl"):
        write(tmp_path / file, rows)
    write(tmp_path / "card" / "README.md", []).write_text(
        "---\nconfigs:\n- config_name: default\n  sep: ';'\n  data_files: rows.csv\n---\n")
    for file, sep in (("rows.csv", ","), ("rows.tsv", "\t"), ("card/rows.csv", ";")):
        datasets.Dataset.from_list(rows).to_csv(tmp_path / file, sep=sep)
    expected = [texts(part) for part in load(tmp_path / "rows.jsonl")]
    for file, folder in (("folder", "two"), ("rows.csv", None), ("rows.tsv", None), ("card", None)):
        assert expected == [texts(part) for part in load(tmp_path / file, data_dir=folder)]

def test_splits_serve_by_how_their_names_start_and_several_of_a_kind_are_told(tmp_path):
    def prompts(*splits, **options):
        data = tmp_path / "-".join(splits) / "data"
        data.mkdir(parents=True, exist_ok=True)
        for i, split in enumerate(splits):
            datasets.Dataset.from_list([point(i)]).to_parquet(data / f"{split}-00000-of-00001.parquet")
        return ["".join(row.prompt[9] for row in rows) for rows in load(data.parent, **options)]
    assert prompts("train_prefs", "test_prefs") == prompts("train", "validation") == ["0", "1"]
    assert prompts("train", "validation", "test") == ["0", "2"]
    assert prompts("train", "test", eval_only=True) == ["", "1"]
    assert prompts("train", eval_only=True) == ["", "0"]
    with pytest.raises(ulma.Mistake, match="train_prefs, train_sft"):
        prompts("train_prefs", "train_sft", "test_sft")
    assert prompts("train_prefs", "train_sft", "test_sft", splits=["train_sft", "test_sft"]) == ["1", "2"]

def test_a_data_set_from_the_hub_is_read_by_name_and_its_rows_named(monkeypatch):
    rows = datasets.Dataset.from_list([point(0), point(1, 0), point(2, 7.5)])
    hub = {("someone/rows", "graded"): {"test": rows.select([0, 1]), "train": rows}}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, data_dir: hub[path, data_dir])
    assert [row.label for row in load("someone/rows", data_dir="graded", eval_only=True)[1]] == [1, 0]
    with pytest.raises(ulma.Mistake, match="someone/rows: train row 3: the label is 7.5"):
        load("someone/rows", data_dir="graded", continuous=True)

def test_without_a_test_split_a_seeded_tenth_of_the_prompts_is_held_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", [point(i % 50, label=i % 2) for i in range(200)])
    (_, test_rows), again, other = load(path), load(path), load(path, seed=1)
    train, test = ({row.prompt for row in part} for part in again)
    assert len(train) == 45 and len(test) == 5 and not train & test
    assert texts(again[1]) == texts(test_rows) != texts(other[1])

def words(opens=False, closes=False):
    """A tokenizer to which the word "7" is token 7, <bos> 1 and <eos> 2, which may open and close texts."""
    names = {**{str(i): i for i in range(3, 61)}, "<unk>": 0, "<bos>": 1, "<eos>": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<bos>"] * opens + ["$A"] + ["<eos>"] * closes, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    special = {"eos_token": "<eos>", "unk_token": "<eos>"} | ({"bos_token": "<bos>"} if opens else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
def tokenized(prompt, *completions, tokenizer, max_length=9):
    """The (prompt, response) tokens that each of the completions of a prompt gets."""
    records = [{"prompt": prompt, "chosen": text, "rejected": text} for text in completions]
    rows = parse(*records, tokenizer=tokenizer, max_length=max_length)[::2]
    return [tuple(ids.tolist() for ids in halves(row)) for row in rows]

@pytest.mark.parametrize("max_length, prompt, response", [
    (8, [10, 11, 12, 13], [20, 21, 22, 2]), (7, [11, 12, 13], [20, 21, 22, 2]), (5, [12, 13], [20, 21, 22]),
    (2, [13], [20])])
def test_prompts_lose_their_start_and_completions_their_end(capsys, max_length, prompt, response):
    with_bos = [1, *prompt[1:]] if len(prompt) < 4 else [1, 11, 12, 13]
    for tokenizer, expected in ((words(opens=True), with_bos), (words(), prompt)):
        capsys.readouterr()
        cut = tokenized("10 11 12 13 ", "20 21 22", tokenizer=tokenizer, max_length=max_length)
        assert cut == [(expected, response)]
    assert ("2 of 2 rows are cut to --max-length" in capsys.readouterr().out) == (max_length < 8)

def test_all_responses_of_a_prompt_get_the_same_part_of_it():
    shorter, longer = tokenized("10 11 12 13 ", "20", "21 22 23", tokenizer=words(), max_length=7)
    assert shorter == ([11, 12, 13], [20, 2]) and longer == ([11, 12, 13], [21, 22, 23, 2])
    one, other = tokenized("10 1", " 21", "1 20", tokenizer=words())  # a token spans the boundary of one
    assert one == ([10], [0, 21, 2]) and other == ([10], [11, 20, 2])
    with pytest.raises(ulma.Mistake, match="no token of its own"):
        tokenized("1", "1 20", tokenizer=words())

@pytest.mark.parametrize("opens, closes", [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize("prompt", ["10 11 ", "<bos> 10 11 "])
@pytest.mark.parametrize("completion, ids", [("20", [20, 2]), ("20 <eos>", [20, 2]), ("", [2])])
def test_bos_appears_once_and_eos_closes_the_response_alone(opens, closes, prompt, completion, ids):
    bos = [1] * (opens or "bos" in prompt)
    assert tokenized(prompt, completion, tokenizer=words(opens, closes)) == [([*bos, 10, 11], ids)]

def row(name, length=1):
    ids = torch.zeros(length)
    return ulma.Row(str(name), "", 1.0, [], None, False, None, input_ids=ids, response_mask=ids == 0)

def test_batches_hold_every_item_once_in_seeded_order_alike_in_length():
    rng = random.Random(0)
    items = [(row(i, rng.randrange(5, 500)),) for i in range(1003)]
    batches, again, other = (ulma.bucketed_batches(items, 8, random.Random(seed)) for seed in (1, 1, 2))
    assert batches == again != other and sorted(map(len, batches)) == [3] + [8] * 125
    assert sorted(int(item[0].prompt) for batch in batches for item in batch) == list(range(1003))
    padded = sum(len(batch) * max(len(item[0].input_ids) for item in batch) for batch in batches)
    assert padded < 1.1 * sum(len(item[0].input_ids) for item in items)

@pytest.mark.parametrize("rejected, chosen, rated", [
    ("20 31 22", "20 21 22", [31]), ("20 31 22 33", "20 21 22 23", [31, 33]),  # replaced
    ("20 31 22", "20 22", [31]), ("20 22", "20 21 22", []), ("20 21", "20 21", []),  # deleted, inserted, none
    ("31 32", "21 22 23", [31, 32]), ("10 31", "21", [10, 31]),  # all, even a word of the prompt
    ("20 " * 250, "31 " + "20 " * 250, []),  # however often a token comes
    ("20 " * 299 + "23", "31 " + "20 " * 299 + "23", [23])])  # after truncation to 300 tokens
def test_of_a_rejected_response_the_tokens_count_that_the_edit_removed(rejected, chosen, rated):
    pair = {"prompt": "10 11 ", "chosen": chosen, "rejected": rejected}
    rows = parse(pair, tokenizer=words(), max_length=302)
    kept = ulma.only_edits([*rows, row("other")])
    ids, mask = rows[1].input_ids, rows[1].response_mask
    assert ids[mask].tolist() == rated and sum(rows[0].response_mask) == len(rows[0].input_ids) - 2
    assert len(kept) == 2 + bool(rated)

# ---- Evaluation --------------------------------------------------------------------------------------------
def test_reward_auc_is_the_share_of_pairs_in_order_with_ties_a_half():
    def auc(scores, labels):
        return concordance(torch.tensor(scores), torch.tensor(labels))
    assert (auc([3.0, 2.0, 1.0], [1, 1, 0]), auc([1.0, 2.0], [1, 0]), auc([1.0, 1.0], [1, 0])) == (1, 0, 0.5)
    assert auc([1.0, 3.0, 2.0, 2.0], [1.0, 0.5, 0.5, 0.0]) == 1.5 / 5 and auc([1.0, 2.0], [1, 1]) is None

def test_exact_match_counts_the_completions_that_are_references(run, tmp_path, monkeypatch):
    answers = {"Question 0?": " Yes.", "Question 1?": "Yes. ", "Question 2?": " No."}
    rows = [point(i, i % 2, references=[" Yes.", " Sure."], group="ab"[i // 2]) for i in range(3)]
    def generate(model, input_ids, **_):
        prompts = TOKENIZER.batch_decode(input_ids, skip_special_tokens=True)
        added = TOKENIZER([answers[p.strip()] for p in prompts for _ in range(ulma.SAMPLES)], padding=True)
        return torch.cat([input_ids.repeat_interleave(ulma.SAMPLES, 0), torch.tensor(added.input_ids)], 1)
    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    metrics = run("--eval-only", "--data", write(tmp_path / "test.jsonl", rows).parent)[0]["eval"]
    assert [metrics["exact_match" + name] for name in ("", "/a", "/b")] == pytest.approx([2 / 3, 1, 0])

def test_samples_come_from_the_policy_whatever_the_models_own_settings_which_stay(run, small, tmp_path):
    plain = (run("--eval-only")[1] / "samples.jsonl").read_text()
    for settings in (dict(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=9.0), dict(min_p=0.5),
                     dict(num_beams=8), dict(no_repeat_ngram_size=2, suppress_tokens=[5]), dict(max_length=3),
                     dict(return_dict_in_generate=True), dict(min_new_tokens=30, typical_p=0.2)):
        shutil.copytree(small / "model", tmp_path / "model", dirs_exist_ok=True)
        file = tmp_path / "model" / "generation_config.json"
        file.write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0, **settings}))
        assert (run("--eval-only", "--model", file.parent)[1] / "samples.jsonl").read_text() == plain
        _, out = run("--epochs", 1, "--model", file.parent)
        assert settings.items() <= json.loads((out / file.name).read_text()).items()
    assert len(set(json.loads(plain.splitlines()[0])["eval"])) == ulma.SAMPLES

@pytest.mark.parametrize("named", [True, False])
def test_rows_end_alike_as_texts_and_through_a_template_whose_turns_end_otherwise(tmp_path, run, named):
    turn = "{{ m.content if m.role == 'user' else m.content + '<eot>\n' }}"
    tokenizer = chat_tokenizer("{% for m in messages %}" + turn + "{% endfor %}", eos="<other>")
    model, end = read_model(HERE / "data" / "base"), tokenizer.convert_tokens_to_ids("<eot>")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = model.get_input_embeddings().weight.data
    weight[[1, end]] = weight[[end, 1]]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end] if named else None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts, ends = read(HERE / "data" / "test.jsonl")[:80], []
    chats = [{**row, "prompt": chat(row["prompt"]), "completion": chat("", row["completion"])[1:]}
             for row in texts]
    for rows, model in ((texts, HERE / "data" / "base"), (texts if named else chats, tmp_path / "model")):
        flags = "--model", model, "--data", write(tmp_path / "rows.jsonl", rows), "--max-length", 128
        ends.append(run("--eval-only", *flags)[0]["eval"])
    one, other = ends
    assert named or other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    assert other["exact_match"] == pytest.approx(one["exact_match"], abs=0.12) and one["exact_match"] > 0.15

# ---- Models, mistakes, LoRA --------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_in_bfloat16_shards_is_trained_and_saved_in_float32(run, tmp_path, name, tied):
    tokenizer = chat_tokenizer(None)
    tokenizer.pad_token = None
    folder = stand_in(tmp_path / "model", name, tokenizer, torch.bfloat16, tie_word_embeddings=tied)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    _, out = run("--model", folder)
    before, after = weights(folder), weights(out)
    assert before.keys() == after.keys() and 0 < (flat(after) - flat(before)).abs().max() < 1
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).pad_token is None  # as it was

def without_a_head(folder):
    tiny("llama", vocab_size=768, tie_word_embeddings=False).model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
def pickled(folder):
    for file in stand_in(folder).glob("*.safetensors*"):
        file.rename(file.with_suffix(".bin"))

def of_other_words(folder):
    stand_in(folder, tokenizer=words(opens=True), vocab_size=768)

@pytest.mark.parametrize("make, told", [
    (of_other_words, "its tokenizer is not that of --model"),
    (lambda folder: stand_in(folder, "bert", hidden_size=32, num_attention_heads=2), "decoder-only"),
    (without_a_head, "lm_head.weight"), (pickled, "safetensors"), (Path.mkdir, "tokenizer"),
    (lambda folder: stand_in(folder, rms_norm_eps=math.nan), "not finite"),
    (lambda folder: stand_in(folder, quantization_config={"quant_method": "fp8"}), "quantised"),
    (lambda folder: stand_in(folder, vocab_size=99), "fewer embeddings than tokens"),
    (lambda folder: stand_in(folder, max_position_embeddings=32), "it takes 32 tokens")])
def test_a_model_that_cannot_be_trained_is_refused(run, tmp_path, capsys, make, told):
    make(tmp_path / "model")
    flag = "--reference" if make is of_other_words else "--model"
    assert told in error_of(capsys, run, flag, tmp_path / "model")
LINE, HALF = json.dumps(point(1)), '{"chosen": "Hi", "rejected": "\\n\\nAssistant: x"}'
@pytest.mark.parametrize("flags, told", [
    (("--beta", "0"), "--beta"), (("--max-length", "1"), "--max-length"), (("--log-z", "much"), "--log-z"),
    (("--data", "nowhere"), "nowhere"), (("--model", "nowhere"), "nowhere"), (("--methd", "sft"), "--methd"),
    (("--data", __file__), "test_ulma"), (("--data-dir", "x"), "x"), (("--output-dir", f"{__file__}/x"), "x"),
    (("--output-dir", "", "--save-steps", "9"), "--save-steps"), (("--fine-grained",), "needs pairs"),
    (("--output-dir", HERE), "neither new"), (("--balanced", "--method", "dpo"), "--balanced"),
    (("--splits", "train_x"), "train_x"), *((("--data", text), told) for text, told in (
        (LINE[:-9], "rows count from 0"), (f"{LINE}\n{LINE[:-9]}", "row 1"), ("", "is empty"),
        (LINE.replace("Answer", "\xe9"), "utf-8"), (LINE.replace("prompt", "promt"), "no prompt"),
        (LINE.replace("label", "lable"), "it has prompt, completion, lable; needed are prompt"),
        (f'{LINE}\n{LINE.replace(": 1}", ": 2}")}', "train row 2: the label is 2"),
        (LINE.replace(": 1}", ": 0.5}"), "--continuous"), (LINE.replace(": 1}", ': "1"}'), "label is '1'"),
        (LINE.replace(" Answer 1.", ""), "no completion"), (LINE.replace("Question 1?", ""), "no prompt"),
        (LINE.replace('" Answer 1."', "5"), "train row 1: 5 was read, not a text"),
        (LINE.replace(" Answer 1.", "2024-01-31"), "datetime(2024, 1, 31, 0, 0)'} was read, not a text"),
        (json.dumps(point(1, references="Yes.")), "a list of texts"), (HALF, "Assistant:"),
        (json.dumps({"prompt": CHAT, "completion": chat("", "Good.")[1:], "label": 1}), "chat_template"),
        ("\n".join([LINE, json.dumps(point(2))]), "from 1 rows of label 1 and 0 others"),
        ("\n".join(json.dumps(point(i, 0)) for i in "12"), "from 0 rows of label 1 and 1 others"),
        ("\n".join([LINE] * 9), "0 others (dpo: on one prompt), beside 9 test rows")))])
def test_a_mistake_gets_one_line_that_names_it_and_nothing_is_written(run, capsys, tmp_path, flags, told):
    if flags[0] == "--data" and flags[1][:1] in "{":
        (tmp_path / "rows.jsonl").write_text(flags[1], encoding="latin-1")
        flags = ("--data", tmp_path / "rows.jsonl", "--output-dir", tmp_path / "out")
    assert told in error_of(capsys, run, *flags)
    assert not (tmp_path / "out").exists()

def test_a_terminal_that_knows_no_greek_gets_question_marks():
    command, odd = [sys.executable, "ulma.py", "--data", "nowhere-β"], {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=HERE, capture_output=True, env=os.environ | odd)
    assert done.returncode == 2 and b"nowhere-? is empty or unreadable" in done.stderr

def test_a_model_that_breaks_is_told_and_never_replaces_a_checkpoint(run, capsys, monkeypatch, tmp_path):
    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, bound: (
        clip(parameters, bound) * (math.nan if next(calls) == 4 else 1)))
    flags = "--save-steps", 2, "--output-dir", tmp_path / "out"
    assert "not finite at step 4" in error_of(capsys, run, *flags)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert "--learning-rate" in error_of(capsys, run, "--learning-rate", 1e30)

def test_ctrl_c_and_a_full_memory_are_told_in_one_line(run, capsys, monkeypatch):
    for error, told in ((KeyboardInterrupt, "the same command"), (torch.OutOfMemoryError, "--batch-size")):
        monkeypatch.setattr(ulma, "batch_losses", lambda *_: (_ for _ in ()).throw(error))
        assert told in error_of(capsys, run)

def test_lora_trains_adapters_alone_and_saves_the_merged_model(run, small, monkeypatch):
    pytest.importorskip("peft")
    models, load_model, saved, save = [], ulma.load_model, [], torch.save
    monkeypatch.setattr(ulma, "load_model", lambda *these: models.append(load_model(*these)) or models[-1])
    monkeypatch.setattr(torch, "save", lambda state, path: saved.append(state) or save(state, path))
    results, out = run("--method", "sft", "--lora", 2, "--save-steps", 3, "--bf16", "--learning-rate", 0.03)
    [model], before, after = models, weights(small / "model"), weights(out)
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {
        (True, torch.float32), (False, torch.bfloat16)}
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapters == len(flat(saved[0]["parameters"])) < model.num_parameters() / 4  # in a checkpoint
    changed = {name: after[name] - before[name] for name in before if (before[name] != after[name]).any()}
    assert run("--lora", 2) and {p.dtype for p in models[1].parameters()} == {torch.float32}
    assert changed.keys() == {name for name in before if "proj" in name}  # all linear layers but the head
    assert {torch.linalg.matrix_rank(change, rtol=1e-3).item() for change in changed.values()} == {2}
    again = run("--eval-only", "--model", out, "--reference", small / "model")[0]["eval"]
    assert again["perplexity"] == pytest.approx(results["after"]["perplexity"], rel=0.02)  # it was bfloat16

DEVICE = """
import collections, json, sys, traceback
import torch, ulma
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
        leaves = _pytree.tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or getattr(x, "type", 0) == "pretend" for x in leaves):
            return op(*args, **kwargs or {})
        if op is torch.ops.aten._local_scalar_dense.default:  # the CPU waits for a number
            waits[[f for f in traceback.extract_stack() if "/lib/" not in f.filename][-2].name] += 1
            return 0.5
        with device:
            return op(*_pytree.tree_map(to_fake, args), **kwargs or {})
ulma.sample = lambda model, tokenizer, rows, args: [["x"]] * len(rows)
ulma.save_model = lambda *_: None
with Pretend():
    ulma.main(sys.argv[1:])
print(json.dumps(waits))
"""

def test_on_a_device_without_data_training_waits_only_where_it_logs(small, tmp_path):
    flags = "--method", "pointwise-dpo", "--gradient-checkpointing", "--save-steps", 0, "--epochs", 4
    process = begin(small, tmp_path / "out", *flags, script=("-c", DEVICE), stdout=subprocess.PIPE)
    waits = json.loads(process.communicate()[0].splitlines()[-1])  # rows scored; rewards, labels; 2 lines
    assert waits == {"<lambda>": 10 + 3 * 3, "<listcomp>": 2 * 4 * 10, "train": 2 * 2}

# ---- Interruptions, several processes, and what the README says --------------------------------------------
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"

def begin(small, out, *flags, launcher=(), script=("ulma.py",), stdout=subprocess.DEVNULL):
    """A run of 40 short steps in a process of its own, or in two."""
    command = [sys.executable, *launcher, *script, "--model", small / "model", "--data", small / "data",
               "--max-length", 64, "--epochs", 8, "--batch-size", 2, "--learning-rate", 1e-3,
               "--save-steps", 3, "--output-dir", out, *flags]
    return subprocess.Popen([*map(str, command)], cwd=HERE, stderr=subprocess.PIPE, text=True,
                            stdout=stdout, env={**os.environ, "OMP_NUM_THREADS": "1"})
def end(*processes):
    for process in processes:
        assert process.communicate() and process.returncode == 0, process.args
def wait_for(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.01)
def figures(out):
    """What equal runs have in common: the log, but for times and steps done twice, and the metrics."""
    metrics = json.loads((out / "metrics.json").read_text())
    log = {line["step"]: {**line, "tokens_per_second": 0} for line in read(out / "log.jsonl")}
    return list(log.values()), metrics["before"], metrics["after"]
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
        wait_for((out / "options.json").exists, process)
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.communicate()
        if not (out / "metrics.json").exists():
            end(begin(small, out, "--save-steps", 1))
        same(out, never)

@pytest.mark.parametrize("lora", [0, 4])
def test_two_processes_equal_one_and_go_on_after_a_kill(small, tmp_path, lora):
    """Pair-wise DPO on six pairs, one held out: for the last batch, of one, a process has none."""
    pairs = [{**point(i), "chosen": f" {i}.", "rejected": f" {i}{'!' * i}?"} for i in range(6)]
    flags = ("--data", write(tmp_path / "pairs.jsonl", pairs), "--fine-grained", "--method", "dpo",
             "--lora", lora, "--gradient-accumulation", 2, "--gradient-checkpointing")
    lora and pytest.importorskip("peft")
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
    assert "neither new" in error_of(capsys, run, *again, "--beta", 1)
    assert run(*again)[0]["train"]["from_step"] == 2
    same(stopped, run("--save-steps", 1)[1])
    assert "neither new" in error_of(capsys, run, *again)

def test_a_checkpoint_of_other_data_or_processes_or_with_code_is_refused(stopped, run, capsys):
    file = stopped / "checkpoint-2" / "0-of-1.pt"
    state, flags = torch.load(file, weights_only=True), ("--save-steps", 1, "--output-dir", stopped)
    torch.save({**state, "steps": 99}, file)
    assert "of 99 steps, not 6" in error_of(capsys, run, *flags)
    torch.save({"step": print}, file)
    assert "delete it to begin anew: Weights only load failed" in error_of(capsys, run, *flags)
    file.rename(file.with_name("1-of-2.pt"))
    assert "0-of-1.pt" in error_of(capsys, run, *flags)

def test_the_readmes_command_aligns_the_embedded_model(tmp_path):
    command = [sys.executable, "ulma.py", "--method", "ulma", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
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
    names, base = {}, AutoModelForCausalLM.from_pretrained(HERE / "data" / "base")
    exec(snippet, names)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    prompt, text, _ = names["rows"][0]
    first = (-naive_logp(base, {"prompt": prompt, "completion": text}).item() + math.log(2)) / 2
    assert losses[0] == pytest.approx(first, rel=1e-3) and losses[-1] < losses[0]
