"""TENT: by hand, gradients, what the PeerMLP's view sees, saving."""

import attrs
import pytest
import torch
import torch.nn.functional as F
from plait import Run
from plait_graph.conformance_examples import graph as small_graph
from plait_graph.episodes import Episode
from plait_graph.fewshot import EpisodeGraph, FixedSparse
from plait_graph.plugin import AdamTraining, EpisodeAccuracy, Tent
from plait_graph.tasks import EpisodeObjective
from plait_graph.tent import TENT, temperatures

EPISODE = Episode(torch.tensor([[0, 2], [3, 4]]), torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([4, 1]))


def path_graph():
    """0 - 1 - 2 - 3, and 4 alone."""
    edges = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    return EpisodeGraph.of(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), edges)


def tent(seed=0):
    torch.manual_seed(seed)
    return TENT(in_channels=3, num_classes=5, hidden_channels=4, dropout=0.0, base_weight=0.5).double()


def as_double(graph):
    x, a = graph.x.double(), FixedSparse.of(graph.adjacency.matrix.to_dense().double())
    return attrs.evolve(graph, x=x, adjacency=a, degree=graph.degree.double())


# -- TENT -----------------------------------------------------------------------------------------------------------


def tent_by_hand(model, z, a, subgraphs, episode):
    """Logits of the queries; ``subgraphs`` [N lists of nodes] are the class-ego subgraphs without the class node."""
    adapted, prototypes, members = [], [], []
    for nodes, support in zip(subgraphs, episode.support.tolist(), strict=True):
        mean = z[nodes].mean(0)
        phi = torch.cat([model.weight.flatten(), model.bias])
        phi = (model.scale(mean) + 1) * phi + model.shift(mean)
        weight, bias = phi[:16].view(4, 4), phi[16:]
        # the subgraph's own adjacency, the class node last and joined to all, row-normalised with self-loops
        k = len(nodes)
        joined = torch.ones(k + 1, k + 1).double()
        joined[:k, :k] = (a[nodes][:, nodes] > 0).double()
        features = torch.cat([z[nodes], z[support].mean(0, keepdim=True)])
        out = joined / joined.sum(1, keepdim=True) @ features @ weight + bias
        adapted.append((weight, bias))
        prototypes.append(out[-1])
        members.append(out[[nodes.index(v) for v in support]])
    weight, bias = (torch.stack(part).mean(0) for part in zip(*adapted, strict=True))
    queries = (a @ z)[episode.query] @ weight + bias
    spread = torch.stack([(m - p).norm(dim=1).sum() for m, p in zip(members, prototypes, strict=True)])
    tau = len(spread) * spread / spread.sum()
    return torch.stack([-((queries - p) ** 2).sum(1) / t for p, t in zip(prototypes, tau, strict=True)], 1)


def test_tent_by_hand():
    model, graph = tent(), as_double(path_graph())
    a = graph.adjacency.matrix.to_dense()
    first, second = model.encoder
    z = a @ (a @ graph.x @ first.weight + first.bias).relu() @ second.weight + second.bias
    expected = tent_by_hand(model, z, a, [[0, 1, 2, 3], [2, 3, 4]], EPISODE)
    torch.testing.assert_close(model(graph, EPISODE), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.answers(graph, [EPISODE])[0], expected, atol=1e-6, rtol=1e-6)
    base = F.cross_entropy(model.base(z[[0, 2, 3, 4, 1, 2]]), torch.tensor([4, 4, 1, 1, 4, 1]))
    losses = F.cross_entropy(expected, EPISODE.labels, reduction="none") + 0.5 * base
    torch.testing.assert_close(model.losses(graph, EPISODE), losses, atol=1e-6, rtol=1e-6)


