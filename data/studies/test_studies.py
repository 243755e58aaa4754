"""The studies mean what they say, and what the pages show is what comes out.

The rivals' losses are the project's with another log Z or another shape.
"""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import, and these tests may come first
import losses
import more_tables
import pytest
import questions
import records
import run
import runs
import smollm2
import store
import tables
import torch

import ulma
from ulma import Row, pointwise_dpo_loss, prior_log_z, ulma_loss

torch.manual_seed(0)
BETA, LOGPS, REF_LOGPS = 0.3, torch.randn(50).double() - 9, torch.randn(50).double() - 9
RATIOS, ONE, ZERO = LOGPS - REF_LOGPS, torch.ones(50), torch.zeros(50)
ROOT, HERE, make_data = ulma.HERE, Path(__file__).parent, records.make_data
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


@pytest.fixture
def gradient_of(monkeypatch):
    """gradient_of(flags): losses of fifty rows, each label 25 times, and −∇ of them by log π."""

    def gradient_of(flags, log_z=0.5):
        logps = LOGPS.float().requires_grad_()
        monkeypatch.setattr(ulma, "row_logps", lambda *given: logps)
        rows = [
            Row(f"prompt {i % 25}", ZERO, ZERO, float(i < 25), 1 + 2 * (i % 2), ref_logp=ref)
            for i, ref in enumerate(REF_LOGPS.tolist())
        ]
        own, argv = losses.parse_flags(f"--beta {BETA} {flags}")
        args = ulma.read_options([*argv, "--log-z", str(log_z)])
        losses_of = losses.Losses(own, rows)
        found, rewards = losses_of(None, list(losses_of.rejected_of) or rows, args)
        [gradient] = torch.autograd.grad(found.sum(), logps)
        return found.detach(), rewards, -gradient, losses_of

    return gradient_of


LABELS = (torch.arange(50) < 25).float()
WEIGHTS = 1 + 2.0 * (torch.arange(50) % 2)
FLAGS = ["", "--method pointwise-dpo", "--method sft", "--continuous", "--loss kto"]
FLAGS += ["--loss kto-sft", "--loss dpo", "--loss shuffled --method pointwise-dpo"]
FLAGS += ["--loss constant-push", "--z mean", "--z midpoint --method pointwise-dpo"]


@pytest.mark.parametrize("flags", FLAGS)
def test_the_weights_that_are_kept_are_those_of_the_gradient(flags, gradient_of):
    _, _, gradient, losses_of = gradient_of(flags)
    kept = torch.tensor([weight for _, weight, _ in losses_of.seen])
    if flags == "--loss dpo":  # a pair has the mean weight of its two rows
        gradient = gradient * WEIGHTS / ((WEIGHTS[:25] + WEIGHTS[25:]) / 2).repeat(2)
    if flags == "--method sft":  # it is given rows of label 1 alone
        gradient, kept = gradient[:25], kept[:25]
    torch.testing.assert_close(gradient, kept)


@pytest.mark.parametrize("flags", ["", "--method pointwise-dpo", "--continuous", "--method sft"])
def test_without_flags_of_the_studies_the_losses_are_those_of_ulma(flags, gradient_of):
    found, rewards, _, losses_of = gradient_of(flags)
    args = ulma.read_options(f"--beta {BETA} --log-z 0.5 {flags}".split())
    rows = [row for row, _, _ in losses_of.seen]
    expected, expected_rewards = ulma.batch_losses(None, rows, args)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(rewards, expected_rewards)


def test_kto_is_one_minus_the_probability_of_the_label(gradient_of):
    found, _, _, _ = gradient_of("--loss kto")
    likelihood = (-pointwise_dpo_loss(LOGPS.float(), REF_LOGPS.float(), LABELS, BETA)).exp()
    torch.testing.assert_close(found, WEIGHTS * (1 - likelihood))
    more, _, _, _ = gradient_of("--loss kto-sft")
    torch.testing.assert_close(more - found, -WEIGHTS * LABELS * LOGPS.float())


