"""Restoration networks: built, trained, resumed, stored and run; bad input."""

import pytest
import torch
from datasets import Dataset, Features, Image
from plait import Run
from plait_imaging.images import encode_png, read_batches
from plait_imaging.networks import ResidualCNN
from plait_imaging.restoration_networks import LoadResidualCNN, TrainRestorationNetwork
from plait_imaging.torch_model import TorchModel
from plait_imaging.training import Settings, train_restorer, windows

SETTINGS = Settings(
    loss="l1", num_steps=6, batch_size=2, crop_size=8, flip=True, learning_rate=1e-2, schedule="cosine", precision="fp32"
)  # fmt: skip


def images(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def pairs(inputs, targets):
    cells = {
        name: [{"bytes": encode_png(image), "path": None} for image in some]
        for name, some in (("image", inputs), ("target", targets))
    }
    return Dataset.from_dict(cells, Features({"image": Image(), "target": Image()}))


def darkened(scale=1, side=12):
    """Targets are the inputs at half the brightness."""
    inputs = images(6, 3, side, side)
    return pairs(inputs, (inputs // 2).repeat_interleave(scale, -1).repeat_interleave(scale, -2))


def error(network, data):
    scored = TorchModel(tile=0).restore(model=network, data=data, run=Run())
    found, truth = (
        torch.stack([image for _, batch in read_batches(scored, column) for image in batch]).float()
        for column in ("image", "target")
    )
    return (found - truth).abs().mean().item()


class TestNetwork:
    def test_fresh_it_changes_nothing_but_the_size(self):
        batch = torch.rand(2, 3, 6, 8)
        assert torch.equal(ResidualCNN(4, 3)(batch), batch)
        enlarged = ResidualCNN(4, 3, scale=2)(torch.full((1, 3, 6, 8), 0.25))
        assert enlarged.shape == (1, 3, 12, 16)
        assert enlarged.allclose(torch.tensor(0.25))

    def test_it_reaches_as_far_as_it_has_layers(self):
        network = ResidualCNN(4, 3)
        torch.nn.init.normal_(network.layers[-1].weight)
        batch = torch.rand(1, 3, 15, 15, requires_grad=True)
        network(batch)[0, :, 7, 7].sum().backward()
        touched = batch.grad[0].abs().sum(0).nonzero() - 7
        assert touched.abs().max() <= 3

    def test_weights_are_drawn_from_the_seed(self):
        method = LoadResidualCNN(channels=4, num_layers=2)
        one, again, other = (method.load_model(run=Run(seed=seed)).layers[0].weight for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)

    def test_one_layer_is_refused(self):
        with pytest.raises(ValueError, match="num_layers 1"):
            ResidualCNN(num_layers=1)


class TestTraining:
    @pytest.mark.parametrize("loss", ["l1", "l2"])
    def test_it_learns(self, loss):
        data = darkened()
        fresh = LoadResidualCNN(channels=8, num_layers=2).load_model(run=Run())
        method = TrainRestorationNetwork(loss=loss, num_steps=60, batch_size=4, learning_rate=2e-2)
        trained = method.optimize(model=fresh, data=data, run=Run())
        assert error(trained, data) < error(fresh, data) / 3
        assert not trained.training
        assert torch.equal(fresh.layers[-1].weight, torch.zeros_like(fresh.layers[-1].weight))

    def test_enlarging(self):
        data = darkened(scale=2)
        fresh = LoadResidualCNN(channels=4, num_layers=2, scale=2).load_model(run=Run())
        trained = TrainRestorationNetwork(num_steps=3).optimize(model=fresh, data=data, run=Run())
        enlarged = TorchModel(scale=2, tile=0).restore(model=trained, data=data, run=Run())
        assert [image.size for image in enlarged["image"]] == [(24, 24)] * 6

    def test_what_is_kept_decoded_changes_nothing(self, monkeypatch):
        fresh = LoadResidualCNN(channels=4, num_layers=2).load_model(run=Run())
        method = TrainRestorationNetwork(num_steps=4, batch_size=4)
        held = method.optimize(model=fresh, data=darkened(), run=Run())
        monkeypatch.setattr("plait_imaging.restoration_networks._HELD_BYTES", 1000)  # of 864 a pair
        read = method.optimize(model=fresh, data=darkened(), run=Run())
        assert torch.equal(held.layers[0].weight, read.layers[0].weight)

    def test_what_was_frozen_learns(self):
        fresh = LoadResidualCNN(channels=4, num_layers=2).load_model(run=Run()).requires_grad_(False)
        trained = TrainRestorationNetwork(num_steps=2).optimize(model=fresh, data=darkened(), run=Run())
        assert not torch.equal(trained.layers[-1].weight, fresh.layers[-1].weight)
        assert all(parameter.requires_grad for parameter in trained.parameters())

    def test_half_precision(self):
        fresh = LoadResidualCNN(channels=4, num_layers=2).load_model(run=Run())
        method = TrainRestorationNetwork(num_steps=2, precision="bf16")
        trained = method.optimize(model=fresh, data=darkened(), run=Run())
        assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}

    def test_a_killed_training_goes_on_to_the_same_bits(self):
        some = [(image / 255, image / 510) for image in images(5, 3, 10, 12)]

        class Checkpoint:
            state = None

            def load(self):
                return self.state

            def save(self, state):
                self.state = {**state, "module": {k: v.clone() for k, v in state["module"].items()}}
                self.state["optimizer"] = torch.load(_stored(state["optimizer"]), weights_only=True)

        def train(checkpoint, track=iter):
            torch.manual_seed(3)
            network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Dropout(0.3))
            train_restorer(
                network, lambda rows: [some[row] for row in rows], 5, SETTINGS, seed=1, device=torch.device("cpu"),
                checkpoint=checkpoint, track=track, seconds_between_saves=0,
            )  # fmt: skip
            return network[0].weight

        def three(steps):
            for step in steps:
                if step == 3:
                    raise KeyboardInterrupt
                yield step

        whole, killed = train(None), Checkpoint()
        with pytest.raises(KeyboardInterrupt):
            train(killed, three)
        assert killed.state["step"] == 3
        assert torch.equal(train(killed), whole)


def _stored(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


class TestWindows:
    def test_image_and_target_show_the_same(self):
        some = [(image, image.repeat_interleave(2, -1).repeat_interleave(2, -2)) for image in images(4, 3, 9, 11)]
        inputs, targets = windows(some, 6, flip=True)
        assert inputs.shape == (4, 3, 6, 6)
        assert torch.equal(targets[..., ::2, ::2], inputs)

    def test_small_images_bound_the_windows_of_all(self):
        some = [(torch.zeros(3, *size), torch.zeros(3, *size)) for size in ((9, 11), (5, 20))]
        assert windows(some, 8, flip=False)[0].shape == (2, 3, 5, 8)


class TestRefusals:
    def refused(self, words, model=None, data=None, **fields):
        model = LoadResidualCNN(channels=4, num_layers=2).load_model(run=Run()) if model is None else model
        with pytest.raises(ValueError, match=words):
            TrainRestorationNetwork(num_steps=2, **fields).optimize(
                model=model, data=darkened() if data is None else data, run=Run()
            )

    def test_input(self):
        data = darkened()
        self.refused("model is a str", model="net")
        self.refused("Identity, has no parameters", model=torch.nn.Identity())
        self.refused("data is a dict", data={"train": data})
        self.refused("no column 'target'", data=data.remove_columns("target"))
        self.refused("no pairs", data=data.select([]))
        odd = pairs(images(1, 3, 8, 8), images(1, 3, 8, 12))
        self.refused("image is 8×8 pixels and its target 8×12", data=odd)
        mixed = pairs([*images(1, 3, 8, 8), *images(1, 3, 4, 4)], images(2, 3, 8, 8))
        self.refused("1 and 2 times as large", data=mixed)

    def test_another_scale_than_the_targets(self):
        self.refused("makes 3×12×12 of an image whose target is 3×24×24; set its scale", data=darkened(scale=2))

    def test_a_loss_that_is_not_finite(self):
        model = LoadResidualCNN(channels=4, num_layers=2).load_model(run=Run())
        torch.nn.init.constant_(model.layers[-1].bias, float("inf"))
        with pytest.raises(FloatingPointError, match="the loss is inf in step 1; lower learning_rate"):
            TrainRestorationNetwork(num_steps=2).optimize(model=model, data=darkened(), run=Run())
