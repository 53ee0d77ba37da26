"""Weights from one kind of file to another, to the bit; and files that mean harm, of which nothing is run."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.conftest import three_parts
from thalweg.checkpoint import Snapshot, Store
from thalweg.checkpoint.convert import convert, huggingface, read_weights, renamed, safetensorfiles, torchfiles
from thalweg.core import CheckpointError, RecipeError, RunFolderError, ThalwegError

KINDS = ("torch", "safetensors", "lightning", "hf")
NAMES = {"torch": "w.pt", "safetensors": "w.safetensors", "lightning": "w.ckpt", "hf": "folder"}
FACTS = {"step": 7, "ranking": [[0.5, 7]], "tied": {"head.weight": "f32"}}


def every_dtype() -> dict[str, Tensor]:
    """Values that a detour through another dtype would change, and shapes at the edge."""
    bits = torch.arange(256, dtype=torch.uint8)
    found = {
        "f32": torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45]),
        "f64": torch.tensor([[0.1, 1 / 3]], dtype=torch.float64),
        "bf16": bits.repeat(2).view(torch.bfloat16),
        "f16": bits.view(torch.float16),
        "c64": torch.tensor([1 + 2j, -0j], dtype=torch.complex64),
        "i64": torch.tensor(2**62),
        "u16": torch.tensor([65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(0.1),
    }
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"):
        found[name] = bits.view(getattr(torch, name))
    return found


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """To the bit: a NaN is the NaN that it was."""
    raw = lambda t: t.contiguous().reshape(-1).view(torch.uint8)
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype
        and mine[name].shape == theirs[name].shape
        and (not mine[name].numel() or torch.equal(raw(mine[name]), raw(theirs[name])))
        for name in mine
    )


def config_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "none", **config}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tensors = every_dtype()
    average = {**tensors, "f32": tensors["f32"] + 1}
    state = {"applied": torch.tensor([7])}
    Store(tmp_path / "run" / "checkpoints").save(
        7, Snapshot({"weights": tensors, "average": average, "state": state}, FACTS)
    )
    return tmp_path / "run"


@pytest.mark.parametrize("first, second", list(itertools.product(KINDS, KINDS)))
def test_every_pair_of_kinds_gives_the_same_bits(first: str, second: str, run: Path, tmp_path: Path) -> None:
    """Run to the first kind, to the second, and read: dtypes, shapes, NaNs and tied names are those of the run."""
    like = config_folder(tmp_path / "like")
    one, two = tmp_path / NAMES[first], tmp_path / f"again-{NAMES[second]}"
    convert(run, one, choice="live", like=like if first == "hf" else None)
    convert(one, two, like=like if second == "hf" else None)
    read = read_weights(two)
    wanted = {**every_dtype(), "head.weight": every_dtype()["f32"]}
    assert same(read.named(), wanted)
    assert read.tied == {"head.weight": "f32"}
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("to", KINDS)
def test_a_checkpoint_folder_is_a_source_too(to: str, run: Path, tmp_path: Path) -> None:
    like = config_folder(tmp_path / "like") if to == "hf" else None
    told = convert(run / "checkpoints" / "step-00000007", tmp_path / NAMES[to], choice="average", like=like)
    assert "Step 7: the weight average." in told
    assert torch.equal(read_weights(tmp_path / NAMES[to]).tensors["f32"][:2], every_dtype()["f32"][:2] + 1)


def test_what_is_written_is_read_by_those_who_made_the_form(run: Path, tmp_path: Path) -> None:
    wanted = every_dtype()
    convert(run, tmp_path / "w.pt", choice="live")
    plain = torch.load(tmp_path / "w.pt", weights_only=True)
    assert plain["head.weight"].data_ptr() == plain["f32"].data_ptr(), "tied in the file"
    del plain["head.weight"]
    assert same(plain, wanted)
    convert(run, tmp_path / "w.safetensors", choice="live")
    assert same(safetensors.torch.load_file(tmp_path / "w.safetensors"), wanted)


def test_the_average_is_taken_where_there_is_one_and_said(run: Path, tmp_path: Path) -> None:
    assert any("the weight average" in line for line in convert(run, tmp_path / "w.pt"))
    with pytest.raises(CheckpointError, match="'mean'") as err:
        read_weights(run, choice="mean")
    assert three_parts(err.value)[1] == "It holds: live, average."


def test_best_weights_are_those_of_the_best_step(run: Path) -> None:
    """Without early stopping there is no group of best weights: the checkpoint of the best step stands for it."""
    Store(run / "checkpoints").save(
        9, Snapshot({"weights": {"f32": torch.zeros(1)}, "state": {"applied": torch.ones(1)}}, {**FACTS, "step": 9})
    )
    best = read_weights(run, choice="best")
    assert best.step == 7 and len(best.tensors["f32"]) == 5
    assert read_weights(run).step == 9
    with pytest.raises(CheckpointError, match="holds no weights called 'best'"):
        read_weights(run, choice="best", step=9)


def test_reading_a_run_leaves_what_is_being_saved_alone(run: Path) -> None:
    """Another process may be writing: what is half-written there is no rubbish."""
    half = run / "checkpoints" / ".step-00000008.abcdef01.tmp"
    half.mkdir()
    read_weights(run)
    assert half.is_dir()


def test_a_damaged_checkpoint_is_passed_over_and_said(run: Path) -> None:
    store = Store(run / "checkpoints")
    store.save(9, store.load(7))
    damaged = run / "checkpoints" / "step-00000009" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    read = read_weights(run)
    assert read.step == 7 and "Passed over a damaged checkpoint" in read.told[0]
    with pytest.raises(CheckpointError, match="damaged"):
        read_weights(damaged.parent)


def test_nested_tables_are_found_and_the_rest_is_told(tmp_path: Path) -> None:
    for key in ("state_dict", "model", "module"):
        torch.save({key: {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pt")
        read = read_weights(tmp_path / "w.pt")
        assert list(read.tensors) == ["a"]
        assert read.told == (f"Taken from its key '{key}'. Left out: epoch.",)
    torch.save({"a": torch.ones(2), "epoch": 3}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").told == ("Left out, as they are no tensors: epoch.",)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_forms_of_torch_files_are_read(zipped: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert same(dict(read_weights(tmp_path / "w.pt").tensors), dict(model.state_dict()))


def test_a_view_does_not_bring_all_that_it_looks_at(tmp_path: Path) -> None:
    whole = torch.arange(100_000.0)
    torch.save({"a": whole[:10].view(2, 5).T, "b": whole[10:20]}, tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 5000
    assert torch.equal(read_weights(tmp_path / "small.pt").tensors["a"], whole[:10].view(2, 5).T)


# Other people's programs


def test_lightning_loads_what_is_written(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Mine(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

    torch.save({"module.weight": torch.randn(2, 3), "module.bias": torch.randn(2)}, tmp_path / "w.pt")
    told = convert(tmp_path / "w.pt", tmp_path / "w.ckpt", rename=["module=net"])
    assert told[-1].startswith(f"wrote {tmp_path / 'w.ckpt'}: a Lightning checkpoint of 2 tensors")
    loaded = Mine.load_from_checkpoint(tmp_path / "w.ckpt", map_location="cpu")
    assert torch.equal(loaded.net.weight, torch.load(tmp_path / "w.pt")["module.weight"])
    assert "state_dict" in torch.load(tmp_path / "w.ckpt", weights_only=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.strategy.connect(loaded)
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    read = read_weights(tmp_path / "theirs.ckpt")
    assert read.kind == "a Lightning checkpoint" and torch.equal(read.tensors["net.weight"], loaded.net.weight)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shard", [None, 6000])
def test_transformers_loads_what_is_written(shard: int | None, gpt2: Path, tmp_path: Path) -> None:
    """From its own folder to a torch file of the model's names and back, in one file and in shards."""
    transformers = pytest.importorskip("transformers")
    before = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    torch.save(before.state_dict(), tmp_path / "w.pt")  # lm_head and wte are one tensor here
    (gpt2 / "tokenizer.json").write_text("{}")
    (gpt2 / "modeling_own.py").write_text("raise SystemExit")
    told = convert(tmp_path / "w.pt", tmp_path / "out", like=gpt2, shard_bytes=shard)
    assert any("Left there, as it is code: modeling_own.py." in line for line in told)
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / "modeling_own.py").exists()
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 2) == (shard is not None)
    if shard:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert sorted({*index["weight_map"].values()}) == shards
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in {p: p for p in before.parameters()})
    after, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(dict(after.state_dict()), dict(before.state_dict()))
    assert same(read_weights(tmp_path / "out").named(), dict(before.state_dict()))


