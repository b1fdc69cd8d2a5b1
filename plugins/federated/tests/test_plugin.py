"""The hooks: data in, model out, reports, errors that name the mistake."""

import io
import json
from functools import partial

import numpy as np
import plait
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from PIL import Image as Pillow
from plait import codecs
from plait.errors import PipelineError
from plait.pipeline import parse_pipeline
from plait_federated.client_data import inputs_of
from plait_federated.models import ARCHITECTURES, ImageClassifier
from plait_federated.plugin.data import Digits8x8, Partition
from plait_federated.plugin.evaluation import FederatedAccuracy, FederatedGraph, FederatedRounds
from plait_federated.plugin.models import FederatedModel
from plait_federated.plugin.training import (
    DPSGD,
    DFedAvg,
    DFedAvgM,
    DFedProx,
    DFedSAM,
    FedAvg,
    FedProx,
    FedSAM,
    Scaffold,
)
from plait_vision import Classifier
from safetensors import safe_open

SHORT = {"rounds": 2, "batch_size": 32, "local_epochs": 1, "engine": "loop"}


@pytest.fixture(scope="module")
def digits():
    return Digits8x8(as_numbers=True).load_data(run=plait.Run())


@pytest.fixture(scope="module")
def few(digits):
    return {"train": digits["train"].select(range(360)), "test": digits["test"].select(range(100))}


@pytest.fixture(scope="module")
def clients(few):
    return Partition(num_clients=6, scheme="dirichlet", coefficient=0.5).transform(data=few, run=plait.Run())


@pytest.fixture
def model(clients):
    return FederatedModel(architecture="mlp").load_model(data=clients, run=plait.Run())


def test_digits_are_scaled_and_split(digits):
    assert (len(digits["train"]), len(digits["test"])) == (1437, 360)
    values = np.asarray(digits["test"][:20]["pixel_values"])
    assert values.shape == (20, 1, 8, 8)
    assert values.min() == 0
    assert values.max() == 1


def test_digits_are_images_like_any_others():
    digits, numbers = (Digits8x8(as_numbers=choice).load_data(run=plait.Run()) for choice in (False, True))
    assert digits["test"].column_names == ["image", "label"]
    assert digits["test"]["label"] == numbers["test"]["label"]
    seen = inputs_of(digits["test"], None).float() / 255
    assert seen.shape == (360, 3, 8, 8)
    assert (seen - inputs_of(numbers["test"], None)).abs().max() <= 0.5 / 255 + 1e-6


def test_accuracy_of_image_text_models_and_of_models_of_several_tasks():
    clip = pytest.importorskip("plait_clip")
    digits = Digits8x8().load_data(run=plait.Run())["test"]

    class TwoTasks(torch.nn.Module):
        tasks = ("a", "b")

        def __init__(self):
            super().__init__()
            self.heads = torch.nn.ModuleList([torch.nn.Linear(192, 10), torch.nn.Linear(192, 10)])

        def logits(self, images, task):
            return self.heads[self.tasks.index(task)](images.flatten(1))

    model = TwoTasks()
    mean = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    with torch.no_grad():
        mean[1].weight.copy_((model.heads[0].weight + model.heads[1].weight) / 2)
        mean[1].bias.copy_((model.heads[0].bias + model.heads[1].bias) / 2)
    models = {"CLIP": clip.tiny_model(), "tasks": model, "mean": mean}
    report = FederatedAccuracy().evaluate(model=models, data=digits, run=plait.Run())
    assert 0 <= report.value("accuracy", model="CLIP") <= 1
    assert report.value("accuracy", model="tasks") == report.value("accuracy", model="mean")
    with pytest.raises(ValueError, match="model model: task is 'c'"):
        FederatedAccuracy(task="c").evaluate(model=model, data=digits, run=plait.Run())


def test_a_partition_keeps_rows_and_survives_storage(few, clients, tmp_path):
    run = plait.Run()
    again = Partition(num_clients=6, scheme="dirichlet", coefficient=0.5).transform(data=few, run=run)
    assert again["train"]["client"] == clients["train"]["client"]
    (panel,) = run.reports[0].panels
    assert panel.images[0][0].data.startswith(b"\x89PNG")
    codecs.save(clients, tmp_path / "stored")
    loaded = codecs.load(tmp_path / "stored", ("train",))
    assert loaded[:]["client"] == clients["train"][:]["client"]
    originals = {np.asarray(row).tobytes() for row in few["train"][:]["pixel_values"]}
    assert all(np.asarray(row).tobytes() in originals for row in loaded[:50]["pixel_values"])


