"""How far a law predicts what thumbs-down bring: the tables negatives and mistakes.

Of the bad completions of a model a share c loses its probability, and all else grows in proportion.
Then a share a of acceptable completions becomes a / (1 − c (1 − a)).
"""

from collections import defaultdict

import tables
from records import MISTAKES, sorts_of

import ulma

SFT = tables.TABLES["negatives"][""]["0"]  # demonstrations alone: the model without thumbs-down


def after(before, coverage):
    """The share of acceptable completions, in %, once a share of the bad ones is gone."""
    return before / (1 - coverage * (1 - before / 100))


def coverage(before, now):
    """The share of the bad completions that must have gone."""
    return (1 - before / now) / (1 - before / 100)


def print_law(table, seeds):
    """What c is on rated prompts, what it predicts for fresh ones, and what was measured there.

    In mistakes c is predicted: c with all sorts of mistakes, times the share that is covered.
    """
    done, lines = tables.make(table, seeds), []
    done |= tables.make("negatives", seeds)
    whole = tables.TABLES["negatives"][""]["800"]
    for name, flags in tables.TABLES[table][""].items():
        if flags == SFT or "untrained" in flags:
            continue
        found = defaultdict(list)
        for seed in range(seeds):
            sft, own, all_sorts = (
                done[tables.named((given, seed, False))] for given in (SFT, flags, whole)
            )
            c = coverage(sft["rated"], own["rated"])
            if table == "mistakes":
                covered = share_of(sft["kinds"]["undemonstrated"], sorts_of(seed, int(name[0])))
                found["covered, %"].append(100 * covered)
                c = covered * coverage(sft["rated"], all_sorts["rated"])
            found["a"].append(sft["undemonstrated"])
            found["c"].append(c)
            found["predicted"].append(after(sft["undemonstrated"], c))
            found["measured"].append(own["undemonstrated"])
        errors = [a - b for a, b in zip(found["measured"], found["predicted"])]
        found["measured − predicted"] = errors
        line = [tables.shown(some, 2 if key == "c" else 1) for key, some in found.items()]
        lines.append([name, *line])
    print()
    tables.print_table(["thumbs-down", *found], lines)


def share_of(kinds, sorts):
    """The share of bad completions that are of these sorts of mistakes."""
    bad = sum(share for kind, share in kinds.items() if kind not in ("full", "brief"))
    return sum(kinds.get(kind, 0.0) for kind in sum(sorts, ())) / bad


def print_kinds(table, seeds):
    """The completions of requests without demonstrations, by kind, in %."""
    done, lines = tables.make(table, seeds), []
    columns = ["full", "brief", *sum(MISTAKES, ()), "other"]
    for name, flags in tables.TABLES[table][""].items():
        found = [done[run]["kinds"]["undemonstrated"] for run in tables.runs_of(flags, seeds)]
        shares = [ulma.mean([one.get(kind, 0.0) for one in found]) for kind in columns]
        lines.append([name, *(f"{share:.1f}" for share in shares)])
    print()
    tables.print_table([table, *columns], lines)