def test_pairwise_dpo_takes_each_chosen_row_with_its_rejected_one(gradient_of):
    found, _, _, _ = gradient_of("--loss dpo")
    halves = [logps.float()[part] for logps in (LOGPS, REF_LOGPS) for part in HALVES]
    weights = (WEIGHTS[:25] + WEIGHTS[25:]) / 2
    torch.testing.assert_close(found, weights * ulma.dpo_loss(*halves, BETA))


HALVES = slice(0, 25), slice(25, 50)


def test_a_shuffled_brake_gives_demonstrations_weights_of_other_demonstrations(gradient_of):
    *_, braked = gradient_of("--method pointwise-dpo")
    *_, shuffled = gradient_of("--loss shuffled --method pointwise-dpo")
    braked, shuffled = (
        torch.tensor([weight / row.weight for row, weight, _ in kept.seen])
        for kept in (braked, shuffled)
    )
    torch.testing.assert_close(shuffled[25:], braked[25:])
    assert not torch.allclose(shuffled[:25], braked[:25])
    known = (shuffled[:25, None] - braked[None, :25]).abs().amin(1)
    assert known.max() < 1e-6


def test_an_unbraked_push_stays_what_it_is_where_the_policy_is_the_reference(gradient_of):
    *_, losses_of = gradient_of("--loss constant-push")
    at_first = -BETA * torch.tensor(BETA * 0.5).sigmoid().item()
    weights = [weight / row.weight for row, weight, _ in losses_of.seen]
    assert weights[:25] == [1.0] * 25
    assert weights[25:] == pytest.approx([at_first] * 25)


def test_bco_s_log_z_is_the_midpoint_of_the_classes_or_the_mean_of_all_rows(gradient_of):
    *_, losses_of = gradient_of("--z mean")
    args = ulma.read_options(["--log-z", "7"])
    ratios = RATIOS.float()
    assert losses_of.log_z([], args) == pytest.approx(-ratios.mean().item(), abs=1e-5)
    del losses_of.seen[30:]  # all of label 1, and five of label 0
    losses_of.own.z = "midpoint"
    midpoint = (ratios[:25].mean() + ratios[25:30].mean()) / 2
    assert losses_of.log_z([], args) == pytest.approx(-midpoint.item(), abs=1e-5)
    losses_of.seen = []
    assert losses_of.log_z([], args) == 7


def test_every_good_and_bad_row_of_one_prompt_are_a_pair():
    names = "good 1, good 1, bad 1, bad 1, bad 1, good 2, bad 2, good 3, bad 4".split(", ")
    rows = [Row(name[-1], ZERO, ZERO, float("good" in name)) for name in names]
    rejected_of = losses.pairs_of(rows)
    assert len(rejected_of) == 2 * 3 + 1
    assert len({id(chosen) for chosen in rejected_of}) == 7
    for chosen, rejected in rejected_of.items():
        assert chosen.prompt == rejected.prompt
        assert (chosen.label, rejected.label) == (1, 0)


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
    kept = losses.only_edits([first, second])
    assert kept == ([first, second] if rated else [first])
    assert first.response_mask.tolist() == [False, False] + [True] * (len(chosen) + 1)
    assert second.input_ids[second.response_mask].tolist() == rated


# ---- Runs and tables ----


@pytest.fixture
def small(monkeypatch):
    """A run on sixteen rows and four prompts, so that it takes a second."""
    whole = records.training_and_test

    def few(*given):
        train, asked = whole(*given)
        good = [record for record in train if record["label"] == 1][:8]
        prompts = [record["prompt"] for record in good]
        bad = [record for record in train if record["label"] == 0]
        bad = [record for record in bad if record["prompt"] in prompts] or bad[:8]
        return good + bad, asked[:4] + asked[-4:]

    monkeypatch.setattr(records, "training_and_test", few)


