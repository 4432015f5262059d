"""The form of the rows that each task learns from."""

from __future__ import annotations

from llmo.data.forms.base import Form
from llmo.data.forms.conversational import Conversational
from llmo.data.forms.labelled import Labelled
from llmo.data.forms.paired import Paired
from llmo.data.forms.questions import Questions
from llmo.data.forms.rated import Rated
from llmo.data.forms.tagged import Tagged
from llmo.specs import DataSpec, TaskSpec

_FORMS: dict[str, type[Form]] = {
    "text-classification": Labelled,
    "token-classification": Tagged,
    "generation": Conversational,
    "masked-lm": Conversational,
    "extractive-qa": Questions,
    "regression": Rated,
    "sentence-embedding": Paired,
}


def form_of(spec: DataSpec, task: TaskSpec) -> Form:
    """The task's form; a task that is not of the house reads texts with labels."""
    return _FORMS.get(task.name, Labelled)(spec, task)
