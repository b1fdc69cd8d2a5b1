"""Weights are read from what people have, by name, and what is no weights is told in one sentence."""

import argparse
import io
import json
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from plait.weights import is_torchscript, read_checkpoint, read_weights
from safetensors.torch import save_file


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def equal(state, model):
    own = model.state_dict()
    return set(state) == set(own) and all(torch.equal(state[name], own[name]) for name in own)


def prefixed(state, prefix):
    return OrderedDict((prefix + name, value) for name, value in state.items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".weights"])
@pytest.mark.parametrize("old_format", [False, True])
def test_files_of_torch_save_whatever_their_suffix(tmp_path, model, suffix, old_format):
    path = tmp_path / f"net{suffix}"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not old_format)
    assert equal(read_weights(path), model)
    assert equal(read_weights(str(path)), model)


@pytest.mark.parametrize("name", ["net.safetensors", "pytorch_model.bin"])
def test_safetensors_are_told_by_their_content(tmp_path, model, name):
    save_file(model.state_dict(), tmp_path / name)
    assert equal(read_weights(tmp_path / name), model)
    assert not is_torchscript(tmp_path / name)


def test_torchscript_gives_its_weights(tmp_path, model):
    torch.jit.trace(model.eval(), torch.zeros(2, 3)).save(tmp_path / "net.pt")
    assert is_torchscript(tmp_path / "net.pt")
    assert equal(read_weights(tmp_path / "net.pt"), model)


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "model", "params", "params_ema", "net"])
def test_wrappers_are_opened(tmp_path, model, entry):
    optimizer = torch.optim.Adam(model.parameters()).state_dict()
    torch.save({"epoch": 3, entry: model.state_dict(), "optimizer": optimizer, "best": 0.5}, tmp_path / "net.pth")
    assert equal(read_weights(tmp_path / "net.pth"), model)


def test_a_wrapper_in_a_wrapper(tmp_path, model):
    torch.save(
        {"model": {"state_dict": model.state_dict(), "arch": "mlp"}, "step": torch.tensor(3)}, tmp_path / "net.pth"
    )
    assert equal(read_weights(tmp_path / "net.pth"), model)


@pytest.mark.parametrize("pair", [("params", "params_ema"), ("model", "model_ema"), ("net", "net_ema")])
def test_averaged_weights_are_taken_before_plain_ones_unless_asked_otherwise(tmp_path, model, pair):
    plain, averaged = ({"weight": torch.full((2,), value)} for value in (1.0, 2.0))
    for order in (pair, pair[::-1]):
        torch.save({name: averaged if name.endswith("ema") else plain for name in order}, tmp_path / "net.pth")
        assert read_weights(tmp_path / "net.pth")["weight"][0] == 2
        assert read_weights(tmp_path / "net.pth", entry=pair[0])["weight"][0] == 1


def test_several_models_are_not_guessed_among(tmp_path, model):
    torch.save({"generator": model.state_dict(), "discriminator": model.state_dict()}, tmp_path / "gan.pth")
    with pytest.raises(ValueError, match=r"gan\.pth holds several models: generator, discriminator; say which entry"):
        read_weights(tmp_path / "gan.pth")
    assert equal(read_weights(tmp_path / "gan.pth", entry="generator"), model)
    with pytest.raises(ValueError, match="has no entry 'teacher' with weights; it has generator, discriminator"):
        read_weights(tmp_path / "gan.pth", entry="teacher")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
def test_prefixes_of_all_names_are_taken_off(tmp_path, model, prefix):
    torch.save({"state_dict": prefixed(model.state_dict(), prefix)}, tmp_path / "net.ckpt")
    assert equal(read_weights(tmp_path / "net.ckpt"), model)


@pytest.mark.slow
def test_a_compiled_part_and_an_averaged_model(tmp_path, model):
    compiled = torch.nn.Sequential(OrderedDict({"0": torch.compile(model[0]), "1": model[1]}))
    assert any("_orig_mod" in name for name in compiled.state_dict())
    torch.save(compiled.state_dict(), tmp_path / "net.pth")
    assert equal(read_weights(tmp_path / "net.pth"), model)
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "swa.pth")
    assert equal(read_weights(tmp_path / "swa.pth"), model)


