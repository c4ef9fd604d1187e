"""Fine-tune a causal language model of transformers on a `datasets` dataset. The checkpoints open in transformers.

    python examples/finetune_transformers.py gpt2 my.txt      a model name or folder, and a text with a sample per line
    python examples/finetune_transformers.py --smoke          a tiny random Llama, on text bundled with Python

From a config instead: python -m fundamentallm.train --model.pretrained gpt2 --data.source my.txt
"""

import sys
from pydoc_data.topics import topics

from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fundamentallm import Config, Trainer, TrainingConfig, create_tokenizer

smoke = "--smoke" in sys.argv[1:]


def tiny_model(folder: str, text: str) -> str:
    """Write a model and its tokenizer to a folder, in place of a download."""
    tokenizer = create_tokenizer("bpe:400", text, end_of_text="<|endoftext|>")
    shape = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shape).bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


if smoke:
    samples = Dataset.from_dict({"text": list(topics.values())})
    name = tiny_model("runs/tiny_llama", "\n".join(samples["text"]))
elif len(sys.argv) == 3:
    name = sys.argv[1]
    samples = load_dataset("text", data_files=sys.argv[2], split="train")
else:
    sys.exit(__doc__)

# As for transformers' Trainer: a model, a tokenizer, a tokenized dataset and a collator.
model = AutoModelForCausalLM.from_pretrained(name)  # often in bfloat16; the Trainer converts it to float32
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model.config.pad_token_id = tokenizer.pad_token_id
length = 32 if smoke else 512
tokenized = samples.map(
    lambda rows: tokenizer(rows["text"], truncation=True, max_length=length), batched=True, remove_columns="text"
)
tokenized = tokenized.filter(lambda row: len(row["input_ids"]) > 1)  # one token has no next one
split = tokenized.train_test_split(test_size=0.1, seed=0)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # pads, and labels padding with -100

config = Config(
    output_dir="runs/finetuned_smoke" if smoke else "runs/finetuned",
    training=TrainingConfig(
        batch_size=8,
        micro_batch_size=2,  # limits memory; the global batch size stays 8
        max_steps=20 if smoke else 500,
        learning_rate=1e-3 if smoke else 2e-5,
        warmup_steps=5,
    ),
)
train_loader = DataLoader(split["train"], batch_size=8, shuffle=True, collate_fn=collator)
val_loader = DataLoader(split["test"], batch_size=8, collate_fn=collator)
trainer = Trainer(model, config, train_loader, val_loader)
print(f"before: {trainer.validate()}")
trainer.train()
print(f"after: {trainer.validate()}")

tokenizer.save_pretrained(f"{config.output_dir}/tokenizer")
again = AutoModelForCausalLM.from_pretrained(trainer.save_checkpoint())
print(f"opened in transformers: {type(again).__name__}")
