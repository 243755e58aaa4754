"""The experiments mean what they say.

The rivals' losses are the project's with another log Z or another shape.
"""

import json
import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import, and these tests come first
import experiments
import pytest
import real_model
import real_ratings
import torch

from ulma import Row, implicit_reward, pointwise_dpo_loss, prior_log_z

torch.manual_seed(0)
BETA, LOGPS, REF_LOGPS = 0.3, torch.randn(50).double() - 9, torch.randn(50).double() - 9
RATIOS, ONE, ZERO = LOGPS - REF_LOGPS, torch.ones(50), torch.zeros(50)


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


@pytest.mark.parametrize("shift", [0.0, 0.7])  # APO-zero, and KTO with that estimate of the KL
def test_apo_zero_and_kto_are_one_minus_sigma_of_the_same_reward(shift):
    positive = 1 - torch.sigmoid(BETA * (RATIOS - shift))
    negative = 1 - torch.sigmoid(BETA * (shift - RATIOS))
    torch.testing.assert_close(1 - (-pointwise(ONE, -shift)).exp(), positive)
    torch.testing.assert_close(1 - (-pointwise(ZERO, -shift)).exp(), negative)
    reward = implicit_reward(LOGPS, REF_LOGPS, BETA, -shift)
    torch.testing.assert_close(torch.sigmoid(reward), negative)


def test_the_true_log_z_is_that_of_the_draws(monkeypatch):
    scores = [1.0] * 16 + [0.4] * 48
    monkeypatch.setattr(experiments, "draws", lambda: {"x": scores})
    true_log_z = experiments.true_log_z.__wrapped__
    exact = math.log(0.25 * math.exp(2) + 0.75 * math.exp(0.8))
    assert true_log_z("x", 0.5, True) == pytest.approx(exact, abs=1e-5)
    best, mean = 1.0, 0.55  # reward in reach, to which β log Z tends as β falls, and as it grows
    assert true_log_z("x", 1e-3, True) * 1e-3 == pytest.approx(best, abs=0.01)
    assert true_log_z("x", 1e3, True) * 1e3 == pytest.approx(mean, abs=0.01)
    assert true_log_z("x", 0.5, False) * 0.5 == pytest.approx(math.log(16.5 / 48.5), abs=1e-5)


def test_a_run_is_trained_with_the_log_z_asked_for_and_its_weights_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setattr(experiments, "true_log_z", lambda prompt, beta, graded: math.log(3) / beta)
    rows = experiments.make_data.read(experiments.make_rows("fair", True) / "train.jsonl")
    assert {row["score"] for row in rows if row["label"]} == {1.0}
    few = [row for row in rows if row["label"]][:8] + [row for row in rows if not row["label"]][:8]
    experiments.make_data.write(tmp_path / "rows" / "fair-validation" / "train.jsonl", few)
    common = "--method pointwise-dpo --rows fair --epochs 1 --learning-rate 1e-6 --beta 1"
    for log_z, positive in ("0", 0.5), ("true", 0.25), ("running", 0.5):
        run = f"{common} --log-z {log_z}", 0, True
        experiments.execute(run)
        weights = json.loads((experiments.folder_of(*run) / "weights.json").read_text())
        assert weights["label 1, acceptable, demonstrated"] == [pytest.approx(positive, abs=1e-3)]
        assert 0 < experiments.measured(run)["exact_match"] < 100
        mean_score, *shares = experiments.kinds(run).values()
        assert 0 < mean_score < 100 and sum(shares) == pytest.approx(100)


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

    pair, single = (row(chosen, 1.0), row(rejected, 0.0)), (row(chosen, 1.0),)
    [(first, *others), last] = experiments.only_edits([pair, single])
    assert (first, last) == (pair[0], single)
    assert first.response_mask.tolist() == [False, False] + [True] * (len(chosen) + 1)
    assert [row.input_ids[row.response_mask].tolist() for row in others] == [rated] * bool(rated)


def test_a_transcript_is_read_as_messages_or_left_out():
    user = {"role": "user", "content": "Hi"}
    assistant = {"role": "assistant", "content": "Hello.\n\nYes?"}
    assert real_ratings.messages("\n\nHuman: Hi\n\nAssistant: Hello.\n\nYes?") == [user, assistant]
    for other in (
        "\n\nHuman: Hi\n\nHuman: Hi\n\nAssistant: Yes?",
        "\n\nHuman: Hi",
        "\n\nHuman: Hi\n\nAssistant:",
        "Be brief.\n\nHuman: Hi\n\nAssistant: Yes?",
    ):
        assert real_ratings.messages(other) is None


def test_the_frontier_measures_score_and_kl_of_the_responses(tmp_path):
    responses = [
        {"completion": "A", "tokens": 2, "score": 0.2, "logp": -3.0, "ref_logp": -5.0},
        {"completion": "A", "tokens": 4, "score": 0.6, "logp": -4.0, "ref_logp": -4.0},
    ]
    experiments.make_data.write(tmp_path / "responses.jsonl", responses)
    metrics = {"after": {"perplexity": 7.0, "reward_auc": 0.9}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    figures = list(real_model.measured_in(tmp_path).values())
    assert figures == pytest.approx([0.4, 1.0, 1.5, 50.0, 7.0, 0.9])