@pytest.mark.parametrize("scheme", ["iid", "stratified", "dirichlet", "pathological", "path"])
@pytest.mark.parametrize("sampling", ["sampled", "disjoint"])
def test_every_scheme_makes_as_many_clients(digits, scheme, sampling):
    method = Partition(num_clients=5, scheme=scheme, coefficient=2, sampling=sampling)
    train = method.transform(data=digits, run=plait.Run())["train"]
    assert set(train["client"]) == set(range(5))
    assert len(train) == 1437


@pytest.mark.parametrize(
    ("architecture", "shape", "classes", "count"),
    [
        ("mlp", (1, 8), 10, 2410),
        ("cnn-small", (1, 8), 10, 1898),
        ("cnn", (1, 28), 10, 26034),
        ("lenet", (3, 32), 10, 797_962),
        ("resnet18-gn", (3, 32), 100, 11_227_812),
        ("resnet18-gn-small-stem", (3, 64), 200, 11_271_432),
    ],
)
def test_sizes_of_the_networks(architecture, shape, classes, count):
    assert set(ARCHITECTURES) >= {architecture}
    network = ImageClassifier(architecture, *shape, classes)
    assert sum(p.numel() for p in network.parameters()) == count
    assert not list(network.buffers())
    with torch.no_grad():
        assert network(torch.rand(2, shape[0], shape[1], shape[1])).shape == (2, classes)


def test_a_network_is_seeded_normalises_and_survives_storage(clients, tmp_path):
    make = FederatedModel(architecture="cnn-small", mean=(0.3,), std=(0.4,)).load_model
    first, again, other = (make(data=clients, run=plait.Run(seed=seed)) for seed in (1, 1, 2))
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))
    torch.testing.assert_close(first(x), first.head(first.body((x - 0.3) / 0.4)))
    codecs.save(first, tmp_path / "model")
    loaded = codecs.load(tmp_path / "model")
    assert torch.equal(loaded(x), first(x))
    first.head = torch.nn.Identity()
    codecs.save(first, tmp_path / "features")
    assert torch.equal(codecs.load(tmp_path / "features")(x), first(x))


