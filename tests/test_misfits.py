"""What does not fit is refused before anything runs, across hooks and kits: one sentence, with line and column."""

import pytest
from plait.errors import PipelineError
from plait.pipeline import parse_pipeline

# Every kind of result once or more; these fit.
STEPS = """\
digits: {load-data: warped-digits}
bare: {transform: select, from: {data: digits}, with: {columns: [image]}}
graph: {load-data: digits-graph}
nodes: {transform: node-split, from: {data: graph}, with: {per_class: 5}}
episodes: {transform: class-split, from: {data: graph}}
network: {load-model: torchvision, from: {data: digits.train}, with: {architecture: resnet18}}
classifier: {optimize: classifier-training, from: {model: network, data: digits.train}}
attacked: {attack: pgd-logits, from: {model: classifier, data: digits.test}}
fresh: {load-model: diffusion, from: {data: digits.train}}
denoiser: {optimize: diffusion, from: {model: fresh, data: digits.train}}
features: {extract-feature: gdf, from: {model: denoiser, data: attacked}}
gate: {optimize: amalgamation-gate, from: {data: {a: features, b: features}}}
fused: {extract-feature: amalgamation, from: {model: gate, data: {a: features, b: features}}}
gcn: {load-model: gnn, from: {data: nodes}}
flat: {optimize: fgsam, from: {model: gcn, data: nodes}}
restorer: {optimize: semiddm-weather, from: {data: {labelled: digits.train}}, with: {training: supervised}}
restored: {restore: semiddm-weather, from: {model: restorer, data: attacked}}
clients: {transform: federated-partition, from: {data: digits}}
plain: {load-model: federated-model, from: {data: clients.train}}
federated: {aggregate: dfedcata, from: {model: plain, clients: clients.train}}
scenes: {load-data: digit-scenes}
clip: {load-model: open-clip}
tasks: {load-data: four-tasks, with: {task: digits}}
several: {load-model: multi-task-vit, from: {data: {digits: tasks}}}
merged: {merge: ties, from: {base: several, experts: {digits: several}}}
towers: {merge: task-arithmetic, from: {base: clip, experts: {scenes: clip}}}
found: {evaluate: retrieval, from: {model: towers, data: scenes.test}}
scores: {evaluate: accuracy, from: {model: {before: network, after: classifier, of clients: federated}, data: restored}}
""".splitlines()
CLASSIFIERS = "a classifier, an image-text-model or a multi-task-model"
IMAGES = "a dataset or the data of clients"
TASKS = "a multi-task-model, a classifier or an image-text-model"
MERGED = "a multi-task-model, a classifier, an image-text-model or a model-folder"
GRAPHS = "a graph or tasks on a graph"


def problems(*steps):
    text = "plait: 1\nsteps:\n" + "".join(f"  {step}\n" for step in (*STEPS, *steps))
    try:
        parse_pipeline(text)
    except PipelineError as error:
        return error.problems
    return []


