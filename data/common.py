"""What the experiments share: runs in processes of their own, and tables in Markdown."""

import contextlib
import io
import multiprocessing
from functools import partial

import torch
from tqdm import tqdm

import ulma


def quietly(function, *given):
    """Call a function without its output, in a process of the pool."""
    torch.set_flush_denormal(True)  # as ulma.main does
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*given)


def in_processes(function, runs, title="runs", runs_a_process=None):
    """Call a function on every run, two at a time."""
    if runs:
        with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=runs_a_process) as pool:
            results = pool.imap(partial(quietly, function), runs, chunksize=1)
            return list(tqdm(results, title, len(runs)))


def error(values):
    """Standard error of the mean."""
    return torch.tensor(values).std().item() / len(values) ** 0.5


def shown(values, digits=1):
    """Mean ± standard error."""
    return f"{ulma.mean(values):.{digits}f} ± {error(values):.{digits}f}"


def print_table(title, header, rows):
    print(f"{title}\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
