"""The embedded rows are what their script says, and its noise is in the demonstrations alone."""

import json
from pathlib import Path

import make_data
import pytest

HERE = Path(__file__).parent


def made(folder, *flags):
    """The rows that make_data.py writes into the folder."""
    make_data.main(["--rows", str(folder), *flags])
    names = ("train", "test", "edits/train", "edits/test")
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]
        for name in names
    }


def acceptable(row):
    return make_data.acceptable(row["type"], make_data.noun_of(row))


def test_the_embedded_rows_are_what_their_script_writes(tmp_path):
    rows, (train, test) = made(tmp_path), make_data.split()
    for name in rows:
        assert (HERE / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
    assert all((row["completion"] in row["answers"]) == row["label"] for row in rows["test"])
    for verb in make_data.VERBS:  # no combination is in both
        assert not set(train[verb]) & set(test[verb])
    assert {row["group"] for row in rows["train"] if row["label"]} == {"demonstrated"}


def test_the_edits_are_of_thumbs_down_of_every_type_alike(tmp_path):
    rows = made(tmp_path)
    edits = rows["edits/train"]
    disliked = [(row["prompt"], row["completion"]) for row in rows["train"] if row["label"] == 0]
    assert len(edits) == 200
    assert all((edit["prompt"], edit["rejected"]) in disliked for edit in edits)
    assert all(edit["chosen"].strip() in acceptable(edit) for edit in edits)
    assert {[edit["type"] for edit in edits].count(verb) for verb in make_data.VERBS} == {8, 9}


def test_noise_makes_that_share_of_the_demonstrations_bad_and_nothing_else(tmp_path):
    exact, noisy = made(tmp_path / "exact"), made(tmp_path / "noisy", "--noise", "0.2")
    changed = [(a, b) for a, b in zip(exact.pop("train"), noisy.pop("train")) if a != b]
    assert len(changed) == 32 and noisy == exact  # of 160
    for before, after in changed:
        assert before["prompt"] == after["prompt"]
        assert before["label"] == after["label"] == after["score"] == 1
        assert after["completion"].strip() not in acceptable(after)
    with pytest.raises(SystemExit):
        make_data.main(["--noise", "0.2"])  # the embedded rows stay exact
