"""Every public name is documented, and its examples give the documented output."""

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import fundamentallm


def public(name: str) -> Any:
    return getattr(fundamentallm, name)


@pytest.mark.parametrize("name", fundamentallm.__all__)
def test_public_name_examples_give_their_documented_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(public(name)) or "", {}, name, None, None)
    assert examples.examples or issubclass(public(name), Exception)
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=failures.append)
    assert failures == []


@pytest.mark.parametrize("name", fundamentallm.__all__)
def test_public_class_documents_every_method(name: str) -> None:
    methods = vars(public(name)).items() if inspect.isclass(public(name)) else ()
    public_ones = [(key, value) for key, value in methods if not key.startswith("_") and callable(value)]
    assert [key for key, value in public_ones if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("name", fundamentallm.__all__)
def test_public_name_with_args_section_lists_every_argument(name: str) -> None:
    thing = public(name)
    text = inspect.getdoc(thing) or ""
    if "\nArgs:" in text:
        names = [argument for argument in inspect.signature(thing).parameters if argument != "self"]
        assert [argument for argument in names if f"\n    {argument}: " not in text] == []
