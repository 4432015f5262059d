"""A project without a base model: what is made of the user's own rows is trained, verified, served and asked."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

import llmo as sdk
from support.project import llmo
from support.tiny import history_rows

YAML = """\
name: shop
task: next-item
data: {source: visits.csv}
model: scratch:sasrec,width=32,layers=1
train: {epochs: 15, learning_rate: 5e-3, batch_size: 8}
deploy: {endpoint: shop, cores: 1}
"""


def visits(folder: Path) -> Path:
    """Users who go round a ring of twenty items, three steps at a time."""
    lines = ["user,item,time"]
    for row in history_rows(80):
        lines += [f"{row['id']},{item},{time}" for time, item in enumerate([*row["text"].split(), row["label"]])]
    (folder / "visits.csv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "llmo.yaml").write_text(YAML, encoding="utf-8")
    return folder / "llmo.yaml"


@pytest.mark.slow
def test_a_recommender_from_a_file_of_visits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMO_HOME", str(tmp_path / "home"))
    file = visits(tmp_path)
    said = llmo("run", file, "--json")
    assert said.code == 0, said.err + said.out
    steps = said.json["steps"]
    assert steps["train"]["result"]["test"]["after"]["recall@10"]["value"] > 0.9
    assert steps["verify"]["result"]["passed"]
    assert all(len(found["answer"]["items"]) == 10 for found in said.json["answers"])
    with sdk.gateway("shop") as door:
        key = {"Authorization": f"Bearer {door.key}"}
        answers = httpx.post(door.endpoint("shop"), json={"history": ["i0", "i3", "i6"]}, headers=key).json()["answers"]
        assert answers[0]["items"][0]["item"] == "i9"
        assert not {"i0", "i3", "i6"} & {item["item"] for item in answers[0]["items"]}
        refused = httpx.post(door.endpoint("shop"), json={"history": ["sofa"]}, headers=key)
        assert refused.status_code == 422
        assert "no item of this history is in the catalogue, such as 'sofa'" in refused.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("scratch:sasrec,width=32", "scratch:sasrek,width=32"), "did you mean 'sasrec'"),
        (("scratch:sasrec,width=32", "scratch:lstm,width=32"), "'lstm' is no model for next-item"),
        (("task: next-item", "task: masked-lm"), "is a base for other tasks"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_runs(
    tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    file = visits(tmp_path)
    file.write_text(file.read_text().replace(*change))
    said = llmo("run", file, LLMO_HOME=str(tmp_path / "home"))
    assert said.code == 2
    assert says in said.err
    assert not list((tmp_path / "home").glob("jobs/*"))
