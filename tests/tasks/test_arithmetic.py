"""The arithmetic datasets, their split, and the reward on the answers that models really write."""

from __future__ import annotations

from decimal import Decimal

import pytest

from grpo_ext.tasks import TASKS, arithmetic_datasets, last_number, number_reward
from grpo_ext.tasks.arithmetic import INSTRUCTION, arithmetic_questions
from grpo_ext.tasks.heldout import best_constant_reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("56", "56"),
        ("7 * 8 = 56", "56"),
        ("The answer is 56.", "56"),
        ("It is 12. No, it is 56", "56"),
        ("-7", "-7"),
        ("so x = -7.", "-7"),
        ("\u22127", "-7"),
        ("+7", "7"),
        ("3-5", "5"),
        ("5 - 3", "3"),
        ("3.50", "3.5"),
        ("...12", "12"),
        ("007", "7"),
        ("1,234", "1234"),
        ("1,234,567.5", "1234567.5"),
        ("1, 2, 3", "3"),
        ("1,2345", "2345"),
        ("12,34", "34"),
        ("56%", "56"),
        ("\\boxed{56}", "56"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "fifty-six", "-", ".", "no number here."])
def test_last_number_is_none_without_a_number(text: str) -> None:
    assert last_number(text) is None


def test_reward_is_one_or_zero_per_row() -> None:
    completions = ["7 x 8 is 56.", "56 or 57", "none", "56.0", "", "-56"]
    assert number_reward(completions, ["56"] * 6) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_reward_reads_chat_completions_and_ignores_other_columns() -> None:
    chat = [[{"role": "assistant", "content": "= -9"}], [{"role": "assistant", "content": None}]]
    assert number_reward(chat, [-9, "4"], prompts=["a", "b"], completion_ids=[[1], [2]]) == [1.0, 0.0]


def test_reward_refuses_rows_that_do_not_match() -> None:
    with pytest.raises(ValueError):
        number_reward(["1", "2"], ["1"])


def test_products_of_one_digit_have_97_questions_of_which_24_are_held_out() -> None:
    train, heldout = arithmetic_datasets("products", digits=1, terms=2, seed=3)
    assert (len(train), len(heldout)) == (73, 24)


@pytest.mark.parametrize("task", TASKS)
def test_split_shares_no_question_and_answers_are_right(task: str) -> None:
    train, heldout = arithmetic_datasets(task, seed=1)
    questions = [row["prompt"][0]["content"] for side in (train, heldout) for row in side]
    assert len(set(questions)) == len(questions) == len(train) + len(heldout)
    assert all(question.endswith(" " + INSTRUCTION) for question in questions)
    assert INSTRUCTION == "Answer with just the number."
    answers = [row["answer"] for side in (train, heldout) for row in side]
    assert number_reward(answers, answers) == [1.0] * len(answers)


def test_products_answers_multiply() -> None:
    for question, answer in arithmetic_questions("products", draws=50):
        left, right = question.split(": ")[1].split(".")[0].split(" * ")
        assert int(left) * int(right) == int(answer)


def test_split_is_the_same_for_the_same_seed_and_differs_between_seeds() -> None:
    first, again, other = (arithmetic_datasets(seed=seed)[1].to_list() for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_digits_and_terms_reach_the_questions() -> None:
    train, _ = arithmetic_datasets("chain_sum", digits=2, terms=3, draws=30, heldout=5, seed=0)
    numbers = [word for word in train[0]["prompt"][0]["content"].split() if word.isdigit()]
    assert len(numbers) == 3
    assert all(len(number) == 2 for number in numbers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "product"}, "task must be one of products, basic_arithmetic, chain_sum; got 'product'"),
        ({"digits": 0}, "digits must be at least 1, got 0"),
        ({"terms": 0}, "terms must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"heldout": 97}, "between 1 and 96"),
        ({"heldout": 0}, "between 1 and 96"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arithmetic_datasets(**arguments)


def test_best_constant_is_the_commonest_answer() -> None:
    _, heldout = arithmetic_datasets(seed=0)
    answers = heldout["answer"]
    commonest = max(answers.count(answer) for answer in answers) / len(answers)
    assert best_constant_reward(heldout, [number_reward]) == commonest
    assert best_constant_reward(heldout, [number_reward], reward_weights=[0.5]) == commonest / 2


def test_best_constant_is_unknown_without_answers() -> None:
    _, heldout = arithmetic_datasets(seed=0)
    assert best_constant_reward(heldout.remove_columns("answer"), [number_reward]) is None
