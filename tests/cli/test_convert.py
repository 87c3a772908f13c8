"""What users write becomes what the field's type asks for, or an error that says what is allowed."""

from __future__ import annotations

import enum
from typing import Any, Literal

import pytest

from grpo_ext.cli.convert import SettingsError, convert, suggest


class Interval(enum.Enum):
    NO = "no"
    STEPS = "steps"


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, "2e-4", 2e-4),
        (float, 1, 1.0),
        (int, "40", 40),
        (int, 40.0, 40),
        (int, "-1", -1),
        (bool, True, True),
        (bool, "yes", True),
        (bool, "off", False),
        (str, "1e3", "1e3"),
        (str, 7, "7"),
        (str, "none", "none"),
        (float | None, None, None),
        (float | None, "null", None),
        (float | None, "none", None),
        (float | None, "0.28", 0.28),
        (int | None, "3", 3),
        (str | None, "none", "none"),
        (str | None, "null", None),
        (str | bool, "group", "group"),
        (str | bool, "true", True),
        (str | bool, False, False),
        (str | bool, "no", "no"),
        (Literal["group", "none"] | bool, "none", "none"),
        (Literal["group", "none"] | bool, "False", False),
        (Literal["no", "steps"], False, "no"),
        (Literal["none", "some"], None, "none"),
        (Interval | str, "steps", "steps"),
        (Interval | str, False, "no"),
        (Interval, "no", "no"),
        (list[float], [1, "2"], [1.0, 2.0]),
        (list[float] | None, "[1, 0.5]", [1.0, 0.5]),
        (list[str], "number, a:b", ["number", "a:b"]),
        (list[str], "number", ["number"]),
        (None | str | list[str], "[tensorboard]", ["tensorboard"]),
        (None | str | list[str], "tensorboard", "tensorboard"),
        (dict[str, Any] | str | None, "{use_reentrant: false}", {"use_reentrant": False}),
        (dict[str, Any] | str | None, {"a": 1}, {"a": 1}),
        (Any, [1], [1]),
    ],
)
def test_convert(hint: Any, value: Any, expected: Any) -> None:
    result = convert("field", hint, value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (float, "fast", "lr: 'fast' is not a number"),
        (float, True, "lr: True is not a number"),
        (int, "1.5", "lr: '1.5' is not a whole number"),
        (int, None, "lr: None is not a whole number"),
        (bool, "maybe", "lr: 'maybe' is not true or false"),
        (bool, 2, "lr: 2 is not true or false"),
        (str, True, "lr: True is not text"),
        (int | None, "x", "lr: 'x' is not a whole number or null"),
        (Literal["a", "b"], "c", "lr: 'c' is not 'a' or 'b'"),
        (Interval, "epoch", "lr: 'epoch' is not 'no' or 'steps'"),
        (list[float], ["x"], "lr: "),
        (dict, "{", "lr: "),
        (list[int], "[", "lr: "),
    ],
)
def test_convert_refuses(hint: Any, value: Any, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        convert("lr", hint, value)
    assert str(error.value).startswith(message)


def test_suggest_names_the_nearest_or_nothing() -> None:
    assert suggest("learning_rat", ["learning_rate", "seed"]) == ": did you mean 'learning_rate'?"
    assert suggest("qqq", ["learning_rate", "seed"]) == ""
