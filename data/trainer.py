"""ULMA at scale: the losses and the data of ulma.py in the Trainer of transformers.

    python data/trainer.py --model Qwen/Qwen2.5-7B-Instruct --data mine --output_dir runs/lora \\
        --lora 16 --learning_rate 1e-4 --bf16 --gradient_checkpointing

    torchrun --nproc-per-node 8 data/trainer.py --model Qwen/Qwen2.5-7B-Instruct --data mine \\
        --output_dir runs/gpus --fsdp --bf16 --gradient_checkpointing \\
        --per_device_train_batch_size 4 --save_steps 100

The first command trains adapters on one GPU (pip install peft), the second all weights on eight.
ScriptArguments, below, has the options of ulma.py and --lora; all others are those of
TrainingArguments. Unless they are given, β is 0.1, the learning rate 1e-5 (too low for adapters),
and there are 3 epochs, and 8 rows in a batch of each process.

- A step's loss is the mean over all its rows, whatever the number of processes, of batches in a
  step, or of rows in the last batch. An epoch has every row once. With the same total number of
  rows in a step, over all processes, the steps are those of ulma.py.
- A run that was killed goes on from its last checkpoint when the same command is given again, and
  ends as if it had never stopped. (--save_steps is 500 by default. If torchrun alone was killed,
  end its processes first.) Another command, other rows to train on, another base model or another
  number of processes is refused; so is a finished folder. Several machines need a shared disk.
- The output folder gets the model; with --lora it gets the adapters, and merged/ in it the model
  with the adapters merged in, which is what ulma.py --eval-only takes as --model. Adapters leave
  the embeddings as they are: train a token that you added to the tokenizer with all weights first.
- A checkpoint also holds the optimizer: 12 bytes a trained weight. --save_total_limit 2 keeps two.
- The rewards that ulma.py writes to log.jsonl are in the log of the Trainer.
- At the end the first process evaluates the model before and after training as ulma.py does, and
  writes metrics.json and samples.jsonl. If the model does not fit on that one GPU, only this
  evaluation fails; the trained model has been saved before.
- Under torchrun every process reads the rows, and loads the model into main memory, in float32.
- log π_ref and log π_θ come from the same wrapped model, in the same precision. With --fsdp --bf16
  that is bfloat16 for the output head, too; otherwise the head works in float32, as in ulma.py.
"""

import gc
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

if os.environ.get("RANK", "0") != "0":  # of several processes only the first one prints
    sys.stdout = open(os.devnull, "w")
    os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

import ulma

# Options of the Trainer that would have no effect here, or would break what is promised above.
REFUSED = """
    label_smoothing_factor neftune_noise_alpha train_sampling_strategy data_seed
    dataloader_drop_last dataloader_num_workers eval_strategy eval_on_start load_best_model_at_end
    resume_from_checkpoint ignore_data_skip save_only_model auto_find_batch_size torch_compile
    fp16 fp16_full_eval bf16_full_eval deepspeed parallelism_config gradient_checkpointing_kwargs
""".split()


@dataclass
class ScriptArguments:
    """What these options mean stands in ulma.py."""

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
    lora: int = ulma.option(0, "rank of the adapters; 0 trains all weights")


