"""A model's weights in another type: what transformers computes in fp32 stays in fp32."""

from __future__ import annotations

import torch
from toys import build_model

from grpo_ext.trainer.models import cast_weights


def test_rotary_frequencies_keep_their_type() -> None:
    model = build_model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cast_weights(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    after = dict(model.named_buffers())
    assert "model.rotary_emb.inv_freq" in after
    assert all(torch.equal(after[name], before[name]) for name in before)