@pytest.mark.parametrize(
    "method",
    [
        DPSGD(**SHORT),
        DFedAvg(topology="ring", **SHORT),
        DFedAvgM(topology="torus", rows=2, **SHORT),
        DFedSAM(topology="full", gossip_steps=2, **SHORT),
        DFedProx(topology="exp", update_order="sequential", **SHORT),
        FedAvg(active_ratio=0.5, **SHORT),
        FedProx(active_ratio=0.5, **SHORT),
        FedSAM(active_ratio=0.5, **SHORT),
        Scaffold(active_ratio=0.5, **SHORT),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_baseline_trains_a_copy(method, model, clients):
    import attrs

    if hasattr(method, "topology") and method.topology == "random":
        method = attrs.evolve(method, active_ratio=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logged = []
    run = plait.Run(on_log=lambda values, step: logged.append((step, values)))
    trained = method.aggregate(model=model, clients=clients, run=run)
    assert type(trained) is type(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert [step for step, _ in logged] == [1, 2]
    last = logged[-1][1]
    assert 0 < last["accuracy"] <= 1
    if hasattr(method, "topology"):
        assert 0 <= last["worst_client_accuracy"] <= last["mean_client_accuracy"] <= 1


@pytest.mark.slow
def test_training_reaches_what_the_data_allow():
    """IID clients on a full graph learn digits."""
    digits = Digits8x8().load_data(run=plait.Run())
    shuffled = Partition(num_clients=4, scheme="iid").transform(data=digits, run=plait.Run())
    model = FederatedModel(architecture="mlp").load_model(data=shuffled, run=plait.Run())
    method = DFedAvg(rounds=6, batch_size=16, local_epochs=2, topology="full", engine="loop")
    trained = method.aggregate(model=model, clients=shuffled, run=plait.Run())
    report = FederatedAccuracy().evaluate(
        model={"trained": trained, "fresh": model}, data=shuffled["test"], run=plait.Run()
    )
    assert report.value("accuracy", model="trained") > 0.9
    assert report.value("accuracy", model="fresh") < 0.3


def test_all_outputs_survive_storage_and_make_tables(model, clients, tmp_path):
    method = DFedAvg(topology="ring", output="all", eval_clients_every=1, **SHORT)
    outcome = method.aggregate(model=model, clients=clients, run=plait.Run())
    codecs.save(outcome, tmp_path / "outcome")
    history = codecs.load(tmp_path / "outcome", ("history",))
    assert history == outcome["history"]
    local = codecs.load(tmp_path / "outcome", ("clients",))
    assert list(local) == [f"client-{client}" for client in range(6)]
    mean = torch.stack([one.head.weight for one in local.values()]).mean(0)
    torch.testing.assert_close(mean, outcome["model"].head.weight, atol=1e-6, rtol=0)

    report = FederatedRounds(target=0.05, last=2).evaluate(data={"a": history, "b": history[:1]}, run=plait.Run())
    assert report.value("rounds to 5%", method="a") == 1
    accuracy = [record["accuracy"] for record in history]
    assert report.value("last-2 accuracy", method="a") == pytest.approx(np.mean(accuracy))
    assert report.value("MB sent", method="a") == pytest.approx(2 * 12 * 2410 * 4 / 1e6)
    never = FederatedRounds(target=1.0).evaluate(data={"a": history}, run=plait.Run())
    assert (never.value("rounds to 100%", method="a"), never.value("reached", method="a")) == (3, 0)


def test_models_that_kept_heads_answer_with_their_mean(model, digits):
    class Merged(torch.nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.task_heads = torch.nn.ModuleList(heads)
            self.tasks = ("0", "1")

        def logits(self, images, task):
            return self.task_heads[int(task)](model.body(images))

    heads = [torch.nn.Linear(32, 10) for _ in range(2)]
    mean = torch.nn.Linear(32, 10)
    with torch.no_grad():
        mean.weight.copy_((heads[0].weight + heads[1].weight) / 2)
        mean.bias.copy_((heads[0].bias + heads[1].bias) / 2)
    merged = FederatedAccuracy().evaluate(model=Merged(heads), data=digits["test"], run=plait.Run())
    model.head = mean
    averaged = FederatedAccuracy().evaluate(model=model, data=digits["test"], run=plait.Run())
    assert merged.value("loss", model="model") == pytest.approx(averaged.value("loss", model="model"), rel=1e-4)


def test_half_precision_models_come_back_as_they_were(model, clients):
    half = model.half().eval()
    trained = DFedAvg(topology="ring", **SHORT).aggregate(model=half, clients=clients, run=plait.Run())
    assert trained.head.weight.dtype == torch.float16
    assert not trained.training


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("{load-model: federated-model, from: {data: digits.train}, with: {column: pixels}}", "federated-model needs the column 'pixels'"),
        ("{aggregate: dfedavg, from: {model: net, clients: digits.train}, with: {column: pixels}}", "dfedavg needs the column 'pixels' of 'clients'"),
        ("{evaluate: federated-accuracy, from: {model: net, data: digits.test}, with: {column: pixels}}", "federated-accuracy needs the column 'pixels'"),
    ],
)  # fmt: skip
def test_columns_that_are_missing_are_told_before_the_run(step, sentence):
    steps = ["digits: {load-data: digits-8x8}", "net: {load-model: federated-model, from: {data: digits.train}}"]
    lines = ["plait: 1", "steps:", *(f"  {line}" for line in (*steps, f"other: {step}"))]
    with pytest.raises(PipelineError, match=sentence):
        parse_pipeline("\n".join(lines))


def test_the_graph_is_shown(clients):
    report = FederatedGraph(topology="ring", weights="metropolis").evaluate(data=clients, run=plait.Run())
    assert report.rows[0]["directed edges"] == 12
    assert report.rows[0]["second eigenvalue"] == pytest.approx(2 / 3)  # 1/3 + 2/3·cos(60°)
    assert report.panels[0].images[0][0].data.startswith(b"\x89PNG")


def test_graphs_from_files(tmp_path):
    (tmp_path / "edges.csv").write_text("0,1\n1,2\n2,3\n")
    graph = DFedAvg(topology="custom", graph_file=tmp_path / "edges.csv").graph(4, seed=0)
    assert graph.adjacency(0).sum() == 6
    np.save(tmp_path / "matrix.npy", np.full((3, 3), 1 / 3))
    assert DFedAvg(topology="custom", graph_file=tmp_path / "matrix.npy").graph(3, seed=0).mixing(0)[0, 2] == 1 / 3
    (tmp_path / "other.csv").write_text("0,1,2\n")
    with pytest.raises(ValueError, match="two columns"):
        DFedAvg(topology="custom", graph_file=tmp_path / "other.csv").graph(4, seed=0)
    with pytest.raises(ValueError, match="cannot be read"):
        DFedAvg(topology="custom", graph_file=tmp_path / "missing.csv").graph(4, seed=0)
    (tmp_path / "marked.csv").write_text("0,1\n1,2\n", encoding="utf-8-sig")  # as spreadsheets save it
    assert DFedAvg(topology="custom", graph_file=tmp_path / "marked.csv").graph(3, seed=0).adjacency(0).sum() == 4
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="cannot be read: Object arrays"):
        DFedAvg(topology="custom", graph_file=tmp_path / "objects.npy").graph(3, seed=0)


@pytest.fixture
def image_folder(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2), ("val", 1)):
        for label, name in enumerate(["cat", "dog"]):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(100 * label)
                Pillow.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"


def test_images_in_class_folders_train(image_folder):
    run = plait.Run()
    images = plait.load("labelled-images", source=str(image_folder)).load_data(run=run)
    clients = Partition(num_clients=3, scheme="stratified").transform(data=images, run=run)
    assert clients["train"].features["label"].names == ["cat", "dog"]
    assert {split: len(part) for split, part in clients.items()} == {"train": 12, "test": 4, "val": 2}
    model = FederatedModel(architecture="lenet", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)).load_model(
        data=clients, run=run
    )
    method = DFedAvg(rounds=1, batch_size=4, local_epochs=1, topology="full", augment_padding=2, output="all")
    assert method.aggregate(model=model, clients=clients, run=run)["history"][0]["gradient_steps"] == 3


