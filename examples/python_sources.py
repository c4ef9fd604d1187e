"""Train a model of Python code: byte-pair encoding and a Transformer, on Python's standard library.

    python examples/python_sources.py
    python examples/python_sources.py --smoke     finishes in seconds

The text is 5 MB and present on every machine with Python. It is tokenized once, on all cores, one document per file.
`data.source` may also be a folder (with `suffixes=[".py"]`), rows, a dataset, or several of these. Stop the script at
any time; running it again resumes.
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
    generate,
    load_corpus,
)

smoke = "--smoke" in sys.argv[1:]

data = DataConfig(
    source=str(Path(sysconfig.get_path("stdlib"), "a*.py" if smoke else "*.py")),
    tokenizer="bpe:512" if smoke else "bpe:4096",
    end_of_text="<|endoftext|>",
    sequence_length=64 if smoke else 256,
)
corpus = load_corpus(data)
tokenizer = corpus.tokenizer
size = tokenizer.get_vocab_size()
print(f"{len(corpus.sources[0].train.ids):,} tokens to train on, {size:,} in the vocabulary")

config = Config(
    output_dir="runs/python_sources_smoke" if smoke else "runs/python_sources",
    model=ModelConfig(vocab_size=size, d_model=64 if smoke else 256, num_heads=4, num_layers=2 if smoke else 6),
    data=data,
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
trainer = Trainer(Transformer(config.model), config, *create_dataloaders(corpus, tokenizer, config))
trainer.train()

prompt = tokenizer.encode("def __init__(self").ids
ids = generate(trainer.model, prompt, max_new_tokens=20 if smoke else 200, context=256, temperature=0.8)
print(tokenizer.decode(prompt + list(ids)))
