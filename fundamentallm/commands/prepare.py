"""Tokenize the data of a config once, on all cores, so that runs start at once. A rerun keeps what is finished.

Runs find the tokens in data.cache_dir. The folders printed at the end can be moved to other machines and given as
data.source there.
"""

from collections.abc import Sequence

from fundamentallm.commands.common import say, settings_parser
from fundamentallm.config.command_line import parse_config
from fundamentallm.config.units import size_text
from fundamentallm.errors import ConfigError, Problem


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return its exit code."""
    _, rest = settings_parser(program, "", str(__doc__).strip()).parse_known_args(arguments)
    config = parse_config(rest, program)
    if config.model.pretrained is not None:  # a run would use its tokenizer
        from fundamentallm.run.resume import completed

        config, _ = completed(config)
    from fundamentallm.data.corpus import describe, is_intact, load_corpus  # the imports take half a second
    from fundamentallm.run.resume import learned_tokenizer

    if learned := learned_tokenizer(config):
        say(f"the run in {config.output_dir} keeps its tokenizer; for a new one, name another output_dir")
    corpus = load_corpus(config.data, tokenizer=learned)
    for line in describe(corpus):
        say(line)
    for source in corpus.sources:
        if not is_intact(source.folder, is_large_checked=True):
            reason, advice = f"and {source.folder} is damaged", "Delete this folder, and run the command again."
            raise ConfigError(Problem("data.source", source.name, advice=advice, reason=reason))
        size = sum(path.stat().st_size for path in source.folder.iterdir())
        say(f"{source.name} is prepared in {source.folder} ({size_text(size)})")
    return 0
