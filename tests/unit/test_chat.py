"""Chats: tokens and targets as transformers has them, bad rows, templates that cannot be used."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fundamentallm.config.saved import saved_data_settings
from fundamentallm.config.schema import IGNORE_INDEX, DataConfig
from fundamentallm.data.corpus import Corpus, describe, load_corpus
from fundamentallm.data.datasets import TokenDataset, opening
from fundamentallm.data.loaders import corpus_samples
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.errors import ConfigError
from tests.conftest import problem_of

TURN = "{{ '<|start|>' + message.role + '\\n' }}%s{{ '<|end|>\\n' }}"
CHAT = (
    "{%% for message in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}<|start|>assistant\n{%% endif %%}"
)
PLAIN = CHAT % (TURN % "{{ message.content }}")
TOOLS = CHAT % (
    TURN % "{{ message.content }}{% if 'tool_calls' in message %}{{ message.tool_calls | tojson }}{% endif %}"
)
GENERATION = "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
MARKED = CHAT % (TURN % (GENERATION + "{% else %}{{ message.content }}{% endif %}"))
THINKS = CHAT % (
    TURN % "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}{{ message.content }}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN

SINGLE = [("system", "Add."), ("user", "1+2?"), ("assistant", " é3 ")]
SEVERAL = [*SINGLE, ("user", "<|start|> +1?"), ("tool", "4"), ("assistant", "4!"), ("user", "Thanks")]


def chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def model_folder(folder: Path, template: str) -> str:
    """Returns the tokenizer.json of a folder as transformers writes it."""
    tokenizer = create_tokenizer("bpe:270", "1+2? 4! Add. Thanks assistant user", end_of_text="<|end|>")
    tokenizer.add_special_tokens(["<|start|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=template)
    made.save_pretrained(folder)
    return str(folder / "tokenizer.json")


def load(folder: Path, template: str, rows: list[Any], **settings: Any) -> Corpus:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"source": str(source), "messages_field": "m", "train_split": 1.0, "cache_dir": str(folder / "cache")}
    given["tokenizer"] = model_folder(folder, template)
    return load_corpus(DataConfig(**given | settings), show_progress=False)


def samples_of(corpus: Corpus, length: int = 200) -> TokenDataset:
    return corpus_samples(corpus, length, has_validation=False)[0]


def targets_of(corpus: Corpus, index: int) -> list[str]:
    """Returns the text of each run of targets of a sample."""
    found, open_run = list[list[int]](), False
    for target in samples_of(corpus)[index][1].tolist():
        if target != IGNORE_INDEX and not open_run:
            found.append([])
        open_run = target != IGNORE_INDEX
        if open_run:
            found[-1].append(target)
    return [corpus.tokenizer.decode(ids, skip_special_tokens=False) for ids in found]


def test_chat_has_the_tokens_and_mask_of_transformers(tmp_path: Path) -> None:
    rows = [chat(*SINGLE), chat(*SEVERAL), chat(*SEVERAL[:5], SEVERAL[5])]
    samples = samples_of(load(tmp_path, MARKED, [{"m": row} for row in rows]))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for index, row in enumerate(rows):
        expected = theirs.apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True)
        inputs, targets = samples[index]
        ids, mask = expected["input_ids"], expected["assistant_masks"]
        assert inputs[: len(ids) - 1].tolist() == ids[:-1]
        wanted = [token if counts else IGNORE_INDEX for token, counts in zip(ids, mask, strict=True)][1:]
        assert targets.tolist() == wanted + [IGNORE_INDEX] * (len(targets) - len(wanted))


def test_chat_trains_what_the_assistant_writes(tmp_path: Path) -> None:
    corpus = load(tmp_path, PLAIN, [{"m": chat(*SINGLE)}, {"m": chat(*SEVERAL)}])
    assert [targets_of(corpus, index) for index in (0, 1)] == [[" é3 <|end|>\n"], [" é3 <|end|>\n", "4!<|end|>\n"]]
    assert "2 and 0 chats" in describe(corpus)[0]


def test_validation_counts_the_bytes_of_turns(tmp_path: Path) -> None:
    corpus = load(tmp_path, PLAIN, [{"m": chat(*SEVERAL)}] * 4, train_split=0.5)
    turns = len(" é3 <|end|>\n4!<|end|>\n".encode())
    assert corpus.sources[0].validation.num_bytes == 2 * turns
    _, validation = corpus_samples(corpus, 200)
    assert validation.num_bytes == 2 * turns
    whole = len(validation.tokens) // 2
    cut = corpus_samples(corpus, whole - 12)[1]  # without the last message, and the second turn's end
    assert (cut.num_cut, cut.num_lost) == (2, 0)
    assert 2 * len(" é3 <|end|>\n".encode()) < cut.num_bytes < 2 * turns


def test_rows_of_tables_are_chats_too(tmp_path: Path) -> None:
    """A table has a null for each field that another message has."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    rows = [{"m": [*chat(("user", "1+2?")), call, *chat(("tool", "3"), ("assistant", "3."))]}]
    expected = targets_of(load(tmp_path, TOOLS, rows), 0)
    assert expected == ['[{"name": "add"}]<|end|>\n', "3.<|end|>\n"]
    source = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).to_parquet(source)
    assert targets_of(load(tmp_path, TOOLS, rows, source=source), 0) == expected


