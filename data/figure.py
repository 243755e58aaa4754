"""Draw rewards.svg, the mean rewards of positives and of negatives over training.

    pip install matplotlib
    python data/experiments.py figure

The rewards are those of all training rows, measured PARTS times an epoch.
"""

import contextlib
import io
import sys
import tempfile
from importlib.util import find_spec
from unittest.mock import patch

import torch
from experiments import METHODS, ROOT

import ulma

COLOURS = {"SFT": "tab:gray", "point-wise DPO": "tab:orange", "ULMA": "tab:blue"}
CLASSES = {
    "positives": (1, "demonstrated"),
    "negatives, demonstrated": (0, "demonstrated"),
    "negatives, undemonstrated": (0, "undemonstrated"),
}
BETA = 3.0  # SFT has none: its rewards are shown for that of the others
PARTS = 5


def rewards_of(flags):
    """[(epoch, the mean r_θ of each class of training rows)] over a run of ulma.py."""
    load_items, train = ulma.load_items, ulma.train
    rows, ref_logps, curve = [], [], []

    def keep_rows(args, tokenizer):
        items, test_items = load_items(args, tokenizer)
        rows[:] = ulma.rows_of(items)
        return items, test_items

    def measure(model, args, epoch):
        logps = ulma.all_logps(model, rows, args, "rewards")
        if not curve:  # π_θ is still π_ref
            ref_logps.append(logps)
        log_z = ulma.prior_log_z(ulma.mean([row.label for row in rows]), BETA)
        rewards = ulma.implicit_reward(logps, ref_logps[0], BETA, log_z).tolist()
        of_class = {kind: [] for kind in CLASSES.values()}
        for row, reward in zip(rows, rewards):
            of_class[row.label, row.group].append(reward)
        curve.append((epoch, *map(ulma.mean, of_class.values())))

    def watch_training(model, items, args, out):
        steps = len(items) // args.batch_size  # in an epoch
        counted = iter(range(args.epochs * steps))

        def watch_losses(*arguments):
            step = next(counted)
            if step % (steps // PARTS) == 0:
                measure(model, args, step / steps)
            return ulma.batch_losses(*arguments)

        figures = train(model, items, args, out, watch_losses)
        measure(model, args, args.epochs)
        return figures

    with (
        tempfile.TemporaryDirectory() as out,
        patch("ulma.load_items", keep_rows),
        patch("ulma.train", watch_training),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        ulma.run(ulma.read_options([*flags.split(), "--output-dir", out]))
    return curve


def main():
    if not find_spec("matplotlib"):
        sys.exit("the figure needs matplotlib: pip install matplotlib")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ulma", "font.size": 9}
    torch.set_flush_denormal(True)  # as ulma.main does
    curves = {name: rewards_of(METHODS[name]) for name in COLOURS}
    figure, panels = pyplot.subplots(1, len(CLASSES), figsize=(8.5, 2.8), layout="constrained")
    for column, (panel, title) in enumerate(zip(panels, CLASSES), 1):
        for name, curve in curves.items():
            epochs, rewards = zip(*[(point[0], point[column]) for point in curve])
            panel.plot(epochs, rewards, color=COLOURS[name], label=name)
            print(f"{title}: {name} {curve[0][column]:.2f} to {curve[-1][column]:.2f}")
        panel.set(title=title, xlabel="epoch", xlim=(0, epochs[-1]))
    panels[0].set_ylabel("mean reward r_θ")
    panels[0].legend(frameon=False)
    panels[2].sharey(panels[1])
    figure.savefig(ROOT / "data/rewards.svg", metadata={"Date": None})
