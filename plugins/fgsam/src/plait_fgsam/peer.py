"""The PeerMLP of a graph network: the same modules and parameters, with message passing removed.

Luo et al., NeurIPS 2024, section 4: the propagation matrix becomes the identity, so that no row talks to another
and the loss needs only the rows that carry it::

    with peer_mlp(model):
        logits = model(data.x[rows], identity_graph(len(rows)))

Every layer of PyTorch Geometric that is known here gets either its closed form, or its own forward on the
``identity`` graph (each node its own only neighbour), or on an ``empty`` one. The rule is the identity, so that
every weight matrix takes part; GIN, which adds the node itself, loses none on an empty graph. Layers that take edges
or attend from node to node and are not known are refused by name. What a model does beside its layers cannot be
seen: edges that its own forward reads, and ``nn.MultiheadAttention`` from node to node, stay on.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_geometric.nn import attention

Peer = Literal["identity", "empty"] | Callable[..., Any]


class PeerError(ValueError):
    """The model has no PeerMLP: the message says which layer stands in the way and what to do."""


@contextmanager
def peer_mlp(model: nn.Module, peers: Mapping[type[nn.Module], Peer] | None = None) -> Iterator[nn.Module]:
    """Within the context ``model`` is its own PeerMLP; on exit everything is as before, also after an error.

    Message passing is off, dropout is off (all modules in eval mode), and BatchNorm normalises by the batch and
    leaves its running statistics alone. Its layers ignore the edges that they are given. The loss is computed within
    the context; its gradient may be taken afterwards, but not through activation checkpoints, which would run the
    model again. May be nested.

    Args:
        model: holds PyTorch Geometric layers, or layers with a method ``peer_forward`` that takes what ``forward``
            takes.
        peers: how to treat a layer type, for this context only; see :func:`register_peer`.

    Raises:
        PeerError: for a model without message passing and for an unknown layer that takes edges; when the model is
            run, for bipartite input whose sources are no targets.
    """
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for layer, peer in peer_layers(model, peers):
            stack.enter_context(_replaced_forward(layer, peer))
        yield model


def peer_losses(
    model: nn.Module, losses: Callable[[nn.Module], Tensor], peers: Mapping[type[nn.Module], Peer] | None = None
) -> Tensor:
    """What ``losses`` gives for the model as its own PeerMLP; see :func:`peer_mlp`."""
    with peer_mlp(model, peers):
        return losses(model)


def register_peer(layer_type: type[nn.Module], peer: Peer) -> None:
    """Say how layers of exactly this type lose their message passing.

    Args:
        peer: ``"identity"`` or ``"empty"``: the layer's own forward on that graph; or a function
            ``(layer, *args, **kwargs) -> output`` that gets the arguments of the layer's forward.
    """
    if not (callable(peer) or peer in ("identity", "empty")):
        raise PeerError(f"peer is {peer!r}; allowed is 'identity', 'empty' or a function")
    _PEERS[layer_type] = peer


def identity_graph(num_rows: int, device: torch.device | str | None = None) -> Tensor:
    """``edge_index`` [2, num_rows] of the graph in which each node has itself as its only neighbour."""
    return torch.arange(num_rows, device=device).expand(2, -1)


def peer_layers(model: nn.Module, peers: Mapping[type[nn.Module], Peer] | None = None) -> list[tuple[nn.Module, Peer]]:
    """The layers of ``model`` that pass messages, each with what replaces it; raises :class:`PeerError`."""
    known = {**_PEERS, **(peers or {})}
    found: list[tuple[nn.Module, Peer]] = []
    for name, layer in model.named_modules():
        if type(layer) in known:
            found.append((layer, _fitting(layer, known[type(layer)])))
        elif hasattr(type(layer), "peer_forward"):
            found.append((layer, _own_peer))
        elif isinstance(layer, (pyg.MessagePassing, *_MIX_ROWS)) or (name and _uses_edges_itself(layer, known)):
            raise PeerError(
                f"layer {name or 'model'} is a {type(layer).__name__}, whose message passing cannot be turned off by "
                f"rule; call register_peer({type(layer).__name__}, ...) with 'identity' or a function, or pass your own "
                "mlp_loss"
            )
        if isinstance(layer, pyg.ChebConv) and layer.lins[1:]:
            warnings.warn(
                f"layer {name}: the PeerMLP of a ChebConv uses only W_0, W_2, ...: W_1 learns from the GNN alone",
                stacklevel=4,
            )
    if not found:
        raise PeerError(
            "the model has no message-passing layer, so its PeerMLP would be the model itself; use SAM instead, or "
            "pass your own mlp_loss"
        )
    return found


def takes_edges(layer: nn.Module) -> bool:
    """Whether it passes messages, or its forward names edges among its arguments."""
    return isinstance(layer, pyg.MessagePassing) or hasattr(type(layer), "peer_forward") or _names_edges(layer)


def _names_edges(layer: nn.Module) -> bool:
    return _forward_names_edges(cast(Hashable, type(layer)))


@functools.cache
def _forward_names_edges(layer_type: type[nn.Module]) -> bool:
    """Not asked of PyTorch Geometric's own layers: those that use edges in another way are listed in ``_MIX_ROWS``."""
    if layer_type.__module__.startswith("torch_geometric."):
        return False
    try:
        names = inspect.signature(layer_type.forward).parameters
    except (TypeError, ValueError):  # a forward that is not written in Python
        return False
    return not {"edge_index", "adj", "adj_t"}.isdisjoint(names)


