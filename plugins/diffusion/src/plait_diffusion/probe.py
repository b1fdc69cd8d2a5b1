"""How much of the classes is in pooled features: logistic regression on few labels, over random draws of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


def draws(
    num_train: int, num_test: int | None, num_labels: int | None, repeats: int, generator: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, test rows) for every repeat.

    Args:
        num_train: rows to draw the labelled ones from.
        num_test: rows of the test set, all of which are used; None: what is not drawn is tested on.
        num_labels: rows that are drawn; None: all, which leaves one repeat that differs from no other.

    Raises:
        ValueError: there are not as many rows.
    """
    labels = num_train if num_labels is None else num_labels
    if labels > num_train or (num_test is None and labels >= num_train):
        raise ValueError(
            f"num_labels is {num_labels or 'all'}, of {num_train} rows{'' if num_test else ', and some must be left to test on'};"
            " draw fewer"
        )
    found = []
    for _ in range(repeats if num_labels is not None else 1):
        order = generator.permutation(num_train)
        found.append((np.sort(order[:labels]), np.sort(order[labels:]) if num_test is None else np.arange(num_test)))
    return found


def probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    inverse_strength: float = 1.0,
) -> float:
    """Share of the test rows that multinomial logistic regression on standardised features gets right.

    Args:
        train, test: [N, C] and [M, C].
        inverse_strength: scikit-learn's C.

    Raises:
        ValueError: the training rows are of one class.
    """
    if len(np.unique(train_labels)) < 2:
        raise ValueError(f"all {len(train_labels)} labelled rows are of class {train_labels[0]}; draw more")
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=inverse_strength, max_iter=2000).fit(scaler.transform(train), train_labels)
    return float(model.score(scaler.transform(test), test_labels))


def wins(scores: Sequence[float], baseline: Sequence[float]) -> int:
    """In how many repeats, each on the same rows, the scores are higher."""
    return sum(score > other for score, other in zip(scores, baseline, strict=True))
