"""The studies mean what they say, and what the pages show is what comes out.

The rivals' losses are the project's with another log Z or another shape.
"""

import contextlib
import io
import json
import math
import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import, and these tests may come first
import demonstrations
import pytest
import real
import run
import torch

import ulma
from ulma import Row, pointwise_dpo_loss, prior_log_z, ulma_loss

torch.manual_seed(0)
BETA, LOGPS, REF_LOGPS = 0.3, torch.randn(50).double() - 9, torch.randn(50).double() - 9
RATIOS, ONE, ZERO = LOGPS - REF_LOGPS, torch.ones(50), torch.zeros(50)
ROOT, HERE, make_data = ulma.HERE, Path(__file__).parent, run.make_data
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "data").rglob("*.md"))]


# ---- Losses of others ----


def pointwise(labels, log_z=0.0, continuous=False, beta=BETA):
    return pointwise_dpo_loss(LOGPS, REF_LOGPS, labels, beta, log_z, continuous)


def test_bco_pair_is_pointwise_dpo_with_log_z_0_on_both_halves():
    chosen, rejected = -torch.sigmoid(BETA * RATIOS).log(), -torch.sigmoid(-BETA * RATIOS).log()
    torch.testing.assert_close(pointwise(ONE) + pointwise(ZERO), chosen + rejected)


def test_sppo_hard_is_the_continuous_loss_with_the_prior_of_one_half():
    log_z = prior_log_z(0.5, BETA, continuous=True)
    for label, target in (ONE, 1 / (2 * BETA)), (ZERO, -1 / (2 * BETA)):
        loss = pointwise(label, log_z, continuous=True)
        torch.testing.assert_close(loss / BETA**2, (RATIOS - target) ** 2)


def test_qrpo_is_the_continuous_loss_on_quantiles_whose_log_z_is_known():
    quantiles = (torch.arange(50) + 0.5).double() / 50
    log_z = math.log(BETA * (math.exp(1 / BETA) - 1))
    mean = (quantiles / BETA).exp().mean()  # E exp(q / β), q uniform
    assert mean.log().item() == pytest.approx(log_z, abs=1e-3)
    loss = pointwise(quantiles, log_z, continuous=True)
    torch.testing.assert_close(loss, (quantiles - BETA * log_z - BETA * RATIOS) ** 2)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_nft_has_ulmas_numerator_on_thumbs_down_and_is_equal_where_the_ratio_is_one_half(share):
    ratio = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    log_z, zero = math.log(share / (1 - share)), torch.zeros(3)
    losses = ulma_loss(ratio.log(), zero, zero, 1.0, log_z), -torch.log1p(-share * ratio)
    ulmas, nfts = (torch.autograd.grad(x.sum(), ratio)[0] * ratio.detach() for x in losses)
    part = share * ratio.detach()
    torch.testing.assert_close(ulmas, part / (1 - share + part))
    torch.testing.assert_close(nfts, part / (1 - part))
    assert ulmas[1].item() == pytest.approx(nfts[1].item())
    assert ulmas[2].item() == pytest.approx(share)  # below 1, and NFT's q/(1 − q) is not
    assert nfts[2].item() == pytest.approx(share / (1 - share))


def test_kto_is_one_minus_the_probability_of_the_label_and_has_the_weight_that_is_told(monkeypatch):
    logps = LOGPS.float().requires_grad_()
    monkeypatch.setattr(ulma, "row_logps", lambda *given: logps)
    labels = (torch.arange(50) % 2).float()
    rows = [
        Row("x", ZERO, ZERO, label, 5.0 if label else 1.0, ref_logp=ref)
        for label, ref in zip(labels.tolist(), REF_LOGPS.tolist())
    ]
    args = ulma.read_options(["--beta", str(BETA)])
    losses, rewards = run.kto_losses(None, rows, args)
    weights = 1 + 4 * labels
    expected = 1 - (-pointwise_dpo_loss(logps, REF_LOGPS.float(), labels, BETA)).exp()
    torch.testing.assert_close(losses, weights * expected)
    [gradient] = torch.autograd.grad(losses.sum(), logps, retain_graph=True)
    torch.testing.assert_close(-gradient, weights * run.weights_of(rewards, labels, args, "kto"))
    more, _ = run.kto_losses(None, rows, args, sft=1.0)
    torch.testing.assert_close(more - losses, -weights * labels * logps)


