"""Train a LoRA adapter with peft. The checkpoints hold the adapter only, and open in peft.

    python examples/lora.py gpt2 my.txt     a model name or folder, and a text
    python examples/lora.py --smoke         a tiny random Qwen3, on text bundled with Python

Run it again after an interruption, and it resumes. From a config instead:
python -m fundamentallm.train --model.pretrained gpt2 --model.lora "{r: 8}" --data.source my.txt
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    default_data_collator,
)

from fundamentallm import Config, Trainer, TrainingConfig, create_tokenizer

smoke = "--smoke" in sys.argv[1:]


def tiny_model(folder: str, text: str) -> str:
    """Write a model and its tokenizer to a folder, in place of a download."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=400, num_key_value_heads=4, head_dim=8, **sizes))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=create_tokenizer("bpe:400", text)).save_pretrained(folder)
    return folder


if smoke:
    text = "\n".join(topics.values())
    name = tiny_model("runs/tiny_qwen3", text)
elif len(sys.argv) == 3:
    name, text = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8")
else:
    sys.exit(__doc__)

length = 32 if smoke else 512
tokenizer = AutoTokenizer.from_pretrained(name)
ids = torch.tensor(tokenizer(text)["input_ids"])
windows = ids[: len(ids) // length * length].view(-1, length)
rows = [{"input_ids": window, "labels": window} for window in windows]
split = len(rows) * 9 // 10

model = AutoModelForCausalLM.from_pretrained(name)
lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05)
model = get_peft_model(model, lora)
model.print_trainable_parameters()

config = Config(
    output_dir="runs/lora_smoke" if smoke else "runs/lora",
    training=TrainingConfig(max_steps=20 if smoke else 500, learning_rate=1e-2 if smoke else 2e-4, warmup_steps=5),
)
train_loader = DataLoader(rows[:split], batch_size=8, shuffle=True, collate_fn=default_data_collator)
val_loader = DataLoader(rows[split:][:64], batch_size=8, collate_fn=default_data_collator)
trainer = Trainer(model, config, train_loader, val_loader)
trainer.train()
print(f"after: {trainer.validate()}")

checkpoint = trainer.save_checkpoint()
adapted = AutoPeftModelForCausalLM.from_pretrained(checkpoint)
print(f"opened in peft: {sorted(path.name for path in checkpoint.glob('adapter*'))}")
merged = adapted.merge_and_unload()  # on the command line: fundamentallm checkpoints consolidate runs/lora OUT --merge
print(f"merged: {type(merged).__name__}")