@pytest.mark.parametrize(
    "flags, positive",
    [
        ("--log-z 0", 0.5),
        ("--z midpoint --log-z 0", 0.5),
        ("--up 3 --log-z 0", 1.5),
        ("--loss kto", 0.25),
        ("--loss kto-sft", 1.25),
        ("--loss dpo", 0.5),
        ("--average --log-z 0", 0.5),
        ("--loss constant-push --log-z 0", 0.5),
        ("--sft 1 --log-z 0", 0.5),
    ],
)
def test_a_run_is_trained_as_its_flags_say(flags, positive, small):
    common = "--method pointwise-dpo --epochs 1 --learning-rate 1e-6 --beta 1"
    figures = runs.execute((f"{common} {flags}", 0, False))
    first, last, ratio = figures["classes"]["label 1, acceptable, demonstrated"]
    assert first == last == pytest.approx(positive, abs=1e-3) and abs(ratio) < 1e-3
    assert 0 < figures["all"] < 100


def test_a_push_may_have_a_strength_of_its_own(small):
    common = "--method ulma --epochs 1 --learning-rate 1e-6 --beta 1 --log-z 0"
    figures = runs.execute((f"{common} --down 3", 0, False))
    for name, (first, _, _) in figures["classes"].items():
        assert first == pytest.approx(1.0 if name.startswith("label 1") else -1.5, abs=1e-3)


def test_a_run_with_eval_only_measures_the_base_model(small, monkeypatch):
    monkeypatch.setattr(records, "rated", lambda learnt, seed: learnt[:4])
    flags = "--eval-only --kinds"
    figures = runs.execute((flags, 0, False))
    assert "classes" not in figures  # of rows that were trained
    assert 0 < figures["rated"] < 100
    assert set(figures["kinds"]) == {"demonstrated", "undemonstrated"}


def test_the_prompts_of_a_run_without_thumbs_down_are_those_that_would_have_them():
    whole, _ = records.training_and_test("data", 1, False)
    few, _ = records.training_and_test("demonstrations", 1, False)
    rated = records.rated(whole, 1)
    assert rated == records.rated(few, 1) and len(rated) == records.RATED
    assert {record["group"] for record in rated} == {"undemonstrated"}


def test_the_true_log_z_makes_sigma_the_probability_of_an_acceptable_answer(small, monkeypatch):
    seen = []
    monkeypatch.setattr(
        runs, "Losses", lambda *given: seen.append(losses.Losses(*given)) or seen[0]
    )
    flags = "--method pointwise-dpo --epochs 1 --learning-rate 1e-9 --beta 2 --z true"
    runs.execute((flags, 0, False))
    for row, weight, _ in seen[0].seen:
        assert 0 < row.acceptance < 1
        assert weight == pytest.approx(2 * (row.label - row.acceptance), abs=1e-3)


def test_the_probability_of_an_acceptable_answer_is_the_share_of_samples(monkeypatch):
    asked = make_data.read(ROOT / "data/test.jsonl")[::96]
    args = ulma.read_options(["--batch-size", "8"])
    tokenizer = ulma.load_tokenizer(args.model)
    model = ulma.load_model(args.model, tokenizer)
    exact = runs.acceptance(model, tokenizer, asked, args, records)
    monkeypatch.setattr(ulma, "SAMPLES", 200)
    drawn = ulma.sample(model, tokenizer, records.rows_of(asked, args, tokenizer), args)
    for record, share, samples in zip(asked, exact, drawn):
        found = ulma.mean([f" {one.text}" in record["answers"] for one in samples])
        assert found == pytest.approx(share, abs=0.14)  # four standard errors at most


def test_a_seed_draws_its_own_rows_and_seed_0_has_those_of_data():
    first, _ = records.training_and_test("data", 0, False)
    assert first == make_data.read(ROOT / "data/train.jsonl")
    other, _ = records.training_and_test("data", 1, False)
    assert len(other) == len(first) and other != first
    assert sum(record["label"] for record in other) == 160


