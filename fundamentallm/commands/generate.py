"""Write text with a trained model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.errors import CheckpointError, CheckpointNotFoundError


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line; returns the exit code.

    Raises:
        FundamentaLLMError: if the checkpoint cannot be opened, or a value is outside its range.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR",
        help="a checkpoint, a folder of checkpoints (the best, else the newest, is taken), or a run's output_dir",
    )  # fmt: skip
    parser.add_argument("--prompt", default="\n", help="text to go on from [a new line]")
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="tokens to write [200]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token [0.8]")
    parser.add_argument("--top_k", type=int, metavar="N", help="draw among the N most probable tokens only")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    options = parser.parse_args(arguments)

    # Imported here, so that --help need not wait for torch.
    from fundamentallm.data.tokenizers import encode_prompt, read_tokenizer
    from fundamentallm.models.generation import generate
    from fundamentallm.models.transformer import Transformer, from_transformers_config
    from fundamentallm.training.snapshot import MODEL_KEY
    from fundamentallm.training.stored import load_checkpoint

    folder = find_checkpoint(options.checkpoint)
    weights = load_checkpoint(folder)[MODEL_KEY]
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model, context = Transformer(from_transformers_config(shape)), shape["max_position_embeddings"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {error}") from error
    prompt = encode_prompt(tokenizer, options.prompt)
    ids = generate(model, prompt, options.max_new_tokens, context, options.temperature, options.top_k, options.seed)
    print(options.prompt, end="", flush=True)
    # A character may be made of several tokens, so what is new in the decoded whole is printed.
    written, shown = [], 0
    for token in ids:
        if token == shape.get("eos_token_id"):
            break
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(tokenizer.decode(written)[shown:])
    return 0


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the best (else the newest) below it.

    Raises:
        CheckpointNotFoundError: if there is none, or one without what generating needs.
    """
    from fundamentallm.training.checkpoint import CheckpointManager, checkpoints_folder
    from fundamentallm.training.manifest import MANIFEST

    manager = CheckpointManager(checkpoints_folder(path))
    folder = path if (path / MANIFEST).exists() else manager.get_best() or manager.get_latest()
    if folder is None:
        raise CheckpointNotFoundError(f"there is no checkpoint in {path}; give a checkpoint, or a run's output_dir.")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise CheckpointNotFoundError(f"{folder} has no {name}; it was saved without a Transformer or a tokenizer.")
    return folder
