"""Replace functions of Unsloth and of its generated trainer, and restore them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from grpo_ext.integrations.unsloth import step
from grpo_ext.integrations.unsloth.counting import counts
from grpo_ext.integrations.unsloth.head import SYMBOLS, replacement

#: Calls that restore what `patch` replaced, and whether it is in effect.
_undo: list[Callable[[], None]] = []


def patch(*, head: bool = True, one_forward: bool = True, trim: bool = True, dense: bool | None = None) -> None:
    """Replace the parts of Unsloth's GRPO step that the package's docstring lists.

    Args:
        head, one_forward, trim: whether to replace this part.
        dense: None replaces it where Unsloth runs attention row by row, True always, False never.

    Raises:
        ImportError: if Unsloth is missing or cannot be imported (older versions need a GPU), or if its version lacks
            the function for the head.
    """
    if _undo:
        return
    try:
        import unsloth_zoo.rl_replacements as replacements
    except (ImportError, NotImplementedError) as error:
        raise ImportError(
            "grpo_ext.integrations.unsloth needs unsloth, imported before it (and versions before October 2026 need a "
            f"GPU for that): {error}"
        ) from error
    if not hasattr(replacements, SYMBOLS[0]):
        raise ImportError(
            f"this version of unsloth_zoo has no {SYMBOLS[0]} in its rl_replacements: install one from August 2026 or "
            "later, or train without patch()"
        )
    counts.clear()
    _undo.append(lambda: None)
    if head:
        for name in SYMBOLS:
            if hasattr(replacements, name):
                _set(replacements, name, replacement(getattr(replacements, name)))
    if one_forward or trim or dense is not False:
        _patch_step(one_forward, trim, dense)


def _patch_step(one_forward: bool, trim: bool, dense: bool | None) -> None:
    trainer = getattr(sys.modules.get("trl"), "GRPOTrainer", None)
    names = None if trainer is None else step.names_of(trainer)
    if trainer is None or names is None:
        counts["step handed back: trl.GRPOTrainer is not Unsloth's, import unsloth before patch()"] += 1
        return
    if trim or dense is not False:
        _set_item(names, "grpo_accumulated_loss", step.accumulated_loss(names["grpo_accumulated_loss"], trim, dense))
    if not one_forward:
        return
    scoring, logps = "_generate_and_score_completions", "_get_per_token_logps_and_entropies"
    owners = [step.owner_of(trainer, name) for name in (scoring, logps)]
    results = step.results_of_scoring(inspect.getsource(getattr(trainer, scoring))) if all(owners) else None
    if results is None:
        counts["one_forward handed back: unknown code of the trainer"] += 1
        return
    _set_item(names, "UnslothEfficientGRPO", step.WithOldLogps(names["UnslothEfficientGRPO"]))
    _set(owners[0], scoring, step.generate_and_score(getattr(owners[0], scoring)))
    _set(owners[1], logps, step.token_logps(getattr(owners[1], logps), results))


def _set(owner: Any, name: str, value: Any) -> None:
    original = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, original))


def _set_item(names: dict[str, Any], name: str, value: Any) -> None:
    original = names[name]
    names[name] = value
    _undo.append(lambda: names.__setitem__(name, original))


def unpatch() -> None:
    """Restore Unsloth's own functions."""
    while _undo:
        _undo.pop()()


def status() -> dict[str, int | bool]:
    """Return ``patched`` and the number of calls by our code and by Unsloth's.

    ``served``, ``handed back: <options>``: of the head. ``one_forward served``, ``one_forward handed back: <reason>``:
    generation batches. ``trim …``, ``dense …``: micro-batches.
    """
    return {"patched": bool(_undo), **counts}
