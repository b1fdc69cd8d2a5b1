"""``torch-model``: tiles leave no seam, every way to name a network gives the same, bad networks are refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait import Run
from plait_imaging.images import read_floats
from plait_imaging.tiling import run_tiled
from plait_imaging.torch_model import TorchModel
from safetensors.torch import save_file
from torch import nn

NETWORK = """
import torch

class Sharpen(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(width, 3, 3, padding=1)
        )
    def forward(self, x):
        return x + 0.1 * self.body(x)
"""


def local_network(scale=1):
    """Looks 2 pixels far; its zero padding spoils a border of 2 pixels of whatever it is given."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3 * scale**2, 3, padding=1)]
    return nn.Sequential(*body, *([nn.PixelShuffle(scale)] if scale > 1 else [])).eval()


def data_of(*shapes):
    arrays = [np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8) for i, shape in enumerate(shapes)]
    return Dataset.from_dict(
        {"image": [Image.fromarray(a) for a in arrays], "name": [f"n{i}" for i in range(len(shapes))]}
    )


def floats(dataset):
    return [image for _, batch in read_floats(dataset) for image in batch]


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    tile=st.sampled_from([16, 17, 24, 32]),
    batch_size=st.integers(1, 5),
    scale=st.sampled_from([1, 2, 3]),
)
def test_tiled_equals_whole_for_a_model_that_looks_a_quarter_of_the_overlap_far(height, width, tile, batch_size, scale):
    network = local_network(scale)
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
    settings_ = {"overlap": 8, "scale": scale, "multiple_of": 1, "batch_size": batch_size}
    with torch.no_grad():
        tiled = run_tiled(network, image, tile=tile, **settings_)
        whole = network(image[None])[0]
    assert tiled.shape == (3, height * scale, width * scale)
    assert torch.allclose(tiled, whole, atol=1e-5)


def test_a_model_that_looks_farther_differs_so_the_test_above_can_fail():
    network, image = local_network(), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tiled = run_tiled(network, image, tile=16, overlap=2, scale=1, multiple_of=1, batch_size=1)
        assert not torch.allclose(tiled, network(image[None])[0], atol=1e-4)


@pytest.mark.parametrize("multiple_of", [8, 64])
def test_padding_to_a_multiple_is_cut_off_again(multiple_of):
    seen = []

    def network(tiles):
        seen.append(tuple(tiles.shape[2:]))
        return tiles * 2

    image = torch.rand(3, 13, 21)
    result = run_tiled(network, image, tile=0, overlap=0, scale=1, multiple_of=multiple_of, batch_size=1)
    assert torch.allclose(result, image * 2)
    assert all(side % multiple_of == 0 for shape in seen for side in shape)


def test_memory_is_one_batch_of_tiles():
    seen = []

    def network(tiles):
        seen.append(tuple(tiles.shape))
        return tiles

    run_tiled(network, torch.rand(3, 100, 90), tile=32, overlap=8, scale=1, multiple_of=1, batch_size=3)
    assert {shape[1:] for shape in seen} == {(3, 32, 32)}
    assert max(shape[0] for shape in seen) == 3


def test_a_steps_model_is_used_and_left_as_it_was():
    network, data = local_network().train(), data_of((40, 30), (20, 50))
    method = TorchModel(tile=24, overlap=8, keep_float=True)
    restored = method.restore(model=network, data={"test": data}, run=Run())["test"]
    assert network.training
    assert restored["name"][:] == ["n0", "n1"]
    for image, result in zip(floats(data), floats(restored), strict=True):
        assert torch.allclose(network(image[None])[0], result, atol=1e-5)


def test_torchscript_safetensors_and_a_step_give_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    namespace = {}
    exec(NETWORK, namespace)
    torch.manual_seed(1)
    network, data = namespace["Sharpen"](width=5), data_of((20, 24))
    save_file(network.state_dict(), "weights.safetensors")
    torch.jit.trace(network, torch.zeros(1, 3, 16, 16)).save("model.pt")
    ways = [
        (TorchModel(keep_float=True), network),
        (TorchModel(keep_float=True, file=tmp_path / "model.pt"), None),
        (
            TorchModel(
                keep_float=True,
                file=tmp_path / "weights.safetensors",
                architecture="./net.py:Sharpen",
                arguments={"width": 5},
            ),
            None,
        ),
    ]
    results = [floats(method.restore(model=model, data=data, run=Run()))[0] for method, model in ways]
    assert torch.allclose(results[0], results[1], atol=1e-6)
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("net.pth", lambda state: state),
        ("net_g_latest.pth", lambda state: {"params": {n: 0 * t for n, t in state.items()}, "params_ema": state}),
        ("last.ckpt", lambda state: {"epoch": 3, "state_dict": {f"model.{n}": t for n, t in state.items()}}),
        ("checkpoint.pt", lambda state: {"model_state_dict": {f"module.{n}": t for n, t in state.items()}}),
    ],
)
def test_checkpoints_of_others_give_the_same_as_the_network(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    namespace = {}
    exec(NETWORK, namespace)
    torch.manual_seed(1)
    network, data = namespace["Sharpen"](), data_of((12, 10))
    torch.save(content(network.state_dict()), name)
    method = TorchModel(keep_float=True, file=tmp_path / name, architecture="./net.py:Sharpen")
    direct = TorchModel(keep_float=True).restore(model=network, data=data, run=Run())
    assert torch.equal(
        floats(method.restore(model=None, data=data, run=Run()))[0],
        floats(direct)[0],
    )


def test_which_weights_of_a_checkpoint(tmp_path):
    state = torch.nn.Conv2d(3, 3, 1).state_dict()
    torch.save({"params": state, "params_ema": {n: 0 * t for n, t in state.items()}}, tmp_path / "net.pth")
    fields = {"file": tmp_path / "net.pth", "architecture": "torch.nn:Conv2d"}
    fields["arguments"] = {"in_channels": 3, "out_channels": 3, "kernel_size": 1}
    averaged, plain = (
        floats(TorchModel(keep_float=True, entry=entry, **fields).restore(model=None, data=data_of((4, 4)), run=Run()))[
            0
        ]
        for entry in (None, "params")
    )
    assert averaged.abs().max() == 0
    assert plain.abs().max() > 0


def test_bfloat16_is_close_and_not_the_same():
    network, data = local_network(), data_of((24, 24))
    exact = floats(TorchModel(keep_float=True).restore(model=network, data=data, run=Run()))[0]
    rough = floats(TorchModel(keep_float=True, dtype="bfloat16").restore(model=network, data=data, run=Run()))[0]
    assert next(network.parameters()).dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, atol=0.02)