def test_a_prefix_that_only_some_names_have_is_part_of_them(tmp_path):
    state = {"model.weight": torch.ones(2), "head.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "net.pth")
    assert set(read_weights(tmp_path / "net.pth")) == set(state)


def test_expected_names_decide_about_prefixes(tmp_path, model):
    wrapped = torch.nn.ModuleDict({"model": model})
    torch.save(wrapped.state_dict(), tmp_path / "net.pth")
    assert equal(read_weights(tmp_path / "net.pth", expected=wrapped.state_dict()), wrapped)
    assert equal(read_weights(tmp_path / "net.pth", expected=model.state_dict()), model)
    torch.save({"state_dict": wrapped.state_dict() | {"loss.scale": torch.ones(1)}}, tmp_path / "lightning.ckpt")
    assert equal(read_weights(tmp_path / "lightning.ckpt", expected=model.state_dict()), model)


def test_counters_that_older_files_lack_do_not_matter(tmp_path, model):
    wrapped = torch.nn.ModuleDict({"model": model})
    state = {name: value for name, value in wrapped.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "net.pth")
    wrapped.load_state_dict(read_weights(tmp_path / "net.pth", expected=wrapped.state_dict()))
    model.load_state_dict(read_weights(tmp_path / "net.pth", expected=model.state_dict()))


def test_options_and_numpy_numbers_beside_the_weights_do_no_harm(tmp_path, model):
    about = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "epoch": np.int64(3), "n": np.int32(3)}
    torch.save({"model": model.state_dict(), **about}, tmp_path / "net.pth")
    assert equal(read_weights(tmp_path / "net.pth"), model)


def shards(folder, model, suffix="safetensors"):
    names = sorted(model.state_dict())
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {}
    for number, part in enumerate((names[:3], names[3:]), start=1):
        file = folder / f"{stem}-{number:05d}-of-00002.{suffix}"
        content = {name: model.state_dict()[name] for name in part}
        save_file(content, file) if suffix == "safetensors" else torch.save(content, file)
        places |= dict.fromkeys(part, file.name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_by_index_folder_or_any_shard(tmp_path, model, suffix):
    index = shards(tmp_path, model, suffix)
    for path in (index, tmp_path, *tmp_path.glob(f"*-of-00002.{suffix}")):
        assert equal(read_weights(path), model)


def test_a_shard_alone_and_missing_shards_are_no_model(tmp_path, model):
    index = shards(tmp_path, model)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names 1 files that are not beside it: model-00002-of-00002\.safetensors"):
        read_weights(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=r"is part 1 of 2 and model\.safetensors\.index\.json is not beside it"):
        read_weights(tmp_path / "model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '\.\./model\.safetensors', which is not a file beside it"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"none": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks none, which model\.safetensors\.index\.json says is in it"):
        read_weights(index)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of shards"):
        read_weights(index)


def test_folders(tmp_path, model):
    with pytest.raises(ValueError, match=r"holds no weights: none of model\.safetensors\.index\.json"):
        read_weights(tmp_path)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert equal(read_weights(tmp_path), model)
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"holds a\.safetensors, b\.safetensors; give one of these files"):
        read_weights(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert equal(read_weights(tmp_path), model)


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("net.pth", b"weights")
    return buffer.getvalue()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Secret:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>Log in</html>", "is a web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page"),
        (zipped(), "a zip archive; unpack it"),
        (b"\x1f\x8b\x08 some gzip", "compressed with gzip"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"hello, this is text", "is not a file of weights"),
        (pickle.dumps({"weight": [1.0, 2.0]}), "is not a file of weights"),
        (saved(torch.ones(3)), "holds a Tensor, not weights by name"),
        (saved([torch.ones(3)]), "holds a list, not weights by name"),
        (saved({}), "holds no weights; its entries are none"),
        (saved({"epoch": 3, "lr": 0.1}), "holds no weights; its entries are epoch, lr"),
        (
            saved(torch.nn.Linear(2, 2)),
            r"could run code \(torch\.nn\.modules\.linear\.Linear\); .*state_dict\(\) alone",
        ),
        (saved({"model": Secret()}), r"could run code \(builtins\.print|could run code"),
        (saved({"a": torch.ones(9999)})[:9000], "damaged or cut off|is not a file of weights"),
    ],
)
def test_what_is_no_weights_is_told_in_one_sentence(tmp_path, capsys, content, sentence):
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


def test_optimizers_alone_are_no_weights(tmp_path, model):
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    for content in (optimizer.state_dict(), {"optimizer": optimizer.state_dict(), "epoch": 3}):
        torch.save(content, tmp_path / "optimizer.pt")
        with pytest.raises(ValueError, match="the state of an optimizer"):
            read_weights(tmp_path / "optimizer.pt")
    assert read_checkpoint(tmp_path / "optimizer.pt")["optimizer"]["param_groups"][0]["lr"] == 0.001
    with pytest.raises(ValueError, match="is not a file"):
        read_checkpoint(tmp_path)


def test_cut_safetensors_and_missing_files(tmp_path, model):
    path = tmp_path / "net.safetensors"
    save_file(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"net\.safetensors is not a whole safetensors file"):
        read_weights(path)
    with pytest.raises(ValueError, match=r"none\.pth is not a file"):
        read_weights(tmp_path / "none.pth")


def test_weights_saved_twice_under_a_prefix_and_without(tmp_path):
    torch.save({"_orig_mod.weight": torch.ones(1), "weight": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="has a duplicate weight"):
        read_weights(tmp_path / "net.pth")