def _uses_edges_itself(layer: nn.Module, known: Mapping[type[nn.Module], Peer]) -> bool:
    """Takes edges and holds no layer that it could hand them to."""
    if not _names_edges(layer):
        return False
    inner = [m for m in layer.modules() if m is not layer]
    return not any(type(m) in known or takes_edges(m) for m in inner)


# -- switching ---------------------------------------------------------------------------------------------------


def _fitting(layer: Any, peer: Peer) -> Peer:
    """A closed form where it holds: one message is aggregated to itself, none (GIN) to 0. Else the layer is run."""
    if peer not in _CLOSED_FORMS or layer.aggr in ("add", "sum", "mean", "max", "min"):
        return peer
    return "empty" if peer is _gin else "identity"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    modes = [module.training for module in modules]
    norms = [module for module in modules if isinstance(module, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for module in modules:
            module.training = False
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        for norm, tracks in zip(norms, tracked, strict=True):
            norm.track_running_stats = tracks


@contextmanager
def _replaced_forward(layer: nn.Module, peer: Peer) -> Iterator[None]:
    before = layer.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if callable(peer):
            return peer(layer, *args, **kwargs)
        return forward_on(layer, peer, *args, **kwargs)

    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = before


def _own_peer(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return layer.peer_forward(*args, **kwargs)


def forward_on(layer: nn.Module, graph: Literal["identity", "empty"], *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward on the identity or the empty graph of the rows that come in; its cache is set aside."""
    bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs)
    given = bound.arguments
    if not {"x", "edge_index"} <= set(inspect.signature(type(layer).forward).parameters):
        raise PeerError(
            f"the forward of {type(layer).__name__} has no arguments named x and edge_index, so it cannot be run on "
            f"another graph; register a function with register_peer, or give the layer a method peer_forward"
        )
    x = given["x"] = _both_target(given["x"])
    rows = x[0] if isinstance(x, tuple) else x
    loops = identity_graph(len(rows), rows.device)
    given["edge_index"] = loops if graph == "identity" else loops[:, :0]
    if given.get("edge_weight") is not None:
        given["edge_weight"] = None
    if given.get("edge_attr") is not None:
        edge_attr = given["edge_attr"]
        given["edge_attr"] = edge_attr.new_zeros(given["edge_index"].shape[1], *edge_attr.shape[1:])
    given.pop("size", None)
    with _without_cache(layer):
        return type(layer).forward(*bound.args, **bound.kwargs)


def _both_target(x: Any) -> Any:
    """Bipartite input (source, target): both become the target's rows."""
    if not isinstance(x, (tuple, list)):
        return x
    source, target = x
    if target is None or source.shape[-1] != target.shape[-1]:
        widths = f"{source.shape[-1]} and {'no' if target is None else target.shape[-1]}"
        raise PeerError(
            f"a layer is given bipartite features ({widths} columns of sources and targets), and a target is not its "
            "own source; pass your own mlp_loss"
        )
    return (target, target)


@contextmanager
def _without_cache(layer: nn.Module) -> Iterator[None]:
    names: list[str] = [
        n for n in ("cached", "_cached_edge_index", "_cached_adj_t", "_cached_x") if n in layer.__dict__
    ]
    saved = {name: layer.__dict__[name] for name in names}
    layer.__dict__.update({name: False if name == "cached" else None for name in names})
    try:
        yield
    finally:
        layer.__dict__.update(saved)


# -- closed forms: what the identity graph gives, without building it -----------------------------------------------


def _target(x: Any) -> Tensor:
    pair = _both_target(x)
    target: Tensor = pair[1] if isinstance(pair, tuple) else pair
    return target


def _plus(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


def _gcn(layer: Any, x: Any, *_: Any, **__: Any) -> Tensor:
    return _plus(layer.lin(_target(x)), layer.bias)  # W x + b


def _sage(layer: Any, x: Any, *_: Any, **__: Any) -> Tensor:
    x = _target(x)
    out = layer.lin_l(layer.lin(x).relu() if layer.project else x)  # W_l x + b
    out = out + layer.lin_r(x) if layer.root_weight else out  # + W_r x
    return F.normalize(out, p=2.0, dim=-1) if layer.normalize else out


def _graph(layer: Any, x: Any, *_: Any, **__: Any) -> Tensor:
    x = _target(x)
    out: Tensor = layer.lin_rel(x) + layer.lin_root(x)  # W_rel x + b + W_root x
    return out


def _heads(layer: Any, values: Tensor) -> Tensor:
    """[n, heads * out] concatenated as it is, or averaged over the heads."""
    return values if layer.concat else values.view(-1, layer.heads, layer.out_channels).mean(dim=1)


def _gat(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("return_attention_weights") is not None or layer.lin is None or isinstance(x, (tuple, list)):
        return forward_on(layer, "identity", x, *args, **kwargs)
    out = _heads(layer, layer.lin(x))  # W x per head: attention over the only neighbour is 1
    out = out if layer.res is None else out + layer.res(x)
    return _plus(out, layer.bias)


def _gatv2(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("return_attention_weights") is not None or isinstance(x, (tuple, list)):
        return forward_on(layer, "identity", x, *args, **kwargs)
    out = _heads(layer, layer.lin_l(x))
    out = out if layer.res is None else out + layer.res(x)
    return _plus(out, layer.bias)


def _transformer(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("return_attention_weights") is not None or isinstance(x, (tuple, list)):
        return forward_on(layer, "identity", x, *args, **kwargs)
    out = _heads(layer, layer.lin_value(x))  # W_value x
    if not layer.root_weight:
        return out
    skip = layer.lin_skip(x)
    if layer.lin_beta is None:
        return out + skip
    gate = layer.lin_beta(torch.cat([out, skip, out - skip], dim=-1)).sigmoid()
    return gate * skip + (1 - gate) * out


def _gin(layer: Any, x: Any, *_: Any, **__: Any) -> Tensor:
    out: Tensor = layer.nn((1 + layer.eps) * _target(x))  # a sum over no neighbours
    return out


def _sgc(layer: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = layer.lin(x)
    return out


def _appnp(layer: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _tag(layer: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _plus(sum(lin(x) for lin in layer.lins), layer.bias)  # sum over k of W_k x, + b


_CLOSED_FORMS = (_gcn, _sage, _graph, _gat, _gatv2, _transformer, _gin, _sgc, _appnp, _tag)

# These use edges, or let rows talk to each other, outside of the message passing that can be replaced within them.
_MIX_ROWS = tuple(
    getattr(module, name)
    for module, names in (
        (
            pyg,
            "HeteroConv GPSConv SGFormer Polynormer GraphUNet MetaLayer LPFormer XConv DenseGCNConv DenseSAGEConv "
            "DenseGINConv DenseGraphConv DenseGATConv DMoNPooling TopKPooling SAGPooling EdgePooling ASAPooling "
            "PANPooling MemPooling ClusterPooling CuGraphSAGEConv CuGraphGATConv CuGraphRGCNConv",
        ),
        (attention, "PerformerAttention SGFormerAttention PolynormerAttention"),
    )
    for name in names.split()
    if hasattr(module, name)
)

_PEERS: dict[type[nn.Module], Peer] = {
    pyg.GCNConv: _gcn,
    pyg.SAGEConv: _sage,
    pyg.GraphConv: _graph,
    pyg.GATConv: _gat,
    pyg.GATv2Conv: _gatv2,
    pyg.TransformerConv: _transformer,
    pyg.GINConv: _gin,
    pyg.GINEConv: _gin,
    pyg.SGConv: _sgc,
    pyg.APPNP: _appnp,
    pyg.TAGConv: _tag,
    pyg.GCN2Conv: "identity",
    pyg.FAConv: "identity",
    pyg.ResGatedGraphConv: "identity",
    pyg.ChebConv: "identity",
}
