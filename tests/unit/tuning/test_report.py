"""The report of a search: figures, pictures, and a page that needs nothing beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llmo.jobspecs import TuneJobSpec
from llmo.specs import TaskSpec
from llmo.tuning import report, space
from llmo.tuning.search import Trial
from llmo.types import Reason, Result
from support.searching import SPACE, done, drive, failed, learnt, made


def gathered(outcome: Any = learnt, **keys: Any) -> dict[str, Any]:
    spec = TuneJobSpec(task=TaskSpec(name="text-classification"), **({"space": SPACE, "trials": 24} | keys))
    dimensions = space.resolve(spec, space.Facts("text-classification", spec.train, 500, 1))
    return report.gather(spec, dimensions, drive(made(**({"trials": 24} | keys)), outcome), 12.5)


def test_the_report_says_what_was_tried_and_what_mattered(tmp_path: Path) -> None:
    found = gathered(sampler="random", pruner="none")
    report.write(tmp_path, found)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(found))
    assert next(iter(found["importance"])) == "learning_rate", "it moves the quality far more than the batch"
    assert found["settings"] == found["best"]["settings"]
    assert found["counts"] == {"done": 24, "pruned": 0, "failed": 0, "stopped": 0}
    assert found["steps"] == 24 * 90
    for name in ("history.png", "importance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(?:src|href)=\"(?!data:)", page), "nothing is fetched from anywhere"
    assert "<td>learning_rate</td>" in page


def test_several_objectives_have_a_front_and_its_picture(tmp_path: Path) -> None:
    found = gathered(lambda t, p: done(0.5, seconds=float(t.number)), objectives=["quality", "seconds"], trials=4)
    report.write(tmp_path, found)
    assert found["front"] == [0]
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "(on the front)" in (tmp_path / "report.html").read_text()


def test_reasons_are_shown_as_text_and_few_trials_claim_no_importance(tmp_path: Path) -> None:
    def outcome(trial: Trial, part: int) -> Result:
        return failed("<b>odd</b> & bad", Reason.ERROR) if trial.number == 1 else learnt(trial, part)

    found = gathered(outcome, trials=4)
    report.write(tmp_path, found)
    assert found["importance"] == {}
    assert not (tmp_path / "importance.png").exists()
    assert "&lt;b&gt;odd&lt;/b&gt; &amp; bad" in (tmp_path / "report.html").read_text()
