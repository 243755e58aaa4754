"""What a real model costs: ULMA on the rows of real-model for one epoch.

    python data/experiments.py real-costs    # after real-model

Every run has one thread; two go at a time.
"""

import json
import resource
import sys

import make_data
from common import in_processes, print_table
from real_model import BASE, LENGTHS, RUNS, TEST_PROMPTS, measured_in, requests, respond, trained

COMMON = f"--model {BASE} --data {RUNS}/rows --method ulma --beta 1 --epochs 1 {LENGTHS}"
CASES = [
    f"--learning-rate {rest}"
    for rest in (
        "1e-4 --bf16 true",
        "1e-4 --bf16 false",
        "1e-3 --bf16 true --lora 16",
        "1e-3 --bf16 false --lora 16",
        "1e-5 --bf16 true",
        "3e-3 --bf16 true --lora 16",
    )
]


def folder_of(case):
    return RUNS / "costs" / case


def execute(case):
    """Train and respond. The peak of memory is that of the whole training program."""
    out = folder_of(case)
    with trained(f"{COMMON} {case}", out):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        make_data.write(out / "responses.jsonl", respond(out, requests("test", TEST_PROMPTS), 2, 0))
    (out / "peak.json").write_text(json.dumps(peak))


def main():
    if not (RUNS / "rows/test.jsonl").exists():
        sys.exit("run real-model first")
    todo = [case for case in CASES if not (folder_of(case) / "peak.json").exists()]
    in_processes(execute, todo, runs_a_process=1)  # a peak is a process's
    rows = []
    for case in CASES:
        trained = json.loads((folder_of(case) / "metrics.json").read_text())["train"]
        found = measured_in(folder_of(case))
        peak = json.loads((folder_of(case) / "peak.json").read_text())
        seconds = [f"{trained['seconds']:.0f}", f"{trained['reference_seconds']:.0f}"]
        quality = [f"{found['score']:.3f}", f"{found['KL']:.1f}"]
        rows.append([f"`{case}`", *seconds, f"{peak:.1f}", *quality])
    header = ["flags", "seconds of training", "of the reference", "peak memory, GiB", "score", "KL"]
    print_table("", header, rows)
