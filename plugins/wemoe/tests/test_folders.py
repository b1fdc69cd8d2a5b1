"""Folders of safetensors are merged tensor by tensor: as in memory, in the base's layout, within little memory."""

import functools
import json
import os
import shutil
import subprocess
import sys

import plait
import pytest
import torch
import transformers
from plait import codecs
from plait_wemoe import plugin
from plait_wemoe.baselines import static
from plait_wemoe.folders import ModelFolder, merge_folders
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CAUSAL = transformers.LlamaConfig(
    vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=False,
)  # fmt: skip
METHODS = {
    "simple-average": plugin.SimpleAverage(),
    "task-arithmetic": plugin.TaskArithmetic(scaling=0.7),
    "ties": plugin.Ties(),
    "ties, mean, share of every tensor": plugin.Ties(merge_function="mean", keep=0.5, keep_of="tensor"),
    "dare": plugin.Dare(),
    "dare, then ties": plugin.Dare(then="ties", drop_rate=0.3),
}


def saved(model, folder, shard="4KB"):
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folders(request, tmp_path_factory):
    """A base in many shards, with a tokenizer beside it, and two experts in other shards."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(CAUSAL).to(request.param)
    saved(base, folder / "base")
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "base" / "README.md").write_text("of the base")
    (folder / "base" / "pytorch_model.bin").write_bytes(b"the same again")
    for index, name in enumerate(("a", "b")):
        expert = transformers.LlamaForCausalLM(CAUSAL).to(request.param)
        expert.load_state_dict({n: (v + 0.1 * torch.randn(v.shape)).to(v.dtype) for n, v in base.state_dict().items()})
        saved(expert, folder / name, ("1GB", "9KB")[index])
    return folder


def state(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def loaded(folders, name):
    return plugin.FolderModel(folder=folders / name).load_model(run=plait.Run())


def pool(folders):
    return {"base": loaded(folders, "base"), "experts": {name: loaded(folders, name) for name in ("a", "b")}}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_folders_are_merged_to_the_bits_of_models_in_memory(folders, method, tmp_path):
    merged = method.merge(**pool(folders), data=None, run=plait.Run(seed=3, folder=tmp_path / "scratch"))
    opened = {name: ModelFolder(folders / name).open() for name in ("base", "a", "b")}
    whole = method.merge(
        base=opened["base"], experts={"a": opened["a"], "b": opened["b"]}, data=None, run=plait.Run(seed=3)
    )
    found, expected = state(merged.path), whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)

    codecs.save(merged, tmp_path / "stored")
    shutil.rmtree(tmp_path / "scratch")
    again = codecs.load(tmp_path / "stored")
    assert isinstance(again, ModelFolder)
    repeated = method.merge(**pool(folders), data=None, run=plait.Run(seed=3, folder=tmp_path / "repeated"))
    assert again == repeated != loaded(folders, "base")
    assert state(again.path).keys() == found.keys()
    with torch.no_grad():
        ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(again.open()(ids).logits, whole(ids).logits)


def test_the_layout_is_the_bases(folders, tmp_path):
    out = merge_folders(static.arithmetic(0.3), folders / "base", {"a": folders / "a"}, tmp_path / "out").path
    base = folders / "base"
    copied = {file.name for file in base.iterdir()} - {"README.md", "pytorch_model.bin"}
    assert {file.name for file in out.iterdir()} == copied
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((base / index).read_text())
    assert len(set(json.loads((out / index).read_text())["weight_map"].values())) > 3
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as one, safe_open(out / file.name, "pt") as two:
            assert set(one.keys()) == set(two.keys())
            assert one.metadata() == two.metadata()
            assert all(one.get_slice(n).get_shape() == two.get_slice(n).get_shape() for n in one.keys())  # noqa: SIM118
            assert all(one.get_slice(n).get_dtype() == two.get_slice(n).get_dtype() for n in one.keys())  # noqa: SIM118
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def copy_of(folders, tmp_path, change):
    """A folder like expert a, some of whose tensors are changed."""
    tensors = state(folders / "a")
    tensors.update(change(tensors))
    tensors = {name: value for name, value in tensors.items() if value is not None}
    shutil.copytree(folders / "a", tmp_path / "changed")
    save_file(tensors, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    return tmp_path / "changed"


NORM = "model.norm.weight"


def not_finite(value):
    value = value.clone()
    value[2] = float("inf")
    return value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {NORM: None}, r"expert 'a' .* of another architecture than the base: missing \['model\.norm\.weight'\]"),
        (lambda t: {"extra": torch.ones(2)}, r"surplus \['extra'\]"),
        (lambda t: {NORM: torch.ones(3, dtype=t[NORM].dtype)}, r"model\.norm\.weight is \(3,\) in expert 'a', \(16,\) in the base"),
        (lambda t: {NORM: t[NORM].to(torch.float16)}, r"model\.norm\.weight is torch\.float16 in expert 'a'"),
        (lambda t: {NORM: not_finite(t[NORM])}, r"model\.norm\.weight of expert 'a' holds a value that is not finite"),
        (lambda t: {NORM: t[NORM] * float("nan")}, r"model\.norm\.weight of expert 'a' holds a value that is not finite"),
        (lambda t: {NORM: t[NORM].to(torch.float8_e4m3fn)}, r"is of type F8_E4M3; dequantise it"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("recipe", [static.averaging(), static.trimming(0.3, 20)], ids=["average", "ties"])
def test_experts_that_do_not_fit_are_refused_and_nothing_is_left(folders, tmp_path, change, match, recipe):
    experts = {"a": copy_of(folders, tmp_path, change)}
    with pytest.raises(ValueError, match=match):
        merge_folders(recipe, folders / "base", experts, tmp_path / "out")
    assert [place.name for place in tmp_path.iterdir()] == ["changed"]


def test_results_beyond_the_range_of_the_type_are_refused(folders, tmp_path):
    big = {name: (value * 1e38).to(value.dtype) for name, value in state(folders / "a").items() if "norm" in name}
    experts = {"a": copy_of(folders, tmp_path, lambda tensors: big)}
    with pytest.raises(ValueError, match=r"norm.*weight merged by task arithmetic is beyond the range of torch"):
        merge_folders(static.arithmetic(9.0), folders / "base", experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_read(folders, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        ModelFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no safetensors"):
        ModelFolder(tmp_path)
    shutil.copytree(folders / "base", tmp_path / "cut")
    first = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"is not a whole safetensors file \(.*\); copy it again"):
        _ = ModelFolder(tmp_path / "cut").layout
    first.unlink()
    with pytest.raises(ValueError, match=f"names '{first.name}', which is not a file beside it"):
        ModelFolder(tmp_path / "cut")
    first.write_bytes(content)
    (tmp_path / "cut" / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="leave one set of weights there"):
        ModelFolder(tmp_path / "cut")
    with pytest.raises(ValueError, match="is there already"):
        merge_folders(static.averaging(), folders / "base", {"a": folders / "a"}, tmp_path / "cut")
    with pytest.raises(ValueError, match="there is no expert"):
        merge_folders(static.averaging(), folders / "base", {}, tmp_path / "out")
    with pytest.raises(TypeError, match="the base is a folder, expert 'a' a LlamaForCausalLM; load both alike"):
        plugin.Ties().merge(
            base=loaded(folders, "base"), experts={"a": loaded(folders, "a").open()}, data=None, run=plait.Run()
        )
    with pytest.raises(ValueError, match="statistics is recompute, which needs the models in memory"):
        plugin.Ties(statistics="recompute").merge(**pool(folders), data=None, run=plait.Run())


def test_an_expert_that_equals_the_base_is_told(folders, tmp_path):
    said = []
    merge = functools.partial(
        merge_folders, static.averaging(), folders / "base", {"a": folders / "a", "b": folders / "base"}
    )
    merge(tmp_path / "out", warn=said.append)
    assert said == ["expert 'b' equals the base bit by bit; it adds nothing"]
    with pytest.raises(ValueError, match="expert 'b' equals the base bit by bit; fine-tune it"):
        merge(tmp_path / "other", strict=True)


def test_a_reference_knows_its_folder_and_refuses_another(folders, tmp_path):
    shutil.copytree(folders / "a", tmp_path / "model")
    codecs.save(ModelFolder(tmp_path / "model"), tmp_path / "stored")
    assert sum(file.stat().st_size for file in (tmp_path / "stored").rglob("*") if file.is_file()) < 2000
    found = codecs.load(tmp_path / "stored")
    assert found.path == (tmp_path / "model").resolve()
    assert found.fingerprint == ModelFolder(tmp_path / "model").fingerprint
    os.utime(tmp_path / "model" / "config.json", (1, 1))
    with pytest.raises(ValueError, match="has changed since it was loaded"):
        ModelFolder.from_pretrained(tmp_path / "stored" / "content" / "model")


def test_heads_of_classifiers_stay_the_bases_and_may_differ(tmp_path):
    config = transformers.DistilBertConfig(vocab_size=10, dim=8, hidden_dim=12, n_layers=1, n_heads=2)
    torch.manual_seed(0)
    for name, labels in {"base": 2, "a": 3, "b": 4}.items():
        config.num_labels = labels
        transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path / name)
    said = []
    experts = {name: tmp_path / name for name in ("a", "b")}
    out = merge_folders(static.averaging(), tmp_path / "base", experts, tmp_path / "out", warn=said.append).path
    base, a, b, merged = (state(folder) for folder in (tmp_path / "base", *experts.values(), out))
    heads = {name for name in base if name.startswith(("classifier.", "pre_classifier."))}
    assert len(heads) == 4
    assert all(torch.equal(merged[name], base[name]) for name in heads)
    assert all(torch.allclose(merged[name], (a[name] + b[name]) / 2, atol=1e-6) for name in base.keys() - heads)
    assert said == ["heads are not merged: classifier.bias, classifier.weight, pre_classifier.bias stay the base's"]


def test_folders_are_opened_for_methods_that_need_the_models(tmp_path):
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    models = {name: transformers.BertForSequenceClassification(config).eval() for name in ("base", "a", "b")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    found = {name: ModelFolder(tmp_path / name) for name in models}
    one, two = (
        plugin.Individual().merge(
            base=pool["base"], experts={"a": pool["a"], "b": pool["b"]}, data=None, run=plait.Run()
        )
        for pool in (models, found)
    )
    ids = {"input_ids": torch.tensor([[3, 4]])}
    with torch.no_grad():
        assert torch.equal(one.logits(ids, "a"), two.logits(ids, "a"))


# ------------------------------------------------------------------------------------ definitions of others


def by_hand(tmp_path, recipe, base, **experts):
    for name, value in {"base": base, **experts}.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(value)}, tmp_path / name / "model.safetensors")
    found = merge_folders(recipe, tmp_path / "base", {n: tmp_path / n for n in experts}, tmp_path / "out")
    return state(found.path)["w"].tolist()


def test_linear_of_equal_weights_is_the_simple_average(tmp_path):
    assert by_hand(tmp_path, static.averaging(), [0.0, 1.0], a=[1.0, 2.0], b=[3.0, -4.0]) == [2.0, -1.0]


def test_task_arithmetic_of_equal_weights(tmp_path):
    # θ₀ + 0.5 ((1 − 0) + (3 − 0)), θ₀ + 0.5 ((2 − 1) + (−4 − 1))
    assert by_hand(tmp_path, static.arithmetic(0.5), [0.0, 1.0], a=[1.0, 2.0], b=[3.0, -4.0]) == [2.0, -1.0]


VECTORS = {"a": [4.0, -3.0, 0.5, 1.0], "b": [2.0, 4.0, -0.25, 0.0]}


@pytest.mark.parametrize(("function", "expected"), [("sum", [6.0, 4.0, 0.0, 0.0]), ("mean", [3.0, 4.0, 0.0, 0.0])])
def test_ties_of_one_tensor(tmp_path, function, expected):
    """Kept are 4, −3 and 2, 4 (a quarter, and the entry at the threshold); the sums 6 and 1 elect +; at the second only 4 agrees."""
    assert by_hand(tmp_path, static.trimming(1.0, 25, function), [0.0] * 4, **VECTORS) == expected


def test_one_threshold_of_ties_is_that_of_all_tensors(tmp_path):
    """A quarter of all entries, and the one at the threshold: nothing of the tensor with the small changes."""
    for name, value in {"base": 0.0, "a": 1.0}.items():
        (tmp_path / name).mkdir()
        tensors = {"large": value * torch.tensor([4.0, -3.0]), "small": value * torch.tensor([0.5, 1.0])}
        save_file(tensors, tmp_path / name / "model.safetensors")
    recipe = static.trimming(1.0, 25)
    found = state(merge_folders(recipe, tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out").path)
    assert {name: value.tolist() for name, value in found.items()} == {"large": [4.0, -3.0], "small": [0.0, 0.0]}


def test_dare_keeps_an_entry_rescaled_or_not_at_all(tmp_path):
    recipe = static.dropping(0.75, static.arithmetic(0.5), torch.Generator().manual_seed(0))
    found = torch.tensor(by_hand(tmp_path, recipe, [0.0] * 400, a=[1.0] * 400))
    assert set(found.tolist()) == {0.0, 2.0}  # 0.5 · 1 / (1 − 0.75)
    assert (found != 0).double().mean().item() == pytest.approx(0.25, abs=0.07)


# ------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
from pathlib import Path
from plait_wemoe import states
from plait_wemoe.baselines import static
from plait_wemoe.folders import ModelFolder, merge_folders
import torch

torch.set_num_threads(1)
states.PIECE = 1 << 14  # what pieces take does not depend on the models
folder = Path(sys.argv[1])
recipes = {"average": static.averaging(), "ties": static.trimming(0.3, 20)}


def status(entry):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 1024  # MiB


def growth(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    result = work()
    return status("VmHWM") - before


def merge(recipe, place, out):
    return merge_folders(recipe, place / "base", {t: place / t for t in "ab"}, folder / out)


for name, recipe in recipes.items():
    merge(recipe, folder / "small", f"warm-{name}")
    print(growth(lambda: merge(recipe, folder, f"out-{name}")))
print(growth(lambda: {t: {n: v.clone() for n, v in ModelFolder(folder / t).state().items()} for t in ("base", "a")}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not measure peaks anew")
def test_peak_memory_is_a_part_of_one_model(tmp_path):
    """Three models of 64 MiB in two shards each: what a merge adds to the peak is far below one of them."""
    torch.manual_seed(0)
    for place, rows in {tmp_path / "small": 8, tmp_path: 1024}.items():
        for name in ("base", "a", "b"):
            (place / name).mkdir(parents=True)
            where = {}
            for shard in range(2):
                file = f"model-{shard + 1:05d}-of-00002.safetensors"
                tensors = {f"layers.{shard}.{i}.weight": torch.randn(rows, 256) for i in range(32)}
                save_file(tensors, place / name / file, {"format": "pt"})
                where |= dict.fromkeys(tensors, file)
            index = {"metadata": {"total_size": 64 * rows * 1024}, "weight_map": where}
            (place / name / "model.safetensors.index.json").write_text(json.dumps(index))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    average, ties, two_models = map(float, done.stdout.split())
    assert two_models > 64  # what is measured is memory; some of it is still held from before
    assert max(average, ties) < 64 / 2


@pytest.mark.slow
def test_a_pipeline_that_moved_with_its_models_reads_them_where_they_are_now(folders, tmp_path):
    """The key of a path below the pipeline does not name where it lies, and a reference does."""
    text = "plait: 1\nsteps: {model: {load-model: model-folder, with: {folder: ./model}}}\n"
    shutil.copytree(folders / "a", tmp_path / "before" / "model")
    (tmp_path / "before" / "p.yaml").write_text(text)
    runs = {"store": tmp_path / "store", "out": tmp_path / "runs"}
    first = plait.run(tmp_path / "before" / "p.yaml", **runs).output("model")
    assert first.path == (tmp_path / "before" / "model").resolve()
    (tmp_path / "before").rename(tmp_path / "after")
    again = plait.run(tmp_path / "after" / "p.yaml", **runs).output("model")
    assert again.path == (tmp_path / "after" / "model").resolve()
    theirs = load_file(folders / "a" / "model.safetensors")
    assert all(torch.equal(again.state()[name], value) for name, value in theirs.items())
