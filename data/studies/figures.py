"""The pictures of README.md and of the pages (pip install matplotlib)."""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import tables
import torch
from records import DEVICE
from runs import Quietly
from transformers import AutoTokenizer

import ulma

ROOT = ulma.HERE
COLOURS = {"SFT": "tab:gray", "point-wise DPO": "tab:orange", "ULMA": "tab:blue"}


def panels(*shape, size):
    """A figure and its panels."""
    if not find_spec("matplotlib"):
        sys.exit("the pictures need matplotlib: pip install matplotlib")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ulma", "font.size": 9}
    return pyplot.subplots(*shape, figsize=size, layout="constrained")


def save(figure, name):
    figure.savefig(ROOT / f"data/studies/{name}.svg", metadata={"Date": None})
    print(f"data/studies/{name}.svg")


def draw_means(panel, places, columns, **style):
    """Means with 95 % of their error; columns has the values of the seeds at each place."""
    means = [ulma.mean(values) for values in columns]
    errors = [1.96 * tables.error(values) for values in columns]
    panel.errorbar(places, means, errors, marker="o", markersize=4, **style)


# ---- rewards.svg: the mean rewards of good and of bad answers over training ----
CLASSES = {
    "good answers": (1, "demonstrated"),
    "bad answers, kinds with demonstrations": (0, "demonstrated"),
    "bad answers, kinds without": (0, "undemonstrated"),
}
BETA = 3.0  # SFT has none: its rewards are shown for that of the others
PARTS = 5  # measurements in an epoch
SEEDS = 3


def rewards_of(flags):
    """[(epoch, the mean r_θ of each class of training rows)] over a run of ulma.py."""
    args = ulma.read_options(flags.split())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, _ = ulma.load_rows(args, tokenizer)
    model = ulma.load_model(args.model, tokenizer).to(DEVICE)
    args.log_z = ulma.prior_log_z(ulma.mean([row.label for row in rows]), BETA)
    ulma.set_reference(model, rows, args)
    ref_logps = torch.tensor([row.ref_logp for row in rows])
    trained = ulma.prepare(rows, args)
    steps, curve = len(trained) // args.batch_size, []  # in an epoch

    def measure(epoch):
        logps = ulma.all_logps(model, rows, args, "rewards")
        rewards = ulma.implicit_reward(logps, ref_logps, BETA, args.log_z).tolist()
        of_class = {kind: [] for kind in CLASSES.values()}
        for row, reward in zip(rows, rewards):
            of_class[row.label, row.group].append(reward)
        curve.append((epoch, *map(ulma.mean, of_class.values())))

    done = 0

    def losses_of(*given):
        nonlocal done
        if done % (steps // PARTS) == 0:
            measure(done / steps)
        done += 1
        return ulma.batch_losses(*given)

    with tempfile.TemporaryDirectory() as out:
        ulma.train(model, trained, args, Path(out), losses_of)
    measure(args.epochs)
    return curve


def rewards():
    """The seeds vary the order of the rows; all train on those of data/."""
    figure, parts = panels(1, len(CLASSES), size=(8.5, 2.8))
    run = Quietly(rewards_of)
    rows = tables.TABLES["methods"][""]
    rows = rows | {"SFT": rows["SFT, 50 steps"]}
    curves = {
        name: [run(f"{rows[name]} --seed {seed}") for seed in range(SEEDS)] for name in COLOURS
    }
    for column, (panel, title) in enumerate(zip(parts, CLASSES), 1):
        for name, seeds in curves.items():
            epochs = [point[0] for point in seeds[0]]
            values = torch.tensor([[point[column] for point in curve] for curve in seeds])
            panel.plot(epochs, values.mean(0), color=COLOURS[name], label=name)
            band = {"color": COLOURS[name], "alpha": 0.2, "linewidth": 0}
            panel.fill_between(epochs, values.amin(0), values.amax(0), **band)
            print(f"{title}: {name} {values[:, 0].mean():.2f} to {values[:, -1].mean():.2f}")
        panel.set(title=title, xlabel="epoch", xlim=(0, epochs[-1]))
    parts[0].set_ylabel("mean reward r_θ")
    parts[0].legend(frameon=False)
    parts[2].sharey(parts[1])
    save(figure, "rewards")


# ---- share.svg and negatives.svg: acceptable answers, of what results.jsonl has ----


def share(seeds):
    """Acceptable answers against the share of kinds of request with demonstrations."""
    done = tables.make("share", seeds)
    figure, parts = panels(1, 2, size=(8.5, 3.2))
    titles = {"all": "all requests", "undemonstrated": "requests without demonstrations"}
    for panel, (column, title) in zip(parts, titles.items()):
        for name in [*COLOURS, "KTO"]:
            places, values = [], []
            for block, rows in tables.TABLES["share"].items():
                given = "ULMA" if name == "point-wise DPO" and block == "0 %" else name
                runs = tables.runs_of(rows[given], seeds) if given in rows else []
                found = [done[run][column] for run in runs]
                if found and None not in found:
                    places.append(int(block.split()[0]))
                    values.append(found)
            draw_means(panel, places, values, label=name, color=COLOURS.get(name, "tab:green"))
        panel.set(title=title, xlabel="kinds of request with demonstrations, %")
        panel.set(xticks=(0, 25, 50, 75, 100), xlim=(-5, 105))
    parts[0].set_ylabel("acceptable answers, %")
    parts[0].legend(frameon=False)
    parts[1].sharey(parts[0])
    save(figure, "share")


def negatives(seeds):
    """Acceptable answers against the number of thumbs-down."""
    done = tables.make("negatives", seeds)
    rows = {name: flags for name, flags in tables.TABLES["negatives"][""].items() if name.isdigit()}
    figure, panel = panels(size=(5.5, 3.2))
    for column, colour in (("demonstrated", "tab:blue"), ("undemonstrated", "tab:orange")):
        values = [
            [done[run][column] for run in tables.runs_of(flags, seeds)] for flags in rows.values()
        ]
        label = "with demonstrations" if column == "demonstrated" else "without"
        draw_means(panel, range(len(rows)), values, label=f"kinds {label}", color=colour)
    panel.set(xlabel="thumbs-down beside 160 demonstrations", ylabel="acceptable answers, %")
    panel.set_xticks(range(len(rows)), rows)
    panel.legend(frameon=False)
    save(figure, "negatives")


# ---- real-demonstrations.svg: what β and the learning rate do on a real model ----


def rates(scores):
    """Right answers to validation questions of the first seed, by β, of tables.sweep.

    A setting is "learning rate, β", or for SFT, which has no β, the learning rate.
    """
    names = dict.fromkeys(name for name, _ in scores)
    greatest = max(first for first, *_ in scores.values())
    figure, parts = panels(1, len(names), size=(8.5, 2.8))
    for panel, name in zip(parts, names):
        curves = {}  # {learning rate: [(β, right answers)]}
        for (other, setting), (first, *_) in scores.items():
            if other == name:
                rate, _, beta = setting.partition(", ")
                curves.setdefault(rate, []).append((beta or "none", first))
        for rate, points in curves.items():
            panel.plot(*zip(*points), marker="o", markersize=4, label=f"learning rate {rate}")
        panel.set(title=name, xlabel="β", ylim=(0, 1.1 * greatest))
    parts[0].set_ylabel("right answers, %")
    parts[0].legend(frameon=False, fontsize=7)
    save(figure, "real-demonstrations")


# ---- optimum.svg: where each loss converges, over six responses to one prompt ----
REF = torch.tensor([0.35, 0.25, 0.18, 0.12, 0.07, 0.03], dtype=torch.float64)  # π_ref
RATED = torch.tensor([0.05, 0.10, 0.15, 0.20, 0.25, 0.25], dtype=torch.float64)  # μ
REWARD = torch.tensor([-2.0, 1.0, -1.0, 1.5, -0.5, 2.0], dtype=torch.float64)


def minimum(expected_loss):
    """The distribution over six responses at which the expected loss is least."""
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    options = {"max_iter": 5000, "tolerance_grad": 1e-12, "tolerance_change": 0}
    solver = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **options)

    def closure():
        solver.zero_grad()
        loss = expected_loss(logits.log_softmax(0)).sum()
        loss.backward()
        return loss

    solver.step(closure)
    return logits.softmax(0).detach()


