"""Which keys mattered: PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255) over the trials that came to an end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from llmo.tuning.sampler import distribution
from llmo.tuning.space import Dimension

FEWEST = 8  # with less the figure would be noise


def importance(
    trials: Sequence[Mapping[str, Any]], dimensions: Sequence[Dimension], *, higher_is_better: bool
) -> dict[str, float]:
    """The share of each key, the largest first; empty for too few trials or for trials that are all as good."""
    done = [trial for trial in trials if trial["state"] == "done"]
    varied = [one for one in dimensions if len({repr(trial["settings"][one.key]) for trial in done}) > 1]
    if len(done) < FEWEST or not varied or len({trial["value"] for trial in done}) < 2:
        return {}
    study = optuna.create_study(direction="maximize" if higher_is_better else "minimize")
    for trial in done:
        study.add_trial(
            optuna.trial.create_trial(
                params={one.key: trial["settings"][one.key] for one in varied},
                distributions={one.key: distribution(one) for one in varied},
                value=trial["value"],
            )
        )
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {key: round(float(share), 4) for key, share in sorted(found.items(), key=lambda item: -item[1])}