class ULMATrainer(Trainer):
    """The Trainer, with the losses, the batches and the warm-up of ulma.py."""

    rewards, labels = (), ()  # of this process's rows since the last line of the log

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        """This process's part of the step's mean loss; processes are averaged, hence the factor."""
        model.eval()  # no dropout, with which π_θ would not start as π_ref
        losses, rewards = ulma.batch_losses(model, batch["rows"], options)
        self.rewards += (rewards,)
        self.labels += tuple(row.label for row in batch["rows"])
        return losses.sum() * self.args.world_size / num_items_in_batch

    def get_batch_samples(self, *given):
        """The batches of a step, and the number of their rows in all processes."""
        batches, _ = super().get_batch_samples(*given)
        count = sum(len(batch["rows"]) for batch in batches)
        count = torch.tensor(count, device=self.args.device)
        return batches, self.accelerator.reduce(count, "sum")

    def get_train_dataloader(self):
        dataset = {row: row for row in rows}  # a row is its own index
        return DataLoader(dataset, batch_sampler=EpochBatches(self), collate_fn=collate)

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.args.warmup_steps < 1:  # a share: rounded down, as in ulma.py
            self.args.warmup_steps = int(num_training_steps * self.args.warmup_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def prediction_step(self, model, batch, *given, **more):
        """log π of a batch's rows, for trainer.predict."""
        with torch.no_grad():
            return None, ulma.row_logps(model, batch["rows"], options), None

    def log(self, logs, *given):
        """Adds the mean rewards of this process, and stops where the loss is not finite."""
        for name in ("loss", "grad_norm"):
            told = f"step {self.state.global_step}: {name} is not finite; try a lower learning rate"
            ulma.require(math.isfinite(logs.get(name, 0.0)), f"{told}, in another folder")
        if self.rewards:
            rated = list(zip(torch.cat(self.rewards).tolist(), self.labels))
            logs["reward_positive"] = ulma.mean([reward for reward, z in rated if z > 0.5])
            logs["reward_negative"] = ulma.mean([reward for reward, z in rated if z <= 0.5])
            self.rewards, self.labels = (), ()
        super().log(logs, *given)


class EpochBatches:
    """This process's part of every batch of the present epoch.

    The batches of all processes together are those of ulma.py. One that has fewer rows than there
    are processes is joined to that of the shortest rows, so that no process is without a row.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def batches(self, epoch):
        processes = self.trainer.args.world_size
        size = self.trainer._train_batch_size * processes
        rng = random.Random(self.trainer.args.seed)
        for _ in range(epoch + 1):  # earlier epochs are drawn again, for the state of rng
            batches = ulma.batches_of_like_length(rows, size, rng)
        smallest = min(batches, key=len)
        if len(smallest) < processes:
            batches.remove(smallest)
            shortest = min(batches, key=lambda batch: max(len(row.input_ids) for row in batch))
            shortest += smallest
        return batches

    def __len__(self):
        return len(self.batches(0))

    def __iter__(self):
        process, processes = self.trainer.args.process_index, self.trainer.args.world_size
        for batch in self.batches(int(self.trainer.state.epoch or 0)):
            yield batch[process::processes]


def collate(rows):
    """A batch of rows. The Trainer takes the number of rows and of tokens from input_ids."""
    return {"input_ids": ulma.pad([row.input_ids for row in rows]), "rows": rows}


class BeforeTheFirstStep(TrainerCallback):
    """log π_ref of all rows, from the wrapped model; and a trial of saving."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, *given, **more):
        path = out / "ref_logps.json"
        if path.exists():  # this run has been killed, and its weights are no longer those of π_ref
            ref_logps = json.loads(path.read_text())
        else:
            self.trainer.save_model(_internal_call=True)
            if self.trainer.is_world_process_zero():
                weights = list(out.glob("*.safetensors"))
                ulma.require(weights, f"a trial of saving wrote no weights into {out}")
                for file in weights:
                    file.unlink()  # they are not yet trained
            ref_logps = self.trainer.predict(rows).predictions.tolist()
            finite = all(math.isfinite(ref_logp) for ref_logp in ref_logps)
            ulma.require(finite, "log π_ref is not finite: are the model's weights broken?")
            write(path, ref_logps)
        for row, ref_logp in zip(rows, ref_logps, strict=True):
            row.ref_logp = ref_logp


def write(path, value):
    """Writes JSON at once or not at all, from the first process."""
    if training.process_index == 0:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.replace(path)


def load(folder):
    """A model of this run. With --lora and --bf16 its weights, which are frozen, are bfloat16."""
    model = ulma.load_model(folder, tokenizer)
    if script.lora and training.bf16:
        for weight in model.parameters():  # not the buffers: they hold positions
            if weight is not model.get_output_embeddings().weight:
                weight.data = weight.data.bfloat16()
    return model


def report_error(kind, error, trace):
    """Errors that the user can fix end in one line, from the first process that has them."""
    if not issubclass(kind, ulma.MISTAKES):
        return sys.__excepthook__(kind, error, trace)
    if training.process_index > 0:
        time.sleep(20)  # a mistake of all is told by process 0; then torchrun ends this one
    told = " ".join(str(error).split())
    print(f"trainer.py, process {training.process_index}: error: {told}", file=sys.stderr)


# ---- Options and rows ----
parser = HfArgumentParser((ScriptArguments, TrainingArguments), allow_abbrev=False)
parser.set_defaults(learning_rate=1e-5, lr_scheduler_type="cosine", warmup_steps=0.1, seed=0)
parser.set_defaults(logging_steps=10, logging_nan_inf_filter=False, remove_unused_columns=False)
parser.set_defaults(ddp_find_unused_parameters=True)  # experts without a token have no gradient
script, training, unknown = parser.parse_args_into_dataclasses(
    look_for_args_file=False, return_remaining_strings=True
)
sys.excepthook = report_error
ulma.require(not unknown, f"there is no option {' '.join(unknown)}")
for name in REFUSED:
    given = getattr(training, name)
    ulma.require(given == parser.get_default(name), f"--{name} {given} cannot be used here")
told = "for several GPUs start it with torchrun, for one of them set CUDA_VISIBLE_DEVICES=0"
ulma.require(training.n_gpu < 2, told)
torch.manual_seed(training.seed)
torch.set_flush_denormal(True)
chosen = {name: value for name, value in vars(script).items() if name != "lora"}
options = ulma.Options(**chosen, bf16=training.bf16, learning_rate=training.learning_rate)
options.epochs, options.seed = training.num_train_epochs, training.seed
options.batch_size, options.output_dir = training.train_batch_size, training.output_dir
options.gradient_accumulation = training.gradient_accumulation_steps
ulma.check_numbers(options)
tokenizer = ulma.load_tokenizer(options.model)
rows, test_rows = ulma.load_rows(options, tokenizer)
rows = ulma.prepare(rows, options)
told = f"rows: {len(rows)}; they are too few for {training.world_size} processes"
ulma.require(len(rows) >= training.world_size, told)
model = load(options.model)

# ---- The output folder: a new one, or that of the same command ----
out = Path(training.output_dir)
if training.process_index == 0:
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ulma.Mistake(f"--output_dir {out}: another run is at work there") from None
digest = sha256()
for row in rows:
    contents = (row.input_ids.tolist(), row.response_mask.sum().item(), row.label, row.weight)
    digest.update(repr(contents).encode())
for name, weight in model.state_dict().items():
    total = weight.sum(dtype=torch.float64)  # hash_tensor alone passes over pairs of equal values
    digest.update(f"{name} {weight.shape} {torch.hash_tensor(weight)} {total}".encode())
identity = {"options": asdict(options), "processes": training.world_size}
identity |= {"command": sys.argv[1:], "rows or base model": digest.hexdigest()}
record = out / "options.json"
stored = json.loads(record.read_text()) if record.exists() else None
files = [path.name for path in out.glob("*") if path.name != ".lock"]
ulma.require(stored or not files, f"--output_dir {out} is not empty")
ulma.require("metrics.json" not in files, f"--output_dir {out} has a finished run")
if stored:
    for name, value in identity.items():
        told = (
            f"--output_dir {out} has a run with other {name}: repeat its command, or take another"
        )
        ulma.require(value == stored.get(name), f"{told} folder")
identities = gather_object([identity])  # which also waits until all have looked at the folder
same = all(other == identity for other in identities)
ulma.require(same, "the processes have read different rows or models")
if not stored:
    write(record, identity)

# ---- Training ----
if training.gradient_checkpointing:  # by hand, since that of transformers needs training mode
    blocks = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    ulma.require(blocks, "--gradient_checkpointing: this model has no blocks for it")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
if script.lora:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=script.lora,
        lora_alpha=2 * script.lora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
trainer = ULMATrainer(model, training, collate, rows, processing_class=tokenizer)
trainer.model_accepts_loss_kwargs = True  # compute_loss has divided by all rows of the step
trainer.add_callback(BeforeTheFirstStep(trainer))
whole = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]  # written last
newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
print(f"goes on from {newest}" if newest else f"begins; results in {out}")
trainer.train(newest and str(newest))
trainer.save_model()

# ---- Evaluation, as in ulma.py ----
results = {"options": asdict(options), "train": trainer.state.log_history[-1]}
trainer.accelerator.free_memory()
trainer.accelerator.end_training()
del trainer, model
gc.collect()
torch.cuda.empty_cache()
if training.process_index == 0:
    final = out
    if script.lora:
        final = out / "merged"
        base = ulma.load_model(options.model, tokenizer)
        merged = PeftModel.from_pretrained(base, out, torch_device="cpu")
        merged.merge_and_unload().save_pretrained(final)
        tokenizer.save_pretrained(final)
        del base, merged
    try:
        samples = {}
        model = load(options.model).to(training.device)
        ulma.set_reference(model, test_rows, options)
        results["before"], samples["before"] = ulma.evaluate(model, tokenizer, test_rows, options)
        del model
        model = load(final).to(training.device)
        results["after"], samples["after"] = ulma.evaluate(model, tokenizer, test_rows, options)
    except torch.OutOfMemoryError:
        told = f"the trained model is in {final}, but is too large for one GPU to evaluate it"
        raise ulma.Mistake(told) from None
    ulma.report(results, samples, out)
