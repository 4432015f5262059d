"""The ways to train a model, and the optimisers: what each is called, what it fits, its defaults and its sources.

No torch: the specification, the forecast and the control plane read this page too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmo.errors import SpecError

MethodName = Literal[
    "full",
    "head",
    "last-n",
    "lora",
    "rslora",
    "dora",
    "adalora",
    "ia3",
    "prefix",
    "prompt",
    "bottleneck",
    "few-shot",
    "zero-shot",
]
OptimiserName = Literal["adamw", "adam", "sgd", "rmsprop", "adafactor", "lion"]


@dataclass(frozen=True, slots=True)
class Method:
    """`trains` says which part learns beside the head: `weights` of the model, `low-rank` updates or `scales` that
    are merged into them, `beside` them what is applied when the model runs, or `nothing`.

    `learning_rate` is the default peak for AdamW; `writes`: whether a model that generates can be trained so.
    """

    trains: Literal["weights", "low-rank", "scales", "beside", "nothing"]
    learning_rate: float
    writes: bool = True
    source: str = ""
    measures: bool = False  # needs the frozen weights whole at every step

    @property
    def merges(self) -> bool:
        """Whether an adapter is saved too, and its effect is in the saved weights."""
        return self.trains in ("low-rank", "scales")

    @property
    def frozen(self) -> bool:
        """Whether the trunk's own weights are only run through, so that they may be held in fewer bits."""
        return self.trains in ("low-rank", "scales", "beside") and not self.measures


METHODS: dict[str, Method] = {
    "full": Method("weights", 1e-4),
    "head": Method("weights", 5e-3, writes=False),
    "last-n": Method("weights", 1e-4),
    "lora": Method("low-rank", 5e-4, source="Hu et al. 2021, arXiv:2106.09685"),
    "rslora": Method("low-rank", 2e-4, source="Kalajdzievski 2023, arXiv:2312.03732"),
    "dora": Method("low-rank", 5e-4, source="Liu et al. 2024, arXiv:2402.09353", measures=True),
    "adalora": Method("low-rank", 5e-3, source="Zhang et al. 2023, arXiv:2303.10512"),
    "ia3": Method("scales", 2e-2, source="Liu et al. 2022, arXiv:2205.05638"),
    "prefix": Method("beside", 2e-2, source="Li and Liang 2021, arXiv:2101.00190"),
    "prompt": Method("beside", 5e-3, source="Lester et al. 2021, arXiv:2104.08691"),
    "bottleneck": Method("beside", 1e-3, source="Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021"),
    "few-shot": Method("weights", 2e-5, writes=False, source="Tunstall et al. 2022 (SetFit), arXiv:2209.11055"),
    "zero-shot": Method("nothing", 0.0, writes=False, source="Yin et al. 2019, arXiv:1909.00161"),
}
VIRTUAL = ("prefix", "prompt")  # they put tokens of their own before a text
VIRTUAL_TASKS = ("text-classification", "token-classification", "generation")
PREFERENCE = 0.1  # of a learning rate: preferences move whole answers, and go astray at those that teach answers
LABELS_ONLY = ("few-shot", "zero-shot")  # they compare whole texts, so they are of task text-classification


@dataclass(frozen=True, slots=True)
class Optimiser:
    """`factor` turns a method's learning rate, which is AdamW's, into this one's default; `decoupled`: weight decay is
    taken off the weights, else it is L2, added to the gradient. `numbers` are kept per trained weight."""

    factor: float
    decoupled: bool
    numbers: float
    source: str


OPTIMISERS: dict[str, Optimiser] = {
    "adamw": Optimiser(1.0, True, 2, "Loshchilov and Hutter 2019, arXiv:1711.05101"),
    "adam": Optimiser(1.0, False, 2, "Kingma and Ba 2015, arXiv:1412.6980"),
    "sgd": Optimiser(100.0, False, 1, "with momentum"),
    "rmsprop": Optimiser(1.0, False, 1, "Hinton 2012, lecture 6e"),
    # Its step is a share of each weight matrix' own size, not a length.
    "adafactor": Optimiser(30.0, True, 0.1, "Shazeer and Stern 2018, arXiv:1804.04235"),
    "lion": Optimiser(0.1, True, 1, "Chen et al. 2023, arXiv:2302.06675"),
}


def check(method: str, base_weights: str, task: str, *, has_head: bool) -> None:
    """Raises SpecError for a method that cannot train a model for this task, or over weights of so few bits."""
    if base_weights != "fp32" and not METHODS[method].frozen:
        raise SpecError(
            f"base_weights {base_weights} are for weights that stay as they are, and method {method} "
            + ("measures them at every step" if METHODS[method].measures else "does not train so"),
            hint=f"set train.method to one of {', '.join(name for name, m in METHODS.items() if m.frozen)}, "
            "or leave train.base_weights out",
        )
    if method in LABELS_ONLY and task != "text-classification":
        raise SpecError(
            f"method {method} tells whole texts apart, and the task is {task}",
            hint="it is of task text-classification: set train.method to lora or full",
        )
    if method in VIRTUAL and task not in VIRTUAL_TASKS:
        raise SpecError(
            f"method {method} puts tokens of its own before a text, which a model for {task} does not expect",
            hint=f"it is of {', '.join(VIRTUAL_TASKS)}: set train.method to lora or full",
        )
    if not has_head and not METHODS[method].writes:
        raise SpecError(
            f"method {method} trains a new head on a frozen trunk, and a model for {task} has no head of its own",
            hint="set train.method to lora, last-n or full",
        )


def check_length(method: str, virtual_tokens: int, max_length: int, limit: int | None) -> None:
    """Raises SpecError for texts, with the virtual tokens before them, that are longer than the model reads."""
    virtual = virtual_tokens if method in VIRTUAL else 0
    if limit is None or max_length + virtual <= limit:
        return
    if not virtual:
        raise SpecError(
            f"max_length is {max_length}, but this model reads at most {limit} tokens",
            hint=f"set task.max_length to {limit} or less",
        )
    raise SpecError(
        f"{virtual} virtual tokens and max_length {max_length} are more than the {limit} tokens this model reads",
        hint=f"set task.max_length to {limit - virtual} or less, or train.virtual_tokens lower"
        if virtual < limit
        else "set train.virtual_tokens lower",
    )
