"""What a search varies: the user's own space, or the default one for the task, the method, the rows and the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmo.methods import METHODS, OPTIMISERS, PREFERENCE
from llmo.specs import TaskSpec, TrainSpec, TuneSpec

Settings = dict[str, Any]

RATE_SPAN = 5.0  # times lower and higher than the usual learning rate
WEIGHTS = ("full", "last-n")  # methods that move the trunk's own weights, by less the larger the model is
MOST_COMBINATIONS = 10_000


@dataclass(frozen=True, slots=True)
class Dimension:
    """One key and what it may be: `values`, or from `low` to `high`. `why` says where that comes from."""

    key: str
    values: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False  # only whole numbers
    why: str = ""

    @classmethod
    def of(cls, key: str, choice: Mapping[str, Any], why: str) -> Dimension:
        """From a space as `TuneSpec` holds it."""
        if "values" in choice:
            return cls(key, tuple(choice["values"]), why=why)
        whole = isinstance(choice["low"], int) and isinstance(choice["high"], int)
        log, step = bool(choice.get("log")), choice.get("step")
        return cls(key, None, choice["low"], choice["high"], log, step, whole, why)

    @property
    def ordered(self) -> bool:
        """Whether its values are numbers that grow, so that neighbours are alike."""
        values = self.values or ()
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        return numbers and len(values) > 2 and list(values) == sorted(values)

    def holds(self, value: Any) -> bool:
        """Whether a value is one of this dimension's."""
        if self.values is not None:
            return any(type(value) is type(known) and value == known for known in self.values)
        if isinstance(value, bool) or not isinstance(value, int | float) or (self.whole and value != int(value)):
            return False
        return self.low <= value <= self.high and (self.step is None or _whole((value - self.low) / self.step))

    def apart(self, one: Any, other: Any) -> float:
        """How far two of its values are from each other, from 0 to 1; of values without an order, equal or not."""
        every = self.every() or ()
        if one == other or (self.values is not None and not self.ordered) or one not in every or other not in every:
            return float(one != other)
        return abs(every.index(one) - every.index(other)) / (len(every) - 1)

    def every(self) -> tuple[Any, ...] | None:
        """All its values; None for a range that is not stepped."""
        if self.values is not None:
            return self.values
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            return None
        count = int((self.high - self.low) / step + 1e-9)
        return tuple(self.readable(self.low + step * number) for number in range(count + 1))

    def grid(self) -> tuple[Any, ...]:
        """Its values in a grid: all that are listed or stepped, and of another range the ends and the middle."""
        if self.values is not None or self.step is not None:
            return self.every() or ()
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return tuple(dict.fromkeys(self.readable(value) for value in (self.low, middle, self.high)))

    def readable(self, value: float) -> float:
        """The same value in fewer digits, still one of the range: three, and no more than tell it from its neighbours
        (0.9987 of 0.99 to 0.9999). A stepped one only loses what the addition of steps left behind."""
        if self.whole:
            return round(value)
        if self.step is not None:
            return float(f"{value:.10g}")
        finest = min(abs(value) or 1.0, self.high - self.low)
        return min(max(round(value, 2 - math.floor(math.log10(finest))), self.low), self.high)

    def text(self) -> str:
        if self.values is not None:
            return ", ".join("the model's own" if value is None else f"{value}" for value in self.values)
        how = ", by logarithm" if self.log else f", step {self.step:g}" if self.step is not None else ""
        return f"{self.low:g} to {self.high:g}{how}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the default space depends on. `layers` is 0 where it is not known."""

    task: str
    train: TrainSpec
    rows: int
    parameters: int
    layers: int = 0

    @property
    def writes(self) -> bool:
        return self.task == "generation"


def facts(task: TaskSpec, train: TrainSpec, rows: int, config: Mapping[str, Any], parameters: int, shape: str) -> Facts:
    """`rows` to train on and what they are (`shape`), and the base model's config.json and number of parameters."""
    if train.objective == "auto" and shape == "preference":
        train = train.model_copy(update={"objective": "preference"})
    layers = next((config[name] for name in ("num_hidden_layers", "n_layers", "n_layer") if name in config), 0)
    return Facts(task.name, train, rows, parameters, int(layers))


Rule = tuple[str, Callable[[Facts], bool], Callable[[Facts], Dimension]]


def _always(facts: Facts) -> bool:
    return True