@pytest.mark.parametrize("flags", ["ulma", "pointwise-dpo", "sft", "ulma --continuous"])
def test_the_weights_of_a_table_are_those_of_the_gradient(flags, monkeypatch):
    logps, labels = LOGPS.float().requires_grad_(), [1.0, 0.0] * 25
    monkeypatch.setattr(ulma, "row_logps", lambda *given: logps)
    rows = [Row("x", ZERO, ZERO, z, 1.0, ref_logp=r) for z, r in zip(labels, REF_LOGPS.tolist())]
    args = ulma.read_options(f"--beta {BETA} --log-z 0.5 --method {flags}".split())
    if args.method == "sft":
        labels = [1.0] * 50
    losses, rewards = ulma.batch_losses(None, rows, args)
    [gradient] = torch.autograd.grad(losses.sum(), logps)
    weights = run.weights_of(rewards, torch.tensor(labels), args, "")
    torch.testing.assert_close(-gradient, weights)


def test_pairwise_dpo_takes_each_chosen_row_with_its_rejected_one(monkeypatch):
    logps = LOGPS.float().requires_grad_()
    labels, ref_logps = [1.0] * 25 + [0.0] * 25, REF_LOGPS.float()
    rows = [
        Row(f"prompt {i % 25}", ZERO, ZERO, label, 1.0, ref_logp=ref)
        for i, (label, ref) in enumerate(zip(labels, ref_logps.tolist()))
    ]
    order = []

    def row_logps(model, given, args):
        order.extend(row.prompt for row in given)
        return logps

    monkeypatch.setattr(ulma, "row_logps", row_logps)
    args = ulma.read_options(["--beta", str(BETA)])
    rejected_of = run.pairs_of(rows)
    losses, rewards = run.dpo_losses(None, list(rejected_of), args, rejected_of)
    assert order == [row.prompt for row in rows]
    expected = ulma.dpo_loss(logps[:25], logps[25:], ref_logps[:25], ref_logps[25:], BETA)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(rewards, (BETA * (logps - ref_logps)).detach())
    [gradient] = torch.autograd.grad(losses.sum(), logps)
    weights = run.weights_of(rewards, torch.tensor(labels), args, "dpo")
    torch.testing.assert_close(-gradient, weights)


def test_every_good_and_bad_row_of_one_prompt_are_a_pair():
    names = "good 1, good 1, bad 1, bad 1, bad 1, good 2, bad 2, good 3, bad 4".split(", ")
    rows = [Row(name[-1], ZERO, ZERO, float("good" in name)) for name in names]
    rejected_of = run.pairs_of(rows)
    assert len(rejected_of) == 2 * 3 + 1
    assert len({id(chosen) for chosen in rejected_of}) == 7
    for chosen, rejected in rejected_of.items():
        assert chosen.prompt == rejected.prompt
        assert (chosen.label, rejected.label) == (1, 0)


# ---- The studies ----


def test_the_true_log_z_is_that_of_the_draws(monkeypatch):
    scores = [1.0] * 16 + [0.4] * 48
    monkeypatch.setattr(run, "draws", lambda kind: {"x": scores})
    true_log_z = run.true_log_z.__wrapped__
    exact = math.log(0.25 * math.exp(2) + 0.75 * math.exp(0.8))
    assert true_log_z("", "x", 0.5, True) == pytest.approx(exact, abs=1e-5)
    best, mean = 1.0, 0.55  # reward in reach, to which β log Z tends as β falls, and as it grows
    assert true_log_z("", "x", 1e-3, True) * 1e-3 == pytest.approx(best, abs=0.01)
    assert true_log_z("", "x", 1e3, True) * 1e3 == pytest.approx(mean, abs=0.01)
    assert true_log_z("", "x", 0.5, False) * 0.5 == pytest.approx(math.log(16.5 / 48.5), abs=1e-5)


