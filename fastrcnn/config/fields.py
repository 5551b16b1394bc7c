"""What the schema is written with: the kinds of keys and the base of a section."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

# Leaves are strict: a string is never taken for a number nor a bool for an int. An int is a fine float.
Bool = Annotated[bool, Field(strict=True)]
Str = Annotated[str, Field(strict=True)]
Name = Annotated[str, Field(strict=True, min_length=1)]
Count = Annotated[int, Field(strict=True, ge=0)]
PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Float = Annotated[float, Field(strict=True)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]

Names = tuple[Name, ...]
Ints = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
Positives = Annotated[tuple[Positive, ...], Field(min_length=1)]


def key(default: Any, description: str) -> Any:
    """A key of maskrcnn-benchmark."""
    return Field(default=default, description=description)


def own(default: Any, description: str) -> Any:
    """A key that maskrcnn-benchmark does not have; ``json_schema_extra`` marks it."""
    return Field(default=default, description=description, json_schema_extra={"own": True})


class Section(BaseModel):
    """A frozen group of keys; unknown names, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