def test_a_config_of_another_dtype_would_round_and_is_set(gpt2: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    like = tmp_path / "like"
    transformers.GPT2LMHeadModel.from_pretrained(gpt2).bfloat16().save_pretrained(like)
    told = convert(gpt2, tmp_path / "out", like=like)
    assert any("is float32, as the weights are; it was bfloat16." in line for line in told)
    after = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert same(dict(after.state_dict()), dict(transformers.GPT2LMHeadModel.from_pretrained(gpt2).state_dict()))


def test_names_that_transformers_would_begin_at_random_are_refused(gpt2: Path, tmp_path: Path) -> None:
    convert(gpt2, tmp_path / "w.safetensors", rename=["transformer.h.1=transformer.h.2"])
    with pytest.raises(CheckpointError, match="names of the weights are not those") as err:
        convert(tmp_path / "w.safetensors", tmp_path / "out", like=gpt2)
    assert "transformer.h.1.attn.c_attn.bias" in three_parts(err.value)[1]
    assert not (tmp_path / "out").exists()


def test_the_cache_of_the_hub_is_read_through_its_links(gpt2: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        (blobs / str(number)).write_bytes((gpt2 / name).read_bytes())
        (snapshot / name).symlink_to(blobs / str(number))
    assert same(read_weights(snapshot).named(), read_weights(gpt2).named())


def test_names_that_a_terminal_would_act_on_are_told_as_text(tmp_path: Path) -> None:
    name = "a\x1b[2J\r\u202e"
    torch.save({"b": torch.ones(1), name: 3}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").told == (r"Left out, as they are no tensors: a\x1b[2J\r\u202e.",)
    torch.save({name: torch.ones(1).expand(9)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as err:
        read_weights(tmp_path / "w.pt")
    assert r"a\x1b[2J\r\u202e claims to be of shape" in three_parts(err.value)[1]


# Renaming


def test_renaming_goes_by_whole_names_and_the_first_that_fits(tmp_path: Path) -> None:
    x = torch.ones(1)
    torch.save({"h.1.w": x, "h.10.w": x + 1, "b": x + 2, "tied": x}, tmp_path / "w.pt")
    read = read_weights(tmp_path / "w.pt")
    assert set(renamed(read, ["h.1=first", "h=rest"]).named()) == {"first.w", "rest.10.w", "b", "tied"}
    assert set(renamed(read, ["=net"]).named()) == {"net.h.1.w", "net.h.10.w", "net.b", "net.tied"}
    left = renamed(read, ["h.1.w="])
    assert set(left.tensors) == {"tied", "h.10.w", "b"} and not left.tied, "a tied name takes its place"
    assert left.told[-1] == "Left out, as asked: h.1.w."


@pytest.mark.parametrize(
    "rules, said",
    [
        (["h"], "renames nothing"),
        (["h=h"], "renames nothing"),
        (["x=y"], "fits no name"),
        (["a=b"], "Two tensors would be called b"),
    ],
)
def test_renaming_that_cannot_be_is_refused(rules: list[str], said: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "b": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(RecipeError, match=said) as err:
        renamed(read_weights(tmp_path / "w.pt"), rules)
    three_parts(err.value)


# Targets


def test_nothing_is_written_over_unless_asked(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_text("mine")
    with pytest.raises(RunFolderError, match="is there already"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_text() == "mine"
    convert(tmp_path / "w.pt", tmp_path / "w.safetensors", force=True)
    assert torch.equal(read_weights(tmp_path / "w.safetensors").tensors["a"], torch.ones(1))
    convert(tmp_path / "w.pt", tmp_path / "w.pt", force=True)
    assert torch.equal(read_weights(tmp_path / "w.pt").tensors["a"], torch.ones(1))


def test_force_replaces_a_hugging_face_folder_and_no_other(run: Path, tmp_path: Path) -> None:
    like = config_folder(tmp_path / "like")
    for number in (1, 2):
        convert(run, tmp_path / "out", like=like, force=number == 2)
    assert len(read_weights(tmp_path / "out").tensors) == len(every_dtype())
    (tmp_path / "out" / ".git").mkdir()
    for path in (run, tmp_path / "out", tmp_path):
        before = sorted(path.rglob("*"))
        with pytest.raises(RunFolderError, match="is not replaced"):
            convert(run, path, to="hf", like=like, force=True)
        assert sorted(path.rglob("*")) == before
    with pytest.raises(RunFolderError, match="is a folder"):
        convert(run, tmp_path / "out", to="torch", force=True)


def test_a_checkpoint_is_not_written_into(run: Path) -> None:
    with pytest.raises(RunFolderError, match="lies in a checkpoint"):
        convert(run, run / "checkpoints" / "step-00000007" / "w.pt")
    assert not Store(run / "checkpoints").fault(7)


def test_a_write_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "w.pt").write_text("mine")
    before = sorted(tmp_path.iterdir())
    for to in KINDS:
        like = tmp_path / f"like-{to}"
        monkeypatch.setattr(os, "fsync", real)
        like = config_folder(like) if to == "hf" else None
        before = sorted(tmp_path.iterdir())
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="could not be written") as err:
            convert(run, tmp_path / NAMES[to], like=like, force=True)
        assert "Free some room" in three_parts(err.value)[2]
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "w.pt").read_text() == "mine"


@pytest.mark.parametrize("to", KINDS)
def test_a_file_cut_short_by_the_system_is_taken_away(to: str, run: Path, tmp_path: Path) -> None:
    """No file may grow beyond 2000 bytes here, so that the writers themselves fail in the middle."""
    like = config_folder(tmp_path / "like") if to == "hf" else None
    before = sorted(tmp_path.iterdir())
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written") as err:
            convert(run, tmp_path / NAMES[to], like=like)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    three_parts(err.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_tied_tensor_of_a_word_that_is_taken(tmp_path: Path) -> None:
    x = torch.ones(1)
    torch.save({"a": x, "format": x}, tmp_path / "w.pt")
    for target in ("w.safetensors", "out"):
        with pytest.raises(CheckpointError, match="A tied tensor is called 'format'"):
            convert(tmp_path / "w.pt", tmp_path / target, like=None if "." in target else config_folder(tmp_path / "l"))
    torch.save({"pt": x}, tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert list(read_weights(tmp_path / "w.safetensors").named()) == ["pt"]


def noted(function: Callable[..., None], word: str, done: list[str]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        done.append(word)
        function(*arguments)

    return call


def test_what_is_written_is_on_the_disk_before_it_has_its_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name, word in (("fsync", "fsync"), ("replace", "name"), ("rename", "name")):
        monkeypatch.setattr(os, name, noted(getattr(os, name), word, done))
    convert(run, tmp_path / "w.pt")
    assert done == ["fsync", "name", "fsync"]
    done.clear()
    convert(run, tmp_path / "out", like=config_folder(tmp_path / "like"))
    assert done.index("name") >= 3 and done[-1] == "fsync"


@pytest.mark.parametrize(
    "target, options, said",
    [
        ("w.zip", {}, "does not say what to write"),
        ("w.pt", {"to": "onnx"}, "--to onnx is not known"),
        ("w.pt", {"like": "."}, "go with a Hugging Face folder"),
        ("w.pt", {"choice": "live"}, "holds one set of weights"),
        ("w.pt", {"step": 3}, "holds one set of weights"),
        ("no/w.pt", {}, "cannot be written"),
        ("out", {}, "needs a config.json"),
        ("out", {"like": "."}, "is no Hugging Face folder"),
        ("w.pt", {"rename": ["a="]}, "Nothing of"),
    ],
)
def test_what_cannot_be_asked(
    target: str, options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1)}, "source.pt")
    with pytest.raises(ThalwegError, match=said) as err:
        convert("source.pt", target, **options)
    three_parts(err.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def test_a_dtype_that_a_format_lacks_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "deep.c": torch.ones(2, dtype=torch.complex128)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"deep\.c cannot be written as safetensors"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    convert(tmp_path / "w.pt", tmp_path / "again.pt")
    assert same(dict(read_weights(tmp_path / "again.pt").tensors), dict(torch.load(tmp_path / "w.pt")))


# Files that mean harm


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("marker",)


def rewritten(change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """hostile.pt: a sound torch file of 16 numbers whose pickle is changed."""
    torch.save({"a": torch.arange(16.0)}, "good.pt")
    with zipfile.ZipFile("good.pt") as good, zipfile.ZipFile("hostile.pt", "w", compression) as hostile:
        for entry in good.infolist():
            data = good.read(entry)
            hostile.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)


def number(n: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", n)


def shape(n: int, stride: bytes = b"\x01") -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = data.rindex(b"K\x10")
        data = data[:at] + number(n) + data[at + 2 :]
        at = data.rindex(b"K\x01")
        return data[:at] + b"K" + stride + data[at + 2 :]

    return change


def legacy(value: Any) -> None:
    torch.save(value, "hostile.pt", _use_new_zipfile_serialization=False)


def legacy_claiming(n: int) -> None:
    legacy({"a": torch.arange(16.0)})
    data = Path("hostile.pt").read_bytes()
    at = data.index(b"K\x10")
    Path("hostile.pt").write_bytes(data[:at] + number(n) + data[at + 2 :])


def raw(data: bytes) -> None:
    Path("hostile.pt").write_bytes(data)


def posing(name: str, argument: bytes) -> None:
    """A call of ``name`` by the operations of newer pickles."""
    module, attribute = name.encode().split(b" ")
    text = lambda t: b"\x8c" + bytes([len(t)]) + t
    raw(b"\x80\x04" + text(module) + text(attribute) + b"\x93" + text(argument) + b"\x85R.")


def scripted() -> None:
    with zipfile.ZipFile("hostile.pt", "w") as archive:
        archive.writestr("x/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))


def doubled() -> None:
    rewritten(lambda data: data)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile("hostile.pt", "a") as archive:
        archive.writestr("good/data.pkl", pickle.dumps({"a": Evil()}, protocol=2))


def named_twice() -> None:
    """The same bytes as two parts: what is read is more than what is there."""
    with zipfile.ZipFile("hostile.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("x/data/0", bytes(10_000))
        again = copy.copy(archive.filelist[-1])
        again.filename = "x/data/1"
        archive.filelist.append(again)


def laughs(deep: int, wide: int, times: int = 1, sized: bool = False) -> bytes:
    """A table with a key that is small here, and of wide**deep items to who hashes it."""
    size = b"ctorch\nSize\n" if sized else b""
    key = b"K\x00"
    for _ in range(deep):
        key += b"q\x000" + size + b"(" + b"h\x00" * wide + b"t" + (b"\x85R" if sized else b"")
    return b"\x80\x02}" + key + b"q\x01K\x01s" + b"h\x01K\x02s" * (times - 1) + b"."


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "call": (lambda: torch.save({"a": torch.ones(2), "x": Evil()}, "hostile.pt"), r"asks for posix\.mkdir"),
    "call below a key": (lambda: torch.save({"model": {"a": Evil()}}, "hostile.pt"), r"asks for posix\.mkdir"),
    "call in the old form": (lambda: legacy({"a": torch.ones(2), "x": Evil()}), r"asks for posix\.mkdir"),
    "plain pickle": (lambda: raw(pickle.dumps({"a": Evil()}, protocol=2)), r"asks for posix\.mkdir"),
    "newer pickle": (lambda: posing("os system", b"touch marker"), r"asks for os\.system"),
    "newest pickle": (lambda: raw(pickle.dumps({"a": Evil()}, protocol=5)), r"asks for posix\.mkdir"),
    "pickle of texts": (lambda: raw(b"\x80\x02(S'touch marker'\nios\nsystem\n."), r"asks for os\.system"),
    "whole module": (lambda: torch.save(nn.Linear(2, 2), "hostile.pt"), r"torch\.nn\.modules\.linear\.Linear"),
    "memory by a call": (
        lambda: rewritten(lambda _: b"\x80\x02cbuiltins\nbytearray\n" + number(2**50) + b"\x85R."),
        r"builtins\.bytearray",
    ),
    "script": (scripted, "TorchScript"),
    "bomb": (lambda: rewritten(lambda data: data + bytes(10**7), zipfile.ZIP_DEFLATED), "compressed"),
    "one part twice": (named_twice, r"Its parts claim 2\d{4} bytes, and it has 1\d{4}"),
    "two of a name": (doubled, "doubled"),
    "shape": (lambda: rewritten(shape(2**33)), "cannot be read"),
    "shape over all": (lambda: rewritten(shape(2**62)), "cannot be read"),
    "shape by stride 0": (lambda: rewritten(shape(2**45, b"\x00")), r"claims to be of shape \(35184372088832,\)"),
    "storage": (lambda: rewritten(lambda data: data.replace(b"K\x10", number(2**40))), "cannot be read"),
    "storage in the old form": (lambda: legacy_claiming(2**59), "cannot be read"),
    "storage past the end": (lambda: legacy_claiming(2**16), "cannot be read"),
    "storage beyond its part": (
        lambda: rewritten(lambda data: data.replace(b"K\x10", b"K\x11")),
        r"claims 68 bytes of its part 'good/data/0', which has 64",
    ),
    "storage in other words": (lambda: rewritten(lambda data: data.replace(b"storage", b"sturage")), "in words that"),
    "deep key": (lambda: rewritten(lambda _: laughs(26, 2)), "tuples nested 9 deep"),
    "wide key": (lambda: rewritten(lambda _: laughs(7, 100)), r"nested \d deep, of \d{7,} items"),
    "wide keys": (lambda: rewritten(lambda _: laughs(5, 12, times=100)), r"Its keys are tuples of \d+ items"),
    "key of shapes": (lambda: rewritten(lambda _: laughs(26, 2, sized=True)), "tuples nested 9 deep"),
    "unbalanced": (lambda: rewritten(lambda _: b"\x80\x02\x86."), "nothing is there for TUPLE2"),
    "offset": (lambda: rewritten(lambda d: d.replace(b"QK\x00", b"QJ\xff\xff\xff\xff")), "cannot be read"),
    "overlap": (lambda: (lambda x: torch.save({"a": x, "b": x.T}, "hostile.pt"))(torch.ones(2, 3)), "a and b overlap"),
    "key": (lambda: torch.save({1: torch.ones(2)}, "hostile.pt"), r"A key is no text: 1 \(int\)"),
    "meta": (lambda: torch.save({"a": torch.ones(2, device="meta")}, "hostile.pt"), "meta_tensor"),
    "no tensors": (lambda: torch.save({"epoch": 3}, "hostile.pt"), "holds no tensor"),
    "no table": (lambda: torch.save([torch.ones(2)], "hostile.pt"), "holds no table"),
    "text": (lambda: raw(b"hello"), "as none of the kinds"),
    "empty": (lambda: raw(b""), "as none of the kinds"),
    "cut zip": (lambda: rewritten(lambda d: d) or raw(Path("hostile.pt").read_bytes()[:-9]), "cannot be read"),
    "cut pickle": (lambda: legacy({"a": torch.ones(9)}) or raw(Path("hostile.pt").read_bytes()[:99]), "cannot be read"),
    "pipe": (lambda: os.mkfifo("hostile.pt"), "no plain file"),
    "nothing": (lambda: None, "no plain file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_torch_file_is_refused_and_nothing_is_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, said = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    make()
    before = sorted(os.listdir())
    with pytest.raises(CheckpointError, match=said) as err:
        convert("hostile.pt", "out.safetensors")
    three_parts(err.value)
    assert sorted(os.listdir()) == before, "no marker, no target, nothing half"


def flipped(part: str) -> None:
    """w.pt: with one bit of a part changed."""
    data = bytearray(Path("w.pt").read_bytes())
    with zipfile.ZipFile("w.pt") as archive:
        wanted = archive.read(f"w/{part}")
    data[bytes(data).index(wanted) + len(wanted) // 2] ^= 1
    Path("w.pt").write_bytes(data)


@pytest.mark.parametrize("part", ["data/0", "data/1", "byteorder", "data.pkl"])
def test_a_flipped_bit_of_a_torch_file_is_found(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.randn(9), "b": torch.randn(7), "name": "text" * 99}, "w.pt")
    assert read_weights("w.pt").told == ("Left out, as they are no tensors: name.",)
    flipped(part)
    with pytest.raises(CheckpointError, match="cannot be read") as err:
        read_weights("w.pt")
    assert f"w/{part}" in three_parts(err.value)[1]


def test_a_torch_file_without_checksums_is_read_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = {"a": torch.randn(9)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    read = read_weights("w.pt")
    assert same(dict(read.tensors), weights) and "without checksums" in read.told[0]


def test_tables_beyond_all_measure_are_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    like = config_folder(tmp_path / "like")
    for module, limit in ((torchfiles, "_LARGEST_PICKLE"), (huggingface, "_LARGEST_COPY")):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, 10)
            with pytest.raises(CheckpointError, match=r"has \d+ bytes"):
                convert(tmp_path / "w.pt", tmp_path / "out", like=like)
    index_of({"a": "one.safetensors"}, like)
    monkeypatch.setattr(safetensorfiles, "_LARGEST_INDEX", 10)
    with pytest.raises(CheckpointError, match=r"has \d+ bytes"):
        read_weights(like)
    assert not (tmp_path / "out").exists()


def test_the_payload_of_these_tests_would_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, "hostile.pt")
    torch.load("hostile.pt", weights_only=False)
    assert Path("marker").exists()


def header(table: Any, length: int | None = None, body: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "data",
    [
        header({}, length=2**62),
        header({"a": entry([2**62, 4], [0, 4])}, body=bytes(4)),
        header({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, body=bytes(4)),
        header({"a": entry([1], [0, 4])}),
        header({"a": entry([4], [0, 3], "F6_E2M3")}, body=bytes(3)),
        header({"a": entry([1], [0, 4], "NONE")}, body=bytes(4)),
        header({}),
    ],
    ids=["header", "shape", "overlap", "short", "F6", "dtype", "nothing"],
)
def test_a_hostile_safetensors_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read") as err:
        convert(tmp_path / "w.safetensors", tmp_path / "w.pt")
    three_parts(err.value)
    assert len(list(tmp_path.iterdir())) == 1


def index_of(places: Any, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    "places, said",
    [
        ({"a": "../secret.safetensors"}, "lies elsewhere"),
        ({"a": "/etc/passwd"}, "lies elsewhere"),
        ({"a": "sub/one.safetensors"}, "lies elsewhere"),
        ({"a": ".."}, "lies elsewhere"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"a": "link.safetensors"}, "is a link to"),
        ({"a": "pipe.safetensors"}, "no plain file"),
        ({"a": "one.safetensors", "z": "one.safetensors"}, "says that z is in one.safetensors"),
        ({"a": 3}, "no table of file names"),
        ({}, "no table of file names"),
        ([], "no table of file names"),
    ],
)
def test_a_hostile_index_is_refused(places: Any, said: str, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "hub")
    for name in ("one.safetensors", "../secret.safetensors"):
        safetensors.torch.save_file({"a": torch.ones(1)}, folder / name)
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    index_of(places, folder)
    with pytest.raises(CheckpointError, match=said) as err:
        read_weights(folder)
    three_parts(err.value)


def test_an_index_decides_what_is_taken_of_its_shards(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "hub")
    safetensors.torch.save_file({"a": torch.ones(1), "b": torch.ones(2)}, folder / "one.safetensors")
    index_of({"a": "one.safetensors"}, folder)
    read = read_weights(folder / "model.safetensors.index.json")
    assert list(read.tensors) == ["a"]
    assert read.told == ("1 tensors of the shards are left out: the index does not name them.",)


def test_shards_of_pickles_are_looked_through_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = config_folder(tmp_path / "hub")
    torch.save({"a": torch.ones(1)}, folder / "one.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "one.bin"}}))
    assert list(read_weights(folder).tensors) == ["a"]
    torch.save({"a": torch.ones(1), "b": Evil()}, folder / "one.bin")
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir"):
        read_weights(folder)
    assert not Path("marker").exists()


def test_a_link_of_a_config_folder_brings_nothing_from_elsewhere(tmp_path: Path) -> None:
    """A folder from a stranger must not carry a file of the user's own into what is then uploaded."""
    (tmp_path / "secret.json").write_text('{"token": 1}')
    like = config_folder(tmp_path / "like")
    (like / "vocab.json").symlink_to(tmp_path / "secret.json")
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"vocab\.json is a link to"):
        convert(tmp_path / "w.pt", tmp_path / "out", like=like)
    assert not (tmp_path / "out").exists()
