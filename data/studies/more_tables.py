"""Tables beside those of tables.ini. Most say how far a law predicts what thumbs-down bring.

Of the bad completions of a model a share c loses its probability, and all else grows in proportion.
Then a share a of acceptable completions becomes a / (1 − c (1 − a)). All shares but c are in %.
"""

import questions
import tables
from records import MISTAKES, sorts_of

import ulma

NEGATIVES = tables.TABLES["negatives"][""]
REAL = tables.TABLES["real-demonstrations"][""]
LAWS = {  # table: what its rows are, and the flags of SFT on the demonstrations alone
    "negatives": ("thumbs-down", NEGATIVES["0"]),
    "mistakes": ("sorts of mistakes", NEGATIVES["0"]),
    "real-demonstrations": ("", REAL["SFT, 6 epochs"]),
}


def after(before, coverage):
    """The share of acceptable completions, once a share of the bad ones is gone."""
    return before / (1 - coverage * (1 - before / 100))


def coverage(before, now):
    """The share of the bad completions that must have gone."""
    return (1 - before / now) / (1 - before / 100)


def print_law(table, seeds):
    """What c is on training prompts, what it predicts for new ones, and what was measured there.

    In the table mistakes c is predicted, too: c with all sorts of mistakes, times the share that is
    covered. A simpler rule stands beside the law: new prompts gain as many points as training
    prompts; in the table mistakes, as many as with all sorts, times the share that is covered.
    """
    what, sft_flags = LAWS[table]
    done = tables.make(table, seeds)
    if table == "mistakes":  # its SFT, and all sorts of mistakes
        done = done | tables.make("negatives", seeds)
    lines = []
    for name, flags in tables.TABLES[table][""].items():
        if "--method sft" in flags or "--eval-only" in flags:  # no thumbs-down
            continue
        found = []
        for seed in range(seeds):
            rated_flags, covered = flags, 1.0
            sft = done[tables.named((sft_flags, seed, False))]
            if table == "mistakes":
                shown = sorts_of(seed, int(name[0]))
                covered = share_of(shown, sft["kinds"]["undemonstrated"])
                rated_flags = NEGATIVES["800"]
            rated = done[tables.named((rated_flags, seed, False))]["rated"]
            before = sft["undemonstrated"]
            measured = done[tables.named((flags, seed, False))]["undemonstrated"]
            c = covered * coverage(sft["rated"], rated)
            simple = before + covered * (rated - sft["rated"])
            predicted = after(before, c)
            errors = measured - predicted, measured - simple
            found.append((before, c, predicted, measured, *errors))
        befores, shares, *others, by_law, by_points = zip(*found)
        line = [name, tables.shown(befores), tables.shown(shares, 2), *map(tables.shown, others)]
        lines.append(line + [tables.shown(errors, sign="+") for errors in (by_law, by_points)])
    print()
    header = [what, "a", "c", "predicted", "measured", "measured minus predicted"]
    tables.print_table([*header, "measured minus a + gain in points"], lines)


def share_of(sorts, kinds):
    """Of the completions that are one of the four sorts of mistakes, the share of these sorts."""

    def total(some):
        return sum(kinds.get(kind, 0.0) for sort in some for kind in sort)

    return total(sorts) / total(MISTAKES)


def print_request(seeds):
    """What runs of the table mistakes reach, by whether they show answers to the wrong request."""
    done = tables.make("mistakes", seeds)
    found = {"shown": [], "not shown": []}
    for name, flags in tables.TABLES["mistakes"][""].items():
        number = int(name[0])
        for seed in range(seeds):
            shown = ("wrong request",) in sorts_of(seed, number)
            share = done[tables.named((flags, seed, False))]["undemonstrated"]
            if number < len(MISTAKES):
                found["shown" if shown else "not shown"].append(share)
    print_spread("answers to the wrong request are", found)


