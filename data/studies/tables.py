"""Tables in Markdown, of what runs.py has stored."""

import configparser
import itertools
from pathlib import Path

import torch
from records import make_data
from runs import perform
from store import named, read_flags, write_flags

import ulma

COLUMNS = "all, demonstrated, undemonstrated, perplexity"
SETTINGS = ("seeds", "all", "compared", "try", "columns", "after")
MEASURED = ("samples", "rated", "draw")  # flags of figures that no setting is chosen by
HEADERS = {
    "all": "all requests",
    "demonstrated": "kinds with demonstrations",
    "undemonstrated": "kinds without",
    "first weight": "weight of a demonstration, first epoch",
    "weight": "weight of a demonstration, last epoch",
    "fall": "fall of thumbs-down, kinds without, in nats",
    "ended": "samples that end",
    "KL": "KL in nats",
}


def read_tables():
    """{table: {block: {row: flags}}}, and {table: its settings}."""
    parser = configparser.ConfigParser(delimiters=[":"], interpolation=None)
    parser.optionxform = str  # keeps capitals
    parser.read_string(Path(__file__).with_name("tables.ini").read_text(encoding="utf-8"))
    tables, settings = {}, {}
    for section in parser.sections():
        table, _, block = section.partition(", ")
        given = dict(parser[section])
        common = given.get("all", "")
        settings[table] = {
            "seeds": int(given["seeds"]),
            "compared": given.get("compared", "all"),
            "columns": headers_of(given.get("columns", COLUMNS)),
            "try": given.get("try", ""),
            "after": given.get("after"),
        }
        rows = {name: flags for name, flags in given.items() if name not in SETTINGS}
        rows = {name: f"{common} {flags}".strip() for name, flags in rows.items()}
        tables.setdefault(table, {})[block] = rows
    return tables, settings


def headers_of(columns):
    """{figure: header} of "figure, figure as header"."""
    pairs = [column.partition(" as ")[::2] for column in columns.split(", ")]
    return {figure: header or HEADERS.get(figure, figure) for figure, header in pairs}


TABLES, SETTINGS_OF = read_tables()


def runs_of(flags, seeds):
    return [named((flags, seed, False)) for seed in range(seeds)]


def make(table, seeds):
    """Finish the runs of a table, seed by seed; returns {run: figures}."""
    if SETTINGS_OF[table]["after"]:
        make(SETTINGS_OF[table]["after"], seeds)
    rows = [flags for rows in TABLES[table].values() for flags in rows.values()]
    return perform([(flags, seed, False) for seed in range(seeds) for flags in rows], table)


def print_results(table, seeds):
    """Means and standard errors, and differences from the first row of each block."""
    done, settings = make(table, seeds), SETTINGS_OF[table]
    values, differences = {}, {}
    for block, rows in TABLES[table].items():
        for name, flags in rows.items():
            found = [done[run] for run in runs_of(flags, seeds)]
            for column in (*settings["columns"], settings["compared"]):
                values[block, name, column] = [value_of(one, column) for one in found]
        first, *others = rows
        for name in others:
            pairs = zip(*(values[block, row, settings["compared"]] for row in (name, first)))
            differences[block, name] = [own - base for own, base in pairs]
    chances = holm({key: chance(some) for key, some in differences.items()})
    lines = []
    for block, rows in TABLES[table].items():
        for name in rows:
            line = [f"{block}: {name}" if block else name]
            for column in settings["columns"]:
                digits = {"perplexity": 3, "first weight": 2, "weight": 2}.get(column, 1)
                line.append(shown(values[block, name, column], digits))
            if (block, name) in differences:
                line.append(shown(differences[block, name], sign="+"))
                line.append(verdict(chances[block, name]))
            lines.append(line + [""] * (len(settings["columns"]) + 3 - len(line)))
    [compared] = headers_of(settings["compared"]).values()
    headers = settings["columns"].values()
    print_table(["", *headers, f"difference, {compared}", "significant"], lines)


