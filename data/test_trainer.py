"""The claims of data/trainer.py, one a test. Each runs the script as a user would, on two CPUs.

This file is also what these processes run: see the last lines.
"""

import faulthandler
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
import pytest
import torch
import transformers
from filelock import FileLock
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import ulma

SCRIPT = Path(__file__).with_name("trainer.py")
HANGS = "Timeout (0:"  # what faulthandler writes above the stacks of a process that hangs
TRAINING = (
    "--use_cpu --max_length 64 --max_new_tokens 4 --beta 0.7 --learning_rate 3e-3 "
    "--num_train_epochs 3 --logging_steps 1 --disable_tqdm true --report_to none"
)
ROWS = [
    {"prompt": f"Question {i // 2}?", "completion": f" Answer {i}{' and so on' * (i % 4)}."}
    | {"label": int(i % 4 == 0), "weight": 1 + i % 3}
    for i in range(14)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and fourteen rows, which batches of four do not divide."""
    folder = tmp_path_factory.mktemp("trainer")
    tokenizer = AutoTokenizer.from_pretrained(ulma.EXAMPLE)
    make_model(folder / "model", tokenizer, "llama", attention_dropout=0.5)
    write_rows(folder / "data", ROWS)
    return folder


def make_model(path, tokenizer, name, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    sizes |= {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0, **changes}
    config = transformers.AutoConfig.for_model(name, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_rows(path, rows):
    path.mkdir(exist_ok=True)
    for split, some in {"train": rows, "test": rows[:4]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (path / f"{split}.jsonl").write_text(lines)


@pytest.fixture
def trainer(folder, tmp_path):
    """trainer(flags): runs the script in tmp_path; returns what it printed, errors included."""

    def call(flags, processes=1, code=0, model=folder / "model", data=folder / "data", **more):
        argv = [__file__, "--model", model, "--data", data, "--output_dir", "out"]
        if processes > 1:
            argv[:0] = ["-m", "torch.distributed.run", "--standalone"]
            argv[3:3] = [f"--nproc-per-node={processes}"]
        argv = [sys.executable, *map(str, argv), *TRAINING.split(), *flags.split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ulma.HERE)} | more
        before = set(tmp_path.iterdir())
        for _ in range(2):
            done = subprocess.run(
                argv, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            if HANGS not in done.stderr:
                break
            # Of some hundred starts on several processes one has hung, before its first step. A
            # second try tells chance from a fault; where the first one hung is shown.
            warnings.warn(done.stderr[done.stderr.index(HANGS) :], stacklevel=2)
            for path in set(tmp_path.iterdir()) - before:
                shutil.rmtree(path)
        assert HANGS not in done.stderr and done.returncode == code, done.stderr[-3000:]
        return done.stdout + done.stderr

    return call


def weights_of(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def losses_in(printed):
    return [float(loss) for loss in re.findall("'loss': '(.*?)'", printed)]


def steps_of_ulma(folder, out, batch_size, accumulation, more):
    """The weights that ulma.py leaves, from the same rows and settings."""
    flags = f"--max-length 64 --beta 0.7 --learning-rate 3e-3 --epochs 3 {more}".split()
    flags += [f"--batch-size={batch_size}", f"--gradient-accumulation={accumulation}"]
    args = ulma.read_options([f"--model={folder}/model", f"--data={folder}/data", *flags])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = ulma.load_model(args.model, tokenizer)
    rows, _ = ulma.load_rows(args, tokenizer)
    rows = ulma.prepare(rows, args)
    ulma.set_reference(model, rows, args)
    ulma.train(model, rows, args, out)
    return model.state_dict()


@pytest.mark.parametrize(
    "processes, flags, kind",
    [
        (1, "--per_device_train_batch_size 4", "LlamaForCausalLM"),
        (1, "--per_device_train_batch_size 2 --gradient_accumulation_steps 2", "LlamaForCausalLM"),
        (2, "--per_device_train_batch_size 2 --gradient_checkpointing", "DistributedDataParallel"),
        (2, "--per_device_train_batch_size 2 --fsdp", "FSDPLlamaForCausalLM"),
        (2, "--per_device_train_batch_size 2 --fsdp --gradient_checkpointing", "FSDPLlama"),
        (1, "--per_device_train_batch_size 4 --method pointwise-dpo --average", "LlamaFor"),
    ],
)
def test_steps_are_those_of_ulma(trainer, folder, tmp_path, processes, flags, kind):
    printed = trainer(flags, processes)
    assert f"the model is a {kind}" in printed
    accumulation = 2 if "accumulation" in flags else 1
    own = "--method pointwise-dpo --average" if "--average" in flags else ""
    expected = steps_of_ulma(folder, tmp_path / "ulma", 4 // accumulation, accumulation, own)
    actual, before = weights_of(tmp_path / "out"), weights_of(folder / "model")
    moved = max((expected[name] - before[name]).abs().max() for name in expected)
    assert moved > 3e-3
    assert_close(actual, expected, rtol=0, atol=2e-5)


def test_a_steps_loss_is_the_mean_over_its_rows_however_they_are_spread(trainer):
    flags = "--num_train_epochs 1 --learning_rate 1e-12"
    [whole] = losses_in(trainer(f"{flags} --per_device_train_batch_size 14 --output_dir whole"))
    flags += " --per_device_train_batch_size 2 --gradient_accumulation_steps"
    for processes, accumulation in ((1, 7), (1, 20), (2, 4), (3, 3)):
        out = f"--output_dir spread{processes}{accumulation}"
        [spread] = losses_in(trainer(f"{flags} {accumulation} {out}", processes))
        assert spread == pytest.approx(whole, abs=1e-3)


def test_an_epoch_has_every_row_once_in_any_number_of_processes(trainer):
    flags = "--num_train_epochs 1 --per_device_train_batch_size 1"
    for processes in (1, 2, 3):  # with three, two rows are left for the last batch
        printed = trainer(f"{flags} --output_dir out{processes}", processes)
        used = re.findall("a row of (.*)", printed)
        assert len(used) == len(set(used)) == 14


def test_fewer_rows_than_processes_are_told_once(trainer, tmp_path):
    write_rows(tmp_path / "few", ROWS[:2])
    printed = trainer("", 3, code=1, data=tmp_path / "few")
    assert printed.count("rows: 2; they are too few for 3 processes") == 1


def test_lora_trains_adapters_from_the_seed_and_leaves_a_merged_model(trainer, folder, tmp_path):
    pytest.importorskip("peft")
    flags = "--lora 2 --gradient_checkpointing --learning_rate 3e-2 --num_train_epochs 8"
    trainer(flags)
    trainer(f"{flags} --seed 1 --output_dir other")
    before, after = weights_of(folder / "model"), weights_of(tmp_path / "out" / "merged")
    other = weights_of(tmp_path / "other" / "merged")
    for name in before:  # rank 2 in all linear layers but the head
        rank = torch.linalg.matrix_rank(torch.atleast_2d(after[name] - before[name]), rtol=1e-3)
        assert rank == (2 if "proj" in name else 0)
        assert "proj" not in name or not after[name].equal(other[name])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]


def test_adapters_in_bfloat16_leave_positions_in_float32_and_lower_the_loss(trainer, tmp_path):
    """The first command of the docstring. Rounded positions would be another model."""
    pytest.importorskip("peft")
    flags = "--lora 4 --bf16 --gradient_checkpointing --learning_rate 3e-2 --num_train_epochs 20"
    flags += " --per_device_train_batch_size 14"
    printed = trainer(flags)
    assert "dtypes of buffers: {torch.float32}" in printed
    assert "dtypes of weights: {torch.bfloat16, torch.float32}" in printed
    losses = losses_in(printed)
    assert losses[-1] < losses[0] - 1


def test_the_evaluation_is_that_of_ulma(trainer, folder, tmp_path):
    trainer("")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name, model in (("before", folder / "model"), ("after", tmp_path / "out")):
        flags = ["--eval-only", f"--model={model}", f"--reference={folder / 'model'}"]
        flags += ["--max-length=64", "--max-new-tokens=4", f"--data={folder / 'data'}"]
        alone = ulma.main([*flags, f"--output-dir={tmp_path / name}"])["eval"]
        assert metrics[name] == pytest.approx(alone, abs=1e-6)
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert {"prompt", "before", "after"} == set(json.loads(samples[0]))


# 14 rows are 7 batches and 4 steps an epoch in one process, 4 batches and 2 steps in two.
SAVING = "--save_steps 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"


@pytest.mark.parametrize("flags, processes, steps", [("", 1, 12), ("--lora 2", 2, 6)])
def test_the_same_command_goes_on_after_a_kill_bit_for_bit(
    trainer, tmp_path, flags, processes, steps
):
    if flags:
        pytest.importorskip("peft")
    result = "adapter_model.safetensors" if flags else "model.safetensors"
    code = -signal.SIGKILL if processes == 1 else 1
    for step, left in ((0, steps), (5, steps - 3)):  # no checkpoint yet; one within an epoch
        command = f"{SAVING} {flags} --output_dir killed{step}"
        trainer(command, processes, code, DIES_AT=str(step))
        assert len(losses_in(trainer(command, processes))) == left
    trainer(f"{SAVING} {flags} --output_dir never", processes)
    never = (tmp_path / "never" / result).read_bytes()
    for step in (0, 5):
        assert (tmp_path / f"killed{step}" / result).read_bytes() == never


def test_with_shards_it_goes_on_too(trainer, tmp_path):
    trainer(f"{SAVING} --fsdp", 2, 1, DIES_AT="5")
    assert len(losses_in(trainer(f"{SAVING} --fsdp", 2))) == 3
    trainer(f"{SAVING} --fsdp --output_dir never", 2)
    assert_close(weights_of(tmp_path / "out"), weights_of(tmp_path / "never"), rtol=0, atol=1e-6)


def test_a_checkpoint_that_was_being_written_is_passed_over(trainer, tmp_path):
    trainer(SAVING, code=-signal.SIGKILL, DIES_AT="7")
    (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").unlink()
    assert len(losses_in(trainer(SAVING))) == 9


@pytest.fixture
def killed(trainer, folder, tmp_path):
    """A run that was killed at step 5, on copies of the model and the rows."""
    model, data = tmp_path / "model", tmp_path / "data"
    make_model(model, AutoTokenizer.from_pretrained(folder / "model"), "llama")
    write_rows(data, ROWS)
    trainer(SAVING, code=-signal.SIGKILL, model=model, data=data, DIES_AT="5")
    return {"model": model, "data": data}


def test_a_run_does_not_go_on_with_another_command(trainer, killed):
    for flags in ("--beta 3", "--method pointwise-dpo"):
        assert "run with other options" in trainer(f"{SAVING} {flags}", code=1, **killed)
    assert "run with other command" in trainer(f"{SAVING} --weight_decay 0.1", code=1, **killed)


def test_a_run_does_not_go_on_with_other_rows_or_another_base_model(trainer, killed):
    write_rows(killed["data"], [*ROWS[:13], ROWS[13] | {"completion": " Other."}])
    assert "run with other rows or base model" in trainer(SAVING, code=1, **killed)
    write_rows(killed["data"], ROWS)
    model = AutoModelForCausalLM.from_pretrained(killed["model"])
    model.model.norm.weight.data *= 1.5
    model.save_pretrained(killed["model"])
    assert "run with other rows or base model" in trainer(SAVING, code=1, **killed)


def test_a_finished_run_or_any_other_folder_with_files_is_refused(trainer, tmp_path):
    trainer("--max_steps 1")
    assert "finished" in trainer("--max_steps 1", code=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "is not empty" in trainer("--output_dir full", code=1)


@pytest.mark.parametrize(
    "flags",
    [
        "--label_smoothing_factor 0.1",
        "--neftune_noise_alpha 5",
        "--eval_strategy steps",
        "--resume_from_checkpoint x",
        "--fp16",
    ],
)
def test_options_that_would_have_no_effect_are_refused(trainer, flags):
    printed = trainer(flags, code=1)
    assert f"{flags.split()[0]} " in printed and "cannot be used here" in printed
    assert "Traceback" not in printed


def test_two_runs_at_once_into_one_folder_are_refused(trainer, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert "another run is at work there" in trainer("", code=1)


def test_weights_that_are_not_finite_stop_the_run(trainer, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.norm.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    assert "log π_ref is not finite" in trainer("", code=1, model=tmp_path / "model")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_weights_without_gradient_train_in_two_processes(trainer, folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    sizes = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}
    sizes |= {"moe_num_shared_experts": 1, "moe_layer_start_index": 1}
    make_model(tmp_path / "model", tokenizer, "ernie4_5_moe", **sizes)
    trainer("--max_steps 3", 2, model=tmp_path / "model")


def test_one_step_trains(trainer, folder, tmp_path):
    """The warm-up, a tenth of the steps, is rounded down: it has no step here."""
    trainer("--max_steps 1")
    before, after = weights_of(folder / "model"), weights_of(tmp_path / "out")
    assert not after["lm_head.weight"].equal(before["lm_head.weight"])


@pytest.mark.parametrize("flags", ["--bf16", "--bf16 --fsdp"])
def test_the_reference_has_the_precision_of_the_policy(trainer, flags):
    """Before the first step a reward is β log Z up to noise: the loss tells."""
    flags += " --num_train_epochs 1 --learning_rate 1e-12 --per_device_train_batch_size 8"
    printed = trainer(f"{flags} --method pointwise-dpo --beta 3", 2)
    mean_label = sum(row["weight"] * row["label"] for row in ROWS)
    mean_label /= sum(row["weight"] for row in ROWS)
    labels = torch.tensor([float(row["label"]) for row in ROWS])
    weights = torch.tensor([float(row["weight"]) for row in ROWS])
    rewards = torch.full((14,), mean_label).logit()
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        rewards, labels, weights, reduction="mean"
    )
    assert losses_in(printed) == pytest.approx([losses.item()], abs=5e-3)


def run_script():
    """What a process of these tests runs: the script, which tells what it trains.

    accelerate shards on GPUs alone, so it is told that these CPUs are some. DIES_AT is a step. A
    process that takes longer than HANGS_AFTER seconds writes its stacks and ends.
    """
    faulthandler.dump_traceback_later(int(os.environ.get("HANGS_AFTER", 150)), exit=True)
    from accelerate.state import DistributedType, PartialState
    from transformers import Trainer

    prepare, take_step = Trainer.create_accelerator_and_postprocess, Trainer.training_step

    def prepare_as_on_gpus(trainer):
        if trainer.args.fsdp:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        prepare(trainer)

    def tell_and_take_step(trainer, model, batch, *given):
        if str(trainer.state.global_step) == os.environ.get("DIES_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        print("the model is a", type(model).__name__, file=sys.stderr)
        buffers = {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()}
        weights = sorted({str(weight.dtype) for weight in model.parameters()})
        print("dtypes of buffers:", buffers, file=sys.stderr)
        print("dtypes of weights:", "{" + ", ".join(weights) + "}", file=sys.stderr)
        for row in batch["rows"]:
            sys.stderr.write(
                f"a row of {row.input_ids.tolist()}\n"
            )  # at once, as others write, too
        return take_step(trainer, model, batch, *given)

    Trainer.create_accelerator_and_postprocess = prepare_as_on_gpus
    Trainer.training_step = tell_and_take_step
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    run_script()
