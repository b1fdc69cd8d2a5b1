import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.utils.prune
from huggingface_hub import PyTorchModelHubMixin
from hypothesis import given
from hypothesis import strategies as st
from plait import PlaitError, Report, StoreError, codecs
from plait.codecs.tensors import load_tensors
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


def test_plain_values_import_no_library(workplace):
    Path("p.yaml").write_text('plait: 1\nsteps: {numbers: {load-data: "./toy.py:Numbers"}}')
    code = "import plait, sys; plait.run('p.yaml'); print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "datasets", "diffusers", "transformers", "PIL"} & set(done.stdout.split())


@pytest.mark.slow
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


def test_equal_tensors_are_equal_files(tmp_path):
    for name in "abcdefgh":
        codecs.save({"x": torch.ones(3), "y": torch.eye(3).to_sparse()}, tmp_path / name)
    assert len({file.read_bytes() for file in tmp_path.rglob("*.safetensors")}) == 1


def test_tensors_of_an_earlier_plait_are_read(tmp_path):
    safetensors.torch.save_file({"tx": torch.ones(3)}, tmp_path / "x.safetensors", {"kind": "dict", "sparse": "{}"})
    tensors, kind = load_tensors(tmp_path / "x.safetensors")
    assert kind == "dict"
    assert torch.equal(tensors["x"], torch.ones(3))


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


FEATURES = datasets.Features(
    image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]), flag=datasets.Value("bool"),
    texts=datasets.Sequence(datasets.Value("string")), box={"x": datasets.Value("float16"), "b": datasets.Value("binary")},
    grid=datasets.Array2D((2, 3), "float32"),
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of many kinds, with gaps, of which the pictures lie in files."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(np.full((4, 5, 3), 50 * i, np.uint8)))
    columns = {
        "image": [str(folder / f"{i % 3}.png") if i % 7 else None for i in range(400)],
        "label": [i % 2 for i in range(400)],
        "flag": [None if i % 5 else i % 3 == 0 for i in range(400)],
        "texts": [["ä"] * (i % 4) if i % 6 else None for i in range(400)],
        "box": [{"x": i / 2, "b": bytes(300)} for i in range(400)],
        "grid": [np.full((2, 3), i, np.float32) for i in range(400)],
    }
    info = datasets.DatasetInfo(description="of many kinds", license="CC0", features=FEATURES)
    data = datasets.Dataset.from_dict(columns, FEATURES, info, datasets.Split.TEST)
    return datasets.concatenate_datasets([data, data.select(range(100))], split=datasets.Split.TEST)


def _plain(data):
    """Every value; a picture as its pixels, as its file's name is all that may differ."""
    columns = data.with_format(None).to_dict() | {"image": []}
    pictures = data.with_format(None).select_columns("image")["image"]
    return columns | {"image": [picture and picture.tobytes() for picture in pictures]}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data,
        lambda data: data.shuffle(seed=0),
        lambda data: data.select([3]),
        lambda data: data.select(range(17, 301, 2)).with_format("numpy", ["label", "image"], output_all_columns=True),
        lambda data: data.select([]),
    ],
    ids=["whole", "shuffled", "one", "shown", "none"],
)
def test_a_dataset_comes_back_as_it_was(change, rows, tmp_path):
    data = change(rows)
    codecs.save(data, tmp_path / "a")
    once = codecs.load(tmp_path / "a")
    codecs.save(once, tmp_path / "b")
    for loaded in (once, codecs.load(tmp_path / "b"), pickle.loads(pickle.dumps(once))):
        assert loaded.features == data.features
        assert loaded.column_names == data.column_names
        assert loaded.data.schema == once.data.schema
        assert _plain(loaded) == _plain(data)
        assert (loaded.split, loaded.info.description, loaded.info.license) == ("test", "of many kinds", "CC0")
        assert loaded.format == data.format
        assert all(Path(file["filename"]).is_relative_to(tmp_path) for file in loaded.cache_files)
    assert len(once.cache_files) == (3 if len(data) > 300 else 1)
    assert _on_disk(tmp_path / "a") == _on_disk(tmp_path / "b")
    assert once._fingerprint == codecs.load(tmp_path / "a")._fingerprint
    added = once.add_column("new", [0] * len(once))
    assert set(added.format["columns"]) == {*data.format["columns"], "new"}


