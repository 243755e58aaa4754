"""The steps of data/lesson.md run as it shows; its exercises are graded, given {name: answer}."""

import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import, and these tests may come first
import exercises
import make_data
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

import ulma

HERE = Path(__file__).parent
LESSON = (HERE / "lesson.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", LESSON, re.DOTALL)  # (language, text)
SOLUTIONS = BLOCKS[-1][1]


def applied(diff, code):
    """The code with the hunks of a diff put in."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(x[1:] for x in lines if x[0] in signs) for signs in (" -", " +"))
        assert code.count(before) == 1, before
        code = code.replace(before, after)
    return code


def test_the_lesson_prints_what_it_shows_and_ends_with_ulmas_loss(tmp_path, monkeypatch, capsys):
    for name in ("train.jsonl", "test.jsonl"):
        make_data.write(tmp_path / "few" / name, make_data.read(HERE / name)[::37])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", "lesson.py --data few --beta 3 --epochs 5".split())
    code = ""
    for (kind, text), (_, shown) in zip(BLOCKS[:10:2], BLOCKS[1:10:2]):
        code = text if kind == "python" else applied(text, code)
        exec(code, names := {})
        texts = capsys.readouterr().out, shown
        printed, shown = (re.sub(r"[+-]?\d+\.\d+", "#", text) for text in texts)
        assert printed.endswith(shown)
    given = names["model"], names["rows"], names["args"]
    assert_close(names["losses_of"](*given), ulma.batch_losses(*given))


def weights(loss, logps, *more):
    """The weights of ∇ log π_θ(y|x) in a descent step."""
    return -torch.func.grad(lambda logps: loss(logps, *more).sum())(tensor(logps))


def exercise_1(answers):
    logps, ref_logps = [-2.0, -3.0, -1.0, -1.0], tensor([-1.0, -1.0, -201.0, -201.0])
    given = ref_logps, tensor([1.0, 0.0, 1.0, 0.0]), 0.5, 0.4
    yours, right = answers["ulma_loss"], ulma.ulma_loss
    assert_close(yours(tensor(logps), *given), right(tensor(logps), *given))
    assert_close(weights(yours, logps, *given), weights(right, logps, *given))


def exercise_2(answers):
    expected, given = [1.0, 0.0], (tensor([-3.0, -4.0]), tensor([1.0, 0.0]), 2.0)
    for loss in (ulma.pointwise_dpo_loss, ulma.ulma_loss):
        expected += weights(loss, [-2.0, -6.0], *given).tolist()
    assert answers["weights_at_beta_2"]() == pytest.approx(expected, abs=6e-4)


def exercise_3(answers):
    labels = tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    for log_z in (0.0, ulma.prior_log_z(1 / 6, 0.1), 2.0):
        first = weights(ulma.pointwise_dpo_loss, [-9.0] * 6, -9.0, labels, 0.1, log_z)
        expected = torch.stack([*first[:2], first.mean()])
        assert_close(tensor(answers["first_weights"](0.1, log_z, 1 / 6)), expected)


def exercise_4(answers):
    ref, rated = tensor([0.6, 0.3, 0.1]), tensor([0.2, 0.3, 0.5])
    for labels, beta in (tensor([1, 0, 1]), 0.3), (tensor([0, 1, 1]), 3.0):
        logits = torch.zeros(3, requires_grad=True)
        for _ in range(1000):
            losses = ulma.ulma_loss(logits.log_softmax(0), ref.log(), labels, beta)
            [gradient] = torch.autograd.grad((rated * losses).sum(), logits)
            logits.data -= 3 * gradient
        found = torch.as_tensor(answers["ulma_optimum"](ref, rated, labels, beta))
        assert_close(found, logits.softmax(0), atol=1e-3, rtol=0)


def exercise_5(answers):
    logits, ids = torch.arange(48.0).reshape(2, 6, 4).sin(), torch.arange(12).reshape(2, 6) % 4
    mask = tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]).bool()
    expected = []
    for row, positions in enumerate(([3, 4, 5], [2, 3])):
        scores = [logits[row, t - 1].log_softmax(0)[ids[row, t]] for t in positions]
        expected.append(sum(scores))
    assert_close(answers["response_logps"](logits, ids, mask), torch.stack(expected))


def exercise_6(answers):
    logps, labels = tensor([-2.0, -8.0, -2.0, -8.0]), tensor([1.0, 1.0, 0.0, 0.0])
    assert answers["kto_log_z"](1.5) == -1.5
    probability = (-ulma.pointwise_dpo_loss(logps, -5.0, labels, 0.3, -1.5)).exp()
    assert_close(answers["kto_loss"](logps, -5.0, labels, 0.3, 1.5), 1 - probability)


EXERCISES = exercise_1, exercise_2, exercise_3, exercise_4, exercise_5, exercise_6
MISTAKES = [  # of an exercise: what to replace in the solutions, and by what
    (exercise_1, "-logsigmoid(-r)", "-(1 - r.sigmoid()).log()"),
    (exercise_1, "-logps, -log", "-beta * logps, -log"),
    (exercise_1, "r = beta * (logps - ref_logps + log_z)", "r = logps - ref_logps + log_z"),
    (exercise_1, " + log_z)\n", ") + log_z\n"),
    (exercise_1, "(logps - ref_logps + log_z)\n", "(logps.detach() - ref_logps + log_z)\n"),
    (exercise_2, "0.238", "0.119"),  # β forgotten
    (exercise_3, "beta * log_z).sig", "log_z).sig"),
    (exercise_4, "rated * labels /", "ref * labels /"),
    (exercise_5, "response_mask[:, 1:]", "response_mask[:, :-1]"),
    (exercise_6, "return -kl", "return kl"),
]


@pytest.mark.parametrize("grade", EXERCISES)
def test_your_answer(grade):
    try:
        grade(vars(exercises))
    except exercises.NotSolved:
        pytest.skip("not solved yet")


def solved(old="", new=""):
    exec(SOLUTIONS.replace(old, new), names := dict(vars(exercises)))
    return names


@pytest.mark.parametrize("grade", EXERCISES, ids=range(1, 7))  # -k exercise_1 is your answer's
def test_the_lessons_solution_is_right(grade):
    grade(solved())


@pytest.mark.parametrize("grade, old, new", MISTAKES, ids=range(len(MISTAKES)))
def test_a_plausible_mistake_is_found(grade, old, new):
    assert old in SOLUTIONS
    with pytest.raises(AssertionError):
        grade(solved(old, new))