def print_luck(seeds):
    """How single runs of the table share differ where there are no demonstrations."""
    done = tables.make("share", seeds)
    rows = tables.TABLES["share"]["0 %"]
    found = {name: [done[run]["all"] for run in tables.runs_of(rows[name], seeds)] for name in rows}
    print_spread("0 %", found)


def print_spread(what, found):
    """Of {row: results of runs} their number, the least, the mean and the greatest."""
    lines = []
    for name, shares in found.items():
        numbers = (min(shares), ulma.mean(shares), max(shares))
        lines.append([name, str(len(shares)), *(f"{number:.1f}" for number in numbers)])
    print()
    tables.print_table([what, "runs", "least", "mean", "greatest"], lines)


def print_weights(seeds):
    """Weights of right and of wrong demonstrations in point-wise DPO, in the table noise."""
    done = tables.make("noise", seeds)
    lines = []
    for block, rows in tables.TABLES["noise"].items():
        runs = tables.runs_of(rows["point-wise DPO"], seeds)
        line = [block]
        for kind in ("acceptable", "not acceptable"):
            for epoch in (0, 1):  # the first, the last
                some = [done[run]["classes"].get(f"label 1, {kind}, demonstrated") for run in runs]
                line.append("" if None in some else tables.shown([one[epoch] for one in some], 2))
        lines.append(line)
    print()
    header = ["demonstrations", "correct: first epoch", "last epoch", "wrong: first epoch"]
    tables.print_table([*header, "last epoch"], lines)


def print_rises(seeds):
    """How far graded responses to kinds without demonstrations rise, in the table log-z."""
    done = tables.make("log-z", seeds)
    lines = []
    for block, rows in tables.TABLES["log-z"].items():
        for name, flags in rows.items():
            if "--continuous" in flags:
                line = [f"{block}: {name}"]
                for score in ("0", "0.1", "0.2", "0.3", "0.4"):
                    key = f"label {score}, not acceptable, undemonstrated"
                    some = [done[run]["classes"][key][2] for run in tables.runs_of(flags, seeds)]
                    line.append(tables.shown(some, sign="+"))
                lines.append(line)
    print()
    tables.print_table(["rise of log π in nats, by score", "0", "0.1", "0.2", "0.3", "0.4"], lines)


def print_kinds(seeds):
    """The completions of requests without demonstrations, by kind, in the table negatives."""
    done = tables.make("negatives", seeds)
    columns = ["full", "brief", *(kind for sort in MISTAKES for kind in sort), "other"]
    lines = []
    for name, flags in NEGATIVES.items():
        line = [name]
        for kind in columns:
            runs = tables.runs_of(flags, seeds)
            shares = [done[run]["kinds"]["undemonstrated"].get(kind, 0.0) for run in runs]
            line.append(f"{ulma.mean(shares):.1f}")
        lines.append(line)
    print()
    tables.print_table(["thumbs-down", *columns], lines)


def print_families(seeds):
    """Right answers in the table real-demonstrations, by family of questions."""
    done = tables.make("real-demonstrations", seeds)
    families = [family for group in questions.FAMILIES.values() for family in group]
    lines = []
    for name, flags in tables.TABLES["real-demonstrations"][""].items():
        found = [done[run]["families"] for run in tables.runs_of(flags, seeds)]
        lines.append([name, *(tables.shown([of[family] for of in found]) for family in families)])
    print()
    tables.print_table(["", *families], lines)


def print_guesses():
    """What guesses would score in the table real-demonstrations."""
    seeds = tables.SETTINGS_OF["real-demonstrations"]["seeds"]
    found = [questions.guesses(seed) for seed in range(seeds)]
    lines = []
    for guess in found[0]:
        groups = [[shares[guess][group] for shares in found] for group in questions.FAMILIES]
        everywhere = [ulma.mean(pair) for pair in zip(*groups)]
        lines.append([guess, *map(tables.shown, (everywhere, *groups))])
    header = ["guess", *(tables.HEADERS[name] for name in ("all", *questions.FAMILIES))]
    tables.print_table(header, lines)
