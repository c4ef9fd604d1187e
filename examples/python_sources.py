"""A model of Python code: byte-pair encoding and a Transformer, on the sources of Python's own standard library.

    python examples/python_sources.py
    python examples/python_sources.py --smoke     seconds, to see that it works

The text, some 13 MB, is on every machine that has Python. Stop it at any time: the same line goes on.
"""

import sys
import sysconfig
from pathlib import Path

import torch

from fundamentallm import (
    Config,
    DataConfig,
    ModelConfig,
    Trainer,
    TrainingConfig,
    Transformer,
    create_dataloaders,
    create_tokenizer,
    generate,
)

smoke = "--smoke" in sys.argv[1:]

library = Path(sysconfig.get_path("stdlib"))
files = [path for path in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*path.parts}]
if smoke:
    files = files[:10]
text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)

tokenizer = create_tokenizer("bpe:512" if smoke else "bpe:4096", lambda: [text], lambda: [text])
size = tokenizer.get_vocab_size()
print(f"{len(files)} files, {len(text):,} characters, {size:,} tokens in the vocabulary")

config = Config(
    output_dir="runs/python_sources_smoke" if smoke else "runs/python_sources",
    model=ModelConfig(vocab_size=size, d_model=64 if smoke else 256, num_heads=4, num_layers=2 if smoke else 6),
    data=DataConfig(sequence_length=64 if smoke else 256),
    training=TrainingConfig(
        batch_size=16,
        max_steps=20 if smoke else 2000,
        optimizer="muon",
        learning_rate=5e-3,
        lr_scheduler="linear",
        min_lr_ratio=0.0,
        warmup_steps=5 if smoke else 50,
        eval_every_n_steps=250,
    ),
)
torch.manual_seed(config.training.seed)
trainer = Trainer(Transformer(config.model), config, *create_dataloaders(text, tokenizer, config))
trainer.train()

prompt = tokenizer.encode("def __init__(self").ids
ids = generate(trainer.model, prompt, max_new_tokens=20 if smoke else 200, context=256, temperature=0.8)
print(tokenizer.decode(prompt + list(ids)))
