"""Talks to the endpoint `assistant` through the official OpenAI client: streams, repeats a seed, stops, fills a schema.

Run `llmo run examples/assistant/llmo.yaml` first (`make demo-chat` does both).
"""

from __future__ import annotations

import json

from openai import OpenAI

import llmo

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 40}, "certain": {"type": "boolean"}},
    "required": ["answer", "certain"],
    "additionalProperties": False,
}


def main() -> None:
    with llmo.gateway("assistant") as door:
        client = OpenAI(base_url=f"{door.url}/v1", api_key=door.key)
        question = [{"role": "user", "content": "What is a computer?"}]
        print("user: What is a computer?\nassistant: ", end="")
        for part in client.chat.completions.create(model="assistant", messages=question, stream=True, max_tokens=60):
            print(part.choices[0].delta.content or "" if part.choices else "", end="", flush=True)
        asked = {"model": "assistant", "messages": question, "seed": 7, "temperature": 0.9, "max_tokens": 30}
        twice = [client.chat.completions.create(**asked).choices[0].message.content for _ in range(2)]
        print(f"\nthe same seed, the same answer: {twice[0] == twice[1]}")
        stopped = client.chat.completions.create(model="assistant", messages=question, stop=["."], max_tokens=60)
        print(f"up to the first full stop: {stopped.choices[0].message.content!r} ({stopped.choices[0].finish_reason})")
        wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
        found = client.chat.completions.create(
            model="assistant", messages=question, response_format=wanted, temperature=0.0, max_tokens=80
        )
        print(f"as the schema says: {json.loads(found.choices[0].message.content or '')}")


if __name__ == "__main__":
    main()
