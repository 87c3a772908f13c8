"""How the tokens of a micro-batch lie in the model's input: one protocol, four layouts, one chooser.

`padded` keeps prompts left-padded and completions right-padded. `left_aligned` moves all padding behind the rows, so
that causal attention needs no mask. `shared_prompt` computes a prompt once for all its completions. `packed` lays the
sequences end to end.
"""

from __future__ import annotations

from grpo_ext.update.layouts.chooser import LayoutChooser

__all__ = ["LayoutChooser"]