def test_what_is_stored_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path / "results.jsonl")
    asked = []

    def in_processes(function, some, title):
        asked.extend(some)
        return [(run, {"all": 1.5}) for run in some]

    monkeypatch.setattr(runs, "in_processes", in_processes)
    for flags in ("--method sft --beta 3", "--beta 3 --method sft", "--method ulma --beta 3"):
        done = runs.perform([(flags, 0, False)], "runs")
        assert done["--beta 3 --method " + flags.split("method ")[1].split()[0], 0, False]
    assert [flags for flags, _, _ in asked] == ["--beta 3 --method sft", "--beta 3 --method ulma"]


def test_holm_multiplies_the_least_p_by_the_number_of_comparisons():
    chances = {"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.9}
    assert tables.holm(chances) == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.9})
    assert [tables.verdict(p) for p in (0.09, 0.04, 1e-9)] == [
        "no (p = 0.09)",
        "yes (p = 0.04)",
        "yes (p < 0.001)",
    ]


def test_the_p_of_a_difference_is_that_of_a_paired_t_test():
    pytest.importorskip("scipy")
    # t = 2.776 is the 97.5 % quantile with four degrees of freedom
    centred = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).double()
    error = centred.std() / 5**0.5
    assert tables.chance((centred + 2.776 * error).tolist()) == pytest.approx(0.05, abs=1e-4)


def test_the_table_has_means_errors_and_differences_seed_by_seed(monkeypatch, capsys):
    pytest.importorskip("scipy")
    values = {"--method ulma": [80, 82, 84], "--method sft": [70, 73, 73]}
    done = {
        (flags, seed, False): {"all": value, "demonstrated": None}
        for flags, some in values.items()
        for seed, value in enumerate(some)
    }
    monkeypatch.setitem(tables.TABLES, "noise", {"": {"A": "--method ulma", "B": "--method sft"}})
    monkeypatch.setitem(
        tables.SETTINGS_OF["noise"], "columns", tables.headers_of("all, demonstrated")
    )
    monkeypatch.setattr(tables, "make", lambda *given: done)
    tables.print_results("noise", 3)
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "| A | 82.0 ± 1.2 |  |  |  |"
    assert second.startswith("| B | 72.0 ± 1.0 |  | −10.0 ± 0.6 | yes (p = ")


def test_a_column_has_its_usual_header_or_the_one_that_is_given():
    found = tables.headers_of("score, all, demonstrated as easy kinds")
    assert found == {"score": "score", "all": "all requests", "demonstrated": "easy kinds"}


def test_a_sweep_tries_every_setting_and_marks_the_best(monkeypatch, capsys):
    monkeypatch.setattr(
        tables,
        "perform",
        lambda some, title: {
            run: {"all": 10.0 * ("3e-4" in run[0])} for run in map(store.named, some)
        },
    )
    monkeypatch.setitem(tables.TABLES, "methods", {"": {"SFT": "--method sft --learning-rate 1"}})
    tables.sweep("methods", 1)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines == [
        "| SFT | 1e-4 | 0.0 | 1 |  |",
        "| SFT | 3e-4 | 10.0 | 1 | best |",
        "| SFT | 1e-3 | 0.0 | 1 |  |",
    ]


def test_a_second_seed_tries_the_two_best_settings_of_each_row(monkeypatch, capsys):
    answers = {("1e-4", 0): 5, ("3e-4", 0): 9, ("1e-3", 0): 7, ("3e-3", 0): 8}
    answers |= {("3e-4", 1): 1, ("3e-3", 1): 6}  # the best two

    def perform(some, title):
        return {
            (flags, seed, True): {"all": answers[flags.split()[1], seed]}
            for flags, seed, _ in map(store.named, some)
        }

    monkeypatch.setattr(tables, "perform", perform)
    monkeypatch.setitem(tables.TABLES, "methods", {"": {"SFT": "--method sft --learning-rate 1"}})
    tried = "--learning-rate 1e-4 3e-4 1e-3 3e-3"
    monkeypatch.setitem(tables.SETTINGS_OF["methods"], "try", tried)
    scores = tables.sweep("methods", 2)
    assert scores["SFT", "1e-3"] == [7] and scores["SFT", "3e-3"] == [8, 6]
    assert "| SFT | 3e-3 | 7.0 | 2 | best |" in capsys.readouterr().out


