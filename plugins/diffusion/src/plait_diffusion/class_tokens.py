"""A frozen random table of class tokens: the text encoder of the small models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class ClassTokens(ModelMixin, ConfigMixin):
    """One token for every class and one for no class; prompt ``"3"`` is class ``3``, the empty prompt is no class.

    Args:
        names: of the classes.
        dim: length of a token.
    """

    @register_to_config
    def __init__(self, names: Sequence[str] = (), dim: int = 32) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(len(names) + 1, dim))

    @classmethod
    def drawn(cls, names: Sequence[str], dim: int, generator: torch.Generator) -> ClassTokens:
        """A table drawn from the normal distribution."""
        tokens = cls(names=list(names), dim=dim)
        tokens.table.copy_(torch.randn(tokens.table.shape, generator=generator))
        return tokens

    def of_rows(self, rows: Tensor) -> Tensor:
        """Tokens ``[B, 1, dim]`` of class numbers; the number of classes stands for no class."""
        return self.table[rows.to(self.table.device)].unsqueeze(1)

    def of_prompt(self, prompt: str) -> Tensor:
        """The token ``[1, 1, dim]`` of a class by its name.

        Raises:
            ValueError: there is no such class.
        """
        names = list(self.config.names)
        if prompt and prompt not in names:
            raise ValueError(
                f"prompt is {prompt!r}; the model knows the classes {', '.join(names)}, and '' for no class"
            )
        return self.of_rows(torch.tensor([names.index(prompt) if prompt else len(names)]))
