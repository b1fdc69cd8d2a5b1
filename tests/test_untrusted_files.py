"""Nothing runs but the code that a pipeline names: not what a field can reach in libraries, not what a file asks for."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from plait import Run
from plait.catalogue import offers
from plait.configuration import configure, fields_of
from plait.errors import PlaitError
from plait.fields import CODE, OUTPUT, PATH_OR_NAME
from plait.hookspecs import HOOKS, hook_arguments
from plait.methods import find
from plait.testing.examples import example_for

NOT_THE_USERS = ("os:system", "subprocess:call", "builtins:eval", "shutil:rmtree", "sys:flags", "runpy:run_path")


def _methods():
    return [(hook, f"{offer.package}/{offer.name}") for hook in HOOKS for offer in offers(hook)]


def _with_field(marks):
    """(hook, method, field), one of all methods of a package that share the field."""
    found = {}
    for hook, name in _methods():
        for field in fields_of(find(hook, name).cls).values():
            if marks(field):
                found.setdefault((hook, name.partition("/")[0], field.alias), name)
    return sorted((hook, name, field) for (hook, _, field), name in found.items())


def _is_code(field):
    return CODE in field.metadata


def _is_input(field):
    return OUTPUT not in field.metadata and (PATH_OR_NAME in field.metadata or "Path" in str(field.type))


@pytest.mark.parametrize(("hook", "name", "field"), _with_field(_is_code))
def test_fields_that_name_code_do_not_reach_into_python(hook, name, field):
    for path in NOT_THE_USERS:
        with pytest.raises(PlaitError, match=r"Python's own library"):
            configure(find(hook, name), {field: path})


@pytest.mark.parametrize("path", NOT_THE_USERS)
def test_methods_that_are_none(path):
    for hook in HOOKS:
        with pytest.raises(PlaitError, match=r"Python's own library"):
            find(hook, path)


class _Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def malicious(tmp_path_factory):
    """(canary, files and folders that would make it if anything in them were carried out)."""
    root = tmp_path_factory.mktemp("malicious")
    canary = root / "canary"
    raw = pickle.dumps(_Canary(canary))
    pickle.loads(raw)
    canary.rmdir()  # it is made by whoever unpickles
    places = []
    for name in ("a.pkl", "a.pth", "a.ckpt", "a.bin", "a.npy", "a.npz", "a.pt", "a.joblib", "ind.cora.x"):
        (root / name).write_bytes(raw)
        places.append(root / name)
    torch.save({"state_dict": _Canary(canary)}, root / "b.pth")
    np.save(root / "b.npy", np.array([_Canary(canary)], dtype=object), allow_pickle=True)
    np.savez(root / "b.npz", x=np.array([_Canary(canary)], dtype=object))
    with zipfile.ZipFile(root / "c.zip", "w") as archive:
        archive.writestr("../escaped.txt", "outside")
        archive.writestr("a.pkl", raw)
    places += [root / "b.pth", root / "b.npy", root / "b.npz", root / "c.zip"]

    model = root / "model"
    model.mkdir()
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    automatic = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (model / "config.json").write_text(json.dumps({"model_type": "bert", "auto_map": automatic}))
    torch.save(_Canary(canary), model / "pytorch_model.bin")
    (model / "plait.json").write_text(json.dumps({"library": "callable", "factory": "evil:Evil", "class": "evil:Evil"}))
    (model / "module.json").write_text(json.dumps({"class": "evil:Evil", "file": str(model / "evil.py")}))
    places.append(model)

    raw_folder = root / "graphs"
    for sub in ("raw", "cora/raw", "Cora/raw"):
        (raw_folder / sub).mkdir(parents=True, exist_ok=True)
        for part in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index"):
            (raw_folder / sub / f"ind.cora.{part}").write_bytes(raw)
    (raw_folder / "processed").mkdir()
    (raw_folder / "processed" / "data.pt").write_bytes(raw)
    places.append(raw_folder)

    images = root / "images" / "one"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(raw)
    places.append(images.parent)
    return canary, places


# Fields that make a method read the file, where its defaults do not.
TOGETHER = {
    "context_file": {"text": True, "generator": "context-counts"},
    "language_model": {"text": True, "generator": "mlm"},
    "synonyms_file": {"text": True, "generator": "synonyms"},
}


def _companions(method, field, place):
    """Values for the other fields that are required."""
    others = [f for f in fields_of(method.cls).values() if f.default is attrs.NOTHING and f.alias != field]
    return {other.alias: "Cora" if other.type is str and other.alias == "name" else str(place) for other in others}


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "name", "field"), _with_field(_is_input))
def test_files_run_nothing(hook, name, field, malicious, tmp_path, monkeypatch):
    canary, places = malicious
    monkeypatch.chdir(tmp_path)
    method = find(hook, name)
    example = example_for(method)
    for place in places:
        fields = {**example.fields, **TOGETHER.get(field, {}), field: str(place), **_companions(method, field, place)}
        reads_it = False
        try:
            instance = configure(method, fields, Path())
            arguments = {**dict.fromkeys(hook_arguments(hook)), **example.arguments}
            getattr(instance, hook)(**arguments, run=Run())
        except (Exception, SystemExit):
            reads_it = True
        assert not canary.exists(), f"{name}: {field}={place.name} ran what the file asks for"
        assert not (tmp_path.parent / "escaped.txt").exists()
        if not reads_it:  # such a field is read only in another mode of the method, or any file is a table to it
            break