def test_a_sweep_does_not_measure_what_no_setting_is_chosen_by(monkeypatch):
    swept = []

    def perform(some, title):
        swept.extend(map(store.named, some))
        return {one: {"all": 0.0} for one in swept}

    monkeypatch.setattr(tables, "perform", perform)
    row = {"SFT": "--method sft --learning-rate 1 --samples --rated"}
    monkeypatch.setitem(tables.TABLES, "methods", {"": row})
    tables.sweep("methods", 1)
    assert swept[0] == ("--learning-rate 1e-4 --method sft", 0, True)


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_table_has_flags_that_are_read_and_rows_that_differ(table):
    for rows in tables.TABLES[table].values():
        for flags in rows.values():
            own, argv = losses.parse_flags(flags)
            ulma.read_options(argv)
            first, _, second = own.records.partition("-")
            source = runs.source_of(own.records)
            assert (second if source is questions else first) in source.__doc__
        assert len({store.named((flags, 0, False)) for flags in rows.values()}) == len(rows)


def test_the_law_of_coverage_is_its_own_inverse():
    assert more_tables.after(73.0, 0.43) == pytest.approx(82.6, abs=0.1)
    assert more_tables.after(5.4, 0.43) == pytest.approx(9.1, abs=0.05)
    for before, now in ((30.0, 60.0), (73.0, 82.5)):
        assert more_tables.after(before, more_tables.coverage(before, now)) == pytest.approx(now)


def test_the_law_and_the_simpler_rule_predict_new_prompts_from_training_prompts(
    monkeypatch, capsys
):
    rows = {"0": "--method sft", "50": "--method ulma"}
    figures = {"--method sft": (50, 20), "--method ulma": (60, 32)}  # training prompts, new ones
    done = {
        (flags, seed, False): {"rated": rated, "undemonstrated": new}
        for flags, (rated, new) in figures.items()
        for seed in range(2)
    }
    monkeypatch.setitem(more_tables.LAWS, "negatives", ("thumbs-down", "--method sft"))
    monkeypatch.setitem(tables.TABLES, "negatives", {"": rows})
    monkeypatch.setattr(tables, "make", lambda *given: done)
    more_tables.print_law("negatives", 2)
    *_, line = capsys.readouterr().out.splitlines()
    # c = (1 − 50/60) / 0.5 = 1/3; 20 / (1 − 0.8/3) = 27.3; and 20 + 10 = 30.
    assert line == (
        "| 50 | 20.0 ± 0.0 | 0.33 ± 0.00 | 27.3 ± 0.0 | 32.0 ± 0.0 | +4.7 ± 0.0 | +2.0 ± 0.0 |"
    )


def test_the_share_of_mistakes_that_is_covered_is_one_of_the_four_sorts():
    kinds = {"full": 40.0, "brief": 10.0, "rude": 20.0, "wrong thing": 5.0, "other": 25.0}
    assert more_tables.share_of([("rude",)], kinds) == pytest.approx(0.8)
    assert more_tables.share_of([("over-refusal", "complies")], kinds) == 0
    assert more_tables.share_of(records.MISTAKES, kinds) == 1


# ---- Questions to a real model ----


