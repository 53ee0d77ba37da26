"""The recipe characters: its text, the further forms of its model, and what its benchmark reads from a run."""

from __future__ import annotations

import json
import lzma
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import road_characters, road_nanogpt
from benchmarks.draw import curves
from tests.conftest import three_parts
from thalweg.cli.main import main
from thalweg.core import DataError, ModelError
from thalweg.data.folder import reading_from
from thalweg.recipes import find_task, recipe_for
from thalweg.recipes.models.gpt import GPT, turned
from thalweg.recipes.models.ngrams import NGrams

FORMS = (
    {},
    {"positions": "rotary", "qk_norm": True, "activation": "relu2", "ngrams": 4, "ngram_rows": 64},
    {"norm": "rms", "bias": False, "expand": 2, "ngrams": 2},
)


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_no_form_looks_ahead(form: dict[str, object]) -> None:
    model = GPT(10, 12, 16, 2, 2, **form)  # type: ignore[arg-type]
    tokens = torch.randint(10, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 10
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_rotary_positions_know_distances_alone() -> None:
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    there = turned(q.expand(1, 1, 9, 8)), turned(k.expand(1, 1, 9, 8))
    products = (there[0] @ there[1].mT)[0, 0]
    for distance in range(1, 8):
        line = products.diagonal(-distance)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert not torch.allclose(products[1, 0], products[2, 0])
    assert len(GPT(5, 4, 8, 2, 1, positions="rotary")(torch.zeros(1, 9, dtype=torch.int64))[0]) == 9


def test_queries_and_keys_are_normalized() -> None:
    model = GPT(6, 8, 8, 2, 1, qk_norm=True)
    tokens = torch.randint(6, (1, 8))
    with torch.no_grad():
        before = model(tokens)
        model.blocks[0].qkv.weight[:16] *= 100
        torch.testing.assert_close(model(tokens), before, atol=1e-2, rtol=1e-2)


def test_a_model_that_begins_at_zero_gives_every_token_the_same_chance() -> None:
    model = GPT(7, 4, 8, 2, 2, zero_init=True)
    tokens = torch.randint(7, (3, 4))
    first = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).item()
    assert first == pytest.approx(math.log(7), abs=1e-6)
    assert all(not block.out.weight.any() and not block.down.weight.any() for block in model.blocks)


def test_rows_of_ngrams_are_their_own_while_there_is_room() -> None:
    grams = NGrams(vocab=4, width=2, longest=3, rows=60)
    assert [table.num_embeddings for table in grams.tables] == [25, 60]
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    two, three = grams.codes(pairs)
    assert len(set(two[:, 1].tolist())) == 16 and set(two[:, 0].tolist()) == {4, 9, 14, 19}, (
        "4 stands before the window"
    )
    assert three.min() >= 0 and three.max() < 60 and len(set(three[:, 1].tolist())) > 10
    roomy = NGrams(vocab=4, width=2, longest=3, rows=500)
    all_of = torch.cartesian_prod(*(torch.arange(4),) * 3)
    assert len(set(roomy.codes(all_of)[1][:, 2].tolist())) == 64
    summed = sum(table(code) for table, code in zip(grams.tables, (two, three)))
    torch.testing.assert_close(grams(pairs), summed)


@pytest.mark.parametrize("word", ["positions", "norm", "activation"])
def test_a_form_that_is_not_known_is_refused(word: str) -> None:
    with pytest.raises(ModelError, match=rf"GPT\({word}='rotory'\) is not known"):
        GPT(**{word: "rotory"})


def test_the_text_is_cut_as_nanogpt_cuts_it(shared_data: Path) -> None:
    split = find_task("characters").data()
    assert (split.facts["train characters"], split.facts["held-out"]) == (1_003_854, 111_540)
    assert (int(split.train.tokens.max()), len(split.test)) == (64, 1742)
    first = split.train.gather(torch.tensor([0]))
    assert first["tokens"].shape == (1, 64) and torch.equal(first["tokens"][:, 1:], first["targets"][:, :-1])


