"""ULMA at scale: the losses and the data of ulma.py in the Trainer of transformers.

    python data/trainer.py --model Qwen/Qwen2.5-7B-Instruct --data mine --output_dir runs/lora \\
        --lora 16 --learning_rate 1e-4 --bf16 --gradient_checkpointing

    torchrun --nproc-per-node 8 data/trainer.py --model Qwen/Qwen2.5-7B-Instruct --data mine \\
        --output_dir runs/gpus --fsdp --bf16 --gradient_checkpointing \\
        --per_device_train_batch_size 4 --save_steps 100

The first command trains adapters on one GPU (pip install peft), the second all weights on eight.
ScriptArguments, below, are options of ulma.py; all others are those of TrainingArguments. β is 0.1
and the learning rate 1e-5 unless they are given.

- A step's loss is the mean over all its rows, whatever the number of processes, of batches in a
  step, or of rows in the last batch. An epoch has every row once. With one process and as many rows
  in a batch, the steps are those of ulma.py.
- A run that was killed goes on from its last checkpoint (--save_steps) when the same command is
  given again, and ends as if it had never stopped. Another command, other rows or another base
  model is refused.
- The output folder gets the model; with --lora it gets the adapters, and merged/ in it the model
  with the adapters merged in.
- At the end the first process evaluates the model before and after training as ulma.py does, and
  writes metrics.json and samples.jsonl. If the model does not fit on its GPU, that fails in one
  line, and the trained model is already saved.
- Under torchrun every process reads the rows, and loads the model into main memory.
"""

import json
import math
import os
import random
import sys
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

if os.environ.get("RANK", "0") != "0":  # of several processes only the first one speaks
    sys.stdout = open(os.devnull, "w")
    os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import get_last_checkpoint

import ulma

WITHOUT_EFFECT = (  # options of the Trainer that this script does not obey, and so refuses
    "label_smoothing_factor neftune_noise_alpha train_sampling_strategy data_seed eval_strategy "
    "dataloader_drop_last dataloader_num_workers resume_from_checkpoint torch_compile"
).split()


@dataclass
class ScriptArguments:
    """The options of ulma.py that stand here, too."""

    model: str = str(ulma.EXAMPLE)
    data: str = str(ulma.HERE / "data")
    data_dir: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    method: Literal["ulma", "pointwise-dpo", "sft"] = "ulma"
    beta: float = 0.1
    log_z: float | None = None
    continuous: bool = False
    average: bool = False
    balanced: bool = False
    max_length: int = 512
    max_new_tokens: int = 64


@dataclass
class Adapters:
    lora: int = ulma.option(0, "rank of the adapters; 0 trains all weights")


