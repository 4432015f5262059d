"""Opens a GGUF file as a base model: its header without torch, and its weights as the fp32 folder of transformers."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmo.errors import EnvironmentProblem, ModelError

SUFFIX = ".gguf"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
WHOLE = {"F32", "F16", "BF16", "F64"}  # types that are no quantisation
MACHINE_KEYS = ("is_local", "local_files_only")  # what transformers adds of the machine it ran on


@dataclass(frozen=True, slots=True)
class Header:
    """`quantisation` names the type that most weights are kept in ("Q4_1"), or is None for floating point."""

    architecture: str
    parameters: int
    positions: int | None
    quantisation: str | None


def find(source: Path) -> Path | None:
    """The GGUF file that is meant: the file itself, or the only one of a folder without safetensors; else None.

    Raises ModelError for a folder with several.
    """
    if source.is_file():
        return source if source.suffix.lower() == SUFFIX else None
    found = sorted(p for p in source.iterdir() if p.suffix.lower() == SUFFIX)
    if not found or any(source.glob("*.safetensors")):
        return None
    if len(found) > 1:
        raise ModelError(
            f"the folder holds {len(found)} GGUF files: {', '.join(p.name for p in found[:5])}",
            hint="name the one you mean, the least quantised (F16 or Q8_0) for training",
            where=str(source),
        )
    return found[0]


def read(path: Path) -> Header:
    """What the file says of itself, checked to be whole. Raises ModelError when it is broken or cut short."""
    with _border(path):
        from gguf import GGUFReader

        opened = GGUFReader(path)
        architecture = str(opened.fields["general.architecture"].contents())
        positions = opened.fields.get(f"{architecture}.context_length")
        sizes = [(tensor.tensor_type.name, int(tensor.n_elements)) for tensor in opened.tensors]
        limit = None if positions is None else int(positions.contents())
    counted: Counter[str] = Counter()
    for kind, count in sizes:
        counted[kind] += count
    if not counted:
        raise ModelError(f"{path.name} holds no weights", hint="download it again", where=str(path))
    kind = counted.most_common(1)[0][0]
    return Header(architecture, counted.total(), limit, None if kind in WHOLE else kind)


def convert(path: Path, out: Path) -> Header:
    """Write `out` as a Hugging Face folder: fp32 safetensors, config, tokeniser and chat template.

    Raises ModelError for an architecture that transformers cannot read from GGUF.
    """
    header = read(path)
    _supported(path, header)
    with _border(path), TemporaryDirectory(dir=out, prefix=".gguf-") as aside:
        _transformers(path, Path(aside))
        for file in Path(aside).iterdir():
            shutil.move(file, out / file.name)
    return header


def config(path: Path) -> dict[str, Any]:
    """The config that `convert` would write, without the weights."""
    _supported(path, read(path))
    with _border(path):
        from transformers import AutoConfig

        from llmo.engines.torch import quiet

        with quiet():
            found = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        return dict(json.loads(found.to_json_string(use_diff=False)))


def tokenizer(path: Path, out: Path) -> None:
    """The tokeniser's files and the chat template alone, into `out`."""
    with _border(path):
        from transformers import AutoTokenizer

        from llmo.engines.torch import quiet

        with quiet():
            found = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        found.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text(encoding="utf-8")).items() if k not in MACHINE_KEYS}
    settings.write_text(json.dumps(kept, ensure_ascii=False, indent=2), encoding="utf-8")


def _transformers(path: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from llmo.engines.torch import quiet

    with quiet(), redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        )
    # It is dequantised; what says otherwise would make `save_pretrained` refuse.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.name_or_path = model.config._name_or_path = ""
    with quiet():
        model.save_pretrained(out)
    tokenizer(path, out)


def _supported(path: Path, header: Header) -> None:
    with _border(path):
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        known = sorted(str(name) for name in GGUF_SUPPORTED_ARCHITECTURES if "tokenizer" not in name)
    if header.architecture.replace("-", "_") not in known and header.architecture not in known:
        raise ModelError(
            f"transformers cannot read the architecture '{header.architecture}' from GGUF",
            hint=f"give the model's safetensors folder; from GGUF it reads {', '.join(known)}",
            where=str(path),
        )


@contextmanager
def _border(path: Path) -> Iterator[None]:
    """The GGUF reader trusts the file: a broken one shows as any error, from NumPy's to memory that nobody has."""
    try:
        yield
    except ModelError:
        raise
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise _broken(path, error) from error
    except ImportError as error:
        raise EnvironmentProblem(
            "opening a GGUF file needs packages that are not installed: gguf, torch and transformers",
            hint="pip install 'llmo-os[generate]'",
        ) from error
    except Exception as error:  # the library raises what it likes for a broken file
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path.name} is broken, cut short, or no GGUF file: {(str(error).splitlines() or [repr(error)])[0][:200]}",
        hint="download or copy it again",
        where=str(path),
    )