def test_without_its_text_it_says_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("THALWEG_DATA", raising=False)
    assert main(["train", "characters", "--data", str(tmp_path), "--runs", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "tiny_shakespeare.txt.xz is not there" in told and f"{tmp_path} (data.folder)" in told and "char-rnn" in told


def test_a_text_of_other_characters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny_shakespeare.txt.xz").write_bytes(lzma.compress("Cliché, 30 %".encode() * 100))
    with (
        reading_from(str(tmp_path)),
        pytest.warns(UserWarning, match="is not the file"),
        pytest.raises(DataError) as caught,
    ):
        find_task("characters").data()
    assert "400 of its 1300 bytes" in three_parts(caught.value)[1]


def test_the_anchor_is_nanogpts() -> None:
    torch.manual_seed(0)
    model = road_nanogpt.NanoGPT(65)
    assert sum(p.numel() for p in model.parameters()) == 804_096
    assert [road_nanogpt.rate(step) for step in (99, 100, 2000)] == pytest.approx([1e-3 * 100 / 101, 1e-3, 1e-4])
    tokens = torch.arange(65, dtype=torch.uint8).repeat(10)
    told = road_nanogpt.train(tokens, tokens, lambda _: 0.0, "eager", until=3)
    assert len(told.seen) == 3 and told.seen[0] == pytest.approx(math.log(65), abs=0.1) and not told.curve


def test_the_exact_loss_covers_whole_windows() -> None:
    tokens = torch.randint(65, (64 * 3 + 20,), dtype=torch.uint8)
    model = road_nanogpt.NanoGPT(65)
    with torch.no_grad():
        each = [
            F.cross_entropy(model(tokens[None, at : at + 64].long())[0], tokens[at + 1 : at + 65].long())
            for at in (0, 64, 128)
        ]
    assert road_characters.exact(model, tokens) == pytest.approx(float(sum(each)) / 3, rel=1e-5)


def test_an_arm_of_the_ablation_changes_what_it_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THALWEG_DATA", str(tmp_path))
    whole = road_characters.recipe({})
    fixed = {"compile": "off", "data.folder": str(tmp_path)}
    assert whole == recipe_for(find_task("characters")).override(fixed)
    for arm, changes in road_characters.LESS.items():
        differing = {path for path, *_ in road_characters.recipe(changes).diff(whole)}
        assert bool(differing) == (arm != "the recipe")
        assert all(any(path.startswith(named) for named in changes) for path in differing)
    assert road_characters.recipe(road_characters.LESS["embeddings at the head's rate"]).optimizer.groups == {}
    with reading_from(str(tmp_path)) as folder:
        assert not folder.asked


def test_the_picture_has_every_arm_in_its_frame() -> None:
    arms = [("a", [(1.0, 2.0), (10.0, 1.0)]), ("b <c>", [(5.0, 1.5)]), ("a", [(2.0, 3.0)])]
    svg = curves("title", "unit", arms, targets=[1.2, 4.0], note="note")
    assert svg.count(">b &lt;c&gt;<") == svg.count(">a<") == 1 and svg.count("<circle") == 4
    assert svg.count('class="one"') == 2
    places = [float(number) for line in re.findall(r'\bd="M([^"]+)"', svg) for number in line.replace("L", " ").split()]
    assert len(places) > 20 and all(0 <= place <= 720 for place in places)


def test_the_table_has_a_row_for_every_arm() -> None:
    rows = [
        {"arm": arm, "seeds": [0, 1], "losses": [1.0 + k, 1.2 + k], "ms a step": [5.0, 5.0]}
        for k, arm in enumerate(road_characters.LESS)
    ]
    lines = road_characters.table(json.loads(json.dumps({"rows": rows}))).splitlines()
    assert len(lines) == 2 + len(rows) and "| +1.000 ± 0.000 |" in lines[3] and "| nothing changed | 1.100" in lines[2]
