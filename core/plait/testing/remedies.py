"""What to do about a broken promise, beside the sentence that says how it is broken."""

from __future__ import annotations

import re

# The first pattern that is found in a difference says what mends it.
AFTER_RELOAD = (
    (r"gradient of", "call zero_grad() before returning"),
    (r"requires_grad of", "return the model with the requires_grad flags that from_pretrained gives it"),
    (r"train/eval mode of", "call eval() before returning"),
    (r"state_dict.*keys", "register the tensor as a parameter or buffer that from_pretrained makes too"),
    (r"state_dict", "let the configuration say what the weights alone do not, or merge adapters before returning"),
    (r"keys .* and", "return a mapping whose keys are texts"),
    (r"column ", "give the column features that datasets can write, e.g. lists of one length"),
    (r"tensors differ", "return the tensor detached, on the CPU and contiguous"),
    (
        r"\w+ and \w+$",
        "return a type that comes back as itself: a list and no tuple inside JSON-like values, a Dataset, tensors",
    ),
)
BETWEEN_RUNS = (
    (r"gradient of", "call zero_grad() before returning"),
    (r"(time|seconds|speed|ms/)", "leave times out of the result, or name their columns in the example's ignore"),
    (r"", "draw from run.generator() or run.numpy_generator(), and iterate over sorted names, not over sets"),
)
IN_PLACE = (
    (r"is moved to", "move a copy: copy.deepcopy(model).to(run.device), or move it back in a finally clause"),
    (r"gradient of", "train a copy: copy.deepcopy(model)"),
    (r"train/eval mode of", "work on a copy, or give the mode back in a finally clause"),
    (r"requires_grad of", "work on a copy, or give the flags back in a finally clause"),
    (r"state_dict", "train a copy: copy.deepcopy(model)"),
    (r"tensors differ", "clone a tensor before writing into it"),
    (r"", "copy it before changing it"),
)
ON_RESUME = (
    (r"", "keep all state in loop.save: weights, optimizer, counters, and generators (or make one for each round: run.generator(f'round {i}'))"),
)  # fmt: skip


def remedy(difference: str, known: tuple[tuple[str, str], ...]) -> str:
    """``: what to do`` for a difference; empty where nothing is known."""
    return next((f": {text}" for pattern, text in known if re.search(pattern, difference)), "")
