"""Layouts of a micro-batch as the model's input: one protocol, four layouts, one chooser.

`padded` pads prompts on the left and completions on the right. `left_aligned` moves all padding to the end of each row,
so that causal attention needs no mask. `shared_prompt` computes a prompt once for all its completions. `packed`
concatenates the sequences.
"""

from __future__ import annotations

from grpo_ext.update.layouts.chooser import LayoutChooser

__all__ = ["LayoutChooser"]
