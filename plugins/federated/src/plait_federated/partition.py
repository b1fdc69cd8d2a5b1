"""Cut a labelled data set into the shards of clients: IID, stratified, Dirichlet, pathological.

Every function returns one index array a client. The *sampled* ones draw the classes of a client
sample by sample, as the program of Li et al. (arXiv 2410.07272) does: shards are equal in size, and a
sample may be used twice once its class has run out. The *disjoint* ones give each sample to one client.

``labels`` are int64 ``[N]``, never negative. What draws classes needs samples of all of them, 0 … C−1, C being the
highest label plus one. Every client gets at least one sample. Else all of them raise ``ValueError``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

ClientRows = list[np.ndarray]
Scheme = Literal["iid", "stratified", "dirichlet", "pathological", "path"]
Sampling = Literal["sampled", "disjoint"]


def divide(
    labels: np.ndarray,
    num_clients: int,
    seed: int,
    *,
    scheme: Scheme,
    coefficient: float = 0.3,
    sampling: Sampling = "sampled",
    drop_remainder: bool = False,
    as_released: bool = False,
) -> ClientRows:
    """The shards of any of the schemes below.

    Args:
        coefficient: alpha of ``dirichlet``; number of classes a client of ``pathological`` (also called ``path``).
        sampling: whether ``dirichlet`` and ``pathological`` are sampled or disjoint.
    """
    sampled = {"drop_remainder": drop_remainder, "as_released": as_released}
    if scheme == "iid":
        return iid(labels, num_clients, seed, drop_remainder=drop_remainder)
    if scheme == "stratified":
        return stratified(labels, num_clients, seed)
    if scheme == "dirichlet":
        if sampling == "sampled":
            return sampled_dirichlet(labels, num_clients, coefficient, seed, **sampled)
        return disjoint_dirichlet(labels, num_clients, coefficient, seed)
    if sampling == "sampled":
        return sampled_pathological(labels, num_clients, int(coefficient), seed, **sampled)
    return disjoint_pathological(labels, num_clients, int(coefficient), seed)


def iid(labels: np.ndarray, num_clients: int, seed: int, *, drop_remainder: bool = False) -> ClientRows:
    """Contiguous slices of one permutation; client 0 gets the remainder."""
    _check_labels(labels)
    order = np.random.RandomState(seed).permutation(len(labels))
    ends = np.cumsum(_quotas(len(labels), num_clients, drop_remainder))
    return np.split(order[: ends[-1]], ends[:-1])


def stratified(labels: np.ndarray, num_clients: int, seed: int) -> ClientRows:
    """IID with the same number of samples (±1) of each class for every client."""
    _check_labels(labels)
    _check_num_clients(num_clients, len(labels))
    order = np.random.RandomState(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    return [by_class[client::num_clients] for client in range(num_clients)]


def sampled_dirichlet(
    labels: np.ndarray,
    num_clients: int,
    alpha: float,
    seed: int,
    *,
    drop_remainder: bool = False,
    as_released: bool = False,
) -> ClientRows:
    """Each client draws its samples' classes from its own prior ~ Dirichlet(alpha, …, alpha).

    With alpha → 0 a client's samples are all of one class, each class equally likely; with alpha → ∞ all classes
    are equally likely for every sample.

    Args:
        as_released: keep the rounding of the released program, which sends rare draws to class 0.
    """
    num_classes = _num_classes(labels)
    quotas = _quotas(len(labels), num_clients, drop_remainder)
    random = np.random.RandomState(seed)
    order = random.permutation(len(labels))
    cumulative = np.cumsum(symmetric_dirichlet(alpha, num_classes, num_clients, random), axis=1)
    if not as_released:
        cumulative[:, -1] = 1.0
    return _draw(order, labels, cumulative, quotas, random)


def sampled_pathological(
    labels: np.ndarray,
    num_clients: int,
    classes_per_client: int,
    seed: int,
    *,
    drop_remainder: bool = False,
    as_released: bool = False,
) -> ClientRows:
    """Each client draws its samples from ``classes_per_client`` classes, equally likely."""
    num_classes = _num_classes(labels)
    _check_classes_per_client(classes_per_client, num_classes)
    quotas = _quotas(len(labels), num_clients, drop_remainder)
    random = np.random.RandomState(seed)
    order = random.permutation(len(labels))
    chosen = np.zeros((num_clients, num_classes))
    chosen[:, :classes_per_client] = 1
    for row in chosen:
        random.shuffle(row)
    cumulative = np.cumsum(chosen / classes_per_client, axis=1) * chosen
    if not as_released:
        cumulative[np.arange(num_clients), cumulative.argmax(axis=1)] = 1.0
    return _draw(order, labels, cumulative, quotas, random)


def disjoint_dirichlet(labels: np.ndarray, num_clients: int, alpha: float, seed: int) -> ClientRows:
    """Each class is cut among the clients in proportions ~ Dirichlet(alpha, …, alpha); sizes differ.

    With alpha → 0 each class goes to one client.

    Raises:
        ValueError: no draw out of 1000 gave every client a sample.
    """
    num_classes = _num_classes(labels)
    _check_num_clients(num_clients, len(labels))
    random = np.random.RandomState(seed)
    classes = [random.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]
    for _ in range(1000):
        shares = [symmetric_dirichlet(alpha, num_clients, 1, random)[0] for _ in classes]
        cuts = [np.cumsum(share)[:-1] * len(members) for share, members in zip(shares, classes, strict=True)]
        parts = [np.split(members, cut.astype(int)) for members, cut in zip(classes, cuts, strict=True)]
        shards = [random.permutation(np.concatenate(shard)) for shard in zip(*parts, strict=True)]
        if min(map(len, shards)) > 0:
            return shards
    raise ValueError(
        f"a Dirichlet partition with alpha {alpha} left one of {num_clients} clients empty in 1000 draws; "
        "raise alpha or take fewer clients"
    )


def disjoint_pathological(labels: np.ndarray, num_clients: int, classes_per_client: int, seed: int) -> ClientRows:
    """Each client owns ``classes_per_client`` classes; the owners of a class share its samples equally.

    Raises:
        ValueError: clients × classes_per_client < classes, or a class has fewer samples than owners.
    """
    num_classes = _num_classes(labels)
    _check_classes_per_client(classes_per_client, num_classes)
    _check_num_clients(num_clients, len(labels))
    if num_clients * classes_per_client < num_classes:
        raise ValueError(
            f"{num_clients} clients of {classes_per_client} classes cannot hold {num_classes} classes; "
            "raise classes_per_client"
        )
    random = np.random.RandomState(seed)
    owners: list[list[int]] = [[] for _ in range(num_classes)]
    for client in range(num_clients):  # the classes with the fewest owners so far, ties broken at random
        counts = np.array([len(clients) for clients in owners])
        for label in np.lexsort((random.random_sample(num_classes), counts))[:classes_per_client]:
            owners[label].append(client)
    shards: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label, clients in enumerate(owners):
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) < len(clients):
            raise ValueError(
                f"class {label} has {len(members)} samples for the {len(clients)} clients that share it; "
                "take fewer clients or fewer classes a client"
            )
        for client, part in zip(clients, np.array_split(members, len(clients)), strict=True):
            shards[client].append(part)
    return [random.permutation(np.concatenate(parts)) for parts in shards]


def label_histogram(labels: np.ndarray, shards: ClientRows) -> np.ndarray:
    """How often each of the classes that occur does so in each shard, ``[clients, classes]``."""
    classes, positions = np.unique(labels, return_inverse=True)
    return np.stack([np.bincount(positions[shard], minlength=len(classes)) for shard in shards])


def symmetric_dirichlet(alpha: float, num_parts: int, size: int, random: np.random.RandomState) -> np.ndarray:
    """Draws from Dirichlet(alpha, …, alpha) for any alpha > 0, ``[size, num_parts]``; rows sum to 1.

    They are NumPy's but where all gamma variates of a row underflow, which small alphas do: such a row is drawn
    from their logarithms, Gamma(a) = Gamma(a + 1) · U^(1/a). A Dirichlet draw is independent of the sum of its variates,
    so the choice of rows does not change the distribution.
    """
    alpha = min(alpha, 1e100)  # equal parts to the last digit; sums of larger variates overflow
    drawn = random.dirichlet([alpha] * num_parts, size=size)
    for row in np.flatnonzero(~np.isfinite(drawn).all(axis=1)):
        scaled = alpha * np.log(random.standard_gamma(alpha + 1, num_parts)) + np.log1p(
            -random.random_sample(num_parts)
        )
        with np.errstate(over="ignore"):  # −∞ is what the quotient should be
            parts = np.exp((scaled - scaled.max()) / alpha)
        drawn[row] = parts / parts.sum()
    return drawn


def _draw(
    order: np.ndarray, labels: np.ndarray, cumulative: np.ndarray, quotas: list[int], random: np.random.RandomState
) -> ClientRows:
    """Fill the shards from their ends: a random client, then a class by its cumulative prior, then its last sample."""
    members = [order[labels[order] == label] for label in range(cumulative.shape[1])]
    left = [len(samples) for samples in members]
    shards = [np.empty(quota, dtype=np.int64) for quota in quotas]
    open_places = list(quotas)
    for _ in range(sum(quotas)):
        client = random.randint(len(quotas))
        while open_places[client] == 0:
            client = random.randint(len(quotas))
        open_places[client] -= 1
        while True:
            label = int(np.argmax(random.uniform() <= cumulative[client]))
            if left[label] > 0:
                left[label] -= 1
                break
            left[label] = len(members[label])  # the class has run out: its samples are used again
        shards[client][open_places[client]] = members[label][left[label]]
    return shards


def _quotas(num_samples: int, num_clients: int, drop_remainder: bool) -> list[int]:
    _check_num_clients(num_clients, num_samples)
    quotas = [num_samples // num_clients] * num_clients
    if not drop_remainder:
        quotas[0] += num_samples % num_clients
    return quotas


def _num_classes(labels: np.ndarray) -> int:
    _check_labels(labels)
    occurring = np.unique(labels)
    gaps = np.flatnonzero(occurring != np.arange(len(occurring)))
    if len(gaps):
        raise ValueError(
            f"class {gaps[0]} has no sample; number the classes 0, 1, … without gaps (of named classes: transform: relabel with unused: drop)"
        )
    return len(occurring)


def _check_labels(labels: np.ndarray) -> None:
    if len(labels) and labels.min() < 0:
        row = int(np.argmax(labels < 0))
        raise ValueError(f"row {row} has label {labels[row]}; classes are 0, 1, …, leave unlabelled samples out")


def _check_num_clients(num_clients: int, num_samples: int) -> None:
    if not 2 <= num_clients <= num_samples:
        raise ValueError(
            f"num_clients is {num_clients}; allowed is 2 to the number of samples, {num_samples}, so that none is empty"
        )


def _check_classes_per_client(classes_per_client: int, num_classes: int) -> None:
    if not 1 <= classes_per_client <= num_classes:
        raise ValueError(
            f"classes per client is {classes_per_client}; allowed is 1 to the number of classes, {num_classes}"
        )
