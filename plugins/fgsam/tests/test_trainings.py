"""FGSAM, FGSAM+ and the baselines as trainings of the graph kit; the picture of sharpness."""

import importlib
import sys
from functools import partial
from unittest.mock import patch

import plait
import pytest
import torch
import torch_geometric.nn as pyg
from plait import Run
from plait_fgsam.fgsam import FGSAM, FGSAMPlus, fgsam
from plait_fgsam.peer import peer_losses
from plait_fgsam.plugin import (
    AESAMTraining,
    ASAMTraining,
    ESAMTraining,
    FGSAMPlusTraining,
    FGSAMTraining,
    GraphSharpness,
    LookSAMTraining,
    MixTraining,
    PeerMLPTraining,
    SAMTraining,
)
from plait_fgsam.sharpness import walk
from plait_graph import tasks
from plait_graph.plugin import (
    AdamTraining,
    ClassSplit,
    CsbmGraph,
    DigitsGraph,
    EpisodeAccuracy,
    Gnn,
    Gpn,
    MetaGcn,
    NodeAccuracy,
    NodeSplit,
    Tent,
)

METHODS = [
    AESAMTraining,
    ASAMTraining,
    ESAMTraining,
    FGSAMPlusTraining,
    FGSAMTraining,
    LookSAMTraining,
    MixTraining,
    PeerMLPTraining,
    SAMTraining,
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def graph():
    data = CsbmGraph(num_nodes=300, num_classes=6, num_features=16, homophily=0.9, signal=3.0).load_data(Run())
    data = NodeSplit(per_class=10, num_val=60).transform(data, Run())
    return ClassSplit(train=2, val=2, test=2).transform(data, Run())


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_every_training_learns(method, optimizer, graph):
    model = Gnn().load_model(graph, Run())
    rate = {"learning_rate": 0.1} if optimizer == "sgd" else {}
    trained = method(num_steps=40, optimizer=optimizer, **rate).optimize(model, graph, Run())
    report = NodeAccuracy().evaluate(trained, graph, model, Run())
    assert report.value("accuracy") > (40 if method is PeerMLPTraining else 60)
    assert report.value("gain") > 15


@pytest.mark.slow
@pytest.mark.parametrize("method", [FGSAMTraining, FGSAMPlusTraining, SAMTraining])
def test_training_on_batches_of_drawn_neighbours(method, graph):
    model = Gnn().load_model(graph, Run())
    trained = method(num_steps=40, batch_size=30, num_hops=2, num_neighbors=3).optimize(model, graph, Run())
    assert NodeAccuracy().evaluate(trained, graph, model, Run()).value("gain") > 30


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gat", "sage", "gin", "sgc", "transformer"])
@pytest.mark.parametrize("method", [FGSAMTraining, FGSAMPlusTraining])
def test_every_architecture(method, architecture, graph):
    model = Gnn(architecture=architecture).load_model(graph, Run())
    trained = method(num_steps=30).optimize(model, graph, Run())
    assert trained.history[-1]["val_accuracy"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("model_of", [Gpn(), MetaGcn(n_way=2), Tent()])
@pytest.mark.parametrize("method", METHODS)
def test_few_shot(method, model_of, graph):
    model = model_of.load_model(graph, Run())
    shape = {"n_way": 2, "k_shot": 2, "n_query": 4}
    training = method(num_steps=6, eval_every=3, num_val_tasks=2, select="last", **shape)
    trained = training.optimize(model, graph, Run())
    assert not same(trained, model)
    assert EpisodeAccuracy(num_tasks=5, **shape).evaluate(trained, graph, None, Run()).value("accuracy") > 30


@pytest.mark.parametrize("model_of", [Gpn(dropout=0), MetaGcn(n_way=2, dropout=0), Tent(dropout=0)])
def test_few_shot_peer_sees_no_edges(model_of, graph):
    """Rows alone equal the peer pass on the whole graph; the GNN pass differs."""
    model = model_of.load_model(graph, Run())
    objective = tasks.EpisodeObjective(graph, CPU, 2, 2, 4, 1, torch.Generator())
    task = objective.draw(torch.Generator().manual_seed(0))
    from plait_fgsam.peer import peer_mlp

    with peer_mlp(model):
        on_whole_graph = task.losses(model)
    torch.testing.assert_close(peer_losses(model, task.row_losses), on_whole_graph, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(task.losses(model), on_whole_graph, atol=1e-4)


@pytest.mark.slow
def test_lam_zero_is_adam_and_the_seed_is_enough(graph):
    model = Gnn().load_model(graph, Run())
    adam = AdamTraining(num_steps=12).optimize(model, graph, Run(seed=3, step="a"))
    fgsam = FGSAMTraining(num_steps=12, lam=0.0).optimize(model, graph, Run(seed=3, step="b"))
    assert same(adam, fgsam)
    assert same(fgsam, FGSAMTraining(num_steps=12, lam=0.0).optimize(model, graph, Run(seed=3)))


def test_without_edges_fgsam_with_lam_one_is_sam(graph):
    bare = graph.clone()
    bare.edge_index = bare.edge_index[:, :0]
    model = Gnn(dropout=0.0).load_model(bare, Run())
    options = {"num_steps": 8, "optimizer": "sgd"}
    sam = SAMTraining(**options).optimize(model, bare, Run())
    fgsam = FGSAMTraining(lam=1.0, **options).optimize(model, bare, Run())
    for p, q in zip(sam.parameters(), fgsam.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


class KilledError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [10, 13])
@pytest.mark.parametrize("method", [FGSAMPlusTraining, ESAMTraining])
def test_killed_training_resumes_bit_for_bit(method, stop_at, graph):
    model = Gnn().load_model(graph, Run())
    training = method(num_steps=19, checkpoint_every=5)
    run = Run(seed=5)

    def stop(values, step):
        if step == stop_at:
            raise KilledError

    whole = training.optimize(model, graph, Run(seed=5))
    with pytest.raises(KilledError):
        training.optimize(model, graph, Run(seed=5, folder=run.folder, on_log=stop))
    assert same(whole, training.optimize(model, graph, Run(seed=5, folder=run.folder)))


def test_history_has_the_kind_of_update_and_the_cosine(graph):
    model = Gnn().load_model(graph, Run())
    history = FGSAMPlusTraining(num_steps=6, interval=3).optimize(model, graph, Run()).history
    assert [entry["exact"] for entry in history] == [1, 0, 0, 1, 0, 0]
    assert -1 <= history[0]["cosine"] <= 1
    assert history[0]["gnn_norm"] > 0
    assert "gnn_norm" not in history[1]


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (AdamTraining(num_steps=6), 1),
        (SAMTraining(num_steps=6), 2),
        (ESAMTraining(num_steps=6), 2),
        (LookSAMTraining(num_steps=6, interval=3), 4 / 3),
        (PeerMLPTraining(num_steps=6), 0),
        (PeerMLPTraining(num_steps=6, rho=0.1), 0),
        (FGSAMTraining(num_steps=6), 1),
        (FGSAMPlusTraining(num_steps=6, interval=3), 1 / 3),
    ],
)
def test_reports_have_the_passes_of_the_graph_network(method, passes, graph):
    model = Gnn().load_model(graph, Run())
    report = NodeAccuracy().evaluate(method.optimize(model, graph, Run()), graph, model, Run())
    assert report.value("GNN passes") == pytest.approx(passes)


@pytest.mark.slow
def test_gain_on_a_noisy_graph():
    """Paper's claim at small scale: on noisy edges FGSAM and FGSAM+ beat Adam by two points and more."""
    gains = {"fgsam": [], "fgsam-plus": []}
    for seed in (0, 1):
        run = Run(seed=seed)
        data = NodeSplit(per_class=10, num_val=300).transform(DigitsGraph(random_edges=3.0).load_data(run), run)
        model = Gnn().load_model(data, run)
        length = {"num_steps": 60, "eval_every": 10}
        adam = AdamTraining(**length).optimize(model, data, run)
        for name, method in (("fgsam", FGSAMTraining), ("fgsam-plus", FGSAMPlusTraining)):
            trained = method(**length).optimize(model, data, run)
            gains[name].append(NodeAccuracy().evaluate(trained, data, adam, run).value("gain"))
    assert all(sum(values) / 2 > 2 for values in gains.values()), gains


# -- sharpness ------------------------------------------------------------------------------------------------------


def test_sharpness_of_a_parabola():
    model = torch.nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0]]))
    curvature = torch.tensor([1.0, 3.0]).double()
    before = model.weight.data_ptr()
    walked = walk(
        model,
        lambda: (curvature * model.weight**2).sum() / 2,
        torch.tensor([0.0, 1.0, 2.0]),
        4,
        torch.Generator().manual_seed(0),
    )
    assert walked.ascent.tolist() == pytest.approx([0.5, 2.0, 4.5])
    assert walked.random.shape == (4, 3)
    assert (walked.random[:, 0] == 0.5).all()
    assert model.weight.tolist() == [[1.0, 0.0]]
    assert model.weight.data_ptr() == before


