"""Models, few-shot backbones, plain training, evaluation."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from hypothesis import given, settings
from hypothesis import strategies as st
from plait import Run
from plait_graph import datasets, tasks
from plait_graph.episodes import Episode
from plait_graph.fewshot import GPN, EpisodeGraph, FixedSparse, MetaGCN
from plait_graph.models import ARCHITECTURES, GNN
from plait_graph.plugin import (
    AdamTraining,
    ClassSplit,
    CsbmGraph,
    EpisodeAccuracy,
    Gnn,
    Gpn,
    MetaGcn,
    NodeAccuracy,
    NodeSplit,
    SGDTraining,
    Tent,
)
from plait_graph.sampling import NeighbourSampler
from plait_graph.tent import TENT
from plait_graph.training_loop import seconds_per_update
from torch_geometric.data import Data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def graph():
    data = CsbmGraph(num_nodes=300, num_classes=6, num_features=16, homophily=0.9, signal=3.0).load_data(Run())
    data = NodeSplit(per_class=10, num_val=60).transform(data, Run())
    return ClassSplit(train=2, val=2, test=2).transform(data, Run())


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_keep_their_shape_and_survive_saving(architecture, graph, tmp_path):
    model = Gnn(architecture=architecture, hidden_channels=8, heads=2).load_model(graph, Run()).eval()
    logits = model(graph.x, graph.edge_index)
    assert logits.shape == (300, 6)
    model.history = [{"update": 0, "loss": 0.5}]
    model.save_pretrained(tmp_path)
    again = GNN.from_pretrained(tmp_path).eval()
    assert torch.equal(again(graph.x, graph.edge_index), logits)
    assert again.history == model.history


def test_weights_follow_the_seed_and_leave_the_global_generator_alone(graph):
    state = torch.random.get_rng_state()
    a, b, c = (Gnn().load_model(graph, Run(seed=s)) for s in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("method", [AdamTraining(num_steps=30), SGDTraining(num_steps=30)])
def test_training_learns_and_leaves_its_inputs_alone(method, graph):
    model = Gnn().load_model(graph, Run())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    trained = method.optimize(model, graph, Run())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(trained.history) == 30
    assert trained.history[-1]["val_accuracy"] > 0.6
    assert seconds_per_update(trained) > 0
    report = NodeAccuracy().evaluate(trained, graph, model, Run())
    assert report.value("accuracy") > 60
    assert report.value("gain") > 20
    both = NodeAccuracy().evaluate({"fresh": model, "trained": trained}, graph, None, Run())
    assert not both.panels  # a model without a training has no time
    pair = NodeAccuracy().evaluate({"a": trained, "b": trained}, graph, trained, Run())
    assert [row["time"] for row in pair.rows] == [1, 1]
    assert pair.panels[0].images[0][0].data
    assert both.value("accuracy", model="trained") == report.value("accuracy")


def test_accuracy_and_macro_f1_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, x, edge_index):
            return x

    data = Data(
        x=torch.eye(3)[[0, 0, 1, 2]], edge_index=torch.zeros(2, 0, dtype=torch.long), y=torch.tensor([0, 1, 1, 2])
    )
    data.test_mask = torch.tensor([True, True, True, False])
    report = NodeAccuracy().evaluate(Fixed(), data, None, Run())
    assert report.value("accuracy") == pytest.approx(200 / 3)
    assert report.value("macro-F1") == pytest.approx(100 * 2 / 3)
    assert report.value("± 95 % of one seed") == pytest.approx(196 * (2 / 9 / 3) ** 0.5)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("model_of", [Gnn(), Gpn()])
def test_killed_training_resumes_bit_for_bit(model_of, graph):
    model = model_of.load_model(graph, Run())
    batch = {"batch_size": 20, "num_hops": 2, "num_neighbors": 3} if isinstance(model_of, Gnn) else {}
    episodes = {"n_way": 2, "k_shot": 2, "n_query": 3, "num_val_tasks": 3}
    method = AdamTraining(num_steps=17, checkpoint_every=5, eval_every=4, **batch, **episodes)
    whole = method.optimize(model, graph, Run(seed=5))
    run = Run(seed=5)
    logged = []

    def stop(values, step):
        logged.append(step)
        if step == 12:
            raise KilledError

    with pytest.raises(KilledError):
        method.optimize(model, graph, Run(seed=5, folder=run.folder, on_log=stop))
    first = len(logged)
    resumed = method.optimize(
        model, graph, Run(seed=5, folder=run.folder, on_log=lambda values, step: logged.append(step))
    )
    assert logged[first] == 10
    assert same(whole, resumed)
    assert [e["loss"] for e in whole.history] == [e["loss"] for e in resumed.history]


def test_a_finished_training_leaves_nothing_for_the_next_one_in_its_folder(graph):
    model, run = Gnn().load_model(graph, Run()), Run()
    method = AdamTraining(num_steps=6, checkpoint_every=2, select="last")
    first = method.optimize(model, graph, run)
    other = Gnn().load_model(graph, Run(seed=9))
    assert not same(method.optimize(other, graph, run), first)
    assert not list(run.folder.rglob("*.pt"))


@pytest.mark.parametrize("change", ["method", "model", "dropout", "data", "seed"])
def test_a_killed_training_is_resumed_by_the_same_training_only(change, graph):
    def stop(values, step):
        if step == 5:
            raise KilledError

    model, folder = Gnn().load_model(graph, Run()), Run().folder
    method = AdamTraining(num_steps=8, checkpoint_every=2, select="last")
    with pytest.raises(KilledError):
        method.optimize(model, graph, Run(folder=folder, on_log=stop))
    assert list(folder.rglob("*.pt"))
    seed, data = 0, graph
    if change == "method":
        method = AdamTraining(num_steps=8, checkpoint_every=2, select="last", learning_rate=0.02)
    elif change == "model":
        model = Gnn().load_model(graph, Run(seed=9))
    elif change == "dropout":  # with the same weights
        model = Gnn(dropout=0.1).load_model(graph, Run())
    elif change == "data":
        data = graph.clone()
        data.x = data.x + 1
        data.adjacency = torch.eye(300).to_sparse()
    else:
        seed = 3
    again = method.optimize(model, data, Run(seed=seed, folder=folder))
    assert same(again, method.optimize(model, data, Run(seed=seed)))
    assert len(again.history) == 8


def test_patience_and_last_weights(graph):
    model = Gnn().load_model(graph, Run())
    stopped = AdamTraining(num_steps=400, eval_every=1, patience=3, learning_rate=1e-9).optimize(model, graph, Run())
    assert len(stopped.history) == 4  # the first validation is a gain, three more are not
    last = AdamTraining(num_steps=6, eval_every=1, select="last").optimize(model, graph, Run())
    best = AdamTraining(num_steps=6, eval_every=1).optimize(model, graph, Run())
    accuracies = [entry["val_accuracy"] for entry in best.history]
    objective = tasks.NodeObjective(graph, CPU)
    assert objective.validate(best) == pytest.approx(max(accuracies))
    assert objective.validate(last) == pytest.approx(accuracies[-1])


def test_receptive_field_gives_the_same_losses(graph):
    whole, part = tasks.NodeObjective(graph, CPU), tasks.NodeObjective(graph, CPU, num_hops=3)
    assert part.whole.data.num_nodes <= whole.data.num_nodes
    for architecture in ("gcn", "sage", "gat"):
        model = Gnn(architecture=architecture).load_model(graph, Run()).eval()
        torch.testing.assert_close(part.whole.losses(model), whole.whole.losses(model))


def test_all_neighbours_drawn_give_the_same_losses(graph):
    whole = tasks.NodeObjective(graph, CPU).whole
    drawn = tasks.NodeObjective(graph, CPU, num_hops=3, num_neighbors=300).draw(torch.Generator().manual_seed(0))
    for architecture in ("gcn", "sage", "gat"):
        model = Gnn(architecture=architecture).load_model(graph, Run()).eval()
        torch.testing.assert_close(drawn.losses(model), whole.losses(model))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), num_neighbors=st.integers(1, 4), num_hops=st.integers(1, 3))
def test_drawn_neighbours(seed, num_neighbors, num_hops):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(25, (2, 60), generator=generator)
    targets = torch.randperm(25, generator=generator)[:4]
    nodes, kept = NeighbourSampler(edges, 25, num_neighbors).draw(targets, num_hops, generator)
    assert torch.equal(nodes[:4], targets)
    assert len(torch.unique(nodes)) == len(nodes)
    assert len(torch.unique(kept)) == len(kept)
    distance = {int(v): 0 for v in targets}
    for hop in range(1, num_hops + 1):
        reached = {int(edges[0, e]) for e in kept if distance.get(int(edges[1, e])) == hop - 1}
        distance |= {v: hop for v in reached if v not in distance}
    assert set(distance) == set(nodes.tolist())
    for v in nodes.tolist():
        wanted = min(num_neighbors, int((edges[1] == v).sum())) if distance[v] < num_hops else 0
        assert int((edges[1, kept] == v).sum()) == wanted


def test_neighbours_are_drawn_uniformly_and_anew():
    star = torch.stack([torch.arange(1, 11), torch.zeros(10, dtype=torch.long)])
    sampler, generator = NeighbourSampler(star, 11, 3), torch.Generator().manual_seed(0)
    drawn = torch.cat([sampler.draw(torch.tensor([0]), 1, generator)[1] for _ in range(2000)])
    assert torch.bincount(drawn, minlength=10).tolist() == pytest.approx([600] * 10, rel=0.15)


def test_training_on_drawn_neighbours_learns(graph):
    model = Gnn().load_model(graph, Run())
    method = AdamTraining(num_steps=30, batch_size=20, num_hops=2, num_neighbors=3)
    assert method.optimize(model, graph, Run()).history[-1]["val_accuracy"] > 0.6
    with pytest.raises(ValueError, match="num_neighbors is 3 without num_hops"):
        AdamTraining(num_neighbors=3).optimize(model, graph, Run())


def test_batches_hold_so_many_labelled_nodes(graph):
    objective = tasks.NodeObjective(graph, CPU, batch_size=7)
    task = objective.draw(torch.Generator().manual_seed(0))
    assert len(torch.unique(task.targets)) == 7
    assert graph.train_mask[task.targets].all()


def test_edge_weights_reach_models_that_name_them(graph):
    from torch_geometric.nn import GCNConv

    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = GCNConv(16, 6)

        def forward(self, x, edge_index, edge_weight=None):
            return self.conv(x, edge_index, edge_weight)

    data = graph.clone()
    data.edge_weight = torch.rand(data.edge_index.shape[1])
    model = Weighted()
    expected = F.cross_entropy(
        model(data.x, data.edge_index, data.edge_weight)[data.train_mask], data.y[data.train_mask]
    )
    torch.testing.assert_close(tasks.NodeObjective(data, CPU).whole.losses(model).mean(), expected)


# -- few-shot -------------------------------------------------------------------------------------------------------


def path_graph():
    """0 - 1 - 2 - 3, and 4 alone."""
    edges = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    return EpisodeGraph.of(torch.arange(15.0).view(5, 3) / 10, edges)


def test_adjacency_is_row_normalised_with_self_loops():
    graph = path_graph()
    third, half = 1 / 3, 1 / 2
    expected = [
        [half, half, 0, 0, 0],
        [third, third, third, 0, 0],
        [0, third, third, third, 0],
        [0, 0, half, half, 0],
        [0, 0, 0, 0, 1],
    ]
    torch.testing.assert_close(graph.adjacency.matrix.to_dense(), torch.tensor(expected))
    assert graph.degree.tolist() == [1, 2, 2, 1, 0]


def test_loops_and_repeated_edges_do_not_count_twice():
    plain = path_graph()
    loops = torch.tensor([[0, 4, 0], [0, 4, 1]])
    edges = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    again = EpisodeGraph.of(plain.x, torch.cat([edges, loops], dim=1))
    assert torch.equal(again.degree, plain.degree)
    assert torch.equal(again.adjacency.matrix.to_dense(), plain.adjacency.matrix.to_dense())


def test_fixed_sparse_matrix():
    x = torch.tensor([[0.0, 1, 2], [0, 0, 0], [3, 0, 4], [5, 0, 0]])
    sparse = FixedSparse.of(x.to_sparse_csr())
    rows = torch.tensor([3, 1, 2, 2])
    assert torch.equal(sparse[rows].matrix.to_dense(), x[rows])
    assert torch.equal(sparse[rows].transposed.to_dense(), x[rows].T)
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(sparse.transposed.to_dense(), x.T)
    assert torch.autograd.gradcheck(lambda w: FixedSparse.of(x.double().to_sparse_csr()) @ w, w)


EPISODE = Episode(torch.tensor([[0, 2], [3, 4]]), torch.tensor([1, 2]), torch.tensor([0, 1]))


@pytest.mark.parametrize(("weighting", "distance"), [("softmax", "euclidean"), ("sum", "squared")])
def test_gpn_by_hand(weighting, distance):
    torch.manual_seed(0)
    graph = path_graph()
    model = GPN(in_channels=3, hidden_channels=4, weighting=weighting, distance=distance).eval()
    a = graph.adjacency.matrix.to_dense()
    e1, e2 = model.encoder
    s1, s2 = model.scorer
    z = a @ (a @ graph.x @ e1.weight + e1.bias).relu() @ e2.weight + e2.bias
    s = (a @ (a @ graph.x @ s1.weight + s1.bias).relu() @ s2.weight + s2.bias).relu() @ model.score.weight.T
    s = s.flatten() + model.score.bias
    logits = torch.empty(2, 2)
    for i, nodes in enumerate(EPISODE.support.tolist()):
        raw = torch.stack([torch.sigmoid(graph.degree[v].clamp_min(1).log() * s[v]) for v in nodes])
        w = raw.softmax(0) / 2 if weighting == "softmax" else raw / raw.sum()
        prototype = w[0] * z[nodes[0]] + w[1] * z[nodes[1]]
        gap = (z[EPISODE.query] - prototype).norm(dim=1)
        logits[:, i] = -gap if distance == "euclidean" else -(gap**2)
    torch.testing.assert_close(model(graph, EPISODE), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.answers(graph, [EPISODE])[0], logits, atol=1e-5, rtol=1e-5)


def test_isolated_support_nodes_give_no_nan():
    model = GPN(in_channels=3)
    loss = F.cross_entropy(model(path_graph(), EPISODE), EPISODE.labels)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def test_meta_gcn_adapts_by_detached_gradient_steps():
    torch.manual_seed(0)
    graph = path_graph()
    model = MetaGCN(in_channels=3, n_way=2, hidden_channels=4, dropout=0.0, num_inner_steps=2, inner_learning_rate=0.3)
    with torch.no_grad():
        for bias in model.biases:
            bias.normal_()
    a = graph.adjacency.matrix.to_dense()

    def logits(parameters):
        w1, w2, w3, b1, b2, b3 = parameters
        return (a @ (a @ graph.x @ w1 + b1).relu() @ w2 + b2) @ w3 + b3

    adapted = [p.detach().clone().requires_grad_() for p in model.parameters()]
    for _ in range(2):
        loss = F.cross_entropy(logits(adapted)[EPISODE.support.flatten()], torch.tensor([0, 0, 1, 1]))
        gradients = torch.autograd.grad(loss, adapted)
        adapted = [(p - 0.3 * g).detach().requires_grad_() for p, g in zip(adapted, gradients, strict=True)]
    torch.testing.assert_close(model(graph, EPISODE), logits(adapted)[EPISODE.query])
    outer = torch.autograd.grad(model(graph, EPISODE)[0, 0], list(model.parameters()))
    first_order = torch.autograd.grad(logits(adapted)[EPISODE.query][0, 0], adapted)
    for g, h in zip(outer, first_order, strict=True):
        torch.testing.assert_close(g, h)


def loss_on_episodes(model, data):
    """Mean loss of 20 episodes of the training classes: what training lowers."""
    objective = tasks.EpisodeObjective(data, CPU, 2, 3, 5, 1, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    model.eval()
    return sum(objective.draw(generator).losses(model).mean().item() for _ in range(20)) / 20


@pytest.mark.slow
@pytest.mark.parametrize("make", [Gpn(), MetaGcn(n_way=2)])
@pytest.mark.parametrize("sparse", [False, True])
def test_few_shot_training_and_accuracy(make, sparse, graph, tmp_path):
    data = graph
    if sparse:
        data, csr = graph.clone(), graph.x.to_sparse_csr()
        del data.x
        data.x_crow, data.x_col, data.x_value = csr.crow_indices(), csr.col_indices(), csr.values()
        data.x_columns, data.num_nodes = 16, 300
        assert torch.equal(datasets.features(data).to_dense(), graph.x)
    model = make.load_model(data, Run())
    episodes = {"n_way": 2, "k_shot": 3, "n_query": 5}
    trained = AdamTraining(num_steps=25, eval_every=10, num_val_tasks=5, select="last", **episodes).optimize(
        model, data, Run()
    )
    report = EpisodeAccuracy(num_tasks=20, **episodes).evaluate(trained, data, model, Run())
    assert report.value("accuracy") > 55
    assert loss_on_episodes(trained, data) < 0.6 * loss_on_episodes(model, data)
    assert 0 < report.value("± 95 % of one seed") < 20
    trained.save_pretrained(tmp_path)
    again = type(trained).from_pretrained(tmp_path)
    assert EpisodeAccuracy(num_tasks=20, **episodes).evaluate(again, data, model, Run()).rows == report.rows


@pytest.mark.slow
@pytest.mark.parametrize("make", [Gpn(), MetaGcn(n_way=3), Tent()])
def test_few_shot_training_gains_over_the_untrained_model_on_the_same_episodes(make):
    """Most features are noise, so that a network has to learn which to look at."""
    data = CsbmGraph(num_nodes=600, num_classes=12, num_features=8, homophily=0.5, signal=4.0).load_data(Run())
    noise = torch.randn(600, 24, generator=torch.Generator().manual_seed(0))
    data.x = torch.cat([data.x, 2.5 * noise], dim=1)
    data = ClassSplit(train=6, val=3, test=3).transform(data, Run())
    episodes = {"n_way": 3, "k_shot": 3, "n_query": 5}
    model = make.load_model(data, Run())
    training = AdamTraining(num_steps=100, eval_every=100, num_val_tasks=2, select="last", **episodes)
    trained = training.optimize(model, data, Run())
    seen = with_classes(data, train_classes=data.test_classes, test_classes=data.train_classes)
    assert EpisodeAccuracy(num_tasks=40, **episodes).evaluate(trained, seen, model, Run()).value("gain") > 15


# -- bad input -----------------------------------------------------------------------------------------------------


def without(graph, name):
    copy = graph.clone()
    del copy[name]
    return copy


def with_classes(graph, **classes):
    copy = graph.clone()
    for name, value in classes.items():
        copy[name] = value
    return copy


@pytest.mark.parametrize(
    ("model_of", "change", "message"),
    [
        (Gnn(), lambda g: without(g, "train_mask"), "no node is labelled"),
        (Gpn(), lambda g: without(g, "train_classes"), "no split of its classes"),
        (Gpn(), lambda g: with_classes(g, val_classes=g.train_classes), "is in two splits"),
        (Gpn(), lambda g: with_classes(g, val_classes=torch.tensor([-1, -2])), "validation class -1 has 0 nodes"),
        (Gpn(), lambda g: with_classes(g, test_classes=torch.zeros(2)), "test_classes must be whole numbers"),
    ],
)
def test_training_refuses_graphs_without_what_it_needs(model_of, change, message, graph):
    model = model_of.load_model(graph, Run())
    with pytest.raises(ValueError, match=message):
        AdamTraining(n_way=2).optimize(model, change(graph), Run())


def test_training_refuses_wrong_models_and_episodes(graph):
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module on graphs as model, got a str"):
        AdamTraining().optimize("gcn", graph, Run())
    gpn, meta = Gpn().load_model(graph, Run()), MetaGcn(n_way=4).load_model(graph, Run())
    with pytest.raises(ValueError, match="n_way is 5, but there are only 2 training classes"):
        AdamTraining().optimize(gpn, graph, Run())
    with pytest.raises(ValueError, match="do not apply to episodes"):
        AdamTraining(n_way=2, num_hops=2).optimize(gpn, graph, Run())
    with pytest.raises(ValueError, match="made for n_way = 4"):
        AdamTraining(n_way=2, n_query=3).optimize(meta, graph, Run())
    with pytest.raises(ValueError, match="does not answer episodes"):
        EpisodeAccuracy(n_way=2).evaluate(Gnn().load_model(graph, Run()), graph, None, Run())
    with pytest.raises(ValueError, match="val_mask of shape"):
        NodeAccuracy(split="val").evaluate(gpn, without(graph, "val_mask"), None, Run())
    broken = Gnn().load_model(graph, Run())
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        AdamTraining().optimize(broken, graph, Run())


class Explodes(torch.nn.Module):
    """Its loss is finite and its gradient is not."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 6)
        self.offset = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, edge_index):
        return self.linear(x) + self.offset.sqrt()


