"""What the documents say is run: python, recipes, commands with their output and exit code, links.

The blocks of one file share a namespace and a fresh folder, and run in order:

    ```python     is executed; one that begins with >>> is a doctest, so that the values shown are checked
    ```toml       is read as a recipe
    ```console    its lines `$ thalweg ...` are run; `# exit 2` behind one is its exit code (0 without), and the lines below it
                  must stand in its output, in this order (`...` is anything)

A block whose first line is `# name.py` or `# name.toml` is also written to that file. `<!-- not run: REASON -->` before a
block leaves it out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import importlib
import io
import re
import shlex
import sys
import textwrap
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg import Recipe, regularize, schedules
from thalweg.cli.main import main
from thalweg.core.recipe import Schedule as RecipeSchedule
from thalweg.engine.settle import Decisions, settle_optimizer
from thalweg.optim import card, table
from thalweg.rules import DECAYS, RULES, STAGES
from thalweg.schedules import cards
from thalweg.schedules.shapes import options_of

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
FILES = [*(ROOT / name for name in NAMES if (ROOT / name).is_file()), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("console", "sh", "bash", "shell")
SHOWN = ("", "text", "json")  # languages that nothing is run of
NOT_RUN = ("make", "pip", "git", "cd")  # commands that are not run
MOST_LEFT_OUT = 6


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its first line, ``reason`` says why it is not run."""

    language: str
    text: str
    line: int
    reason: str


def blocks_of(text: str) -> Iterator[Block]:
    lines, before = iter(enumerate(text.splitlines(), 1)), ""
    for number, line in lines:
        if line.lstrip().startswith("```"):
            body: list[str] = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                body.append(inner)
            left_out = re.fullmatch(r"<!-- not run: (.+) -->", before.strip())
            code = textwrap.dedent("\n".join(body)) + "\n"
            yield Block(line.strip()[3:].strip(), code, number + 1, left_out.group(1) if left_out else "")
        before = line if line.strip() else before


def run_text(text: str, name: str, folder: Path) -> None:
    """Run all blocks of a document in ``folder``, which is the current one; the error names file and line."""
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in blocks_of(text):
        if not block.reason:
            with telling_where(f"{name}:{block.line}"):
                run_block(block, name, folder, namespace)


@contextlib.contextmanager
def telling_where(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as err:
        raise AssertionError(f"{where}: {type(err).__name__}: {err}") from err


def run_block(block: Block, name: str, folder: Path, namespace: dict[str, Any]) -> None:
    if written := re.match(r"# ([\w-]+\.(?:py|toml))\n", block.text):
        (folder / written.group(1)).write_text(block.text, encoding="utf-8")
    if block.language == "python" and block.text.startswith(">>>"):
        run_doctest(block, name, namespace)
    elif block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.text, name, "exec", dont_inherit=True), namespace)
    elif block.language == "toml":
        Recipe.from_toml(block.text)
    elif block.language in COMMANDS:
        run_commands(block.text, folder)
    else:
        assert block.language in SHOWN, f"a block of '{block.language}' would not be run: name it text, or mark it"


def run_doctest(block: Block, name: str, namespace: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, namespace, name, name, block.line - 1)
    told = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failed = runner.run(test, out=told.write, clear_globs=False).failed
    namespace.update(test.globs)
    assert not failed, told.getvalue()


def run_commands(text: str, folder: Path) -> None:
    output, position = "", 0
    for line in text.splitlines():
        prompt, _, command = line.partition("$ ")
        if prompt or not command:
            if line.strip() and not line.startswith("#") and line.split()[0] not in NOT_RUN:
                pattern = ".*".join(map(re.escape, re.split(r" ?\.\.\. ?", spaces_out(line))))
                found = re.compile(pattern).search(output, position)
                assert found, f"{line!r} is not in the rest of the output:\n{output[position:]}"
                position = found.end()
            continue
        words = shlex.split(command, comments=True)
        output, position = "", 0
        if words[0] not in NOT_RUN:
            assert words[0] == "thalweg", f"'{words[0]}' would not be run: mark the block"
            wanted = re.search(r"# exit (\d+)$", command)
            code, told = run_thalweg(words[1:], folder)
            assert code == int(wanted.group(1) if wanted else 0), f"{command} gave exit {code}:\n{told}"
            output = "\n".join(map(spaces_out, told.splitlines()))


