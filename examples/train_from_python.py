"""Train a small model from Python, read its history, and generate text.

Run it from any folder: python examples/train_from_python.py [OUTPUT_DIR]
"""

import sys

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


def main(output_dir: str = "runs/from_python") -> Trainer:
    """Train for 60 steps and return the trainer."""
    from pydoc_data.topics import topics  # English prose bundled with CPython

    text = "\n\n".join(topics.values())[:100_000]
    tokenizer = create_tokenizer("char", text)
    config = Config(
        output_dir=output_dir,
        model=ModelConfig(vocab_size=tokenizer.get_vocab_size(), d_model=64, num_heads=4, num_layers=2),
        data=DataConfig(sequence_length=64),
        training=TrainingConfig(batch_size=16, max_steps=60, optimizer="muon", learning_rate=5e-3, warmup_steps=5),
    )
    train_loader, val_loader = create_dataloaders(text, tokenizer, config)

    torch.manual_seed(config.training.seed)
    trainer = Trainer(Transformer(config.model), config, train_loader, val_loader)
    history = trainer.train()  # a finished run is left alone if the script runs again
    print(f"validation loss {history['val_loss'][-1]:.3f} after {trainer.global_step} steps")

    prompt = tokenizer.encode("The ").ids
    print(tokenizer.decode(prompt + list(generate(trainer.model, prompt, max_new_tokens=100, context=64))))
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