def test_super_resolution_gives_the_larger_image():
    restored = TorchModel(scale=2, tile=16, overlap=4).restore(
        model=local_network(2), data=data_of((20, 30)), run=Run()
    )
    assert restored[0]["image"].size == (60, 40)


def test_bad_networks_and_files(tmp_path):
    data = data_of((8, 8))
    with pytest.raises(ValueError, match="both missing"):
        TorchModel().restore(model=None, data=data, run=Run())
    with pytest.raises(ValueError, match="both given"):
        TorchModel(file=tmp_path / "x.pt").restore(model=nn.Identity(), data=data, run=Run())
    with pytest.raises(ValueError, match=r"x\.pt is not a file; give the path"):
        TorchModel(file=tmp_path / "x.pt").restore(model=None, data=data, run=Run())
    (tmp_path / "x.pt").write_text("no model")
    with pytest.raises(ValueError, match=r"x\.pt is not a file of weights"):
        TorchModel(file=tmp_path / "x.pt").restore(model=None, data=data, run=Run())
    torch.save({"weight": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt holds weights only; say of what with architecture"):
        TorchModel(file=tmp_path / "x.pt").restore(model=None, data=data, run=Run())
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    for architecture, reason in (
        ("torch.nn:Identity", "does not fit"),
        ("torch.nn:Nothing", "there is no 'Nothing' in torch.nn"),
        ("torch.nn:Linear", "cannot be built"),
        ("torch:Generator", "is not a class of torch.nn.Module"),
        ("torch.hub:download_url_to_file", "is not a class of torch.nn.Module"),
        ("torch.hub:urlopen", "is not a class of torch.nn.Module"),
    ):
        method = TorchModel(file=tmp_path / "x.safetensors", architecture=architecture)
        with pytest.raises(ValueError, match=reason):
            method.restore(model=None, data=data, run=Run())
    with pytest.raises(ValueError, match="architecture is 'os:getcwd', which is of Python's own library"):
        TorchModel(file=tmp_path / "x.safetensors", architecture="os:getcwd")
    with pytest.raises(ValueError, match=r"image n0: .*the model returned \(1, 3, 4, 4\)"):
        TorchModel().restore(model=nn.AvgPool2d(2), data=data, run=Run())
    with pytest.raises(ValueError, match="image n0: the model cannot restore it"):
        TorchModel().restore(model=nn.Linear(3, 3), data=data, run=Run())

    class Broken(nn.Module):
        def forward(self, x):
            return x / 0

    class OnLevels(nn.Module):
        def forward(self, x):
            return 255 * x

    with pytest.raises(ValueError, match=r"image n0 came out with values from .*, as on the 0–255 scale"):
        TorchModel().restore(model=OnLevels(), data=data, run=Run())
    with pytest.raises(ValueError, match="image n0 came out with NaN or infinity"):
        TorchModel().restore(model=Broken(), data=data, run=Run())


def test_bad_fields(tmp_path):
    with pytest.raises(ValueError, match="at most half"):
        TorchModel(tile=64, overlap=40)
    with pytest.raises(ValueError, match="overlap must be smaller"):
        TorchModel(tile=64, overlap=64)
    with pytest.raises(ValueError, match="holds weights only"):
        TorchModel(file=tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="needs its weights"):
        TorchModel(architecture="a:B")
    with pytest.raises(ValueError, match=r"architecture is 'Restormer'; allowed is package\.module:name"):
        TorchModel(architecture="Restormer", file=tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="arguments are for architecture"):
        TorchModel(arguments={"a": 1})
    with pytest.raises(ValueError, match="entry is for the weights of architecture"):
        TorchModel(entry="params")