def spaces_out(line: str) -> str:
    """Tables are as wide as their terminal: runs of blanks count as one."""
    return " ".join(line.split())


def run_thalweg(arguments: list[str], folder: Path) -> tuple[int, str]:
    """(exit code, what a terminal would show) of a command in this process; the document's own modules are read anew."""
    forget_modules(folder)
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    return code, told.getvalue()


def forget_modules(folder: Path) -> None:
    """Modules from ``folder`` are imported anew when they are next asked for."""
    for name in [n for n, m in sys.modules.items() if str(folder) in str(getattr(m, "__file__", None))]:
        del sys.modules[name]
    importlib.invalidate_caches()


def links_of(text: str) -> Iterator[str]:
    for link in re.finditer(r"\]\(([^)\s]+)[^)]*\)|^\[[^\]]+\]: (\S+)", prose_of(text), flags=re.MULTILINE):
        target = link.group(1) or link.group(2)
        if not re.match(r"https?:|mailto:", target):
            yield target


def prose_of(text: str) -> str:
    """A document without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def slugs_of(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose_of(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def check_links(text: str, file: Path) -> None:
    for link in links_of(text):
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), f"{file.name} links to {link}, which is not there"
        if anchor and target.suffix == ".md":
            there = text if target == file else target.read_text(encoding="utf-8")
            assert anchor in slugs_of(there), f"{file.name} links to {link}, and no heading is called that"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh current folder, on the module path; a terminal of 120 columns; one thread, which suits models this small best.

    What a document registers is forgotten after it.
    """
    for registry in (RULES, STAGES, schedules.SHAPES, regularize.PENALTIES, regularize.TRANSFORMS):
        monkeypatch.setattr(registry, "_things", dict(registry._things))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    forget_modules(tmp_path)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_blocks_run(file: Path, folder: Path) -> None:
    run_text(file.read_text(encoding="utf-8"), file.name, folder)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_links_resolve(file: Path) -> None:
    check_links(file.read_text(encoding="utf-8"), file)


def test_few_blocks_are_left_out() -> None:
    left_out = [
        f"{file.name}:{block.line}: {block.reason}"
        for file in FILES
        for block in blocks_of(file.read_text(encoding="utf-8"))
        if block.reason
    ]
    assert len(left_out) <= MOST_LEFT_OUT, "\n".join(left_out)