def value_of(figures, column):
    """A figure of a run, in %; "score" and the kinds are means over its samples."""
    if column in figures:
        return figures[column]
    if column in ("first weight", "weight"):  # means of the first and of the last epoch
        return figures["classes"]["label 1, acceptable, demonstrated"][column == "weight"]
    if column == "fall":  # in the mean of the last epoch
        return -figures["classes"]["label 0, not acceptable, undemonstrated"][2]
    kinds = figures["kinds"].values()  # of as many prompts each
    if column == "score":
        totals = [sum(make_data.SCORES.get(kind, 0) * of[kind] for kind in of) for of in kinds]
        return ulma.mean(totals)
    return ulma.mean([of.get(column, 0.0) for of in kinds])


def verdict(p):
    """At 5 %, with p."""
    word = "yes" if p < 0.05 else "no"
    return f"{word} (p < 0.001)" if p < 0.001 else f"{word} (p = {p:.2g})"


def sweep(table, seeds):
    """Acceptable answers to validation prompts in %, with each setting tried for each row.

    The first seed tries all settings, and each other seed those that are the two best of their
    row until then. Returns {(row, setting): [acceptable answers of each seed]}. A setting is the
    values that were tried, in the order of "try", joined by commas.
    """
    if SETTINGS_OF[table]["after"]:
        make(SETTINGS_OF[table]["after"], seeds)
    cells = settings_of(table)
    scores = {cell: [] for cell in cells}
    for seed in range(seeds):
        tried = [cell for cell in cells if seed == 0 or cell in best(scores, 2)]
        done = perform([(cells[cell], seed, True) for cell in tried], table)
        for cell in tried:
            scores[cell].append(done[named((cells[cell], seed, True))]["all"])
    lines = []
    for (name, setting), found in scores.items():
        is_best = (name, setting) in best(scores, 1)
        mean = f"{ulma.mean(found):.1f}"
        lines.append([name, setting, mean, str(len(found)), "best" if is_best else ""])
    tried = ", ".join(read_flags(SETTINGS_OF[table]["try"]))
    print_table(["method", tried, "acceptable", "seeds", ""], lines)
    return scores


def settings_of(table):
    """{(row, setting): flags} of a sweep."""
    tried, cells = read_flags(SETTINGS_OF[table]["try"]), {}
    for rows in TABLES[table].values():
        for name, flags in rows.items():
            given = read_flags(flags)
            own = {flag: values.split() for flag, values in tried.items() if flag in given}
            for setting in itertools.product(*own.values()):
                changed = given | dict(zip(own, setting))
                changed = {flag: changed[flag] for flag in changed if flag not in MEASURED}
                cells[name, ", ".join(setting)] = write_flags(changed)
    return cells


def best(scores, count):
    """The settings of each row that have most seeds, and among these the highest means."""
    order = sorted(scores, key=lambda cell: (len(scores[cell]), ulma.mean(scores[cell])))
    names = {name for name, _ in scores}
    return {cell for row in names for cell in [c for c in order if c[0] == row][-count:]}


def shown(values, digits=1, sign=""):
    """Mean ± standard error, or nothing where there are no values."""
    if None in values:
        return ""
    mean = f"{ulma.mean(values):{sign}.{digits}f}".replace("-", "−")
    return f"{mean} ± {error(values):.{digits}f}"


def error(values):
    """Standard error of the mean."""
    return torch.tensor(values).double().std().item() / len(values) ** 0.5


def chance(differences):
    """p of a paired t-test: how often chance alone would make a difference as large."""
    from scipy.stats import ttest_1samp

    return ttest_1samp(differences, 0.0).pvalue


def holm(chances):
    """Holm's correction: p for each comparison, if all of a table are looked at."""
    order = sorted(chances, key=chances.get)
    corrected = [(len(order) - i) * chances[key] for i, key in enumerate(order)]
    corrected = itertools.accumulate(corrected, max)
    return {key: min(p, 1.0) for key, p in zip(order, corrected)}


def print_table(header, rows):
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
