import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from hypothesis import given
from hypothesis import strategies as st
from plait import PlaitError, Report, codecs
from plait.report import Curve, Image, Panel, png


class Net(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        self.norm = torch.nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.linear(x))


def round_trip(value, folder):
    codecs.save(value, folder / "a")
    return codecs.load(folder / "a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(value=JSON)
def test_plain_values(value, tmp_path_factory):
    assert round_trip(value, tmp_path_factory.mktemp("c")) == value


def test_tensors(tmp_path):
    base = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    value = {"a": base, "view": base.T, "none": torch.empty(0, 2), "bool": torch.tensor([True])}
    loaded = round_trip(value, tmp_path)
    assert list(loaded) == list(value) or set(loaded) == set(value)
    assert all(torch.equal(loaded[k], value[k]) and loaded[k].dtype == value[k].dtype for k in value)
    assert torch.equal(codecs.load(tmp_path / "a", ("view",)), base.T)
    assert torch.equal(round_trip(base, tmp_path / "b"), base)


def test_arrays_lists_and_mappings(tmp_path):
    value = {"x": np.arange(3), "y": [torch.ones(2), (1, np.float64(2).item())]}
    loaded = round_trip(value, tmp_path)
    assert np.array_equal(loaded["x"], value["x"])
    assert torch.equal(loaded["y"][0], torch.ones(2))
    assert loaded["y"][1] == (1, 2.0)
    assert np.array_equal(codecs.load(tmp_path / "a", ("x",)), np.arange(3))
    with pytest.raises(PlaitError, match=r"no split 'z'.*it has x, y"):
        codecs.load(tmp_path / "a", ("z",))


def test_datasets_by_split(tmp_path):
    train = datasets.Dataset.from_dict(
        {"label": [0, 1]}, features=datasets.Features(label=datasets.ClassLabel(names=["cat", "dog"]))
    )
    loaded = round_trip({"train": train, "test": train.select([1])}, tmp_path)
    assert loaded["train"].features == train.features
    assert codecs.load(tmp_path / "a", ("test",))["label"] == [1]


def test_modules_keep_mode_dtype_and_frozen_parameters(tmp_path):
    net = Net(4)
    net.norm.eval()
    net.linear.weight.requires_grad_(False)
    net.linear.weight.data = net.linear.weight.data.to(torch.bfloat16)
    loaded = round_trip(net, tmp_path)
    assert isinstance(loaded, Net)
    assert loaded.training
    assert not loaded.norm.training
    assert [p.requires_grad for p in loaded.parameters()] == [False, True, True, True]
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_graphs(tmp_path):
    data = pytest.importorskip("torch_geometric.data").Data(
        x=torch.rand(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]), name="g"
    )
    loaded = round_trip(data, tmp_path)
    assert torch.equal(loaded.x, data.x)
    assert torch.equal(loaded.edge_index, data.edge_index)
    assert loaded.name == "g"


def test_reports(tmp_path):
    picture = Image(caption="<b>", data=png(np.zeros((2, 3), np.uint8)))
    report = Report(
        rows=[{"method": "a", "x": 1.5}], title="t", better={"x": "lower"}, formats={"x": ".1f"},
        curves=[Curve(name="c", x=[0, 1], y=[2, 3])], panels=[Panel(title="p", images=[[picture]])], notes=["n"],
    )  # fmt: skip
    assert round_trip(report, tmp_path) == report


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(PlaitError, match="save_pretrained"):
        codecs.save(object(), tmp_path / "a")
    with pytest.raises(PlaitError, match="of type torch"):
        codecs.save({"m": torch.nn.Linear(1, 1)}, tmp_path / "b")