def test_random_directions_have_length_one():
    """Around 0 the loss |w|^2 / 2 at distance r is r^2 / 2 in every direction."""
    model = torch.nn.Linear(3, 2, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    radii = torch.tensor([0.0, 1.0, 3.0])
    walked = walk(model, lambda: model.weight.square().sum() / 2, radii, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(walked.random, (radii**2 / 2).double().expand(4, 3))
    assert (walked.ascent == 0).all()


@pytest.mark.slow
def test_sharpness_report(graph):
    model = Gnn().load_model(graph, Run())
    report = GraphSharpness(num_points=5, num_directions=3).evaluate({"a": model, "b": model}, graph, Run())
    assert report.value("rise along the gradient", model="a") > 0
    assert report.rows[0] | {"model": ""} == report.rows[1] | {"model": ""}
    assert len(report.panels[0].images) == 1
    assert len(report.curves) == 4
    alone = GraphSharpness(num_points=5).evaluate(model, graph, Run())
    assert alone.value("loss") == report.value("loss", model="a")


def test_sharpness_refuses_few_shot_models(graph):
    with pytest.raises(ValueError, match="the model is a GPN, which answers episodes"):
        GraphSharpness().evaluate(Gpn().load_model(graph, Run()), graph, Run())


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGSAMTraining(rho=-1), "rho is -1"),
        (lambda: FGSAMTraining(lam=1.5), "lam is 1.5"),
        (lambda: FGSAMPlusTraining(topology=True, lam=0.0), "lam is 0"),
        (lambda: FGSAMPlusTraining(interval=0), "interval is 0"),
        (lambda: MixTraining(rho=0.1), "rho is 0.1"),
        (lambda: FGSAMTraining(optimizer="lbfgs"), "optimizer is 'lbfgs'"),
        (lambda: SAMTraining(perturb="encoder.*"), "perturb is 'encoder.*'; expected a list"),
        (lambda: FGSAMTraining(peer={"GINConv": "full"}), "peer of GINConv is 'full'"),
        (lambda: SAMTraining(betas=(0.9, 1.0)), "betas is"),
        (lambda: SAMTraining(betas=(0.9,)), "betas is .0.9,.; expected two numbers"),
        (lambda: SAMTraining(betas=0.9), "betas is 0.9; expected two numbers"),
        (lambda: SAMTraining(perturb=3), "perturb is 3; expected a list"),
        (lambda: FGSAMTraining(peer=["GINConv"]), "peer is .'GINConv'.; expected a mapping"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("old", "new"), [("variant", "as_released"), ("lr", "learning_rate"), ("num_updates", "num_steps")]
)
def test_fields_by_their_old_names_are_answered_with_the_new_ones(old, new):
    with pytest.raises(ValueError, match=f"fgsam-plus has no field '{old}' any more .did you mean '{new}'"):
        plait.load("fgsam-plus", **{old: 1})


@pytest.mark.parametrize(
    ("method", "change", "read"),
    [
        (SAMTraining, {"learning_rate": 0.3}, lambda o: o.defaults["lr"]),
        (SAMTraining, {"weight_decay": 0.3}, lambda o: o.defaults["weight_decay"]),
        (SAMTraining, {"betas": (0.1, 0.2)}, lambda o: o.base.param_groups[0]["betas"]),
        (SAMTraining, {"optimizer": "sgd", "momentum": 0.3}, lambda o: o.base.param_groups[0].get("momentum")),
        (SAMTraining, {"optimizer": "adamw"}, lambda o: type(o.base).__name__.lower()),
        (SAMTraining, {"rho": 0.3}, lambda o: o.param_groups[0]["rho"]),
        (ASAMTraining, {"rho": 0.3}, lambda o: o.param_groups[0]["rho"] if o.adaptive else "not adaptive"),
        (LookSAMTraining, {"interval": 4}, lambda o: o.interval),
        (LookSAMTraining, {"alpha": 0.3}, lambda o: o.alpha),
        (LookSAMTraining, {"rho": 0.3}, lambda o: o.param_groups[0]["rho"]),
        (ESAMTraining, {"beta": 0.3}, lambda o: o.beta),
        (ESAMTraining, {"gamma": 0.3}, lambda o: o.gamma),
        (AESAMTraining, {"delta": 0.3}, lambda o: o.delta),
        (AESAMTraining, {"lambda_1": 0.3}, lambda o: o.lambda_1),
        (AESAMTraining, {"lambda_2": 0.3}, lambda o: o.lambda_2),
        (AESAMTraining, {"num_steps": 33}, lambda o: o.num_steps),
        (FGSAMTraining, {"lam": 0.3}, lambda o: o.lam),
        (FGSAMTraining, {"rho": 0.3}, lambda o: o.param_groups[0]["rho"]),
        (FGSAMTraining, {"combine": "additive"}, lambda o: o.combine),
        (FGSAMPlusTraining, {"lam": 0.3}, lambda o: o.lam),
        (FGSAMPlusTraining, {"rho": 0.3}, lambda o: o.param_groups[0]["rho"]),
        (FGSAMPlusTraining, {"interval": 4}, lambda o: o.interval),
        (FGSAMPlusTraining, {"alpha": 0.3}, lambda o: o.alpha),
        (FGSAMPlusTraining, {"flatness_from": "perturbed"}, lambda o: o.flatness_from),
        (FGSAMPlusTraining, {"topology": True}, lambda o: o.topology),
        (FGSAMPlusTraining, {"projection": "global"}, lambda o: o.projection),
    ],
)
def test_every_field_reaches_the_optimizer(method, change, read, graph):
    model = Gnn().load_model(graph, Run())
    wanted = list(change.values())[-1]
    assert read(method(**change).make_update(model, 0).optimizer) == wanted
    assert read(method().make_update(model, 0).optimizer) != wanted


@pytest.mark.parametrize("method", [FGSAMTraining, FGSAMPlusTraining])
def test_algorithm_1_as_printed_sets_its_choices(method, graph):
    optimizer = method(as_released=False).make_update(Gnn().load_model(graph, Run()), 0).optimizer
    assert (optimizer.combine, optimizer.lam) == ("additive", 1.0)
    if method is FGSAMPlusTraining:
        assert (optimizer.flatness_from, optimizer.topology) == ("perturbed", True)


def test_models_that_need_edge_values_have_a_peer(graph):
    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = pyg.GCNConv(16, 8), pyg.GATConv(8, 6, edge_dim=2)

        def forward(self, x, edge_index, edge_weight, edge_attr):
            return self.second(self.first(x, edge_index, edge_weight).relu(), edge_index, edge_attr)

    data = graph.clone()
    data.edge_weight = torch.rand(data.edge_index.shape[1])
    data.edge_attr = torch.rand(data.edge_index.shape[1], 2)
    torch.manual_seed(0)
    model = Weighted()
    trained = FGSAMPlusTraining(num_steps=30).optimize(model, data, Run())
    assert NodeAccuracy().evaluate(trained, data, model, Run()).value("gain") > 15
    task = tasks.NodeObjective(data, CPU).whole
    losses = peer_losses(model, task.row_losses)
    data.edge_weight, data.edge_attr = data.edge_weight + 1, data.edge_attr + 1
    torch.testing.assert_close(losses, peer_losses(model, tasks.NodeObjective(data, CPU).whole.row_losses))


def test_models_without_a_peer_are_refused(graph):
    class Dense(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(16, 6)

        def forward(self, x, edge_index):
            return self.lin(x)

    class Unknown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = pyg.LEConv(16, 6)

        def forward(self, x, edge_index):
            return self.conv(x, edge_index)

    for method in (FGSAMTraining, FGSAMPlusTraining, PeerMLPTraining):
        with pytest.raises(ValueError, match=r"no message-passing layer.*use SAM"):
            method().optimize(Dense(), graph, Run())
        with pytest.raises(ValueError, match="LEConv"):
            method().optimize(Unknown(), graph, Run())
    assert len(SAMTraining(num_steps=2).optimize(Unknown(), graph, Run()).history) == 2


def test_a_model_that_reads_its_edges_itself_may_be_given_the_identity_graph(graph):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(16, 6)

        def forward(self, x, edge_index):
            source, target = edge_index
            return torch.zeros(len(x), 6).index_add(0, target, self.lin(x)[source])

    torch.manual_seed(0)
    model = Own()
    trained = FGSAMTraining(num_steps=30, peer={"Own": "identity"}).optimize(model, graph, Run())
    assert NodeAccuracy().evaluate(trained, graph, model, Run()).value("gain") > 15


def test_the_peer_of_tent_refuses_a_foreign_layer(graph):
    model = Tent().load_model(graph, Run())
    model.extra = pyg.LEConv(16, 6)
    with pytest.raises(ValueError, match="layer extra is a LEConv"):
        FGSAMTraining(n_way=2, k_shot=2, n_query=4).optimize(model, graph, Run())
    with pytest.raises(ValueError, match=r"peer names GCNConv; of layers that take edges the model has .*Propagation"):
        FGSAMTraining(n_way=2, peer={"GCNConv": "empty"}).optimize(Tent().load_model(graph, Run()), graph, Run())


def test_only_the_named_tensors_are_perturbed(graph):
    model = Gpn().load_model(graph, Run())
    encoder, rest = SAMTraining(perturb=("encoder.*",)).groups(model)
    assert len(encoder["params"]) == 4
    assert len(rest["params"]) == 6
    assert rest["perturb"] is False
    with pytest.raises(ValueError, match=r"matches no tensor of the model; it has encoder\.0"):
        SAMTraining(perturb=("decoder.*",), n_way=2).optimize(model, graph, Run())


def test_the_graph_of_the_peer_can_be_chosen(graph):
    model = Gnn(architecture="gin", dropout=0.0).load_model(graph, Run())
    usual, identity = (
        FGSAMTraining(num_steps=3, peer=p).optimize(model, graph, Run()) for p in ({}, {"GINConv": "identity"})
    )
    assert usual.history[0]["gnn_norm"] == identity.history[0]["gnn_norm"]
    assert usual.history[0]["mlp_norm"] != identity.history[0]["mlp_norm"]
    assert same(usual, FGSAMTraining(num_steps=3, peer={"GINConv": "empty"}).optimize(model, graph, Run()))
    for name in ("GATConv", "Linear"):
        with pytest.raises(
            ValueError, match=f"peer names {name}; of layers that take edges the model has GINConv, GNN$"
        ):
            FGSAMTraining(peer={name: "empty"}).optimize(model, graph, Run())


def test_esam_gets_the_losses_of_the_samples(graph):
    """Which samples are used in the second pass matters, so their losses are not averaged before."""
    model = Gnn(dropout=0.0).load_model(graph, Run())
    few, all_of_them = (ESAMTraining(num_steps=2, gamma=g).optimize(model, graph, Run()) for g in (0.1, 1.0))
    assert not same(few, all_of_them)


def test_the_peer_alone_may_be_perturbed(graph):
    model = Gnn().load_model(graph, Run())
    assert PeerMLPTraining(rho=0.3).make_update(model, 0).update.optimizer.param_groups[0]["rho"] == 0.3
    near, far = (PeerMLPTraining(num_steps=5, rho=r, select="last").optimize(model, graph, Run()) for r in (0, 0.5))
    assert not same(near, far)


def test_draws_of_esam_follow_the_seed(graph):
    model = Gnn().load_model(graph, Run())
    draws = [torch.rand(9, generator=ESAMTraining().make_update(model, s).optimizer.generator) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_own_model_in_a_plain_loop(graph):
    """The classes alone, without the kit's training."""
    from plait_fgsam.peer import identity_graph, peer_mlp

    model = pyg.GAT(16, 8, num_layers=2, out_channels=6, dropout=0.5)
    rows = torch.nonzero(graph.train_mask).flatten()
    optimizer = FGSAM(model.parameters(), lr=0.01)

    def gnn_loss():
        return torch.nn.functional.cross_entropy(model(graph.x, graph.edge_index)[rows], graph.y[rows])

    def mlp_loss():
        with peer_mlp(model):
            return torch.nn.functional.cross_entropy(model(graph.x[rows], identity_graph(len(rows))), graph.y[rows])

    torch.manual_seed(0)
    losses = [float(optimizer.step(gnn_loss, mlp_loss)["loss"]) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert model.training


def test_one_call_is_a_loop_of_updates(graph):
    """Three batches of rows, FGSAM+; and it needs no plait."""
    from plait_fgsam.peer import identity_graph, peer_mlp

    batches = torch.nonzero(graph.train_mask).flatten().chunk(3) * 2
    trained = []
    for in_one_call in (False, True):
        torch.manual_seed(0)
        model = pyg.GCN(16, 8, num_layers=2, out_channels=6, dropout=0.5)
        optimizer = FGSAMPlus(model.parameters(), lr=0.01)

        def gnn_loss(model, rows):
            return torch.nn.functional.cross_entropy(model(graph.x, graph.edge_index)[rows], graph.y[rows])

        def row_losses(model, rows):
            logits = model(graph.x[rows], identity_graph(len(rows)))
            return torch.nn.functional.cross_entropy(logits, graph.y[rows], reduction="none")

        def mlp_loss(model, rows):
            with peer_mlp(model):
                return row_losses(model, rows).mean()

        if in_one_call:
            reported = list(fgsam(optimizer, model, batches, gnn_loss, row_losses))
            assert [info["exact"] for info in reported] == [True, False] * 3
        else:
            for rows in batches:
                optimizer.step(partial(gnn_loss, model, rows), partial(mlp_loss, model, rows))
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*trained)
    with patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.startswith("plait")]:
            del sys.modules[name]
        sys.modules["plait"] = None  # to import it is an error now
        for name in ("fgsam", "baselines"):
            importlib.import_module(f"plait_fgsam.{name}")


@pytest.mark.slow
def test_bf16_autocast_trains_as_float32_does(graph):
    final = []
    for enabled in (False, True):
        model = Gnn(dropout=0.0).load_model(graph, Run())
        task = tasks.NodeObjective(graph, CPU).whole
        optimizer = FGSAMPlus(model.parameters(), lr=0.01)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(20):
                optimizer.step(lambda: task.losses(model).mean(), lambda: peer_losses(model, task.row_losses).mean())  # noqa: B023
        assert all(p.dtype == torch.float32 for p in model.parameters())
        final.append(task.losses(model).mean().item())
    assert final[0] == pytest.approx(final[1], rel=0.02)