def test_image_columns_are_read_upright():
    turned = Pillow.fromarray(np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "png", exif=exif)
    data = Dataset.from_dict(
        {"image": [{"bytes": buffer.getvalue(), "path": None}]}, features=Features({"image": Image()})
    )
    assert (inputs_of(data, None)[0].numpy() == np.rot90(np.asarray(turned), -1).transpose(2, 0, 1)).all()
    assert torch.equal(inputs_of(data.with_format("numpy"), None), inputs_of(data, None))


@pytest.mark.parametrize("column", [{"decode": True}, {"decode": False}])
def test_unusable_images_in_columns_are_named_by_row(column):
    images = [png_bytes((4, 4)), {"bytes": b"no image", "path": None}]
    kinds = Features({"image": Image(**column), "label": Value("int64"), "client": Value("int64")})
    data = Dataset.from_dict({"image": images, "label": [0, 1], "client": [0, 1]}, features=kinds)
    with pytest.raises(ValueError, match="image of row 1 is not an image"):
        train_on(data)
    assert inputs_of(data.select([0]), None).shape == (1, 3, 4, 4)


def test_own_client_column_and_user_model():
    """Grey 8-bit images (made RGB), clients named by text, a model of the user's."""
    random = np.random.default_rng(0)
    rows = {
        "image": [Pillow.fromarray(random.integers(0, 255, (4, 4), dtype=np.uint8)) for _ in range(12)],
        "label": random.integers(0, 2, 12).tolist(),
        "client": ["b", "a", "c"] * 4,
    }
    data = Dataset.from_dict(
        rows, features=Features({"image": Image(), "label": ClassLabel(num_classes=2), "client": Value("string")})
    )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    method = DFedAvg(topology="full", output="all", **SHORT)
    outcome = method.aggregate(model=model, clients=data, run=plait.Run())
    assert list(outcome["clients"]) == ["client-0", "client-1", "client-2"]
    assert "accuracy" not in outcome["history"][0]
    apart = [data.filter(lambda row, name=name: row["client"] == name) for name in "abc"]
    again = method.aggregate(model=model, clients=apart, run=plait.Run())
    assert torch.equal(again["model"][1].weight, outcome["model"][1].weight)


