"""Fine-tune a causal language model of transformers. The checkpoints open in transformers.

    python examples/finetune_transformers.py gpt2 my.txt      a model name or folder, and a text
    python examples/finetune_transformers.py --smoke          a tiny random Llama, on text bundled with Python

The same from the command line: python -m fundamentallm.train --model.pretrained gpt2 --data.source my.txt
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fundamentallm import Config, DataConfig, Trainer, TrainingConfig, create_dataloaders, create_tokenizer

smoke = "--smoke" in sys.argv[1:]


def tiny_model(folder: str, text: str) -> str:
    """Write a model and its tokenizer to a folder, in place of a download."""
    tokenizer = create_tokenizer("bpe:400", text)
    shape = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shape).bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


if smoke:
    text = "\n\n".join(topics.values())[:30_000]
    name = tiny_model("runs/tiny_llama", text)
else:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    name, file = sys.argv[1:]
    text = Path(file).read_text(encoding="utf-8")

model = AutoModelForCausalLM.from_pretrained(name)  # often in bfloat16; the Trainer converts it to float32
tokenizer = AutoTokenizer.from_pretrained(name)
config = Config(
    output_dir="runs/finetuned_smoke" if smoke else "runs/finetuned",
    data=DataConfig(sequence_length=32 if smoke else 512),
    training=TrainingConfig(
        batch_size=8,
        micro_batch_size=2,  # limits memory; the global batch size stays 8
        max_steps=20 if smoke else 500,
        learning_rate=1e-3 if smoke else 2e-5,
        warmup_steps=5,
    ),
)
# `backend_tokenizer` is the tokenizer of the `tokenizers` library inside a fast tokenizer of transformers.
trainer = Trainer(model, config, *create_dataloaders(text, tokenizer.backend_tokenizer, config))
print(f"before: {trainer.validate()}")
trainer.train()
print(f"after: {trainer.validate()}")

again = AutoModelForCausalLM.from_pretrained(trainer.save_checkpoint())
print(f"opened in transformers: {type(again).__name__}")