def test_tent_without_edges_by_hand():
    """Every class-ego subgraph is its support nodes, the class node their mean; nothing is propagated."""
    model, graph = tent(), as_double(path_graph()).alone(EPISODE.rows)
    first, second = model.encoder
    z = (graph.x @ first.weight + first.bias).relu() @ second.weight + second.bias
    adapted, prototypes, spread = [], [], []
    for support in (z[:2], z[2:4]):
        phi = torch.cat([model.weight.flatten(), model.bias])
        phi = (model.scale(support.mean(0)) + 1) * phi + model.shift(support.mean(0))
        adapted.append(phi)
        out = support @ phi[:16].view(4, 4) + phi[16:]
        prototypes.append(out.mean(0))
        spread.append((out - out.mean(0)).norm(dim=1).sum())
    phi = torch.stack(adapted).mean(0)
    queries = z[4:] @ phi[:16].view(4, 4) + phi[16:]
    gaps = ((queries[:, None] - torch.stack(prototypes)) ** 2).sum(-1)
    expected = -gaps / (2 * torch.stack(spread) / sum(spread))
    torch.testing.assert_close(model(graph, EPISODE.renumbered()), expected, atol=1e-6, rtol=1e-6)


def test_temperatures():
    members = torch.tensor([[[1.0, 0], [3, 0]], [[0, 1], [0, -5]]])
    assert temperatures(members, torch.zeros(2, 2)).tolist() == pytest.approx([0.8, 1.2])
    alone = torch.ones(3, 1, 4)  # 1-shot without edges: each support node is its class node
    assert temperatures(alone, torch.ones(3, 4)).tolist() == [1, 1, 1]


def test_one_shot_tent_on_rows_alone_has_finite_gradients():
    model, graph = tent(), as_double(path_graph())
    episode = attrs.evolve(EPISODE, support=torch.tensor([[0], [4]]))
    loss = model.losses(graph.alone(episode.rows), episode.renumbered()).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_every_tensor_of_tent_gets_the_gradient_of_its_loss():
    model, graph = tent(seed=1), as_double(path_graph())
    loss = model.losses(graph, EPISODE).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(g.abs().max() > 0 for g in gradients)
    with torch.no_grad():  # along the bias of phi
        before = model.bias[0].item()
        values = []
        for step in (1e-5, -1e-5):
            model.bias[0] = before + step
            values.append(model.losses(graph, EPISODE).mean().item())
    place = [name for name, _ in model.named_parameters()].index("bias")
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradients[place][0].item(), rel=1e-5)


def test_tent_needs_the_classes_of_an_episode_to_train():
    with pytest.raises(ValueError, match="does not say its classes"):
        tent().losses(as_double(path_graph()), attrs.evolve(EPISODE, classes=None))


def loss_on_episodes(model, data):
    """Mean loss of 20 episodes of the training classes: what training lowers."""
    shape = (2, 3, 5, 1)
    objective = EpisodeObjective(data, torch.device("cpu"), *shape, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    model.eval()
    return sum(objective.draw(generator).losses(model).mean().item() for _ in range(20)) / 20


@pytest.mark.parametrize("sparse", [False, True])
def test_training_accuracy_and_saving(sparse, tmp_path):
    data, plain = small_graph(), small_graph()
    if sparse:
        csr = data.x.to_sparse_csr()
        del data.x
        data.x_crow, data.x_col, data.x_value = csr.crow_indices(), csr.col_indices(), csr.values()
        data.x_columns, data.num_nodes = plain.x.shape[1], len(plain.y)
    shape = {"n_way": 2, "k_shot": 3, "n_query": 5}
    model = Tent(hidden_channels=8).load_model(data, Run())
    trained = AdamTraining(num_steps=40, num_val_tasks=2, select="last", **shape).optimize(model, data, Run())
    report = EpisodeAccuracy(num_tasks=20, **shape).evaluate(trained, data, model, Run())
    assert report.value("accuracy") > 60
    assert loss_on_episodes(trained, data) < 0.6 * loss_on_episodes(model, data)
    assert report.rows[0]["accuracy"] == pytest.approx(
        EpisodeAccuracy(num_tasks=20, **shape).evaluate(trained, plain, model, Run()).value("accuracy"), abs=2
    )
    trained.save_pretrained(tmp_path)
    again = type(trained).from_pretrained(tmp_path).eval()
    assert again.config == trained.config
    assert EpisodeAccuracy(num_tasks=20, **shape).evaluate(again, data, model, Run()).rows == report.rows