def test_token_classifiers_of_transformers_train():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config)
    rows = {
        "input_ids": [[i % 20, 1, 2, 3] for i in range(16)],
        "label": [i % 2 for i in range(16)],
        "client": [0, 1] * 8,
    }
    method = DFedAvg(topology="full", rounds=1, local_epochs=1, batch_size=4)
    trained = method.aggregate(model=model, clients=Dataset.from_dict(rows), run=plait.Run())
    assert not torch.equal(trained.classifier.weight, model.classifier.weight)


def test_a_failed_step_resumes_from_its_checkpoint(model, clients, tmp_path):
    method = DFedAvg(topology="ring", output="all", **SHORT | {"rounds": 4})
    whole = method.aggregate(model=model, clients=clients, run=plait.Run())

    def stop(values, step):
        if step == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        method.aggregate(model=model, clients=clients, run=plait.Run(folder=folder, on_log=stop))
    (part,) = folder.glob("loops/*/round-000003/*")
    with safe_open(part, "pt") as file:
        kept = json.loads(file.metadata()["history"])
    resumed = method.aggregate(model=model, clients=clients, run=plait.Run(folder=folder))
    assert resumed["history"][:3] == kept  # with their times: these rounds were not played again
    assert torch.equal(resumed["model"].head.weight, whole["model"].head.weight)
    assert not list(folder.glob("loops/*"))


def test_a_changed_graph_file_is_another_training(model, clients, tmp_path):
    """A training that was killed on one graph does not resume on another."""
    method = DFedAvg(topology="custom", graph_file=tmp_path / "graph.csv", **SHORT)

    def stop(values, step):
        raise KeyboardInterrupt

    np.savetxt(tmp_path / "graph.csv", [(i, (i + 1) % 6) for i in range(6)], delimiter=",", fmt="%d")
    with pytest.raises(KeyboardInterrupt):
        method.aggregate(model=model, clients=clients, run=plait.Run(folder=tmp_path / "work", on_log=stop))
    np.savetxt(tmp_path / "graph.csv", [(i, j) for i in range(6) for j in range(i)], delimiter=",", fmt="%d")
    changed, alone = (
        method.aggregate(model=model, clients=clients, run=plait.Run(folder=tmp_path / name))
        for name in ("work", "other")
    )
    assert torch.equal(changed.head.weight, alone.head.weight)


def test_one_run_serves_several_trainings(model, clients):
    run = plait.Run()
    first, second = DFedAvg(topology="ring", **SHORT), DFedAvg(topology="ring", **SHORT | {"learning_rate": 0.01})
    a, b = (method.aggregate(model=model, clients=clients, run=run) for method in (first, second))
    assert not torch.equal(a.head.weight, b.head.weight)
    alone = second.aggregate(model=model, clients=clients, run=plait.Run())
    assert torch.equal(b.head.weight, alone.head.weight)


def png_bytes(size):
    buffer = io.BytesIO()
    Pillow.new("RGB", size).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def train_on(data, model=None, **fields):
    method = DFedAvg(**{"topology": "full"} | SHORT | fields)
    return method.aggregate(model=model or torch.nn.Linear(4, 2), clients=data, run=plait.Run())


