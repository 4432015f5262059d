"""What every specification is made of: strictness, and the kinds of numbers and names its keys take."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Spec(BaseModel):
    """Strict: an unknown key is an error; a value is never bent into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def plain(self) -> dict[str, Any]:
        """As JSON values, with every default written out: what jobs carry and digests are taken of."""
        return self.model_dump(mode="json")


def _float(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; a number is what was meant."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _seconds(value: Any) -> Any:
    """`90s`, `10m` and `2h` as seconds; a number is seconds already."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|min|h)\s*", value) if isinstance(value, str) else None
    if found is None:
        if isinstance(value, str) and not isinstance(_float(value), float):
            raise ValueError("a time is written like 90s, 10m or 2h")
        return _float(value)
    return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]]


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_float)]
Seconds = Annotated[float, Field(allow_inf_nan=False, gt=0), BeforeValidator(_seconds)]