@pytest.mark.parametrize(
    "flags, positive",
    [
        ("--log-z 0", 0.5),
        ("--z true", 0.25),
        ("--z running", 0.5),
        ("--up 3 --log-z 0", 1.5),
        ("--loss kto", 0.25),
        ("--loss kto-sft", 1.25),
        ("--loss dpo", 0.5),
        ("--average --log-z 0", 0.5),
    ],
)
def test_a_run_is_trained_as_its_flags_say_and_its_weights_kept(
    flags, positive, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "RUNS", tmp_path)
    monkeypatch.setattr(run, "true_log_z", lambda kind, prompt, beta, graded: math.log(3) / beta)
    monkeypatch.setattr(ulma, "SAMPLES", 1)
    rows = make_data.read(run.make_rows("fair", True) / "train.jsonl")
    assert {row["score"] for row in rows if row["label"]} == {1.0}
    good = [row for row in rows if row["label"]][:8]
    asked = [row["prompt"] for row in good]
    bad = [row for row in rows if not row["label"] and row["prompt"] in asked]
    assert len(bad) == 8
    make_data.write(tmp_path / "rows" / "fair-validation" / "train.jsonl", good + bad)
    common = "--method pointwise-dpo --rows fair --epochs 1 --learning-rate 1e-6 --beta 1"
    one = f"{common} {flags}", 0, True
    run.execute(one)
    results = json.loads((run.folder_of(*one) / "metrics.json").read_text())
    [[weight, ratio]] = results["classes"]["label 1, acceptable, demonstrated"]
    assert weight == pytest.approx(positive, abs=1e-3) and abs(ratio) < 1e-3
    assert 0 < run.measured(one)["exact_match"] < 100
    mean_score, *shares = run.kinds(one).values()
    assert 0 < mean_score < 100 and sum(shares) == pytest.approx(100)


def test_a_sweep_chooses_the_best_cell_and_prints_the_grid(monkeypatch, capsys):
    monkeypatch.setattr(run, "perform", lambda runs, title: None)
    monkeypatch.setattr(run, "measured", lambda one: {"exact_match": 10.0 * ("3e-5" in one[0])})
    best = run.sweep("noise", {"SFT": "--method sft --learning-rate 1e-3"})
    assert best == {"SFT": "--method sft --learning-rate 3e-5"}
    assert "10.0 | 0.0 | 0.0" in capsys.readouterr().out


@pytest.mark.parametrize("table", run.TABLES)
def test_every_table_has_flags_that_are_read_and_folders_of_their_own(table):
    folders = set()
    for flags in run.TABLES[table].values():
        _, argv = run.read_flags(flags)
        ulma.read_options(argv)
        folders.add(run.folder_of(flags, 0, False))
    assert len(folders) == len(run.TABLES[table])


@pytest.mark.parametrize(
    "rejected, chosen, rated",
    [
        ([20, 31, 22, 33], [20, 21, 22, 23], [31, 33]),  # replaced
        ([20, 22], [20, 21, 22], []),  # inserted
        ([31, 32], [21, 22, 23], [31, 32]),  # all
        ([20] * 250, [31] + [20] * 250, []),  # however often a token comes
    ],
)
def test_of_a_rejected_response_the_tokens_count_that_the_edit_removed(rejected, chosen, rated):
    def row(response, label):
        ids = torch.tensor([10, 11, *response, 1])
        return Row("10 11", ids, torch.arange(len(ids)) > 1, label)

    first, second = row(chosen, 1.0), row(rejected, 0.0)
    kept = run.only_edits([first, second])
    assert kept == ([first, second] if rated else [first])
    assert first.response_mask.tolist() == [False, False] + [True] * (len(chosen) + 1)
    assert second.input_ids[second.response_mask].tolist() == rated


