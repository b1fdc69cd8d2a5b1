"""Which parameters unlearning may change, and where it stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from plait_clip import clip_loss, evaluating
from torch import Tensor, nn

from plait_ubt.embeddings import CaptionedImages, device_of, parts, unit_images, unit_texts
from plait_ubt.options import Scope
from plait_ubt.tokens import caption_words

PROJECTION = re.compile(
    r"(^|\.)(text_projection|visual_projection|visual\.proj|(visual|text)\.head\.proj|attnpool\.c_proj)(\.|$)"
)


def parameters_in_scope(model: Any, scope: Scope, image: Tensor, text: str) -> list[nn.Parameter]:
    """The parameters that Step 5 may change.

    A tower is what its encoder's output depends on; ``proj`` goes by the usual names of the last projections.

    Args:
        image, text: any input of the model; image ``[3, H, W]`` in [0, 1].

    Raises:
        ValueError: no parameter has the name of a projection.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if scope == "all":
        return parameters
    if scope == "proj":
        chosen = [p for name, p in model.named_parameters() if p.requires_grad and PROJECTION.search(name)]
        if not chosen:
            raise ValueError(
                "scope is 'proj', but no parameter of this model is named like a projection; use another scope"
            )
        return chosen
    output = (
        model.encode_image(image[None].to(parameters[0].device)) if scope == "visual" else model.encode_text([text])
    )
    gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


@torch.no_grad()
def diagnose(
    model: Any, forget_pairs: CaptionedImages, forget_texts: Sequence[str], retain_pairs: CaptionedImages
) -> dict[str, float]:
    """Where forgetting stands.

    Returns:
        ``forget_cosine``: mean c(U, t_forget); ``unrelated_cosine``: the same for retained images whose caption holds
        none of the forget words (absent if there is none); ``retain_loss``: L_clip of up to 256 retained pairs.
    """
    with evaluating(model):
        device = device_of(model)
        v_forget = unit_texts(model, forget_texts)
        rows = range(min(256, len(retain_pairs)))
        u_retain = unit_images(model, retain_pairs.images(rows).to(device))
        retain_captions = [retain_pairs.captions[i] for i in rows]
        words = {word for text in forget_texts for word in caption_words(text)}
        unrelated = [i for i in rows if words.isdisjoint(caption_words(retain_captions[i]))]
        batches = parts(range(len(forget_pairs)), 64)
        u_forget = torch.cat([unit_images(model, forget_pairs.images(batch).to(device)) for batch in batches])
        values = {
            "forget_cosine": (u_forget * v_forget).sum(-1).mean().item(),
            "retain_loss": clip_loss(u_retain, unit_texts(model, retain_captions), model.logit_scale.exp()).item(),
        }
        if unrelated:
            values["unrelated_cosine"] = (u_retain[unrelated] @ v_forget.T).mean().item()
    return values
