"""Pictures: who holds which classes, and who listens to whom."""

from __future__ import annotations

import networkx
import numpy as np
from matplotlib.figure import Figure


def partition_figure(histogram: np.ndarray, class_names: list[str]) -> Figure:
    """Circles as large as the number of samples; ``histogram`` [clients, classes]."""
    clients, classes = histogram.shape
    figure = Figure(figsize=(min(12, 1.5 + 0.28 * clients), min(8, 1.2 + 0.28 * classes)))
    axes = figure.subplots()
    client, label = np.nonzero(histogram)
    counts = histogram[client, label]
    axes.scatter(client, label, s=180 * counts / histogram.max(), color="#2a6f97", alpha=0.8)
    axes.set_yticks(range(classes), class_names, fontsize=8)
    axes.set_xlabel("client")
    axes.set_xlim(-0.8, clients - 0.2)
    axes.grid(alpha=0.2)
    return figure


def graph_figure(adjacency: np.ndarray) -> Figure:
    """Peers on a circle; arrows only where an edge runs one way."""
    directed = bool((adjacency != adjacency.T).any())
    # An arrow shows the way of the model: from the peer that is read to its reader.
    graph = networkx.from_numpy_array(adjacency.T, create_using=networkx.DiGraph if directed else networkx.Graph)
    figure = Figure(figsize=(4.5, 4.5))
    axes = figure.subplots()
    networkx.draw_networkx(
        graph,
        networkx.circular_layout(graph),
        ax=axes,
        with_labels=len(adjacency) <= 40,
        node_size=max(15, 3000 // len(adjacency)),
        font_size=7,
        node_color="#a9d6e5",
        edge_color="#888888",
        width=0.6,
        **({"arrowsize": 6} if directed else {}),
    )
    axes.axis("off")
    return figure