def paths_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a recipe."""
    for name, wanted in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(wanted):
            yield from paths_of(wanted, f"{name}.")
        else:
            yield prefix + name


def test_the_default_recipe_is_shown_whole() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    first = next(block for block in blocks_of(text) if block.language == "toml")
    assert tomllib.loads(first.text) == tomllib.loads(Recipe().to_toml())
    cells = re.findall(r"^\| (`[^|]+`) \|", text, flags=re.MULTILINE)
    rows = {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)}
    assert set(paths_of(Recipe)) <= rows, "every key has a row that explains it"


def test_tables_name_every_shape_option_and_word() -> None:
    text = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")
    for name in schedules.SHAPES:
        row = re.search(rf"^\| `{name}\b.*$", text, flags=re.MULTILINE)
        assert row, f"docs/schedules.md has no row for {name}"
        assert all(f"{option}=" in row.group() for option in options_of(name))
        assert f"`{schedules.SHAPES[name].formula.replace('`', '')}`" in row.group(), (
            f"the formula of {name} is another"
        )
    together = text[text.index("## Put together") : text.index("## Where it begins")]
    assert all(re.search(rf"^\| .*`{name}\(", together, flags=re.MULTILINE) for name in schedules.COMPOSITIONS)
    kinds = dict(re.findall(r"^\| `schedule\.(\w+)` \| (factor|value) \|", text, flags=re.MULTILINE))
    listed = {key.split(".")[1]: kind for key, kind, _ in cards.SCHEDULED if key.startswith("schedule.")}
    assert kinds == listed and set(kinds) == {field.name for field in dataclasses.fields(RecipeSchedule)}
    text = (ROOT / "docs" / "weight-decay.md").read_text(encoding="utf-8")
    assert set(table._WORDS) <= set(re.findall(r'^\| `"(\w+)"` \|', text, flags=re.MULTILINE))


def test_the_page_of_rules_is_the_one_that_is_made() -> None:
    """``python -m thalweg.optim.card > docs/rules.md`` makes it."""
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == card.page()


def test_every_form_of_decay_and_every_key_of_a_group_has_a_row() -> None:
    text = (ROOT / "docs" / "weight-decay.md").read_text(encoding="utf-8")
    assert set(DECAYS) == set(re.findall(r'^\| `"(\w+)"` \| (?!param|the tables)', text, flags=re.MULTILINE))
    text = (ROOT / "docs" / "optimizer-groups.md").read_text(encoding="utf-8")
    assert set(table._GROUP_KEYS) == set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))


def test_the_advice_on_optimizers_can_be_followed() -> None:
    """Every recipe of the page settles, its options are those of its rule, and every rule and stage that it names is there."""
    text = (ROOT / "docs" / "choose-an-optimizer.md").read_text(encoding="utf-8")
    recipes = [Recipe.from_toml(block.text) for block in blocks_of(text) if block.language == "toml"]
    settled = [settle_optimizer(recipe, Decisions()).optimizer for recipe in recipes]
    assert {one.rule for one in settled} >= {
        "adamw",
        "muon",
        "ademamix",
        "soap",
        "schedule_free_adamw",
        "sgd",
        "adafactor",
    }
    for one in settled:
        for group in one.groups.values():
            RULES[group["rule"]]
    assert all(schedules.parse(recipe.schedule.lr) for recipe in recipes)
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+)", text[text.index("## Which stages") :], flags=re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert len(named) >= 8 and set(named) <= {*STAGES}


def test_the_index_links_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {file.name for file in (ROOT / "docs").glob("*.md")} - {"index.md"} <= set(links_of(index))


GOOD = {
    "python": "```python\na = 1\n```\n```python\nassert a == 1\n```",
    "doctest": "```python\na = 1\n```\n```python\n>>> a + 1\n2\n>>> b = 3\n```\n```python\nassert b == 3\n```",
    "recipe": "```toml\n[train]\nsteps = 3\n```",
    "output": "```console\n$ thalweg tasks\npycode ... GPT\n\ndigits\n$ pip install x\n```",
    "exit": "```sh\n$ thalweg train pycodes  # exit 2\nerror: There is no task\n```",
    "usage": "```sh\n$ thalweg fly  # exit 2\n```",
    "file": "```python\n# mine.py\nx = 1\n```\n```python\nimport mine\nassert mine.x == 1\n```",
    "left out": "<!-- not run: it would take a week -->\n```python\n1/0\n```",
    "in a list": "1. so:\n   ```python\n   a = 1\n   ```",
    "shown": "```text\n1/0\n```\n```sh\nmake train\n```",
    "links": "[a](#a-b) [web](https://example.org)\n# A: b",
}
BAD = {
    "python": "```python\n1/0\n```",
    "syntax": "```python\n1 +\n```",
    "doctest": "```python\n>>> 1 + 1\n3\n```",
    "recipe": "```toml\n[train]\nstep = 3\n```",
    "exit": "```console\n$ thalweg tasks  # exit 2\n```",
    "unexpected exit": "```console\n$ thalweg train pycodes\n```",
    "output": "```console\n$ thalweg tasks\nimagenet\n```",
    "order": "```console\n$ thalweg tasks\ndigits\npycode\n```",
    "output of another": "```console\n$ thalweg tasks\n$ thalweg init\npycode\n```",
    "unknown command": "```console\n$ rm -rf x\n```",
    "no prompt": "```sh\nthalweg train digits\n```",
    "unknown language": "```py\n1\n```",
    "reason": "<!-- not run: -->\n```python\n1/0\n```",
    "reason of another": "<!-- not run: old -->\nText.\n```python\n1/0\n```",
    "file": "[a](nowhere.md)",
    "titled": '[a](nowhere.md "A title")',
    "reference": "[a][b]\n\n[b]: nowhere.md",
    "anchor": "[a](#nowhere)\n# Here",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_a_good_document_passes(text: str, folder: Path) -> None:
    (folder / "good.md").write_text(text, encoding="utf-8")
    run_text(text, "good.md", folder)
    check_links(text, folder / "good.md")


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_broken_document_fails(text: str, folder: Path) -> None:
    (folder / "bad.md").write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError):
        run_text(text, "bad.md", folder)
        check_links(text, folder / "bad.md")
