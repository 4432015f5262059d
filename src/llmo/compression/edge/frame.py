"""Answers texts with the model beside this file, as its endpoint does; needs only what requirements.txt names.

python run.py "a text" | --file texts.txt | --serve --port 8080 | --check. Every start compares all files with the
manifest. Exit codes: 1 the environment, 2 wrong input, 3 a file or an answer is not what it was.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer
except ImportError as missing:
    sys.exit(f"run.py: a package is not installed ({missing}): pip install -r requirements.txt")

MANIFEST, BATCH_TOKENS, LONGEST, MOST_TEXTS, MOST_BYTES = "manifest.json", 1024, 1 << 20, 512, 4 << 20


class Problem(Exception):
    def __init__(self, what: str, code: int = 2, status: int = 422) -> None:
        super().__init__(what)
        self.code, self.status = code, status


def verify(folder: Path) -> None:
    """Raises Problem (exit code 3), naming every file that is missing, changed, or was not there."""
    written = (folder / MANIFEST).read_bytes() if (folder / MANIFEST).is_file() else b""
    head, _, tail = written.rpartition(b'"sha256": "')  # of all that stands before it
    if tail != f'{hashlib.sha256(head).hexdigest()}"\n}}\n'.encode():
        raise Problem(f"refused: {MANIFEST} is missing or changed; copy the folder again", 3)
    files = json.loads(written)["files"]
    there = {path.name for path in folder.iterdir() if path.name[0] != "."} - {MANIFEST, "__pycache__"}
    wrong = [f"{name} does not belong there" for name in sorted(there - files.keys())]
    for name, known in files.items():
        data = (folder / name).read_bytes() if (folder / name).is_file() else None
        if data is None or known != {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}:
            wrong.append(f"{name} is {'missing' if data is None else 'changed'}")
    if wrong:
        raise Problem(f"refused: {', '.join(wrong)}; copy the folder again", 3)


class Seen(NamedTuple):  # one sequence as the model reads it
    ids: list[int]
    length: int  # its tokens before it was cut
    offsets: list[tuple[int, int]]
    words: list[int | None]


class Task:  # from an input to what the model reads, and from what it says of that to an answer
    asks: tuple[str, ...] = ("text",)
    may_ask: tuple[str, ...] = ()
    answer: Callable[[list[Any], list[Seen], list[str]], dict[str, Any]]

    def __init__(self, card: dict[str, Any], tokenizer: Any) -> None:
        self.labels, self.max_length, self.options = card["labels"], card["max_length"], card["options"]
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)

    def given(self, asked: Any, where: str) -> list[str]:
        named = asked if isinstance(asked, dict) else {self.asks[0]: asked}
        names = [name for name in (*self.asks, *self.may_ask) if name in named]
        if not set(self.asks) <= set(names) or len(names) < len(named):
            takes = " and ".join(self.asks) + "".join(f" (and {name})" for name in self.may_ask)
            raise Problem(f"{where}: this model takes {takes}, not {' and '.join(named) or 'nothing'}")
        for name, text in named.items():
            whole = isinstance(text, str) and (text.isascii() or not any("\ud800" <= x <= "\udfff" for x in text))
            if not whole or not 0 < len(text.strip()) <= LONGEST:
                raise Problem(f"{where}: {name} is not a text of 1 to {LONGEST} characters in valid Unicode")
        return [named[name] for name in names]

    def encode(self, texts: Sequence[str]) -> list[Seen]:
        found = []
        for kept in map(self.tokenizer.encode, texts):
            cut = sum(len(rest.ids) - sum(rest.special_tokens_mask) for rest in kept.overflowing)
            found.append(Seen(kept.ids, len(kept.ids) + cut, kept.offsets, kept.word_ids))
        return found

    def softmax(self, logits: Any) -> Any:
        exp = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
        return exp / exp.sum(-1, keepdims=True)


TASK = Task  # the task of this model stands here


class Model:  # any thread may ask
    def __init__(self, folder: Path, threads: int) -> None:
        self.about, self.golden = (json.loads((folder / f"{name}.json").read_bytes()) for name in ("bundle", "golden"))
        self.lock = threading.Lock()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_mem_pattern, options.log_severity_level = False, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
        self.task = TASK(self.about["task"], Tokenizer.from_file(str(folder / "tokenizer.json")))

    def answers(self, asked: Sequence[Any], where: str = "text {}", first: int = 1) -> list[dict[str, Any]]:
        given = [self.task.given(one, where.format(n)) for n, one in enumerate(asked, first)]
        with self.lock:
            seen = [self.task.encode(texts) for texts in given]
            said = iter(self.run([one.ids for many in seen for one in many]))
        found = []
        for texts, many in zip(given, seen, strict=True):
            own = self.task.answer(list(islice(said, len(many))), many, texts)
            cut = {"truncated": True} if any(one.length > len(one.ids) for one in many) else {}
            found.append({**own, "tokens": sum(one.length for one in many), **cut})
        return found

    def run(self, sequences: Sequence[list[int]]) -> list[Any]:
        """The logits of each sequence without padding; those of like length run together."""
        said: list[Any] = [None] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda n: len(sequences[n]))
        while order:
            count = max(1, sum(k * len(sequences[n]) <= BATCH_TOKENS for k, n in enumerate(order, 1)))
            some, order = order[:count], order[count:]
            width, pad = len(sequences[some[-1]]), [self.about["pad_token_id"]]
            ids = np.array([sequences[n] + pad * (width - len(sequences[n])) for n in some], np.int64)
            mask = np.array([np.arange(width) < len(sequences[n]) for n in some], np.int64)
            (logits,) = self.session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
            if not np.isfinite(logits).all():
                raise Problem("refused: the model's answer is not a finite number", 3, 500)
            for row, n in enumerate(some):
                said[n] = logits[row] if logits.ndim == 2 else logits[row, : len(sequences[n])]
        return said

    def check(self) -> str:
        told = self.answers([one["asked"] for one in self.golden])
        same = sum(alike(a, b["answer"], self.about["tolerance"]) for a, b in zip(told, self.golden, strict=True))
        if same < self.about["share"] * len(told):
            raise Problem(f"refused: only {same} of {len(told)} golden texts are answered here as they were", 3)
        return f"{same} of {len(told)} golden texts answered as they were"


def alike(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return abs(a - b) <= tolerance if isinstance(a, float) else bool(a == b)


def overflows() -> bool:
    """Whether sums of int8 products may overflow here, on x86 without VNNI: then every start answers golden texts."""
    flags = Path("/proc/cpuinfo").read_text("utf-8", "replace").split() if Path("/proc/cpuinfo").is_file() else []
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags)


def serve(model: Model, host: str, port: int) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # only needed here

    class Handler(BaseHTTPRequestHandler):
        protocol_version, timeout, wbufsize = "HTTP/1.1", 15, -1  # an answer leaves in one piece

        def do_POST(self) -> None:
            try:
                status, body = 200, self.told()
            except Exception as problem:  # whatever it is, it is this request's alone
                status, body = getattr(problem, "status", 500), {"error": {"what": str(problem)}}
            data = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close" if self.close_connection else "keep-alive")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST  # noqa: N815

        def told(self) -> dict[str, Any]:
            if (self.command, self.path) == ("GET", "/health"):
                return {"status": "ok", "model": model.about["model"], "precision": model.about["precision"]}
            size, known = self.headers.get("Content-Length", ""), (self.command, self.path) == ("POST", "/predict")
            if not known or not size.isdecimal() or int(size) > MOST_BYTES:
                self.close_connection = True  # the body stays unread
                raise Problem(f"POST /predict with up to {MOST_BYTES} bytes", status=413 if known else 404)
            try:
                body = json.loads(self.rfile.read(int(size)))
                texts = body["texts"] if body.keys() == {"texts"} else [body]
            except (ValueError, AttributeError, RecursionError):
                texts = None
            if not isinstance(texts, list) or not 0 < len(texts) <= MOST_TEXTS:
                raise Problem(f'send JSON: {{"text": "..."}}, or {{"texts": [...]}} with 1 to {MOST_TEXTS} of them')
            return {"model": model.about["model"], "answers": model.answers(texts, "texts[{}]", 0)}

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer((host, port), Handler)
    print(f"http://{host}:{server.server_address[1]}/predict answers", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.serve_forever()


def inputs(options: argparse.Namespace) -> Iterator[Any]:
    source = options.text or (Path(options.file).open("rb") if options.file else sys.stdin.buffer)  # noqa: SIM115
    for number, line in enumerate(source):
        try:
            text = line if options.text else line.decode("utf-8" if number else "utf-8-sig").rstrip("\r\n")
            if options.text or text.strip():
                yield json.loads(text) if options.jsonl else text
        except (ValueError, RecursionError):
            raise Problem(f"line {number + 1} is not {'JSON' if options.jsonl else 'UTF-8'}") from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py", description="Answers texts, one JSON object a line.")
    parser.add_argument("text", nargs="*", help="texts; without any, lines of standard input")
    parser.add_argument("--file", help="a file with one input a line")
    parser.add_argument("--jsonl", action="store_true", help="inputs are JSON: a text, or an object of texts by name")
    parser.add_argument("--check", action="store_true", help="answer the golden texts and say whether all is well")
    parser.add_argument("--serve", action="store_true", help="POST /predict, GET /health; without any password")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    try:
        folder = Path(__file__).resolve().parent
        verify(folder)
        model = Model(folder, options.threads)
        if options.check or options.serve or (model.about["precision"] != "fp32" and overflows()):
            print(model.check(), file=sys.stderr)
        if options.serve:
            serve(model, options.host, options.port)
        first, rest = 1, iter(()) if options.check else inputs(options)
        while some := list(islice(rest, 256)):
            for answer in model.answers(some, first=first):
                print(json.dumps(answer, ensure_ascii=False))
            first += len(some)
    except BrokenPipeError:  # who read the answers has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except Exception as problem:  # the libraries have no class for what they cannot open
        print(f"run.py: {problem}", file=sys.stderr)
        return getattr(problem, "code", 2 if options.file and isinstance(problem, OSError) else 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
