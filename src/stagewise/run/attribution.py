"""One line of attributions as JSON: the fields of PAIR's viewer and ours, as a model that checks and a JSON schema."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Texts = list[str]
Numbers = list[Annotated[float, Field(allow_inf_nan=False)]]

_KNOWN = ("s", "_ids", "_scores", "_stderrs")
"""What is known of each proponent and of each opponent, by the end of its field's name."""


class Attribution(BaseModel):
    """The training samples that matter most for one query: *proponents* are helpful, *opponents* harmful.

    Scores have the sign of the file; ours are minus the influence, in nats per unit weight. Fields that are not named
    here are kept as they are.
    """

    model_config = ConfigDict(strict=True, extra="allow", title="Attribution")

    example_id: str = Field(description="names the query")
    inputs_plaintext: str = Field(description="the query")
    targets_plaintext: str = Field(description="what follows it, or when it was asked")
    proponents: Texts = Field(description="helpful training samples, the strongest first")
    proponent_ids: Texts | None = None
    proponent_scores: Numbers | None = Field(None, description="positive = helpful")
    proponent_stderrs: Numbers | None = Field(None, description="standard errors of the scores")
    opponents: Texts | None = Field(None, description="harmful training samples, the strongest first")
    opponent_ids: Texts | None = None
    opponent_scores: Numbers | None = Field(None, description="negative = harmful")
    opponent_stderrs: Numbers | None = None
    step: int | None = Field(None, description="training step of the checkpoint")
    window: int | None = Field(None, description="training steps during which the weight is changed")
    score: str | None = Field(None, description="what the scores are, with their unit")
    untrusted: str | None = Field(None, description="why the chains that picked the samples cannot be trusted")

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        for side in ("proponent", "opponent"):
            lengths = {f"{side}{end}": len(of) for end in _KNOWN if (of := getattr(self, f"{side}{end}")) is not None}
            if len({*lengths.values()}) > 1:
                raise ValueError(f"fields of the {side}s have different lengths: {lengths}")
        return self


def check(record: Any) -> dict[str, Any]:
    """A record as it came, if it is one.

    Raises:
        ValueError: it is not; names the field, what was got and what was expected.
    """
    try:
        Attribution.model_validate(record)
    except ValidationError as error:
        raise ValueError("; ".join(map(_said, error.errors()))) from None
    return dict(record)


def _said(fault: Any) -> str:
    place = ".".join(map(str, fault["loc"]))
    got = "" if fault["type"] in ("missing", "value_error") else f" (got {fault['input']!r:.60})"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}{got}" if place else f"{message}{got}"