@pytest.fixture
def asked(monkeypatch):
    """Two families of one training question and one test question each, and two drawn answers."""
    families = {"demonstrated": "2 + 2?", "undemonstrated": "3 + 3?"}
    some = [questions.record(*pair, "4") for pair in families.items()]
    parts = {"training": some, "validation": some[:1], "test": some[1:]}
    answers = {"instruct": [["5", "4"], ["4", "4"]], "sft": [["4", "4"], ["7", "8"]]}
    monkeypatch.setattr(questions, "questions", lambda seed: parts)
    monkeypatch.setattr(questions, "drawn", lambda name, seed: answers[name])


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("demonstrations", [("2 + 2?", "4", 1)]),
        ("instruct", [("2 + 2?", "4", 1), ("2 + 2?", "5", 0)]),
        ("own", [("2 + 2?", "4", 1), ("2 + 2?", "4", 1), ("3 + 3?", "7", 0)]),
    ],
)
def test_questions_have_right_demonstrations_and_at_most_one_wrong_answer(kind, expected, asked):
    learnt, test = questions.training_and_test(f"questions-{kind}", 0, False)
    found = [(row["prompt"][1]["content"], row["completion"], row["label"]) for row in learnt]
    assert found == expected
    assert [(row["completion"], row["group"]) for row in test] == [("4", "undemonstrated")]
    _, validation = questions.training_and_test(f"questions-{kind}", 0, True)
    assert [row["group"] for row in validation] == ["demonstrated"]


def test_guesses_look_at_the_family_of_a_question_alone(monkeypatch):
    def of(*answers):
        return [
            questions.record("demonstrated", "?", answer) | {"family": "f"} for answer in answers
        ]

    parts = {"training": of("1", "1", "1", "2"), "test": of("1", "2", "3", "2")}
    monkeypatch.setattr(questions, "questions", lambda seed: parts)
    found = questions.guesses(0)
    assert found["the most frequent answer"] == {"demonstrated": 25.0}
    assert found["a drawn answer"] == {"demonstrated": 31.25}  # 75, 25, 0 and 25


def test_drawn_answers_are_those_of_the_run_with_their_name_and_seed(monkeypatch):
    done = {
        ("--draw sft --lora", 0, False): {"answers": "of SFT"},
        ("--draw instruct", 1, False): {"answers": "of seed 1"},
        ("--draw instruct", 0, False): {"answers": "asked for"},
    }
    monkeypatch.setattr(store, "stored", lambda: done)
    assert store.drawn("instruct", 0) == "asked for"
    with pytest.raises(ValueError, match="no run with --draw sft and seed 1"):
        store.drawn("sft", 1)


def test_parts_have_no_question_in_common_and_seeds_have_few():
    pytest.importorskip("reasoning_gym")
    parts = [part for seed in (0, 1) for part in questions.questions(seed).values()]
    first, *others = [{str(record["prompt"]) for record in part} for part in parts[:3]]
    assert not first & others[0] and not first & others[1] and not others[0] & others[1]
    assert len(first & {str(record["prompt"]) for record in parts[3]}) < 0.1 * len(first)


def test_the_kl_is_the_mean_log_ratio_of_the_answers_that_ended(monkeypatch):
    asked = [{"prompt": f"{letter}?", "completion": "-"} for letter in "AB"]
    args = ulma.read_options([])
    tokenizer = ulma.load_tokenizer(args.model)
    drawn = [[ulma.Sample(" yes", 1, True)], [ulma.Sample(" cut", 1, False)]]
    logps = iter([torch.tensor([-2.0]), torch.tensor([-5.0])])
    monkeypatch.setattr(ulma, "sample", lambda *given: drawn)
    monkeypatch.setattr(ulma, "all_logps", lambda *given: next(logps))
    monkeypatch.setattr(ulma, "load_model", lambda *given: torch.nn.Module())
    figures = smollm2.sampled_figures(None, tokenizer, asked, args)
    assert figures == {"ended": 50.0, "KL": 3.0}


