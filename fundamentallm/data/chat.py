"""Chats as text: rendered by a tokenizer's own chat template, with the position of each assistant turn."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fundamentallm.config.schema import DataConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.errors import ConfigError, Problem

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Marks an assistant turn in a template, as transformers reads it."""
ROLES = ("user", "assistant")
Turns = tuple[tuple[int, int], ...]
"""The first character of each assistant turn, and the one after its last."""


def applied_template(config: DataConfig) -> dict[str, str]:
    """Returns the files, by name, whose chat template renders the rows of `config`; empty if none is applied to them.

    Besides the template, they hold the special tokens that it names. Raises ConfigError if there is none, or it does
    not fit the other settings.
    """
    is_needed = config.messages_field is not None or config.chat_template is True
    if not is_needed and (config.prompt_field is None or config.chat_template is False):
        return {}
    path = Path(expand_user(config.tokenizer))
    names = (TEMPLATE, TOKENIZER_CONFIG, "special_tokens_map.json") if path.name == "tokenizer.json" else ()
    paths = [path.with_name(name) for name in names]
    files = {path.name: path.read_text("utf-8", "replace") for path in paths if path.is_file()}
    if TEMPLATE not in files and '"chat_template"' not in files.get(TOKENIZER_CONFIG, ""):
        if is_needed:
            allowed = f"the tokenizer.json of a chat model, beside its {TEMPLATE} or {TOKENIZER_CONFIG}"
            raise ConfigError(Problem("data.tokenizer", config.tokenizer, allowed, reason="which has no chat template"))
        return {}
    unfit = [("special_tokens", "text"), ("mask_documents", True)]
    reason = "and the chat template of data.tokenizer renders each row as a sample"
    if given := [(name, value) for name, value in unfit if getattr(config, name) == value]:
        raise ConfigError([Problem(f"data.{name}", value, "", "", reason) for name, value in given])
    return files


class ChatTemplate:
    """Renders chats by the chat template beside a tokenizer.json, in transformers' sandbox.

    Raises:
        ConfigError: if it cannot be opened, or transformers is not installed.
    """

    def __init__(self, tokenizer: str | Path) -> None:
        try:
            from transformers import PreTrainedTokenizerFast
            from transformers.utils.chat_template_utils import render_jinja_template

            folder = Path(expand_user(str(tokenizer))).parent
            opened: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            self.template = opened.get_chat_template()
        except Exception as error:  # its files may hold anything
            reason = f"whose chat template transformers (the extra hf) cannot open: {error}"
            raise ConfigError(Problem("data.tokenizer", str(tokenizer), reason=reason)) from error
        # `apply_chat_template` renders by this function too, but returns no positions in the text.
        fixed = {"chat_template": self.template, **opened.special_tokens_map}
        self._render: Any = functools.partial(render_jinja_template, **fixed)

    def text(self, messages: list[dict[str, Any]], is_prompt: bool = False) -> str:
        """Returns messages as text; `is_prompt` adds what comes before an answer. Raises what the template raises."""
        return str(self._render([messages], add_generation_prompt=is_prompt)[0][0])

    def chat(self, messages: Any) -> tuple[str, Turns]:
        """Returns the text of a chat, and its assistant turns.

        Raises:
            ValueError: if it is not a chat, the template cannot render it, or its turns cannot be found in the text.
        """
        try:
            # Tables have a null for each field that a message lacks. Templates expect it to be absent.
            messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
            answers = [index for index, message in enumerate(messages) if message["role"] == ROLES[1]]
            for index, message in enumerate(messages):
                content, calls = message.get("content"), message.get("tool_calls")
                is_text = isinstance(content, str) and (content or index not in answers)
                if not (is_text or (calls and not content)):
                    raise ValueError(f"{str(message)[:60]!r} has no text as content")
            if MARKED.search(self.template):
                (text,), (turns,) = self._render([messages], return_assistant_tokens_mask=True)
            else:
                text = self.text(messages)
                turns = [self._turn(messages, index, text) for index in answers]
        except Exception as error:  # whatever a template raises
            raise ValueError(f"is not a list of messages that the chat template can render: {error!r}") from error
        if not any(start < stop for start, stop in turns):
            raise ValueError(f"has no answer of the role {ROLES[1]!r} in the text of its chat template")
        return text, tuple(turns)

    def _turn(self, messages: list[dict[str, Any]], index: int, text: str) -> tuple[int, int]:
        """Returns where the prompt of a turn ends and where the text up to it ends: between is what the model writes.

        Both have to be beginnings of the whole text. Otherwise the turn is not trained as it would be generated.
        """
        prompt = self.text(messages[:index], is_prompt=True)
        until = text if index + 1 == len(messages) else self.text(messages[: index + 1])
        if not (text.startswith(until) and until.startswith(prompt)):
            advice = "give one row for each answer, or mark turns by {% generation %} and {% endgeneration %}"
            raise ValueError(f"it renders a turn in another way if others follow, as in {text[:200]!r}; {advice}")
        return len(prompt), len(until)


def token_turns(tokenizer: Tokenizer, text: str, turns: Turns) -> NDArray[np.int64]:
    """Returns the first token of each turn and the one after its last, one after the other.

    A token that only partly belongs to a turn is in it, as in transformers' own mask.
    """
    starts, stops = np.array(tokenizer.encode(text, add_special_tokens=False).offsets).T
    inside = np.zeros(len(starts) + 2, np.int8)
    for start, stop in turns:
        inside[1:-1] |= (starts < stop) & (stops > start)
    return np.flatnonzero(np.diff(inside))