def test_the_frontier_measures_score_and_kl_of_the_responses(tmp_path):
    responses = [
        {"completion": "A", "tokens": 2, "score": 0.2, "logp": -3.0, "ref_logp": -5.0},
        {"completion": "A", "tokens": 4, "score": 0.6, "logp": -4.0, "ref_logp": -4.0},
    ]
    make_data.write(tmp_path / "responses.jsonl", responses)
    metrics = {"after": {"perplexity": 7.0, "reward_auc": 0.9}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    figures = list(real.measured_in(tmp_path).values())
    assert figures == pytest.approx([0.4, 1.0, 1.5, 50.0, 7.0, 0.9])


def test_the_table_of_real_demonstrations_has_the_best_beta_and_differences_from_sft(
    tmp_path, monkeypatch, capsys
):
    question = "demonstrated", "gcd", "2, 4?", "2"
    fakes = {"RUNS": tmp_path, "questions": lambda seed: [[question]] * 3, "SEEDS": range(2)}
    for name in ("make_base", "perform", "in_processes", "likelihoods", "picture"):
        fakes[name] = lambda *given: None
    for name, fake in fakes.items():
        monkeypatch.setattr(demonstrations, name, fake)
    for (name, rows), (_, flags) in demonstrations.ROWS.items():
        for beta in demonstrations.BETAS if flags.endswith("--beta") else [""]:
            for seed in range(2):
                exact = 20.0 + (name == "ULMA") * (5 + seed) + (beta == "1")
                figures = {"validation exact": exact, "KL": 1.0, "tokens": 2, "ended": 1.0}
                figures |= {"distinct": 0.5, "test exact": exact}
                figures |= {f"test exact/{group}": exact for group in demonstrations.FAMILIES}
                folder = demonstrations.folder_of((name, rows, beta, seed))
                make_data.write(folder / "metrics.json", [figures])
    demonstrations.real_demonstrations()
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    [ulma_line] = [line for line in lines if line[:2] == ["| ULMA", "own"]]
    assert ulma_line[2:5] == ["1", "26.5 ± 0.5", "6.5 ± 0.5"]
    gold = make_data.read(tmp_path / "rows/demonstrations, 0/train.jsonl")
    assert [(row["completion"], row["label"]) for row in gold] == [("2", 1)]


# ---- The rows ----


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path)

    def rows_of(kind, split="train", validation=False):
        return make_data.read(run.make_rows(kind, validation) / f"{split}.jsonl")

    return rows_of


def acceptable(row):
    return make_data.acceptable(row["type"], make_data.noun_of(row))


def test_the_embedded_rows_are_what_their_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["make_data.py", "--rows-only"])
    make_data.main()
    for name in ("train", "test", "edits/train"):
        path = ROOT / "data" / f"{name}.jsonl"
        assert path.read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
    rows, (train, test) = make_data.read(tmp_path / "test.jsonl"), make_data.split()
    assert all((row["completion"] in row["answers"]) == row["label"] for row in rows)
    for verb in make_data.VERBS:  # no combination is in both
        assert not set(train[verb]) & set(test[verb])
    rows = make_data.read(tmp_path / "train.jsonl")
    assert {row["group"] for row in rows if row["label"]} == {"demonstrated"}


def test_the_edits_are_of_thumbs_down_of_every_type_alike(rows_of):
    edits = rows_of("edits")
    assert rows_of("edits", "test") == rows_of("embedded", "test")
    rows = rows_of("embedded")
    disliked = [(row["prompt"], row["completion"]) for row in rows if row["label"] == 0]
    assert len(edits) == 200
    assert all((edit["prompt"], edit["rejected"]) in disliked for edit in edits)
    assert all(edit["chosen"].strip() in acceptable(edit) for edit in edits)
    assert {[edit["type"] for edit in edits].count(verb) for verb in make_data.VERBS} == {8, 9}


