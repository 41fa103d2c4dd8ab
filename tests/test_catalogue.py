"""The catalogue: which keys there are, that the lines of every entry run, and that its page says what it says."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue_keys import ALL, KEYS
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import kdkernels as kd
from kdkernels import catalogue
from kdkernels.catalogue import CHAPTERS, ENTRIES, KINDS, PRELUDE, Entry, page
from kdkernels.cli import app
from kdkernels.losses import registry

PAGE = Path(__file__).parents[1] / "docs" / "losses.md"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["losses", *arguments])


@pytest.fixture(scope="module")
def prelude() -> Any:
    return compile(PRELUDE, "prelude", "exec")


def run(lines: str, prelude: Any) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(prelude, names)
    exec(lines, names)
    return names


# --- keys ---------------------------------------------------------------------------------------------------------------


def test_keys_are_those_of_the_literature() -> None:
    assert len(ALL) == len(set(ALL)) == 138 + len(KEYS["blocks"]) + len(["alm_latents", "gold"])
    assert set(ENTRIES) == set(ALL)
    for key, entry in ENTRIES.items():
        assert key == entry.key
        assert key in KEYS[entry.chapter], f"{key} is not of chapter {entry.chapter}"


def test_no_key_is_written_twice() -> None:
    modules = [
        importlib.import_module(f"{catalogue.__name__}.{found.name}")
        for found in pkgutil.iter_modules(catalogue.__path__)
    ]
    tuples = [module.ENTRIES for module in modules if isinstance(getattr(module, "ENTRIES", None), tuple)]
    found = [entry.key for entries in tuples for entry in entries]
    assert sorted(found) == sorted(ENTRIES)


def test_classes_and_entries_agree() -> None:
    """An entry of kind "loss" has its class, and a class, which may be a paper's second one, stands in an entry's lines."""
    with_class = {key for key, entry in ENTRIES.items() if entry.kind == "loss"}
    assert with_class <= set(registry.LOSSES), "an entry without its class"
    lines = "\n".join(entry.use for entry in ENTRIES.values() if entry.kind == "loss")
    for key, loss in registry.LOSSES.items():
        assert f"kd.losses.{loss.__name__}(" in lines, f"{loss.__name__}, registered as {key!r}, is in no entry"
        assert key in with_class or key not in ENTRIES, f"{key!r} has a class and is said to have none"
    for key in with_class:
        loss = kd.losses.get(key)
        assert issubclass(loss, nn.Module)
        assert getattr(kd.losses, loss.__name__) is loss
        assert f"kd.losses.{loss.__name__}(" in ENTRIES[key].use
        assert loss.__name__ in kd.losses.__all__


def test_every_loss_says_where_it_is_from() -> None:
    for key, loss in registry.LOSSES.items():
        text = loss.__doc__ or ""
        assert "Source" in text, key
        assert "onfidence" in text, key


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.key) for entry in ENTRIES.values()])
def test_entry_is_complete(entry: Entry) -> None:
    for name in ("title", "source", "formula", "use", "cost"):
        assert getattr(entry, name).strip() == getattr(entry, name) != "", name
    assert re.search(r"\b(19|20)\d\d\b|arXiv", entry.source), "source must name a year or an arXiv number"
    assert "\n" not in entry.title + entry.source + entry.cost + entry.notes
    assert max(map(len, entry.use.splitlines())) <= 130
    if entry.kind not in ("outside", "recipe"):  # which may be plain PyTorch
        assert "kd." in entry.use


def test_names_get_and_describe() -> None:
    assert kd.losses.names() == list(ENTRIES)
    assert kd.losses.names(chapter="C") == ["sinkd", "uld", "cot2align", "wcord"]
    assert kd.losses.names(chapter="H", kind="loss") == ["medusa_heads"]
    assert kd.losses.get("sinkd") is kd.losses.SinKD
    assert kd.losses.describe("llm_neo").kind == "arguments"
    with pytest.raises(ValueError, match="chapter must be one of blocks, A, A2"):
        kd.losses.names(chapter="Z")
    with pytest.raises(ValueError, match="kind must be one of loss"):
        kd.losses.names(kind="module")


def test_what_is_no_class_shows_its_lines() -> None:
    for ask in (kd.losses.get, kd.losses.describe):
        with pytest.raises(KeyError, match=r"there are .*sinkd"):
            ask("unknown")
    with pytest.raises(KeyError) as found:
        kd.losses.get("llm_neo")
    assert str(found.value).endswith("\n" + ENTRIES["llm_neo"].use)
    assert KINDS["arguments"] in str(found.value)


def test_a_key_has_one_class() -> None:
    with pytest.raises(ValueError, match="'uld' is that of ULD"):
        registry.register("uld")(kd.losses.SinKD)


# --- lines --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", list(ENTRIES))
def test_lines_run(key: str, prelude: Any) -> None:
    names = run(ENTRIES[key].use, prelude)
    loss = names.get("loss")
    if loss is None:
        assert ENTRIES[key].kind == "helper", "only helpers may do without a loss"
        return
    assert isinstance(loss, Tensor)
    assert loss.dim() == 0
    assert loss.isfinite()
    loss.backward()
    leaves = [value for value in leaves_of(names) if value.grad is not None]
    assert any(float(leaf.grad.abs().sum()) > 0 for leaf in leaves if leaf.grad is not None), "no gradient anywhere"
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves if leaf.grad is not None)


def leaves_of(names: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in names.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor) and item.is_leaf:
                found.append(item)
            elif isinstance(item, nn.Module):
                found += item.parameters()
            elif isinstance(item, kd.LMHead):
                found += [tensor for tensor in (item.hidden, item.weight) if tensor.is_leaf]
    return found


# --- page and command ---------------------------------------------------------------------------------------------------


def test_page_is_what_the_catalogue_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page.markdown(), "write it anew: make docs"


def test_page_has_every_key_once_in_the_table_and_once_below() -> None:
    text = page.markdown()
    for key in ENTRIES:
        assert text.count(f"| [`{key}`](#{key}) |") == 1
        assert text.count(f"### `{key}`") == 1


def test_what_to_call() -> None:
    assert page.calls(ENTRIES["sinkd"]) == ["kd.losses.SinKD"]
    assert page.calls(ENTRIES["llm_neo"]) == ["kd.distillation_loss"]
    assert page.calls(ENTRIES["db_llm_dad"]) == [
        "kd.weighting.entropy_weights",
        "kd.token_statistics",
        "kd.distillation_loss",
    ]
    assert page.calls(ENTRIES["krr_st"]) == ["plain PyTorch"]


def test_command_lists() -> None:
    result = invoke()
    assert result.exit_code == 0
    assert all(key in result.output for key in ENTRIES)
    assert all(title in result.output for chapter, title in CHAPTERS.items() if kd.losses.names(chapter=chapter))


def test_command_selects() -> None:
    found = json.loads(invoke("--chapter", "C", "--json").output)
    assert [row["key"] for row in found] == kd.losses.names(chapter="C")
    found = json.loads(invoke("--kind", "outside", "--search", "diffusion students", "--json").output)
    assert [row["key"] for row in found] == ["msd_diffusion"]
    nothing = invoke("--search", "nothing-of-that-kind")
    assert nothing.exit_code == 1
    assert "no entry" in nothing.output


def test_command_shows_an_entry() -> None:
    result = invoke("sinkd")
    assert result.exit_code == 0
    entry = ENTRIES["sinkd"]
    for part in (entry.title, entry.source, entry.formula, *entry.use.splitlines()):
        assert part in result.output
    (row,) = json.loads(invoke("sinkd", "--json").output)
    assert row["use"] == entry.use
    assert row["calls"] == ["kd.losses.SinKD"]


def test_command_refuses() -> None:
    unknown = invoke("sinkdd")
    assert unknown.exit_code == 2
    assert "did you mean sinkd?" in unknown.output
    assert invoke("--chapter", "Z").exit_code == 2
    assert "sinkd" in invoke("sinkd", "--markdown").output
    assert invoke("--markdown").output == page.markdown()


def test_search_finds_all_words() -> None:
    assert [entry.key for entry in page.search(["medusa"])] == ["medusa_heads"]
    assert torch.tensor([len(page.search([word])) for word in ("kl", "sinkhorn")]).gt(0).all()
    assert page.search(["sinkhorn", "medusa"]) == []


def test_guide_links_to_keys() -> None:
    """``which_loss.md`` names no key that is not in the catalogue, nor a file or name that does not exist."""
    guide = PAGE.with_name("which_loss.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"losses\.md#(\w+)\)", guide))
    assert linked <= set(ALL)
    assert all(f"[`{key}`](losses.md#{key})" in guide for key in linked)
    assert all((PAGE.parent / name).exists() for name in re.findall(r"\]\((\w+\.md)", guide))
    for name in set(re.findall(r"`kd\.([\w.]+)", guide)):
        found: Any = kd
        for part in name.split("."):
            found = getattr(found, part)
