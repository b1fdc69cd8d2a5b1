"""The PeerMLP view: per-layer closed forms, independence of edges, nothing left behind."""

import math

import pytest
import torch
import torch_geometric.nn as pyg
from plait_fgsam.fgsam import FGSAMPlus
from plait_fgsam.peer import _PEERS, PeerError, identity_graph, peer_mlp, register_peer
from torch import nn
from torch_geometric.nn import attention

D, H = 6, 4
ROWS = torch.tensor([3, 0, 17])


def graph(seed=0, n=20, edges=60):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator), torch.randint(n, (2, edges), generator=generator)


def mlp():
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H))


def lin(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def gat(c, x):
    values = lin(c.lin, x).view(len(x), c.heads, -1)
    out = values.flatten(1) if c.concat else values.mean(1)
    return out + (0 if c.res is None else lin(c.res, x)) + c.bias


def gatv2(c, x):
    values = lin(c.lin_l, x).view(len(x), c.heads, -1)
    return (values.flatten(1) if c.concat else values.mean(1)) + (0 if c.res is None else lin(c.res, x)) + c.bias


def sage(c, x):
    return lin(c.lin_l, x) + lin(c.lin_r, x)


def transformer_beta(c, x):
    out, skip = lin(c.lin_value, x), lin(c.lin_skip, x)
    gate = torch.sigmoid(torch.cat([out, skip, out - skip], -1) @ c.lin_beta.weight.T)
    return gate * skip + (1 - gate) * out


LAYERS = {
    "GCN": (lambda: pyg.GCNConv(D, H), lambda c, x: lin(c.lin, x) + c.bias),
    "GCN improved": (lambda: pyg.GCNConv(D, H, improved=True), lambda c, x: lin(c.lin, x) + c.bias),
    "GCN no loops": (lambda: pyg.GCNConv(D, H, add_self_loops=False), lambda c, x: lin(c.lin, x) + c.bias),
    "GCN bare": (
        lambda: pyg.GCNConv(D, H, add_self_loops=False, normalize=False, bias=False),
        lambda c, x: lin(c.lin, x),
    ),
    "GCN cached": (lambda: pyg.GCNConv(D, H, cached=True), lambda c, x: lin(c.lin, x) + c.bias),
    "SAGE mean": (lambda: pyg.SAGEConv(D, H), sage),
    "SAGE max": (lambda: pyg.SAGEConv(D, H, aggr="max"), sage),
    "SAGE sum": (lambda: pyg.SAGEConv(D, H, aggr="sum"), sage),
    "SAGE project": (
        lambda: pyg.SAGEConv(D, H, project=True),
        lambda c, x: lin(c.lin_l, lin(c.lin, x).relu()) + lin(c.lin_r, x),
    ),
    "SAGE normalize": (
        lambda: pyg.SAGEConv(D, H, normalize=True, root_weight=False),
        lambda c, x: nn.functional.normalize(lin(c.lin_l, x)),
    ),
    "SAGE two aggregations": (
        lambda: pyg.SAGEConv(D, H, aggr=["mean", "max"]),
        lambda c, x: lin(c.lin_l, torch.cat([x, x], -1)) + lin(c.lin_r, x),
    ),
    "GraphConv": (lambda: pyg.GraphConv(D, H), lambda c, x: lin(c.lin_rel, x) + lin(c.lin_root, x)),
    "GAT": (lambda: pyg.GATConv(D, H, heads=3), gat),
    "GAT mean": (lambda: pyg.GATConv(D, H, heads=3, concat=False, residual=True, dropout=0.5), gat),
    "GATv2": (lambda: pyg.GATv2Conv(D, H, heads=2), gatv2),
    "GATv2 mean": (lambda: pyg.GATv2Conv(D, H, heads=2, concat=False, residual=True), gatv2),
    "Transformer": (lambda: pyg.TransformerConv(D, H), lambda c, x: lin(c.lin_value, x) + lin(c.lin_skip, x)),
    "Transformer beta": (lambda: pyg.TransformerConv(D, H, beta=True), transformer_beta),
    "Transformer no root": (lambda: pyg.TransformerConv(D, H, root_weight=False), lambda c, x: lin(c.lin_value, x)),
    "GIN": (lambda: pyg.GINConv(mlp(), eps=0.3, train_eps=True), lambda c, x: c.nn((1 + c.eps) * x)),
    "SGC": (lambda: pyg.SGConv(D, H, K=3), lambda c, x: lin(c.lin, x)),
    "SGC cached": (lambda: pyg.SGConv(D, H, K=3, cached=True), lambda c, x: lin(c.lin, x)),
    "APPNP": (lambda: pyg.APPNP(K=4, alpha=0.1), lambda c, x: x),
    "TAG": (lambda: pyg.TAGConv(D, H, K=2), lambda c, x: sum(lin(w, x) for w in c.lins) + c.bias),
    "ResGated": (
        lambda: pyg.ResGatedGraphConv(D, H),
        lambda c, x: torch.sigmoid(lin(c.lin_key, x) + lin(c.lin_query, x)) * lin(c.lin_value, x)
        + lin(c.lin_skip, x)
        + c.bias,
    ),
    "Cheb": (lambda: pyg.ChebConv(D, H, K=2), lambda c, x: lin(c.lins[0], x) + c.bias),
    "Cheb 3": (lambda: pyg.ChebConv(D, H, K=3), lambda c, x: lin(c.lins[0], x) - lin(c.lins[2], x) + c.bias),
}  # fmt: skip


def randomised(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


@pytest.mark.filterwarnings("ignore:layer")
@pytest.mark.parametrize("name", LAYERS)
def test_layer_has_its_closed_form(name):
    torch.manual_seed(0)
    make, closed = LAYERS[name]
    layer = randomised(make())
    x, edges = graph()
    layer.eval()
    before = layer(x, edges)  # fills the caches of cached layers
    with peer_mlp(layer):
        on_rows = layer(x[ROWS], identity_graph(3))
        on_all = layer(x, edges)
    torch.testing.assert_close(on_rows, closed(layer, x[ROWS]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(on_rows, on_all[ROWS], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x, edges), before, atol=0, rtol=0)  # its next GNN pass sees the edges again
    assert not torch.allclose(before, on_all, atol=1e-3)


@pytest.mark.filterwarnings("ignore:layer")
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("GIN",)])
def test_closed_form_is_the_layer_itself_on_the_identity_graph(name):
    torch.manual_seed(0)
    layer = randomised(LAYERS[name][0]()).eval()
    x, edges = graph()
    layer(x, edges)
    with peer_mlp(layer):
        closed = layer(x, edges)
    with peer_mlp(layer, {type(layer): "identity"}):
        own = layer(x, edges)
    torch.testing.assert_close(closed, own, atol=1e-5, rtol=1e-5)


def test_gin_on_the_identity_graph_counts_the_node_twice():
    layer = pyg.GINConv(mlp(), eps=0.3)
    x, edges = graph()
    with peer_mlp(layer, {pyg.GINConv: "identity"}):
        torch.testing.assert_close(layer(x, edges), layer.nn(2.3 * x))
    with peer_mlp(layer, {pyg.GINConv: "empty"}):
        torch.testing.assert_close(layer(x, edges), layer.nn(1.3 * x))


@pytest.mark.parametrize("make", [lambda: pyg.GCN2Conv(D, alpha=0.1, theta=0.5, layer=1), lambda: pyg.FAConv(D)])
def test_layers_with_initial_features_do_not_mix_rows(make):
    torch.manual_seed(0)
    layer = randomised(make()).eval()
    x, edges = graph()
    with peer_mlp(layer):
        torch.testing.assert_close(layer(x, x, edges)[ROWS], layer(x[ROWS], x[ROWS], identity_graph(3)))
    if isinstance(layer, pyg.FAConv):
        with peer_mlp(layer):
            on_identity = layer(x, x, edges)
        with peer_mlp(layer, {pyg.FAConv: "empty"}):
            torch.testing.assert_close(layer(x, x, edges), on_identity)


@pytest.mark.parametrize("shared", [True, False])
def test_closed_form_of_gcn2(shared):
    torch.manual_seed(0)
    layer = randomised(pyg.GCN2Conv(D, alpha=0.1, theta=0.5, layer=2, shared_weights=shared))
    (x, edges), x_0 = graph(), graph(1)[0]
    share = math.log(0.5 / 2 + 1)
    with peer_mlp(layer):
        out = layer(x, x_0, edges)
    near, initial = 0.9 * x, 0.1 * x_0
    of_initial = initial @ (layer.weight1 if shared else layer.weight2)
    expected = (1 - share) * (near + initial) + share * (near @ layer.weight1 + of_initial)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_closed_form_of_fa():
    torch.manual_seed(0)
    layer = randomised(pyg.FAConv(D, eps=0.3, dropout=0.5))
    (x, edges), x_0 = graph(), graph(1)[0]
    with peer_mlp(layer):
        out = layer(x, x_0, edges)
    torch.testing.assert_close(out, (lin(layer.att_l, x) + lin(layer.att_r, x)).tanh() * x + 0.3 * x_0)


def test_closed_form_of_gine():
    torch.manual_seed(0)
    layer = pyg.GINEConv(mlp(), eps=0.3, edge_dim=2)
    x, edges = graph()
    with peer_mlp(layer):
        torch.testing.assert_close(layer(x, edges, torch.randn(edges.shape[1], 2)), layer.nn(1.3 * x))


def test_edge_attributes_and_weights_are_ignored():
    torch.manual_seed(0)
    x, edges = graph()
    layer = randomised(pyg.GATConv(D, H, edge_dim=2)).eval()
    gine = randomised(pyg.GINEConv(mlp(), edge_dim=2)).eval()
    gcn = randomised(pyg.GCNConv(D, H))
    attributes = torch.randn(edges.shape[1], 2)
    for net, extra in ((layer, attributes), (gine, attributes), (gcn, attributes[:, 0].abs())):
        with peer_mlp(net):
            torch.testing.assert_close(net(x, edges, extra)[ROWS], net(x[ROWS], identity_graph(3)))


def test_bipartite_input_uses_the_target_rows():
    layer = pyg.SAGEConv(D, H)
    x, edges = graph()
    with peer_mlp(layer):
        torch.testing.assert_close(layer((x, x[:5]), edges), layer(x[:5], edges))


class TwoLayer(nn.Module):
    """Batch normalisation, dropout and two kinds of layers."""

    def __init__(self):
        super().__init__()
        self.first = pyg.GATConv(D, H, heads=2, dropout=0.6)
        self.norm = nn.BatchNorm1d(2 * H)
        self.drop = nn.Dropout(0.5)
        self.second = pyg.GCNConv(2 * H, 3, cached=True)

    def forward(self, x, edge_index):
        return self.second(self.drop(self.norm(self.first(x, edge_index)).relu()), edge_index)


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_as_before_on_exit(training):
    model = TwoLayer().train(training)
    model.drop.eval()
    x, edges = graph()
    model(x, edges)
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    cache = model.second._cached_edge_index
    with peer_mlp(model), peer_mlp(model):
        a, b = model(x, edges), model(x, edges)
    torch.testing.assert_close(a, b, rtol=0, atol=0)  # no dropout
    with pytest.raises(RuntimeError, match="shapes"), peer_mlp(model):
        model(x[:, :2], edges)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
    assert model.second._cached_edge_index is cache
    assert model.norm.track_running_stats
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_other_rows_and_edges_do_not_matter_and_no_random_number_is_drawn():
    model = TwoLayer()
    x, edges = graph()
    state = torch.random.get_rng_state()
    with peer_mlp(model):
        loss = model(x[ROWS], edges).sum()
        again = model(x[ROWS], edges[:, :3]).sum()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(loss, again)


@pytest.mark.parametrize(
    ("make", "attention"),
    [
        (lambda: pyg.GATConv(D, 3), ["att_src", "att_dst"]),
        (lambda: pyg.GATv2Conv(D, 3), ["att", "lin_r.weight"]),
        (lambda: pyg.TransformerConv(D, 3), ["lin_key.weight", "lin_query.weight"]),
    ],
)
def test_attention_learns_from_the_gnn_pass_only(make, attention):
    torch.manual_seed(0)
    layer = make()
    x, edges = graph()
    y = torch.arange(20) % 3
    parameters = dict(layer.named_parameters())

    def gnn():
        return nn.functional.cross_entropy(layer(x, edges), y)

    def peer():
        with peer_mlp(layer):
            return nn.functional.cross_entropy(layer(x[ROWS], edges), y[ROWS])

    gradients = torch.autograd.grad(peer(), [parameters[n] for n in attention], allow_unused=True)
    assert gradients == (None,) * len(attention)
    before = {n: parameters[n].detach().clone() for n in attention}
    optimizer = FGSAMPlus(layer.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.step(gnn, peer)
    for name in attention:
        assert torch.isfinite(parameters[name]).all()
        assert not torch.equal(parameters[name], before[name])


def test_models_without_or_with_unknown_message_passing_are_refused():
    with pytest.raises(PeerError, match=r"no message-passing layer.*use SAM"), peer_mlp(mlp()):
        pass
    model = pyg.Sequential("x, edge_index", [(pyg.EdgeConv(nn.Linear(2 * D, H)), "x, edge_index -> x")])
    with pytest.raises(PeerError, match=r"is a EdgeConv.*register_peer"), peer_mlp(model):
        pass

    class Mine(pyg.GCNConv):
        """A subclass may have other messages, so it is not taken for a GCNConv."""

    with pytest.raises(PeerError, match="Mine"), peer_mlp(Mine(D, H)):
        pass
    with pytest.raises(PeerError, match="peer is 'nothing'"):
        register_peer(Mine, "nothing")
    try:
        register_peer(Mine, "identity")
        layer, (x, edges) = Mine(D, H), graph()
        with peer_mlp(layer):
            torch.testing.assert_close(layer(x, edges), lin(layer.lin, x) + layer.bias)
    finally:
        _PEERS.pop(Mine, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pyg.HeteroConv({("a", "to", "a"): pyg.GCNConv(D, H)}),
        lambda: pyg.GPSConv(D, pyg.GCNConv(D, D), heads=2),
        lambda: pyg.GraphUNet(D, H, H, depth=2),
        lambda: nn.Sequential(pyg.GCNConv(D, H), pyg.SAGPooling(H)),
        lambda: pyg.DenseGCNConv(D, H),
        lambda: nn.Sequential(pyg.GCNConv(D, H), pyg.MetaLayer(node_model=mlp())),
        lambda: nn.Sequential(pyg.GCNConv(D, H), attention.SGFormerAttention(H)),
    ],
)
def test_layers_that_mix_rows_beside_their_messages_are_refused(make):
    kinds = "HeteroConv|GPSConv|GraphUNet|SAGPooling|DenseGCNConv|MetaLayer|SGFormerAttention"
    refused = rf"is a ({kinds}), whose message passing.*register_peer"
    with pytest.raises(PeerError, match=refused), peer_mlp(make()):
        pass


class Summed(nn.Module):
    """Message passing of one's own, without PyTorch Geometric."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x, edge_index):
        source, target = edge_index
        return torch.zeros_like(x).index_add(0, target, self.lin(x)[source])


def test_a_layer_that_takes_edges_itself_is_refused_until_it_is_registered():
    model = pyg.Sequential(
        "x, edge_index", [(Summed(), "x, edge_index -> x"), (pyg.GCNConv(D, H), "x, edge_index -> x")]
    )
    x, edges = graph()
    summed, gcn = model[0], model[1]
    with (
        pytest.raises(PeerError, match=r"is a Summed, .*register_peer\(Summed, \.\.\.\) with 'identity'"),
        peer_mlp(model),
    ):
        pass
    with peer_mlp(model, {Summed: "identity"}):
        torch.testing.assert_close(model(x, edges), lin(gcn.lin, summed.lin(x)) + gcn.bias)
    with peer_mlp(model, {Summed: "empty"}):
        torch.testing.assert_close(model(x, edges), lin(gcn.lin, torch.zeros_like(x)) + gcn.bias)


def test_a_block_that_hands_its_edges_on_is_accepted():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = pyg.GCNConv(D, D)

        def forward(self, x, edge_index):
            return x + self.conv(x, edge_index).relu()

    blocks, (x, edges) = pyg.Sequential("x, edge_index", [(Block(), "x, edge_index -> x")] * 2), graph()
    with peer_mlp(blocks):
        torch.testing.assert_close(blocks(x, edges)[ROWS], blocks(x[ROWS], identity_graph(3)))


def test_other_names_of_arguments_need_a_function():
    class Named(pyg.MessagePassing):
        def __init__(self):
            super().__init__(aggr="sum")
            self.lin = nn.Linear(D, H)

        def forward(self, h, adjacency):
            return self.propagate(adjacency, x=self.lin(h))

    layer, (x, edges) = Named(), graph()
    refused = pytest.raises(PeerError, match="forward of Named has no arguments named x and edge_index")
    with refused, peer_mlp(layer, {Named: "identity"}):
        layer(x, edges)
    with peer_mlp(layer, {Named: lambda layer, h, adjacency: layer.lin(h)}):
        torch.testing.assert_close(layer(x, edges), layer.lin(x))


@pytest.mark.parametrize("pair", [(D, 3), (D, None)])
def test_sources_that_are_no_targets_are_refused(pair):
    source, target = (None if width is None else torch.randn(5, width) for width in pair)
    layer = pyg.SAGEConv((D, 3), H)
    with pytest.raises(PeerError, match=f"bipartite features .{D} and {pair[1] or 'no'} columns"), peer_mlp(layer):
        layer((source, target), identity_graph(5))


@pytest.mark.parametrize(
    "layer", [lambda: pyg.GCNConv(D, H, aggr="std"), lambda: pyg.GraphConv(D, H, aggr="softmax"),
              lambda: pyg.SAGEConv(D, H, aggr="std"), lambda: pyg.SGConv(D, H, aggr="std"),
              lambda: pyg.APPNP(K=2, alpha=0.1, aggr="var")]
)  # fmt: skip
def test_other_aggregations_are_run_on_the_identity_graph(layer):
    layer, (x, edges) = layer(), graph()
    with peer_mlp(layer):
        torch.testing.assert_close(layer(x, edges), type(layer).forward(layer, x, identity_graph(len(x))))


def test_gin_with_another_aggregation_is_run_on_the_empty_graph():
    layer, (x, edges) = pyg.GINConv(mlp(), aggr="mul"), graph()
    with peer_mlp(layer):
        torch.testing.assert_close(layer(x, edges), layer.nn(x + 1))  # an empty product is 1


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisation_is_by_the_rows(training):
    norm = nn.BatchNorm1d(H)
    norm.running_mean += 5
    model = pyg.Sequential("x, edge_index", [(pyg.GCNConv(D, H), "x, edge_index -> x"), norm]).train(training)
    x, edges = graph()
    with peer_mlp(model):
        out = model(x, edges)
        before = lin(model[0].lin, x) + model[0].bias
    expected = (before - before.mean(0)) / (before.var(0, unbiased=False) + norm.eps).sqrt()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (norm.running_mean == 5).all()


def test_own_layer_with_peer_forward():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(D, H)

        def forward(self, x, adjacency):
            return self.lin(adjacency @ x)

        def peer_forward(self, x, adjacency):
            return self.lin(x)

    layer = Mean()
    x = torch.randn(5, D)
    with peer_mlp(layer):
        torch.testing.assert_close(layer(x, None), layer.lin(x))


def test_cheb_says_which_weights_are_not_trained():
    with pytest.warns(UserWarning, match="W_1 learns from the GNN alone"), peer_mlp(pyg.ChebConv(D, H, K=2)):
        pass


@pytest.mark.parametrize("make", [pyg.GCN, pyg.GraphSAGE, pyg.GAT, pyg.GIN])
def test_whole_models_of_pyg(make):
    model = make(D, 8, num_layers=2, out_channels=3, dropout=0.5)
    x, edges = graph()
    with peer_mlp(model):
        torch.testing.assert_close(model(x, edges)[ROWS], model(x[ROWS], identity_graph(3)))