def _on_disk(folder):
    return {file.read_bytes() for file in folder.rglob("*.arrow") if file.stat().st_size > 2**16}


@pytest.mark.parametrize(
    "passed_on",
    [
        lambda data: data.map(lambda rows: {"label": rows["label"][::-1]}, batched=True),
        lambda data: data.remove_columns("box").add_column("new", list(range(len(data)))),
        lambda data: data.select(range(len(data))),
        lambda data: data.with_format("torch"),
        lambda data: datasets.concatenate_datasets([data.select(range(99)), data.select(range(99, len(data)))]),
    ],
)
def test_a_column_that_is_passed_on_is_the_same_file(passed_on, tmp_path):
    numbers = np.random.default_rng(0).random((5000, 20))
    data = datasets.Dataset.from_dict(
        {"label": [0, 1] * 2500, "x": list(numbers), "box": list(map(str, numbers[:, 0]))}
    )
    codecs.save(data, tmp_path / "a")
    before = _on_disk(tmp_path / "a")
    codecs.save(passed_on(codecs.load(tmp_path / "a")), tmp_path / "b")
    assert len(before) == 2
    assert max(before, key=len) in _on_disk(tmp_path / "b")


def test_large_rows_are_written_a_few_at_a_time(tmp_path):
    data = datasets.Dataset.from_dict({"x": [bytes(3 * 2**20)] * 7, "n": list(range(7))})
    loaded = round_trip(data, tmp_path)
    assert [len(piece) for piece in loaded.data.table.column("x").chunks] == [4, 3]
    assert loaded[5] == data[5]


def test_a_dataset_of_an_earlier_plait_is_read(tmp_path):
    data = datasets.Dataset.from_dict({"x": [1, 2]})
    data.save_to_disk(tmp_path / "content" / "dataset")
    (tmp_path / "codec.json").write_text('{"codec": "dataset"}')
    assert codecs.load(tmp_path).to_dict() == {"x": [1, 2]}


def test_what_a_dataset_cannot_take_along(tmp_path):
    data = datasets.Dataset.from_dict({"x": [1, 2]})
    with pytest.raises(StoreError, match=r"a transform .* return it with_format\(None\)"):
        codecs.save(data.with_transform(lambda rows: rows), tmp_path / "a")


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
    codecs.save(loaded, tmp_path / "b")  # what a step passes on is the same file
    first, again = ((tmp_path / name / "content/model/model.safetensors").read_bytes() for name in "ab")
    assert first == again
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
    with pytest.raises(PlaitError, match=r"of type builtins\.object cannot be saved; return a datasets\.Dataset"):
        codecs.save(object(), tmp_path / "a")
    with pytest.raises(PlaitError, match=r"plait\.build_module"):
        codecs.save({"m": torch.nn.Sequential(torch.nn.Linear(1, 1))}, tmp_path / "b")