def test_steps_of_several_kits_fit():
    assert problems() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "argument", "sentence"),
    [
        # models of another kind
        ("{attack: pgd-logits, from: {model: denoiser, data: digits.test}}", "model", f"'model' of pgd-logits takes {CLASSIFIERS}, and denoiser is a diffusion-model"),
        ("{attack: pgd-logits, from: {model: flat, data: digits.test}}", "model", f"'model' of pgd-logits takes {CLASSIFIERS}, and flat is a graph-network"),
        ("{attack: torchattacks, from: {model: restorer, data: digits.test}, with: {name: PGD}}", "model", f"'model' of torchattacks takes {CLASSIFIERS}, and restorer is a restorer"),
        ("{optimize: classifier-training, from: {model: denoiser, data: digits.train}}", "model", f"'model' of classifier-training takes {CLASSIFIERS}, and denoiser is a diffusion-model"),
        ("{optimize: graph-adam, from: {model: network, data: nodes}}", "model", "'model' of graph-adam takes a graph-network, and network is a classifier"),
        ("{optimize: diffusion, from: {model: classifier, data: digits.train}}", "model", "'model' of diffusion takes a diffusion-model, and classifier is a classifier"),
        ("{optimize: semiddm-weather, from: {model: denoiser, data: {labelled: digits.train}}}", "model", "'model' of semiddm-weather takes a restorer, and denoiser is a diffusion-model"),
        ("{extract-feature: gdf, from: {model: classifier, data: digits}}", "model", "'model' of gdf takes a diffusion-model, and classifier is a classifier"),
        ("{extract-feature: content-shift, from: {model: restorer, data: digits}, with: {extractor: gdf}}", "model", "'model' of content-shift takes a diffusion-model, and restorer is a restorer"),
        ("{extract-feature: amalgamation, from: {model: denoiser, data: {a: features, b: fused}}}", "model", "'model' of amalgamation takes an amalgamation-gate, and denoiser is a diffusion-model"),
        ("{restore: semiddm-weather, from: {model: classifier, data: digits}}", "model", "'model' of semiddm-weather takes a restorer, and classifier is a classifier"),
        ("{defend: restore-first, from: {model: classifier, reference: restorer}}", "model", "'model' of restore-first takes an image-text-model, and classifier is a classifier"),
        ("{evaluate: accuracy, from: {model: {a: classifier, b: gcn}, data: digits.test}}", "model", f"'model' of accuracy takes {CLASSIFIERS}, and gcn is a graph-network"),
        ("{evaluate: node-accuracy, from: {model: flat, data: nodes, reference: classifier}}", "reference", "'reference' of node-accuracy takes a graph-network, and classifier is a classifier"),
        ("{evaluate: learned-quality, from: {model: denoiser, data: restored}}", "model", "'model' of learned-quality takes a restorer, and denoiser is a diffusion-model"),
        ("{aggregate: fedavg, from: {model: clip, clients: clients.train}}", "model", "'model' of fedavg takes a classifier, and clip is an image-text-model"),
        ("{aggregate: dfedcata, from: {model: denoiser, clients: clients.train}}", "model", "'model' of dfedcata takes a classifier, and denoiser is a diffusion-model"),
        ("{evaluate: federated-accuracy, from: {model: gcn, data: digits.test}}", "model", f"'model' of federated-accuracy takes {CLASSIFIERS}, and gcn is a graph-network"),
        ("{attack: pgd, from: {model: federated, data: scenes.test}}", "model", "'model' of pgd takes an image-text-model, and federated is a classifier"),
        ("{defend: clean-clip, from: {model: federated, data: scenes.train}}", "model", "'model' of clean-clip takes an image-text-model, and federated is a classifier"),
        ("{optimize: clip-contrastive, from: {model: denoiser, data: scenes.train}}", "model", "'model' of clip-contrastive takes an image-text-model, and denoiser is a diffusion-model"),
        ("{evaluate: retrieval, from: {model: several, data: scenes.test}}", "model", "'model' of retrieval takes an image-text-model, and several is a multi-task-model"),
        ("{optimize: multi-task, from: {model: denoiser, data: {digits: tasks.train}}}", "model", f"'model' of multi-task takes {TASKS}, and denoiser is a diffusion-model"),
        ("{merge: wemoe, from: {base: several, experts: {a: several, b: denoiser}, data: {a: tasks.test, b: tasks.test}}}", "experts", f"'experts' of wemoe takes {MERGED}, and denoiser is a diffusion-model"),
        ("{evaluate: retrieval, from: {model: merged, data: scenes.test}}", "model", "'model' of retrieval takes an image-text-model, and merged is a multi-task-model"),
        ("{aggregate: fedavg, from: {model: towers, clients: clients.train}}", "model", "'model' of fedavg takes a classifier, and towers is an image-text-model"),
        # data of another kind
        ("{transform: resize, from: {data: graph}, with: {size: 8}}", "data", f"'data' of resize takes {IMAGES}, and graph is a graph"),
        ("{transform: concat, from: {data: [digits.train, features]}}", "data", f"'data' of concat takes {IMAGES}, and features is a feature-set"),
        ("{transform: node-split, from: {data: digits}}", "data", f"'data' of node-split takes {GRAPHS}, and digits is a dataset"),
        ("{load-model: gnn, from: {data: digits.train}}", "data", f"'data' of gnn takes {GRAPHS}, and digits.train is a dataset"),
        ("{load-model: diffusion, from: {data: nodes}}", "data", f"'data' of diffusion takes {IMAGES}, and nodes is a graph"),
        ("{attack: fgsm, from: {model: classifier, data: episodes}}", "data", f"'data' of fgsm takes {IMAGES}, and episodes is tasks on a graph"),
        ("{optimize: fgsam, from: {model: gcn, data: digits.train}}", "data", f"'data' of fgsam takes {GRAPHS}, and digits.train is a dataset"),
        ("{optimize: amalgamation-gate, from: {data: {a: features, b: digits.test}}}", "data", "'data' of amalgamation-gate takes a feature-set, and digits.test is a dataset"),
        ("{extract-feature: vision, from: {model: classifier, data: features}}", "data", f"'data' of vision takes {IMAGES}, and features is a feature-set"),
        ("{restore: semiddm-weather, from: {model: restorer, data: fused}}", "data", f"'data' of semiddm-weather takes {IMAGES}, and fused is a feature-set"),
        ("{evaluate: feature-probe, from: {data: digits.test}}", "data", "'data' of feature-probe takes a feature-set, and digits.test is a dataset"),
        ("{evaluate: activation-ranking, from: {data: features, reference: digits.test}}", "reference", "'reference' of activation-ranking takes a feature-set, and digits.test is a dataset"),
        ("{evaluate: episode-accuracy, from: {model: gcn, data: nodes}}", "data", "'data' of episode-accuracy takes tasks on a graph, and nodes is a graph"),
        ("{evaluate: graph-sharpness, from: {model: flat, data: features}}", "data", f"'data' of graph-sharpness takes {GRAPHS}, and features is a feature-set"),
        ("{aggregate: fedavg, from: {model: plain, clients: features}}", "clients", f"'clients' of fedavg takes {IMAGES}, and features is a feature-set"),
        ("{transform: federated-partition, from: {data: graph}}", "data", "'data' of federated-partition takes a dataset, and graph is a graph"),
        ("{optimize: diffusion, from: {model: fresh, data: clients}}", "data", "'data' of diffusion takes a dataset, and clients is the data of clients"),
        ("{attack: pgd, from: {model: clip, data: clients}}", "data", "'data' of pgd takes a dataset, and clients is the data of clients"),
        ("{attack: badnet-fixed, from: {data: graph}}", "data", "'data' of badnet-fixed takes a dataset, and graph is a graph"),
        ("{restore: median, from: {data: graph}}", "data", f"'data' of median takes {IMAGES}, and graph is a graph"),
        ("{ensemble: average, from: {candidates: {a: digits.test, b: graph}}}", "candidates", "'candidates' of average takes a dataset, and graph is a graph"),
        ("{evaluate: psnr-ssim, from: {data: features, reference: digits.test}}", "data", "'data' of psnr-ssim takes a dataset, and features is a feature-set"),
        # what is no model, and what is nothing at all
        ("{attack: fgsm, from: {model: digits, data: digits.test}}", "model", "'model' wants a model, and digits is data (a load-data step)"),
        ("{restore: semiddm-weather, from: {model: restorer, data: network}}", "data", "'data' wants data, and network is a model (a load-model step)"),
        ("{evaluate: accuracy, from: {model: classifier, data: scores}}", "data", "scores is a report, which no step takes"),
        # splits and columns
        ("{evaluate: accuracy, from: {model: classifier, data: digits.tset}}", "data", "digits has no split 'tset' (did you mean 'test'?); it has train, test"),
        ("{optimize: diffusion, from: {model: fresh, data: bare.val}}", "data", "bare has no split 'val'; it has train, test"),
        ("{transform: caption, from: {data: bare}}", "data", "caption needs the column 'label' of 'data', and bare lacks it; it has image"),
        ("{transform: select, from: {data: digits}, with: {columns: [image, lable]}}", "data", "select needs the column 'lable' of 'data', and digits lacks it (did you mean 'label'?); it has image, label"),
        ("{optimize: classifier-training, from: {model: network, data: bare.train}}", "data", "classifier-training needs the column 'label' of 'data', and bare.train lacks it; it has image"),
        ("{transform: federated-partition, from: {data: bare}}", "data", "federated-partition needs the column 'label' of 'data', and bare lacks it; it has image"),
        ("{aggregate: oledfl, from: {model: plain, clients: bare.train}}", "clients", "oledfl needs the column 'label' of 'clients', and bare.train lacks it; it has image"),
        ("{evaluate: zero-shot, from: {model: clip, data: bare.test}}", "data", "zero-shot needs the column 'label' of 'data', and bare.test lacks it; it has image"),
        ("{optimize: restoration-network, from: {data: digits.train, model: network}}", "data", "restoration-network needs the column 'target' of 'data', and digits.train lacks it; it has image, label"),
        ("{attack: pgd-logits, from: {model: classifier, data: bare.test}}", "data", "pgd-logits needs the column 'label' of 'data', and bare.test lacks it; it has image"),
        ("{extract-feature: gdf, from: {model: denoiser, data: digits}, with: {prompt_column: captions}}", "data", "gdf needs the column 'captions' of 'data', and digits lacks it; it has image, label"),
        ("{extract-feature: content-shift, from: {model: denoiser, data: restored}, with: {extractor: gdf, caption_column: text}}", "data", "content-shift needs the column 'text' of 'data', and restored lacks it; it has image, label"),
    ],
)  # fmt: skip
def test_a_misfit_is_one_sentence_with_its_place(step, argument, sentence):
    line = f"  x: {step}"
    column = line.index(f"{argument}: ", line.index("from: ")) + 1
    assert problems(f"x: {step}") == [f"<text>:{3 + len(STEPS)}:{column}: step x: {sentence}"]