def _rate(facts: Facts) -> Dimension:
    method = facts.train.method
    middle, why = usual_rate(facts.train), f"{RATE_SPAN:g} times around what method {method} usually takes"
    if method in WEIGHTS and facts.parameters > 100e6:
        middle *= 0.5 if facts.parameters < 1e9 else 0.2
        why += f", lowered for {facts.parameters / 1e6:.0f}M parameters"
    return Dimension("learning_rate", None, tidy(middle / RATE_SPAN), tidy(middle * RATE_SPAN), log=True, why=why)


def usual_rate(train: TrainSpec) -> float:
    """The peak that is taken where none is written, size aside."""
    rate = METHODS[train.method].learning_rate * OPTIMISERS[train.optimizer].factor
    return rate * (PREFERENCE if train.objective == "preference" else 1.0)


def _epochs(facts: Facts) -> Dimension:
    if facts.writes:
        return Dimension("epochs", (1.0, 2.0, 3.0), why="answers are learnt in few passes")
    few = [(1000, (3.0, 6.0, 10.0)), (20_000, (2.0, 3.0, 5.0))]
    values = next((values for most, values in few if facts.rows < most), (1.0, 2.0, 3.0))
    return Dimension("epochs", values, why=f"for {facts.rows} training rows")


def _batch(facts: Facts) -> Dimension:
    return Dimension("batch_size", (4, 8, 16) if facts.writes else (8, 16, 32), why=f"task {facts.task}")


def _last(facts: Facts) -> Dimension:
    values = tuple(n for n in (1, 2, 4, 8) if n <= max(1, facts.layers or 2))
    return Dimension("last_n", values, why=f"of {facts.layers or 'the'} layers")


TABLE: tuple[Rule, ...] = (
    ("learning_rate", _always, _rate),
    ("epochs", _always, _epochs),
    ("batch_size", _always, _batch),
    ("warmup", _always, lambda _: Dimension("warmup", None, 0.0, 0.2, why="share of the steps")),
    (
        "weight_decay",
        lambda facts: facts.train.method in WEIGHTS,
        lambda _: Dimension("weight_decay", None, 1e-3, 0.1, log=True, why="all weights are trained"),
    ),
    (
        "dropout",
        lambda facts: facts.train.method in WEIGHTS and not facts.writes and facts.rows < 20_000,
        lambda facts: Dimension("dropout", (0.0, 0.1, 0.2), why=f"{facts.rows} rows can be learnt by heart"),
    ),
    (
        "lora.rank",
        lambda facts: METHODS[facts.train.method].trains == "low-rank",
        lambda facts: Dimension("lora.rank", (4, 8, 16, 32), why=f"method {facts.train.method}"),
    ),
    ("last_n", lambda facts: facts.train.method == "last-n", _last),
)


def resolve(tune: TuneSpec, facts: Facts) -> list[Dimension]:
    """The space of a search. In the default one, what `train` says otherwise than by default stays as it is."""
    if tune.space is not None:
        return [Dimension.of(key, choice, "as written") for key, choice in sorted(tune.space.items())]
    usual, given = TrainSpec().plain(), facts.train.plain()
    return [
        make(facts)
        for key, applies, make in TABLE
        if applies(facts) and (key.startswith("lora.") or given[key] == usual[key])
    ]


def usual(dimensions: Sequence[Dimension], train: TrainSpec, task: TaskSpec) -> Settings:
    """The settings that would be trained without a search, as far as the space holds them."""
    plain: Any = {**train.plain(), "max_length": task.max_length}
    if plain["learning_rate"] is None:
        plain["learning_rate"] = usual_rate(train)
    found: Settings = {}
    for one in dimensions:
        value = plain
        for part in one.key.split("."):
            value = value[part]
        if one.holds(value):
            found[one.key] = value
    return found


def combinations(dimensions: Sequence[Dimension]) -> list[Settings] | None:
    """Everything there is to try; None when that has no end, or hardly one."""
    each = [one.every() for one in dimensions]
    known = [values for values in each if values is not None]
    if len(known) < len(each) or math.prod(len(values) for values in known) > MOST_COMBINATIONS:
        return None
    return _products(dimensions, known)


def grid(dimensions: Sequence[Dimension]) -> list[Settings]:
    """Every point of the grid."""
    return _products(dimensions, [one.grid() for one in dimensions])


def tidy(value: float) -> float:
    """Three digits: nobody wants to read more, and no training feels them."""
    return float(f"{value:.3g}")


def words(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    said = {key: f"{value:g}" if isinstance(value, float) else f"{value}" for key, value in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in said.items())


def _products(dimensions: Sequence[Dimension], values: Sequence[Sequence[Any]]) -> list[Settings]:
    keys = [one.key for one in dimensions]
    return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]


def _whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-6