def optima(share, log_z_of):
    """{name: distribution}, where that share of each response's labels is 1."""

    def of(loss, beta):
        def expected(logps):
            log_z, ones = log_z_of(beta), torch.ones(6)
            good, bad = (loss(logps, REF.log(), z * ones, beta, log_z) for z in (1, 0))
            return RATED * (share * good + (1 - share) * bad)

        return minimum(expected)

    return {
        "SFT on the thumbs-up": RATED * share / (RATED * share).sum(),
        "point-wise DPO, β 1": of(ulma.pointwise_dpo_loss, 1.0),
        "ULMA, β 1": of(ulma.ulma_loss, 1.0),
        "ULMA, β 0.1": of(ulma.ulma_loss, 0.1),
    }


def distributions():
    """{name: distribution}, where labels disagree, and where they are exact."""

    def true_log_z(beta):
        return (REF * (REWARD / beta).exp()).sum().log()

    def prior(beta):
        return ulma.prior_log_z((RATED * (REWARD > 0)).sum().item(), beta)

    aligned = REF * REWARD.exp() / (REF * REWARD.exp()).sum()
    disagree = {"π*, β 1": aligned} | optima(REWARD.sigmoid(), true_log_z)
    return disagree, optima((REWARD > 0).double(), prior)


def print_optimum(disagree, exact):
    """A table of the distributions, a column for each response."""
    rows = {"π_ref": REF, "how often each is rated": RATED}
    rows |= {f"labels disagree: {name}": policy for name, policy in disagree.items()}
    rows |= {f"labels are exact: {name}": policy for name, policy in exact.items()}
    lines = [[name, *(f"{x:.3f}" for x in policy.tolist())] for name, policy in rows.items()]
    tables.print_table(["true reward", *(f"{r:g}" for r in REWARD.tolist())], lines)


def optimum():
    found = distributions()
    print_optimum(*found)
    titles = "labels disagree: p = σ(r*)", "labels are exact: p = 1 where r* > 0"
    figure, parts = panels(2, 1, size=(8.5, 4.6))
    colours = {"π_ref": "tab:red", "π*, β 1": "black", "SFT on the thumbs-up": "tab:gray"}
    colours |= {"point-wise DPO, β 1": "tab:orange", "ULMA, β 1": "tab:blue"}
    for panel, title, policies in zip(parts, titles, found):
        policies = {"π_ref": REF} | policies
        for i, (name, policy) in enumerate(policies.items()):
            places = torch.arange(6) + (i - len(policies) / 2) * 0.13
            panel.bar(places, policy, 0.12, label=name, color=colours.get(name, "lightblue"))
        panel.set(title=title, ylabel="π(y)")
        panel.set_xticks(range(6), [f"r* = {r:g}" for r in REWARD.tolist()])
    figure.legend(*parts[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    save(figure, "optimum")