BAD = [
    "text", [], ["text"], [{"from": "user", "value": "1"}], chat(("user", 1), ("assistant", "2")), chat(("user", "1")),
    chat(("user", "1"), ("assistant", "")), chat(("user", "1"), ("assistant", None)), chat(*SINGLE),
    chat(("user", "1"), ("assistant", "\ud800")),
]  # fmt: skip


def test_rows_that_are_no_chats_are_bad_rows(tmp_path: Path) -> None:
    """The template refuses a system message."""
    rows = [{"m": row} for row in [*BAD, chat(*SINGLE[1:])]] + [{"n": chat(*SINGLE)}]
    corpus = load(tmp_path, STRICT, rows, max_bad_rows=len(BAD) + 1)
    assert (corpus.sources[0].bad_rows, len(samples_of(corpus))) == (len(BAD) + 1, 1)
    problem = problem_of(load, tmp_path, STRICT, rows, max_bad_rows=len(BAD))
    assert problem.setting == "data.source"


def test_template_that_alters_earlier_turns_is_refused(tmp_path: Path) -> None:
    assert targets_of(load(tmp_path, THINKS, [{"m": chat(*SINGLE)}]), 0) == ["<think></think> é3 <|end|>\n"]
    problem = problem_of(load, tmp_path, THINKS, [{"m": chat(*SEVERAL)}])
    assert (problem.setting, "{% generation %}" in problem.reason) == ("data.source", True)


@pytest.mark.parametrize("switch", [None, True, False])
def test_pairs_use_the_template_unless_switched_off(tmp_path: Path, switch: bool | None) -> None:
    given = {"messages_field": None, "prompt_field": "q", "end_of_text": None if switch else "<|end|>"}
    corpus = load(tmp_path, PLAIN, [{"q": "1+2?", "text": "3"}], chat_template=switch, **given)
    assert targets_of(corpus, 0) == ["3<|end|>" if switch is False else "3<|end|>\n"]
    prompt = "1+2?" if switch is False else "<|start|>user\n1+2?<|end|>\n<|start|>assistant\n"
    assert corpus.tokenizer.decode(opening(samples_of(corpus)[0]), skip_special_tokens=False) == prompt


WRONG = [
    ({"tokenizer": "char"}, "tokenizer"),
    ({"text_field": "answer"}, "text_field"),
    ({"chat_template": False}, "chat_template"),
    ({"special_tokens": "text"}, "special_tokens"),
    ({"mask_documents": True, "end_of_text": "<|end|>"}, "mask_documents"),
    ({"messages_field": None, "chat_template": True}, "chat_template"),
    ({"source": "python-docs"}, "source"),
]


@pytest.mark.parametrize(("settings", "setting"), WRONG, ids=[setting for _, setting in WRONG])
def test_chats_with_settings_that_do_not_fit_are_refused(
    tmp_path: Path, settings: dict[str, Any], setting: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, PLAIN, [{"m": chat(*SINGLE)}], **settings)
    assert [problem.setting.removeprefix("data.") for problem in error.value.problems] == [setting]


def test_data_of_earlier_checkpoints_are_read_without_a_template() -> None:
    assert saved_data_settings({"prompt_field": "q"})["chat_template"] is False
    assert saved_data_settings({"prompt_field": "q", "chat_template": None})["chat_template"] is None
