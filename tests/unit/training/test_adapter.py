"""A LoRA that was trained elsewhere: stored when all of it applies to the base and changes it, refused otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from llmo.context import NullContext
from llmo.errors import DataError, ModelError
from llmo.sources import fingerprint
from llmo.training.adapter import FILES, run
from support.headed import headed_model
from support.tiny_chat import tiny_adapter, tiny_chat_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("base") / "talker")


def test_it_is_kept_as_it_came_and_says_where_from(base: Path, tmp_path: Path) -> None:
    folder, out = tiny_adapter(tmp_path / "poet", rank=4), tmp_path / "out"
    (folder / "optimizer.pt").write_bytes(b"not wanted")
    settings = json.loads((folder / FILES[0]).read_text()) | {"base_model_name_or_path": "someone/talker"}
    (folder / FILES[0]).write_text(json.dumps(settings))
    out.mkdir()
    card = run({"source": str(folder), "source_digest": fingerprint(folder)}, {"model": base}, out, NullContext())
    assert (card["origin"], card["method"], card["rank"], card["trained_on"]) == (
        "imported", "lora", 4, "someone/talker",
    )  # fmt: skip
    assert sorted(path.name for path in (out / "adapter").iterdir()) == sorted(FILES)
    assert all((out / "adapter" / name).read_bytes() == (folder / name).read_bytes() for name in FILES)


def cut_short(folder: Path) -> None:
    tensors = load_file(folder / FILES[1])
    save_file(dict(list(tensors.items())[:-1]), folder / FILES[1])


def without_effect(folder: Path) -> None:
    save_file({name: tensor * 0 for name, tensor in load_file(folder / FILES[1]).items()}, folder / FILES[1])


def pickled(folder: Path) -> None:
    (folder / FILES[1]).rename(folder / "adapter_model.bin")


def of_another_kind(folder: Path) -> None:
    (folder / FILES[0]).write_text(json.dumps({"peft_type": "IA3"}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut_short, "not all of the adapter applies"),
        (without_effect, "changes nothing"),
        (pickled, "no adapter_model.safetensors"),
        (of_another_kind, "not a LoRA"),
    ],
)
def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    folder = tiny_adapter(tmp_path / "poet")
    spoil(folder)
    with pytest.raises(ModelError, match=says):
        run({"source": str(folder)}, {"model": base}, tmp_path, NullContext())
    assert not (tmp_path / "adapter").exists()


def test_another_base_another_folder_and_no_folder_are_refused(base: Path, tmp_path: Path) -> None:
    deep = tiny_adapter(tmp_path / "deep", layers=3)
    with pytest.raises(ModelError, match="layers of its own"):
        run({"source": str(deep)}, {"model": base}, tmp_path, NullContext())
    with pytest.raises(DataError, match="has changed"):
        run({"source": str(deep), "source_digest": "sha256:0"}, {"model": base}, tmp_path, NullContext())
    encoder = headed_model(tmp_path / "encoder")
    with pytest.raises(ModelError, match="over a BertForSequenceClassification") as refused:
        run({"source": str(deep)}, {"model": encoder}, tmp_path, NullContext())
    assert "--method lora" in refused.value.hint
    with pytest.raises(ModelError, match="is a folder"):
        run({"source": str(deep / FILES[1])}, {"model": base}, tmp_path, NullContext())