class ULMATrainer(Trainer):
    """The Trainer, with ulma.py's losses, batches and warm-up. A batch has rows of ulma.py."""

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        """This process's part of the step's mean loss; processes are averaged, hence the factor."""
        model.eval()  # no dropout, with which π_θ would not start as π_ref
        losses, _ = ulma.batch_losses(model, batch["rows"], args)
        return losses.sum() * self.args.world_size / num_items_in_batch

    def get_batch_samples(self, *given):
        """The batches of a step, and the number of their rows in all processes."""
        batches, _ = super().get_batch_samples(*given)
        count = sum(len(batch["rows"]) for batch in batches)
        count = torch.tensor(count, device=self.args.device)
        return batches, self.accelerator.reduce(count, "sum")

    def get_train_dataloader(self):
        return DataLoader(
            dict(enumerate(rows)), batch_sampler=EpochBatches(self), collate_fn=collate
        )

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.args.warmup_steps < 1:  # a share: rounded down, as in ulma.py
            self.args.warmup_steps = int(num_training_steps * self.args.warmup_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def prediction_step(self, model, batch, *given, **more):
        """log π of a batch's rows, for trainer.predict."""
        with torch.no_grad():
            return None, ulma.row_logps(model, batch["rows"], args), None

    def log(self, logs, *given):
        for name in ("loss", "grad_norm"):
            told = f"step {self.state.global_step}: {name} is not finite: try a lower learning rate"
            ulma.require(math.isfinite(logs.get(name, 0.0)), told)
        super().log(logs, *given)


class ReferencePass(TrainerCallback):
    """Before the first step: a trial of saving, and log π_ref of all rows by the prepared model."""

    def on_train_begin(self, *given, **more):
        path = out / "ref_logps.json"
        if path.exists():  # this run has been killed, and its weights are no longer those of π_ref
            ref_logps = json.loads(path.read_text())
        else:
            trainer.save_model()  # what cannot be saved fails now, not after training
            ref_logps = trainer.predict(rows).predictions.tolist()
            if trainer.is_world_process_zero():
                for file in out.glob("*.safetensors"):
                    file.unlink()  # these weights are not yet trained
                ulma.write(path, [ref_logps])
        for row, ref_logp in zip(rows, ref_logps):
            row.ref_logp = ref_logp


class EpochBatches:
    """This process's part of every batch of the present epoch, as indices of rows.

    The batches of all processes together are those of ulma.py. One that has fewer rows than there
    are processes is joined to another, so that no process is without a row.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.place = {row: i for i, row in enumerate(rows)}

    def batches(self, epoch):
        processes = self.trainer.args.world_size
        rng = random.Random(self.trainer.args.seed)
        for _ in range(epoch + 1):
            size = self.trainer._train_batch_size * processes
            batches = ulma.batches_of_like_length(rows, size, rng)
        smallest = min(batches, key=len)
        if len(smallest) < processes:
            batches.remove(smallest)
            batches[0] = batches[0] + smallest
        return batches

    def __len__(self):
        return len(self.batches(0))

    def __iter__(self):
        process, processes = self.trainer.args.process_index, self.trainer.args.world_size
        for batch in self.batches(int(self.trainer.state.epoch or 0)):
            yield [self.place[row] for row in batch[process::processes]]


def collate(rows):
    """A batch of rows. The Trainer counts the tokens of input_ids."""
    return {"input_ids": ulma.pad([row.input_ids for row in rows]), "rows": rows}


def load(folder):
    """A model of this run. Under adapters and --bf16 its own weights need only be bfloat16."""
    model = ulma.load_model(folder, tokenizer)
    return model.bfloat16() if adapters.lora and training.bf16 else model


def report_mistake(kind, error, trace):
    """What the user can mend is told in one line, by the first process."""
    if not issubclass(kind, ulma.MISTAKES):
        sys.__excepthook__(kind, error, trace)
    elif training.process_index == 0:
        print(f"trainer.py: error: {' '.join(str(error).split())}", file=sys.stderr)


# ---- Options and rows ----
parser = HfArgumentParser((ScriptArguments, Adapters, TrainingArguments))
parser.set_defaults(learning_rate=1e-5, lr_scheduler_type="cosine", warmup_steps=0.1, seed=0)
parser.set_defaults(logging_steps=10, logging_nan_inf_filter=False, remove_unused_columns=False)
parser.set_defaults(ddp_find_unused_parameters=True)  # some models have weights without gradient
script, adapters, training, unknown = parser.parse_args_into_dataclasses(
    look_for_args_file=False, return_remaining_strings=True
)
sys.excepthook = report_mistake
ulma.require(not unknown, f"there is no option {' '.join(unknown)}")
for name in WITHOUT_EFFECT:
    given = getattr(training, name)
    ulma.require(given == parser.get_default(name), f"--{name} {given} has no effect here")
ulma.require(training.n_gpu < 2, "for several GPUs start it with torchrun")
torch.manual_seed(training.seed)
torch.set_flush_denormal(True)
args = ulma.Options(**vars(script), bf16=training.bf16, learning_rate=training.learning_rate)
args.epochs, args.seed = training.num_train_epochs, training.seed
args.batch_size, args.output_dir = training.train_batch_size, training.output_dir
ulma.check_numbers(args)
tokenizer = ulma.load_tokenizer(args.model)
rows, test_rows = ulma.load_rows(args, tokenizer)
rows = ulma.prepare(rows, args)
told = f"{len(rows)} rows are too few for {training.world_size} processes"
ulma.require(len(rows) >= training.world_size, told)

model = load(args.model)

# ---- The output folder: a new one, or that of the same command ----
out = Path(training.output_dir)
identity = {"options": asdict(args), "processes": training.world_size, "command": sys.argv[1:]}
contents = [(row.input_ids.tolist(), row.label, row.weight) for row in rows]
identity["rows"] = sha256(repr(contents).encode()).hexdigest()
hashes = [torch.hash_tensor(weight).item() for weight in model.state_dict().values()]
identity["base model"] = sha256(repr(hashes).encode()).hexdigest()
record = out / "options.json"
stored = json.loads(record.read_text()) if record.exists() else None
ulma.require(stored or not any(out.glob("*")), f"--output_dir {out} is not empty")
ulma.require(not (out / "metrics.json").exists(), f"--output_dir {out} has a finished run")
if stored:
    for name, value in identity.items():
        told = (
            f"--output_dir {out} has a run with other {name}; give its command, or another folder"
        )
        ulma.require(value == stored[name], told)

# ---- Model, reference, training ----
if training.gradient_checkpointing:  # by hand, since that of transformers needs training mode
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
if adapters.lora:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=adapters.lora,
        lora_alpha=2 * adapters.lora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
trainer = ULMATrainer(model, training, collate, rows, processing_class=tokenizer)
trainer.model_accepts_loss_kwargs = True  # compute_loss has divided by all rows of the step
identities = gather_object([identity])  # which also waits until all have looked at the folder
told = "the processes have read different rows or models"
ulma.require(all(other == identity for other in identities), told)
if trainer.is_world_process_zero():
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ulma.Mistake(f"--output_dir {out}: another process is training there") from None
    ulma.write(record, [identity])
trainer.add_callback(ReferencePass())
trainer.train(get_last_checkpoint(out) if stored else None)
trainer.save_model()

# ---- Evaluation, as in ulma.py ----
seconds = trainer.state.log_history[-1]["train_runtime"]
device = training.device
first = trainer.is_world_process_zero()
trainer.accelerator.end_training()
if first:
    results, samples = {"options": identity["options"]}, {}
    del model, trainer
    if adapters.lora:
        merged = PeftModel.from_pretrained(ulma.load_model(args.model, tokenizer), out)
        merged.merge_and_unload().save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
    base = load(args.model).to(device)
    ulma.set_reference(base, test_rows, args)
    results["before"], samples["before"] = ulma.evaluate(base, tokenizer, test_rows, args)
    del base
    policy = load(out / "merged" if adapters.lora else out).to(device)
    results["after"], samples["after"] = ulma.evaluate(policy, tokenizer, test_rows, args)
    results["train"] = {"seconds": seconds, "samples": training.num_train_epochs * len(rows)}
    ulma.report(results, samples, out)