class Summed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 6)

    def forward(self, x, edge_index):
        return self.linear(x).sum(0)


class Unused(torch.nn.Module):
    """What is trained takes no part."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 6).requires_grad_(False)
        self.free = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, edge_index):
        return self.linear(x)


class Normalised(torch.nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        self.conv, self.norm = layer or pyg.GCNConv(16, 6), torch.nn.BatchNorm1d(6)

    def forward(self, x, edge_index):
        return self.norm(self.conv(x, edge_index))


@pytest.mark.parametrize(
    ("model_of", "message"),
    [
        (lambda graph: Explodes(), "the gradient's norm is (inf|nan)"),
        (lambda graph: Summed(), r"the model returned \(6,\); expected logits \[300, 6\]"),
        (lambda graph: GNN(architecture="gcn", in_channels=16, num_classes=5), r"returned \(300, 5\)"),
        (lambda graph: GNN(architecture="gcn", in_channels=7, num_classes=6), "has 16 features a node"),
        (lambda graph: torch.nn.Linear(16, 6), "its forward must take x"),
        (lambda graph: torch.nn.Identity(), "has no weights that could be trained"),
        (lambda graph: Unused(), "the loss depends on no tensor that requires a gradient"),
        (lambda graph: GNN(architecture="gcn", in_channels=16, num_classes=6).double(), "weights are torch.float64"),
    ],
)
def test_models_that_do_not_fit_are_refused(model_of, message, graph):
    model = model_of(graph)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, FloatingPointError), match=message):
        AdamTraining(num_steps=2).optimize(model, graph, Run())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (GPN(in_channels=7), "has 16 features a node"),
        (MetaGCN(in_channels=7, n_way=2), "has 16 features a node"),
        (MetaGCN(in_channels=16, n_way=3), "made for n_way = 3"),
        (GPN(in_channels=16).double(), "x is torch.float32, but the model's weights are torch.float64"),
        (TENT(in_channels=16, num_classes=1), r"but the model was made for classes 0 \.\.\. 0"),
    ],
)
def test_few_shot_models_that_do_not_fit_are_refused(model, message, graph):
    shape = {"n_way": 2, "k_shot": 2, "n_query": 3}
    with pytest.raises(ValueError, match=message):
        AdamTraining(num_steps=2, **shape).optimize(model, graph, Run())
    if not isinstance(model, TENT):  # whose head over the training classes has no part in answers
        with pytest.raises(ValueError, match=message):
            EpisodeAccuracy(num_tasks=2, **shape).evaluate(model, graph, None, Run())


def test_a_head_without_an_output_for_a_training_class_is_refused_before_the_first_update():
    data = CsbmGraph(num_nodes=200, num_classes=8, num_features=16).load_data(Run())
    data = ClassSplit(train=(7, 0, 1, 2), val=(3, 4), test=(5, 6)).transform(data, Run())
    logged = []
    with pytest.raises(ValueError, match=r"has class 7, but the model was made for classes 0 \.\.\. 6"):
        AdamTraining(n_way=2).optimize(
            TENT(in_channels=16, num_classes=7), data, Run(on_log=lambda values, step: logged.append(step))
        )
    assert not logged


def test_layers_without_weights_are_refused(graph):
    for use in (AdamTraining().optimize, lambda *a: NodeAccuracy().evaluate(*a[:2], None, a[2])):
        with pytest.raises(ValueError, match="no weights before its first call"):
            use(Normalised(pyg.GCNConv(-1, 6)), graph, Run())


def test_batch_norm_with_a_batch_of_one_row_is_refused(graph):
    alone = graph.clone()
    alone.edge_index = graph.edge_index[:, :0]
    with pytest.raises(ValueError, match=r"cannot be trained on one row .* raise batch_size or num_hops"):
        AdamTraining(batch_size=1, num_hops=1).optimize(Normalised(), alone, Run())
    assert len(AdamTraining(batch_size=1, num_steps=2).optimize(Normalised(), graph, Run()).history) == 2


def test_models_of_the_other_kind_are_refused(graph):
    with pytest.raises(ValueError, match="GPN, which answers episodes"):
        NodeAccuracy().evaluate(Gpn().load_model(graph, Run()), graph, None, Run())
    with pytest.raises(ValueError, match="has 16 features a node"):
        NodeAccuracy().evaluate(GNN(architecture="gcn", in_channels=7, num_classes=6), graph, None, Run())


def test_the_fields_reach_the_optimizer(graph):
    model = Gnn().load_model(graph, Run())
    adam = AdamTraining(learning_rate=0.3, betas=(0.5, 0.6), weight_decay=0.7).make_update(model, 0).optimizer
    assert (type(adam), adam.defaults["betas"]) == (torch.optim.Adam, (0.5, 0.6))
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (0.3, 0.7)
    assert type(AdamTraining(decoupled=True).make_update(model, 0).optimizer) is torch.optim.AdamW
    sgd = SGDTraining(learning_rate=0.3, momentum=0.4, weight_decay=0.7).make_update(model, 0).optimizer
    assert [sgd.defaults[name] for name in ("lr", "momentum", "weight_decay")] == [0.3, 0.4, 0.7]
    for wrong in ((0.9,), None, 0.9, (0.9, 1.0)):
        with pytest.raises(ValueError, match="betas is"):
            AdamTraining(betas=wrong)


def test_missing_validation_is_said(graph):
    said = []
    model = Gnn().load_model(graph, Run())
    AdamTraining(num_steps=2).optimize(model, without(graph, "val_mask"), Run(on_warning=said.append))
    assert said == ["there are no validation nodes, so the last weights are kept"]
    said.clear()
    AdamTraining(num_steps=2, patience=1, select="last").optimize(
        model, without(graph, "val_mask"), Run(on_warning=said.append)
    )
    assert said == ["there are no validation nodes, so patience does not stop the training"]


def test_warnings_of_libraries_are_reported_once_by_the_run(graph):
    class Warns(Normalised):
        def forward(self, x, edge_index):
            warnings.warn("half of the\nweights rest", UserWarning, stacklevel=1)
            warnings.warn("soon gone", DeprecationWarning, stacklevel=1)
            return super().forward(x, edge_index)

    said = []
    with warnings.catch_warnings(record=True) as raw:
        warnings.simplefilter("always")
        AdamTraining(num_steps=3).optimize(Warns(), graph, Run(on_warning=said.append))
        NodeAccuracy().evaluate(Warns(), graph, None, Run(on_warning=said.append))
    assert said == ["half of the weights rest"] * 2  # of the training and of the evaluation
    assert {str(w.message) for w in raw} == {"soon gone"}