def rows(**changes):
    columns = {"features": [[0.0] * 4] * 4, "label": [0, 1, 0, 1], "client": [0, 0, 1, 1]} | changes
    return Dataset.from_dict({name: values for name, values in columns.items() if values is not None})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_on(rows(client=None)), "no column client.*federated-partition"),
        (lambda: train_on(rows(label=None)), "no column label"),
        (lambda: train_on(rows(label=[0, 1, 2, 1])), "label 2 does not fit a model of 2 outputs"),
        (lambda: train_on(rows(label=[0.5] * 4)), "whole numbers"),
        (lambda: train_on(rows(features=None)), "field column"),
        (lambda: train_on(rows(), column="pixels"), "no column pixels"),
        (lambda: train_on(rows(features=[[0.0] * 4, [0.0]] * 2)), "different sizes"),
        (lambda: train_on({"test": rows()}), "no split train"),
        (lambda: train_on(3), "data is a int"),
        (lambda: train_on([]), "list without datasets"),
        (lambda: train_on(rows().select([])), "no rows"),
        (lambda: train_on(rows(), model="net"), "model is a str"),
        (
            lambda: train_on(rows(), model=torch.nn.Linear(5, 2)),
            r"fails on inputs of shape \(1, 4\) \(RuntimeError: mat1",
        ),
        (lambda: train_on(rows(), model=torch.nn.Unflatten(1, (2, 2))), "has no weights that could be trained"),
        (lambda: train_on(rows(), model=torch.nn.LSTM(4, 2)), "the model gives a tuple for inputs of shape"),
        (lambda: train_on(rows(), topology="random"), "nobody would have a neighbour"),
        (lambda: train_on(rows(client=[0] * 4)), "at least 2"),
        (lambda: train_on(rows(), engine="peers", update_order="sequential"), "allow_wavefront"),
        (lambda: DFedAvg(topology="ring", edges=((0, 1),)), "any other topology none"),
        (lambda: DFedAvg(rounds=0), "rounds is 0"),
        (lambda: DFedProx(prox_lambda=20.0, topology="full"), "must be below 1"),
        (lambda: Partition(scheme="pathological", coefficient=2.5), "whole number"),
        (lambda: Partition(num_clients=1), "num_clients"),
        (lambda: FederatedModel(architecture="lenet").load_model(rows(), plait.Run()), "square images"),
        (lambda: ImageClassifier("lenet", 3, 8, 10), "too small"),
        (lambda: FederatedRounds().evaluate(data=[1], run=plait.Run()), "output: all"),
        (lambda: train_on(rows(label=[0, 1, 1, -1])), "row 3 has label -1; .*leave unlabelled rows out"),
        (lambda: train_on(rows(label=[0, 1, None, 1])), "column label holds missing values"),
        (lambda: train_on(rows(features=[[0.0] * 4] * 3 + [[float("nan")] * 4])), "NaN or infinite values in row 3"),
        (lambda: train_on({"train": rows(), "test": rows().select([])}), "split test of the data has no rows"),
        (lambda: train_on([rows(), rows().select([])]), "dataset of client 1 has no rows"),
        (lambda: train_on([rows(), rows(label=None)]), "dataset of client 1 has other columns than that of client 0"),
        (lambda: partitioned(rows()), "data has a column client, so it is partitioned already"),
        (lambda: partitioned(rows(client=None, label=[0, 1, -1, 1])), "row 2 has label -1"),
        (lambda: partitioned(rows(client=None), num_clients=5), "num_clients is 5; allowed is 2 to .* samples, 4"),
        (lambda: partitioned(rows(client=None), num_clients=5, scheme="stratified"), "num_clients is 5; allowed is 2"),
        (lambda: partitioned(rows(client=None, label=[0, 2, 0, 2])), "class 1 has no sample"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("dfedavg", "lr_decay", "learning_rate_decay"),
        ("fedsam", "sam_rho", "rho"),
        ("fedsam", "lr_decay", "learning_rate_decay"),
    ],
)
def test_old_names_of_fields_lead_to_the_new_ones(method, old, new):
    with pytest.raises(ValueError, match=f"{method} has no field '{old}' any more .did you mean '{new}'"):
        plait.load(method, hook="aggregate", **{old: 0.5})


def partitioned(data, **fields):
    return Partition(**{"num_clients": 2} | fields).transform(data, plait.Run())


def test_models_without_answers_get_no_accuracy():
    evaluate = partial(FederatedAccuracy().evaluate, data=rows(), run=plait.Run())
    broken = torch.nn.Linear(4, 2)
    with torch.no_grad():
        broken.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="model sick has loss nan"):
        evaluate(model={"sick": broken})
    with pytest.raises(ValueError, match="label 1 does not fit a model of 1 outputs"):
        evaluate(model=torch.nn.Linear(4, 1))


def test_classes_that_are_named_but_do_not_occur():
    """Of four classes the first and the last have no sample."""
    labels = Features({"label": ClassLabel(names=["a", "b", "c", "d"]), "features": Sequence(Value("float32"))})
    data = Dataset.from_dict({"label": [1, 2] * 4, "features": [[0.0]] * 8}, features=labels)
    even = partitioned(data, scheme="iid")["train"]
    assert even.features["label"].names == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"class 3 \(d\) has no sample; scheme dirichlet draws all classes"):
        partitioned(data)