class Wide(torch.nn.Module, PyTorchModelHubMixin):
    """A model whose configuration says less than it may hold."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU())
        self.head = torch.nn.Linear(width, 2)
        self.temperature = 1.0

    def forward(self, x):
        return self.head(self.body(x)) / self.temperature


def _pruned(net):
    net.body[0] = torch.nn.Linear(3, 2)
    net.head = torch.nn.Linear(2, 2)


def _lora(net):
    net.body[0].low_rank = torch.nn.Linear(3, 3, bias=False)


def _other_head(net):
    net.head = torch.nn.Linear(3, 5)


def _identity_head(net):
    net.head = torch.nn.Identity()


def _parametrised(net):
    torch.nn.utils.parametrizations.weight_norm(net.body[0])


def _masked(net):
    torch.nn.utils.prune.l1_unstructured(net.body[0], "weight", 0.5)


def _other_activation(net):
    net.body[1] = torch.nn.GELU()


def _other_number(net):
    net.temperature = 2.0


def _hooked(net):
    net.head.register_forward_hook(lambda module, inputs, output: 2 * output)


def _other_dropout(net):
    net.body[1] = torch.nn.Dropout(0.1)


@pytest.mark.parametrize(
    "change",
    [
        _pruned,
        _lora,
        _other_head,
        _identity_head,
        _parametrised,
        _masked,
        _other_activation,
        _other_number,
        _hooked,
        _other_dropout,
    ],
)
def test_a_model_that_its_class_cannot_build_again_is_refused(change, tmp_path):
    net = Wide()
    assert torch.equal(round_trip(net, tmp_path / "plain")(torch.ones(1, 3)), net(torch.ones(1, 3)))
    change(net)
    with pytest.raises(StoreError, match="Wide"):
        codecs.save(net, tmp_path / "changed")


def test_a_configuration_that_says_it_is_enough(tmp_path):
    net = Wide(width=5)
    loaded = round_trip(net, tmp_path)
    assert torch.equal(loaded(torch.ones(2, 5)), net(torch.ones(2, 5)))


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_sparse_tensors(tmp_path, layout):
    dense = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0]])
    sparse = {"coo": dense.to_sparse(), "csr": dense.to_sparse_csr(), "csc": dense.to_sparse_csc()}[layout]
    loaded = round_trip({"adj": sparse, "x": dense}, tmp_path)
    assert loaded["adj"].layout == sparse.layout
    assert torch.equal(loaded["adj"].to_dense(), dense)
    assert torch.equal(loaded["x"], dense)


def test_a_tensor_that_cannot_be_stored(tmp_path):
    with pytest.raises(StoreError, match="'m' that is on the meta device"):
        codecs.save({"m": torch.empty(2, device="meta")}, tmp_path / "a")


def test_graphs_with_sparse_adjacency(tmp_path):
    geometric = pytest.importorskip("torch_geometric")
    adjacency = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to_sparse_csr()
    data = geometric.data.Data(x=torch.rand(2, 2), adj_t=adjacency)
    loaded = round_trip(data, tmp_path)
    assert torch.equal(loaded.adj_t.to_dense(), adjacency.to_dense())
    with pytest.raises(StoreError, match=r"'odd' is a .*neither a tensor nor JSON-like"):
        codecs.save(geometric.data.Data(odd={1, 2}), tmp_path / "b")
    with pytest.raises(StoreError, match="'pair' is a"):  # would come back as a list
        codecs.save(geometric.data.Data(pair=(1, 2)), tmp_path / "c")


@pytest.mark.parametrize("how", ["selected", "made", "concatenated", "filtered"])
def test_datasets_without_rows(tmp_path, how):
    features = datasets.Features(label=datasets.ClassLabel(names=["cat", "dog"]), text=datasets.Value("string"))
    full = datasets.Dataset.from_dict({"label": [0], "text": ["x"]}, features=features)
    empty = {
        "selected": lambda: full.select([]),
        "made": lambda: datasets.Dataset.from_dict({"label": [], "text": []}, features=features),
        "concatenated": lambda: datasets.concatenate_datasets([full.select([]), full.select([])]),
        "filtered": lambda: full.filter(lambda row: False),
    }[how]()
    loaded = round_trip(empty, tmp_path)
    assert len(loaded) == 0
    assert loaded.features == features
    with pytest.raises(StoreError, match="without columns"):
        codecs.save(datasets.Dataset.from_dict({}), tmp_path / "b")


def test_the_image_processor_of_transformers_stays_with_the_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path / "vit"
    )
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit")
    codecs.save(model, tmp_path / "a")
    once = codecs.load(tmp_path / "a")
    codecs.save(once, tmp_path / "b")
    again = codecs.load(tmp_path / "b")
    processor = transformers.AutoImageProcessor.from_pretrained(again.config.name_or_path)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert Path(again.config.name_or_path).is_relative_to(tmp_path / "b")
