"""Arithmetic questions from reasoning-gym, their split into train and held-out, and their reward.

Small sizes have few distinct questions (100 products of two digits), so a split by row would put the same question on
both sides. This split puts every question on exactly one side.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from datasets import Dataset

#: Tasks on which a small instruct model starts with mixed rewards, and constant answers score low.
TASKS: tuple[str, ...] = ("products", "basic_arithmetic", "chain_sum")

INSTRUCTION = "Answer with just the number."

#: Seed of the question pool. It is fixed, so that only the split seed determines the held-out questions.
_POOL_SEED = 0

# A sign counts only without a digit before it ("3-5" ends in 5, "= -5" in -5), a comma only between groups of three
# digits, a point only between digits ("...12" ends in 12).
_NUMBER = re.compile(r"(?:(?<!\d)[-+\u2212])?(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?", re.ASCII)


def arithmetic_questions(
    task: str = "products", *, digits: int = 1, terms: int = 2, draws: int = 400
) -> list[tuple[str, str]]:
    """Draw `draws` questions from reasoning-gym, and return the distinct ones in order.

    Args:
        task: one of `TASKS`.
        digits: digits of each operand.
        terms: operands of a question.
        draws: questions to draw; 400 give 97 distinct ``products`` of two one-digit factors.

    Returns:
        (question, answer) pairs.

    Raises:
        ValueError: the task is unknown, or a size is below 1.
        ImportError: reasoning-gym is not installed.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    for name, value in (("digits", digits), ("terms", terms), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"the {task!r} task needs reasoning-gym: pip install reasoning-gym") from error
    rows = reasoning_gym.create_dataset(
        task,
        size=draws,
        seed=_POOL_SEED,
        min_terms=terms,
        max_terms=terms,
        min_digits=digits,
        max_digits=digits,
    )
    answers: dict[str, str] = {}
    for index in range(draws):
        row = rows[index]
        answers.setdefault(row["question"], row["answer"])
    return list(answers.items())


def arithmetic_datasets(
    task: str = "products",
    *,
    digits: int = 1,
    terms: int = 2,
    draws: int = 400,
    heldout: int = 24,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Create train and held-out datasets that share no question.

    Args:
        task: one of `TASKS`.
        digits: digits of each operand.
        terms: operands of a question.
        draws: questions to draw, before duplicates are dropped.
        heldout: distinct questions to hold out.
        seed: seed of the split; equal seeds give equal splits on every machine.

    Returns:
        (train, heldout) with columns ``prompt`` (one chat message) and ``answer`` (a number as text).

    Raises:
        ValueError: the task is unknown, or ``heldout`` leaves one side empty.
    """
    pairs = arithmetic_questions(task, digits=digits, terms=terms, draws=draws)
    if not 0 < heldout < len(pairs):
        raise ValueError(
            f"heldout must be between 1 and {len(pairs) - 1} (there are {len(pairs)} distinct questions), got {heldout}"
        )
    random.Random(seed).shuffle(pairs)
    return _dataset(pairs[heldout:]), _dataset(pairs[:heldout])


def last_number(text: str) -> Decimal | None:
    """Parse the last number in `text`; None without any. Ignores thousands commas: ``1,234.50`` is 1234.5."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def number_reward(completions: Sequence[Any], answer: Sequence[str | int | float], **columns: object) -> list[float]:
    """Reward 1.0 if the last number of the completion equals the answer, else 0.0.

    Args:
        completions: texts, or chat completions (lists of messages), whose contents are joined.
        answer: the expected number of each row.
        **columns: the other columns of the dataset, unused.
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        target = last_number(str(expected))
        rewards.append(float(target is not None and last_number(completion_text(completion)) == target))
    return rewards


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or a list of chat messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def _dataset(pairs: Sequence[tuple[str, str]]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}], "answer": answer}
            for question, answer in pairs
        ]
    )
