"""An encoder with published weights, and the task that fine-tunes it; small ones, made here."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import three_parts
from thalweg import train_task
from thalweg.core import DataError, MissingExtra, ModelError
from thalweg.data.folder import reading_from
from thalweg.recipes import find_task, recipe_for, sst2
from thalweg.recipes.models.encoder import read_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder as transformers saves it, with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
    cut = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    cut.pre_tokenizer = pre_tokenizers.Whitespace()
    cut.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    cut.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [f"a {'good' if i % 2 else 'bad'} film{' film' * (i % 5)}\t{i % 2}" for i in range(20)]
    for name in sst2.FILES.values():
        (tmp_path / name).write_bytes(lzma.compress("\n".join(lines).encode()))
    return tmp_path


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_it_computes_what_transformers_does(home: Path, pool: str) -> None:
    from transformers import BertModel

    tokens = torch.tensor([[2, 4, 6, 3, 0, 0], [2, 5, 6, 6, 7, 3]])
    seen = (tokens != 0).long()
    mine = read_encoder(home, pool=pool).eval()
    mine.head = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        wanted = BertModel.from_pretrained(home).eval()(tokens, attention_mask=seen).last_hidden_state
        pooled = wanted[:, 0] if pool == "first" else (wanted * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
        torch.testing.assert_close(mine(tokens), pooled, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine(tokens[:1, :4]), pooled[:1], rtol=1e-4, atol=1e-5)


def test_what_is_no_encoder_is_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_encoder(tmp_path)
    assert "config.json" in three_parts(caught.value)[1]
    config = json.loads((home / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").write_bytes((home / "model.safetensors").read_bytes())
    with pytest.raises(ModelError) as caught:
        read_encoder(tmp_path)
    assert three_parts(caught.value)[1] == "It has no encoder.layer.2.attention.self.query.weight."
    with pytest.raises(ModelError) as caught:
        read_encoder(home, pool="last")
    assert three_parts(caught.value)[0] == "pool='last' is not known."


def test_the_package_with_the_weights_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sst2.importlib.util, "find_spec", lambda name: None)
    for act in (sst2.encoder_folder, lambda: sst2.tokenizer(Path())):
        with pytest.raises(MissingExtra) as caught:
            act()
        assert "Install it: pip install" in three_parts(caught.value)[2]


def test_sentences_without_labels_are_named(folder: Path) -> None:
    (folder / sst2.FILES["dev"]).write_bytes(lzma.compress(b"no label here"))
    with reading_from(str(folder)), pytest.raises(DataError) as caught:
        sst2.sentences("dev")
    assert "holds no sentences with labels" in three_parts(caught.value)[0]


def test_the_task_fine_tunes_it(home: Path, folder: Path) -> None:
    named: dict[str, Any] = {"model.encoder": str(home), "data.options.encoder": str(home), "data.folder": str(folder)}
    more = {"train.batch": 4, "train.epochs": 10.0, "optimizer.lr": 0.02, "precision": "fp32", "data.options.limit": 16}
    more |= {"model.dropout": 0.0}
    result = train_task(find_task("sst2"), recipe_for(find_task("sst2")).override({**named, **more}))
    assert result.metrics["accuracy"] == 1.0
    assert result.plan.samples == 16 and result.plan.machine["data"]["dev sentences"] == 20
    rows = {row.name: row for row in result.plan.parameters}
    assert rows["tokens.weight"].thaws == 8 and rows["head.weight"].thaws == 0  # of 40 steps, a fifth
    assert rows["tokens.weight"].lr == pytest.approx(0.8**3)
    assert result.evaluations[-1].metrics["accuracy"] == 1.0