def test_classes_may_be_texts():
    data = rows(client=None, label=["b", "a", "b", "a"])
    test = rows(client=None, label=["b", "b", "a", "a"])
    clients = partitioned({"train": data, "test": test}, scheme="iid")
    assert clients["train"].features["label"].names == clients["test"].features["label"].names == ["a", "b"]
    assert clients["test"]["label"][:] == [1, 1, 0, 0]
    model = torch.nn.Linear(4, 2)
    by_number, by_name = (train_on(rows(label=names), model) for names in ([1, 0, 1, 0], ["b", "a", "b", "a"]))
    assert torch.equal(by_name.bias, by_number.bias)
    with pytest.raises(ValueError, match="the labels are texts, and the model has no names for its classes"):
        FederatedAccuracy().evaluate(model=torch.nn.Linear(4, 2), data=test, run=plait.Run())


def test_a_number_means_the_same_class_to_every_client_and_to_the_model():
    """Clients, their test split and the model have the classes in other orders."""
    labels, orders = [0, 0, 0, 1], (["a", "b"], ["b", "a"])
    same, turned = (
        rows(client=None, label=numbers).cast_column("label", ClassLabel(names=names))
        for names, numbers in zip(orders, (labels, [1 - label for label in labels]), strict=True)
    )
    plain = torch.nn.Linear(4, 2)
    assert torch.equal(train_on([same, turned], plain).bias, train_on([same, same], plain).bias)
    method = DFedAvg(topology="full", **SHORT, output="all")
    clients = partitioned(same, num_clients=2, scheme="iid")
    by_test = [
        method.aggregate(model=plain, clients={**clients, "test": test}, run=plait.Run())["history"][-1]["loss"]
        for test in (same, turned)
    ]
    assert by_test[0] == by_test[1]
    models = [Classifier(plain, class_names=names) for names in orders]
    for model in models:
        model.preparation = None
        trained = [train_on([data, data], model).network.bias for data in (same, turned)]
        assert torch.equal(trained[0], trained[1])
        assert accuracy_of(model, same) == accuracy_of(model, turned)
    assert accuracy_of(models[0], same) == 1 - accuracy_of(models[1], same)


def accuracy_of(model, data):
    return FederatedAccuracy().evaluate(model=model, data=data, run=plait.Run()).value("accuracy")


def test_clients_may_weigh_by_size(few):
    clients = Partition(num_clients=5, scheme="dirichlet", sampling="disjoint").transform(data=few, run=plait.Run())
    model = FederatedModel(architecture="mlp").load_model(data=clients, run=plait.Run())
    fields = {"active_ratio": 1.0} | SHORT
    plain, uniform, by_size = (
        FedAvg(**weights, **fields).aggregate(model, clients, plait.Run()).head.weight
        for weights in ({}, {"weights": "uniform"}, {"weights": "size"})
    )
    assert torch.equal(plain, uniform)
    assert not torch.allclose(plain, by_size, atol=1e-3)


def test_images_of_different_sizes_are_refused():
    data = Dataset.from_dict(
        {"image": [png_bytes((4, 4)), png_bytes((5, 4))], "label": [0, 1], "client": [0, 1]},
        features=Features({"image": Image(), "label": Value("int64"), "client": Value("int64")}),
    )
    with pytest.raises(ValueError, match="different sizes"):
        train_on(data)


def test_weights_that_do_not_keep_the_average_are_warned_about_or_refused(clients, model):
    warnings = []
    path = {"topology": "custom", "edges": tuple((i, i + 1) for i in range(5))}
    DFedAvg(**path, **SHORT).aggregate(model=model, clients=clients, run=plait.Run(on_warning=warnings.append))
    assert "columns of the mixing matrix sum to 0.83 … 1.17" in warnings[0]
    with pytest.raises(ValueError, match="columns of the mixing matrix"):
        DFedAvg(**path, strict=True, **SHORT).aggregate(model=model, clients=clients, run=plait.Run())


def test_accuracy_on_several_data_sets():
    model, evaluate = torch.nn.Linear(4, 2), FederatedAccuracy().evaluate
    one, two = rows(), rows().select(range(2))
    both = evaluate(model={"net": model}, data={"one": one, "two": two}, run=plait.Run()).rows
    assert [(row["model"], row["data"]) for row in both] == [("net", "one"), ("net", "two")]
    (alone,) = evaluate(model={"net": model}, data=two, run=plait.Run()).rows
    assert alone == {name: value for name, value in both[1].items() if name != "data"}
    with pytest.raises(ValueError, match="data is an empty mapping"):
        evaluate(model=model, data={}, run=plait.Run())
    with pytest.raises(ValueError, match="data history is a list; a dataset is needed"):
        evaluate(model=model, data={"history": [1]}, run=plait.Run())
