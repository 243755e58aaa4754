"""The steps of the lesson run as it shows; its exercises are graded.

A grader is given {name: answer}, and fails with the mistake. It does not print the right answer.
"""

import inspect
import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import, and these tests may come first
import exercises
import pytest
import solutions
import torch
from torch import tensor
from torch.testing import assert_close

import ulma

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_data

HERE = Path(__file__).parent
LESSON = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", LESSON, re.DOTALL)  # (language, text)


# ---- The steps ----


def applied(diff, code):
    """The code with the hunks of a diff put in."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert code.count(before) == 1, before
        code = code.replace(before, after)
    return code


def shape_of(printed):
    """What was printed, but for its figures and its last line, a sample."""
    lines = printed.strip().splitlines()
    return [re.sub(r"[+-]?\d+\.\d+", "#", line) for line in lines[:-1]]


def test_the_lesson_prints_what_it_shows_and_ends_with_ulmas_loss(tmp_path, monkeypatch, capsys):
    for name in ("train.jsonl", "test.jsonl"):
        make_data.write(tmp_path / "few" / name, make_data.read(make_data.HERE / name)[::37])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", "lesson.py --data few --beta 3 --epochs 5".split())
    code = ""
    for (kind, text), (_, shown) in zip(BLOCKS[:10:2], BLOCKS[1:10:2]):
        code = text if kind == "python" else applied(text, code)
        exec(code, names := {})
        shape = shape_of(shown)
        assert shape_of(capsys.readouterr().out)[-len(shape) :] == shape
    given = names["model"], names["rows"], names["args"]
    assert_close(names["losses_of"](*given), ulma.batch_losses(*given))


# ---- The exercises ----


def check(condition, mistake):
    if not condition:
        pytest.fail(mistake, pytrace=False)


def equal(yours, right, tolerance=1e-4):
    """Whether the numbers are equal, whatever their type."""
    yours, right = torch.as_tensor(yours).double(), torch.as_tensor(right).double()
    return yours.shape == right.shape and torch.allclose(yours, right, tolerance, tolerance)


def weights(loss, logps, *more):
    """The weights of ∇ log π_θ(y|x) in a descent step."""
    logps = tensor(logps, requires_grad=True)
    losses = torch.as_tensor(loss(logps, *more))
    check(losses.requires_grad, "the loss has no gradient: was something detached?")
    [gradient] = torch.autograd.grad(losses.sum(), logps)
    return -gradient


def exercise_1(answers):
    yours = answers["ulma_loss"]
    logps, labels = [-2.0, -3.0, -2.5, -1.0], tensor([1.0, 0.0, 1.0, 0.0])
    more = tensor([-1.0, -1.0, -4.0, -201.0]), labels, 0.5, 0.4
    found, right = yours(tensor(logps), *more), ulma.ulma_loss(tensor(logps), *more)
    check(equal(found[labels == 1], right[labels == 1]), "where z = 1 it is not SFT's loss")
    check(equal(found[1], right[1]), "where z = 0 it is not point-wise DPO's loss")
    check(equal(found[3], right[3]), "at r = 100 it is not r: σ(100) is rounded to 1")
    found, right = weights(yours, logps, *more), weights(ulma.ulma_loss, logps, *more)
    check(equal(found, right), "the losses are right, but their gradients are not")


def exercise_2(answers):
    given = tensor([-3.0, -4.0]), tensor([1.0, 0.0]), 2.0
    right = {"SFT": [1.0, 0.0]}
    for name, loss in {"DPO": ulma.pointwise_dpo_loss, "ULMA": ulma.ulma_loss}.items():
        right[name] = weights(loss, [-2.0, -6.0], *given).tolist()
    yours = answers["weights_at_beta_2"]()
    check(len(yours) == 6, "these are not six numbers")
    for i, (name, expected) in enumerate(right.items()):
        line = yours[2 * i : 2 * i + 2]
        check(equal(line, expected, 6e-4), f"the two weights of {name} are not both right")


def exercise_3(answers):
    for beta, mean_label in ((0.1, 1 / 6), (2.0, 0.4)):
        labels = torch.zeros(30)
        labels[: round(30 * mean_label)] = 1
        for log_z in (0.0, ulma.prior_log_z(mean_label, beta), 2.0):
            first = weights(ulma.pointwise_dpo_loss, [-9.0] * 30, -9.0, labels, beta, log_z)
            yours = answers["first_weights"](beta, log_z, mean_label)
            at = f"at β = {beta:g}, log Z = {log_z:.2f} and a mean label of {mean_label:.2f}"
            for name, own, right in zip(
                ("of a thumbs-up", "of a thumbs-down", "in the mean"),
                yours,
                (first[0], first[-1], first.mean()),
            ):
                check(equal(own, right), f"the weight {name} is not right {at}")


def exercise_4(answers):
    ref, rated = tensor([0.6, 0.3, 0.1]), tensor([0.2, 0.3, 0.5])
    for labels, beta in (tensor([1, 0, 1]), 0.3), (tensor([0, 1, 1]), 3.0):
        logits = torch.zeros(3, requires_grad=True)
        for _ in range(1000):
            losses = ulma.ulma_loss(logits.log_softmax(0), ref.log(), labels, beta)
            [gradient] = torch.autograd.grad((rated * losses).sum(), logits)
            logits.data -= 3 * gradient
        yours = torch.as_tensor(answers["ulma_optimum"](ref, rated, labels, beta))
        check(equal(yours.sum(), 1.0), "the probabilities do not sum to 1")
        check(equal(yours, logits.softmax(0), 1e-3), "descending the loss ends elsewhere")


def exercise_5(answers):
    ids = torch.arange(12).reshape(2, 6) % 4
    mask = tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]).bool()
    logits = torch.arange(48.0).reshape(2, 6, 4).sin().requires_grad_()
    right = []
    for row, positions in enumerate(([3, 4, 5], [2, 3])):
        scores = [logits[row, t - 1].log_softmax(0)[ids[row, t]] for t in positions]
        right.append(sum(scores))
    right = torch.stack(right)
    yours = answers["response_logps"](logits, ids, mask)
    check(yours.shape == (2,), "it does not have one number a row")
    check(equal(yours.detach(), right.detach()), "these are not the tokens of the response")
    check(yours.requires_grad, "it has no gradient: was something detached?")
    found, expected = (torch.autograd.grad(x.sum(), logits)[0] for x in (yours, right))
    check(equal(found, expected), "the values are right, but their gradients are not")


def exercise_6(answers):
    logps, labels = [-2.0, -8.0, -2.0, -8.0], tensor([1.0, 1.0, 0.0, 0.0])
    stands_for = float(answers["kto_log_z"](1.5))
    check(stands_for != 1.5, "kto_log_z has the wrong sign")
    check(stands_for == -1.5, "kto_log_z: compare r_θ with the r of kto_loss")

    def right(logps, *more):
        return 1 - (-ulma.pointwise_dpo_loss(logps, -5.0, labels, 0.3, -1.5)).exp()

    yours = answers["kto_loss"]
    found = yours(tensor(logps), -5.0, labels, 0.3, 1.5)
    for z, name in ((1, "thumbs-up"), (0, "thumbs-down")):
        expected = right(tensor(logps))[labels == z]
        check(equal(found[labels == z], expected), f"the loss of a {name} is not right")
    found = weights(yours, logps, -5.0, labels, 0.3, 1.5)
    check(equal(found, weights(right, logps)), "the losses are right, but their gradients are not")


EXERCISES = exercise_1, exercise_2, exercise_3, exercise_4, exercise_5, exercise_6


@pytest.mark.parametrize("grade", EXERCISES)
def test_your_answer(grade):
    try:
        grade(vars(exercises))
    except exercises.NotSolved:
        pytest.skip("not solved yet")


# ---- The graders ----


def changed(old, new):
    """The solutions with a change."""
    source = inspect.getsource(solutions)
    assert old in source
    exec(source.replace(old, new), names := {})
    return names


@pytest.mark.parametrize("grade", EXERCISES, ids=range(1, 7))  # -k exercise_1 is your answer's
def test_the_solutions_are_right(grade):
    grade(vars(solutions))


RIGHT = [
    (
        exercise_1,
        "return torch.where(labels == 1, -logps, -",
        "return torch.where(labels == 1, -logps.double(), -",
    ),
    (exercise_1, "-logsigmoid(-r))", "torch.nn.functional.softplus(r))"),
    (
        exercise_3,
        "torch.as_tensor(beta * log_z).sigmoid()",
        "1 / (1 + 2.718281828 ** (-beta * log_z))",
    ),
    (exercise_4, "(rated * labels).sum()", "sum(rated * labels)"),
    (exercise_6, "return -kl", "return torch.tensor(-kl)"),
]
WRONG = [  # of an exercise: what is changed in the solutions, and a part of what the grader says
    (exercise_1, "-logsigmoid(-r)", "-(1 - r.sigmoid()).log()", "rounded"),
    (exercise_1, "-logps, -log", "-beta * logps, -log", "z = 1"),
    (exercise_1, "labels == 1, -logps", "labels == 1, -logsigmoid(r)", "z = 1"),
    (
        exercise_1,
        "r = beta * (logps - ref_logps + log_z)",
        "r = logps - ref_logps + log_z",
        "z = 0",
    ),
    (exercise_1, " + log_z)\n", ") + log_z\n", "z = 0"),
    (
        exercise_1,
        "(logps - ref_logps + log_z)\n",
        "(logps.detach() - ref_logps + log_z)\n",
        "gradients",
    ),
    (exercise_2, "0.238", "0.119", "of DPO"),  # β forgotten
    (exercise_2, "[1, 0", "[2, 0", "of SFT"),
    (exercise_3, "beta * log_z).sig", "log_z).sig", "thumbs-up"),
    (exercise_3, "(mean_label - sigma)", "(1 / 6 - sigma)", "mean"),
    (exercise_3, "return beta * (1 - sigma)", "return 0.1 * (1 - sigma)", "thumbs-up"),
    (exercise_4, "rated * labels /", "ref * labels /", "ends"),
    (
        exercise_4,
        "return rated * labels / (rated * labels)",
        "return ref * labels / (ref * labels)",
        "ends",
    ),
    (exercise_5, "response_mask[:, 1:]", "response_mask[:, :-1]", "tokens"),
    (exercise_5, "logits[:, :-1].log", "logits[:, :-1].detach().log", "gradient"),
    (exercise_6, "return -kl", "return kl", "sign"),
    (exercise_6, "r = beta * (logps", "r = beta * (logps.detach()", "gradient"),
    (exercise_6, "labels == 1, r, -r", "labels == 1, -r, r", "thumbs-up"),
]


@pytest.mark.parametrize("grade, old, new", RIGHT, ids=range(len(RIGHT)))
def test_another_right_answer_passes(grade, old, new):
    grade(changed(old, new))


@pytest.mark.parametrize("grade, old, new, told", WRONG, ids=range(len(WRONG)))
def test_a_plausible_mistake_is_told(grade, old, new, told):
    with pytest.raises(pytest.fail.Exception, match=told):
        grade(changed(old, new))