def test_the_picture_of_a_sweep_has_a_curve_for_each_learning_rate(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = {}
    monkeypatch.setattr(run.figures, "save", lambda figure, name: drawn.update({name: figure}))
    scores = {("SFT", "1e-4"): [5.0], ("ULMA", "1e-4, 1"): [6.0], ("ULMA", "1e-4, 10"): [7.0, 9.0]}
    run.figures.rates(scores | {("ULMA", "1e-3, 1"): [8.0]})
    sft, ulmas = drawn["real-demonstrations"].axes
    assert [line.get_label() for line in ulmas.lines] == [
        "learning rate 1e-4",
        "learning rate 1e-3",
    ]
    assert list(ulmas.lines[0].get_ydata()) == [6.0, 7.0]
    assert list(sft.lines[0].get_ydata()) == [5.0]


def test_adapters_are_trained_and_merged_into_the_model(small):
    pytest.importorskip("peft")
    flags = "--method sft --epochs 1 --learning-rate 1e-2 --lora"
    trained, base = (runs.execute((f"{flags} {more}", 0, False)) for more in ("", "--eval-only"))
    assert trained["all"] != base["all"]


# ---- The rows ----


def rows_of(kind, validation=False, seed=0):
    return records.training_and_test(kind, seed, validation)[0]


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


def test_the_edits_are_of_thumbs_down_of_every_type_alike():
    edits = rows_of("edits")
    assert edits == make_data.read(ROOT / "data/edits/train.jsonl")
    rows = rows_of("data")
    disliked = [(row["prompt"], row["completion"]) for row in rows if row["label"] == 0]
    assert len(edits) == 200
    assert all((edit["prompt"], edit["rejected"]) in disliked for edit in edits)
    assert all(edit["chosen"].strip() in acceptable(edit) for edit in edits)
    assert {[edit["type"] for edit in edits].count(verb) for verb in make_data.VERBS} == {8, 9}


def test_noise_makes_that_share_of_the_demonstrations_bad_and_nothing_else():
    exact, noisy = rows_of("data"), rows_of("noise-0.2")
    changed = [(before, after) for before, after in zip(exact, noisy) if before != after]
    assert len(changed) == 32  # of 160
    for before, after in changed:
        assert before["prompt"] == after["prompt"]
        assert before["label"] == after["label"] == after["score"] == 1
        assert after["completion"].strip() not in acceptable(after)


def test_every_share_has_its_kinds_and_as_many_demonstrations_and_half_is_the_embedded_rows():
    assert rows_of("share-50") == rows_of("data")
    before = set()
    for percent in (0, 25, 50, 75, 100):
        rows, kinds = rows_of(f"share-{percent}"), set(records.demonstrated(percent))
        assert {row["type"] for row in rows if row["label"]} == kinds
        assert sum(row["label"] for row in rows) == 160 * bool(kinds)
        assert before <= kinds and len(kinds) in (24 * percent // 100, 24 * percent // 100 + 1)
        before = kinds


def test_thumbs_down_are_as_many_as_asked_and_of_the_sorts_asked():
    assert sum(row["label"] == 0 for row in rows_of("negatives-200")) == 200
    known = []
    for count in (1, 2, 3, 4):
        sorts = records.sorts_of(5, count)
        assert sorts[:-1] == known
        known = sorts
        kinds = {row["kind"] for row in rows_of(f"mistakes-{count}", seed=5) if not row["label"]}
        assert kinds == set(sum(sorts, ()))


def test_own_responses_are_rated_by_the_rule_and_a_thumbs_up_gets_the_label_asked(monkeypatch):
    asked = [row for row in rows_of("data") if not row["label"]]
    good = [acceptable(row)[0] if i % 4 == 0 else "I see." for i, row in enumerate(asked)]
    monkeypatch.setattr(records, "own_responses", lambda seed: good)
    rows = {label: rows_of(f"own-{label}") for label in ("1", "0.99", "none")}
    demonstrations = [row for row in rows_of("data") if row["label"]]
    for label, up in (("1", 200), ("0.99", 200), ("none", 0)):
        own = [row for row in rows[label] if row not in demonstrations]
        assert [len(rows[label]), len(own)] == [160 + 600 + up, 600 + up]
        thumbs_up = [row for row in own if row["label"]]
        assert len(thumbs_up) == up
        assert {row["label"] for row in thumbs_up} == ({float(label)} if up else set())
        assert all(row["completion"].strip() in acceptable(row) for row in thumbs_up)


def test_a_fifth_of_the_noisy_ratings_is_wrong(monkeypatch):
    asked = [row for row in rows_of("data") if not row["label"]]
    good = [acceptable(row)[0] if i % 4 == 0 else "I see." for i, row in enumerate(asked)]
    monkeypatch.setattr(records, "own_responses", lambda seed: good)
    rated = [row for row in rows_of("noisy-1") if row["kind"] in ("full", "other")]
    own = [row for row in rated if row["completion"] == " I see."]
    assert len(own) == 600
    assert ulma.mean([row["label"] for row in own]) == pytest.approx(0.2, abs=0.06)


def test_the_spread_rows_have_labels_by_the_rule_and_shares_from_5_to_95_percent():
    rows, shares = rows_of("spread"), records.spread_shares()
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


def test_a_chat_uis_thumbs_become_rows(tmp_path):
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
    feedback = [
        {"data": {"rating": rating}, "meta": {"message_id": name}, "snapshot": snapshot}
        for name, rating in (("a2", -1), ("a1", 1), ("b2", 0))
    ]
    feedback.append(feedback[0] | {"snapshot": None})
    (tmp_path / "feedback.json").write_text(json.dumps(feedback))
    argv = [sys.executable, ROOT / "data/thumbs.py", tmp_path / "feedback.json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stderr == "2 rows; 2 left out\n"
    (tmp_path / "ratings.jsonl").write_text(done.stdout)
    args = ulma.read_options(["--data", str(tmp_path / "ratings.jsonl")])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in found] == [0, 1]
    texts = [[message["content"] for message in row["completion"]] for row in found]
    assert texts == [["Q1", "A1", "Q2", "A2"], ["Q1", "A1"]]
    assert list(ulma.find_splits(args)) == ["train"]
    done = subprocess.run([*argv, "0.99"], capture_output=True, text=True, check=True)
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == [0, 0.99]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page):
    files = [ROOT / "test_ulma.py", *(ROOT / "data").rglob("test_*.py")]
    tests = "".join(file.read_text(encoding="utf-8") for file in files)
    for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in tests, name


def test_the_page_has_the_distributions_that_the_command_prints(capsys):
    run.figures.print_optimum(*run.figures.distributions())
    page = (HERE / "where-it-converges.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page


def test_the_page_has_the_guesses_that_the_command_prints(capsys):
    pytest.importorskip("reasoning_gym")
    run.main(["guesses"])
    assert capsys.readouterr().out in (HERE / "real-model.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_index_and_its_tables_exist():
    index = (HERE / "README.md").read_text(encoding="utf-8")
    for page in HERE.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert page.name == "README.md" or f"({page.name})" in index
        for table in re.findall(r"data/studies/run.py ([a-z][a-z-]*)", text):
            assert table in [*tables.TABLES, *run.OTHERS]


@pytest.mark.parametrize("table", tables.TABLES)
def test_the_pages_have_the_tables_that_the_command_prints(table, monkeypatch, capsys):
    pytest.importorskip("scipy")

    def only_stored(some, title):
        done = store.stored()
        if not all(store.named(run) in done for run in some):
            pytest.skip("some of its runs are not in results.jsonl")
        return done

    monkeypatch.setattr(tables, "perform", only_stored)
    for picture in ("share", "negatives"):
        monkeypatch.setattr(run.figures, picture, lambda seeds: None)
    run.main([table])
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for printed in capsys.readouterr().out.strip().split("\n\n"):
        assert printed in text