def test_noise_makes_that_share_of_the_demonstrations_bad_and_nothing_else(rows_of):
    assert rows_of("noise-0.2", "test") == rows_of("embedded", "test")
    exact, noisy = rows_of("embedded"), rows_of("noise-0.2")
    changed = [(before, after) for before, after in zip(exact, noisy) if before != after]
    assert len(changed) == 32  # of 160
    for before, after in changed:
        assert before["prompt"] == after["prompt"]
        assert before["label"] == after["label"] == after["score"] == 1
        assert after["completion"].strip() not in acceptable(after)


def test_every_share_has_its_kinds_and_as_many_demonstrations_and_half_is_the_embedded_rows(
    rows_of,
):
    assert rows_of("share-50") == rows_of("embedded")
    before = set()
    for percent in (0, 25, 50, 75, 100):
        rows, kinds = rows_of(f"share-{percent}"), set(run.demonstrated(percent))
        assert {row["type"] for row in rows if row["label"]} == kinds
        assert sum(row["label"] for row in rows) == 160 * bool(kinds)
        assert before <= kinds and len(kinds) in (24 * percent // 100, 24 * percent // 100 + 1)
        before = kinds


def test_the_spread_rows_have_labels_by_the_rule_and_shares_from_5_to_95_percent(rows_of):
    rows, shares = rows_of("spread"), run.acceptance()
    assert min(shares.values()) == 0.05 and max(shares.values()) == pytest.approx(0.95)
    found = {
        verb: [row["label"] for row in rows if make_data.verb_of(row) == verb] for verb in shares
    }
    assert all(abs(ulma.mean(found[verb]) - shares[verb]) < 0.25 for verb in shares)
    assert len(rows_of("spread", validation=True)) < len(rows) == 960


# ---- The pages ----


def snippets(text):
    """(language, text) of every fenced block."""
    return re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)


def anchor_of(heading):
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_by_hand_prints_what_stands_below_it():
    [by_hand] = [text for kind, text in snippets(README) if kind == "python" and "autograd" in text]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(by_hand, {})
    texts = [text for _, text in snippets(README)]
    assert printed.getvalue() == texts[texts.index(by_hand) + 1]


def test_a_chat_uis_thumbs_become_rows(tmp_path, monkeypatch, capsys):
    messages = {
        name: {"role": role, "content": name.upper(), "parentId": parent}
        for name, role, parent in (
            ("q1", "user", None),
            ("a1", "assistant", "q1"),
            ("q2", "user", "a1"),
            ("a2", "assistant", "q2"),
            ("b2", "assistant", "q2"),  # another answer, not rated
        )
    }
    snapshot = {"chat": {"chat": {"history": {"messages": messages}}}}
    rated = [
        {"data": {"rating": rating}, "meta": {"message_id": name}, "snapshot": snapshot}
        for name, rating in (("a2", -1), ("a1", 1))
    ]
    monkeypatch.chdir(tmp_path)
    Path("feedback.json").write_text(json.dumps(rated))
    [snippet] = [text for kind, text in snippets(README) if "feedback.json" in text]
    exec(snippet, {})
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == [0, 1]
    texts = [[message["content"] for message in row["completion"]] for row in rows]
    assert texts == [["Q1", "A1", "Q2", "A2"], ["Q1", "A1"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            if anchor:
                text = linked.read_text(encoding="utf-8")
                headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
                assert anchor in map(anchor_of, headings), target


def test_every_test_that_the_readme_names_exists():
    tests = (ROOT / "test_ulma.py").read_text(encoding="utf-8")
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests


def test_every_page_is_in_the_index_and_its_tables_exist():
    index = (HERE / "README.md").read_text(encoding="utf-8")
    for page in HERE.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert page.name == "README.md" or f"({page.name})" in index
        for table in re.findall(r"data/studies/run.py ([a-z][a-z-]*)", text):
            assert table in [*run.TABLES, *run.ELSEWHERE]
