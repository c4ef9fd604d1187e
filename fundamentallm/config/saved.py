"""Configs as checkpoints and logs hold them: plain dicts, perhaps of earlier versions."""

from typing import Any


def saved_data_settings(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the section `data` of a checkpoint's config, with what earlier versions did without a setting."""
    data = dict(data)
    if data.get("prompt_field") is not None:
        data.setdefault("chat_template", False)
    if data.get("end_of_text") is not None and str(data.get("tokenizer")).endswith(".json"):
        data.setdefault("special_tokens", "text")
    return data


def flat_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Returns {dotted name: value} of a config as a plain dict; settings without sections belong to the training."""
    nested = config if "training" in config else {"training": config}
    flat = {name: value for name, value in nested.items() if name not in ("model", "data", "training")}
    for section, values in (nested | {"data": saved_data_settings(nested.get("data", {}))}).items():
        if section not in flat:
            flat |= {f"{section}.{name}": value for name, value in values.items()}
    return flat
