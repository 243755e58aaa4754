"""Make a table or a picture of README.md or of a page here: run what it needs, and print it.

    python data/studies/run.py TABLE              # what results.jsonl lacks is run before
    python data/studies/run.py TABLE --sweep      # instead, tries settings on validation prompts
    python data/studies/run.py PICTURE            # draws it (pip install matplotlib)

tables.ini has the rows of every table, and the number of seeds. A run takes half a minute of one
core; two go at a time. Differences are tested by scipy (pip install scipy).
"""

import argparse
import os

import figures
import more_tables
import tables

OTHERS = {  # tables and pictures that are not made of results.jsonl alone
    "rewards": figures.rewards,
    "optimum": figures.optimum,
    "guesses": more_tables.print_guesses,
}
MORE = {  # what is printed below a table
    "mistakes": more_tables.print_request,
    "negatives": more_tables.print_kinds,
    "share": more_tables.print_luck,
    "noise": more_tables.print_weights,
    "log-z": more_tables.print_rises,
    "real-demonstrations": more_tables.print_families,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=[*tables.TABLES, *OTHERS])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--seeds", type=int, help="by default those of tables.ini")
    options = parser.parse_args(argv)
    os.chdir(figures.ROOT)
    if options.table in OTHERS:
        return OTHERS[options.table]()
    if options.sweep:
        scores = tables.sweep(options.table, options.seeds or 1)
        return figures.rates(scores) if options.table == "real-demonstrations" else None
    seeds = options.seeds or tables.SETTINGS_OF[options.table]["seeds"]
    tables.print_results(options.table, seeds)
    if options.table in more_tables.LAWS:
        more_tables.print_law(options.table, seeds)
    if options.table in MORE:
        MORE[options.table](seeds)
    if options.table in ("share", "negatives"):
        getattr(figures, options.table)(seeds)


if __name__ == "__main__":
    main()
