"""What cleaning a backdoored CLIP costs: CPU time of each defence relative to CleanCLIP, on the same model and pairs.

    python benchmarks/clip_defences.py [--epochs 5] [--repeats 3]

The data are those of pipelines/clip-audit.yaml (1,400 digits, a tiny CLIP). The model is fresh: what a defence costs does
not depend on the weights. Minimum over the repeats; one thread.
"""

from __future__ import annotations

import argparse
import time

import torch
from plait import Run
from plait_clip.backdoor.plugin.attacks import BadNetFixed
from plait_clip.backdoor.plugin.defences import CleanClip, FineTune, Par
from plait_clip.plugin.data import Digits
from plait_clip.plugin.models import OpenClip
from plait_ta_cleaner.plugin import FtHardNegatives, TaCleaner
from plait_ubt.plugin import Ubt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="of the defences that fine-tune on clean pairs")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)

    clean = Digits().load_data(Run())["train"]
    attack = BadNetFixed(target="seven", n_poison=28, templates="digits", patch_size=2, margin=0, first=1)
    poisoned = attack.attack(None, clean, Run())
    model, reference = (OpenClip().load_model(None, Run(seed=seed)) for seed in range(2))
    training = {"num_epochs": options.epochs, "batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 0.1}
    rules = {"synonyms": "toy-data"}
    ubt = {
        "n_suspicious": 0.12,
        "overfit_learning_rate": 1e-3,
        "num_overfit_epochs": 10,
        "overfit_batch_size": 32,
        "overfit_normal_weight": 0.0,
        "min_gap_change": 0.0,
        "n_top": 24,
        "n_unlearn": 24,
        "unlearn_learning_rate": 3e-4,
        "token_selection": "all",
        "force": True,
    }
    defences = {
        "clean-clip": (CleanClip(**training, **rules), clean),
        "fine-tune": (FineTune(**training), clean),
        "ft-hard-negatives": (FtHardNegatives(**training, **rules), clean),
        "par": (Par(**{**training, "batch_size": 64}), clean),
        "ta-cleaner, K = 25 %": (TaCleaner(**training, **rules), clean),
        "ta-cleaner, K = N": (TaCleaner(**training, **rules, n_subtext=1.0), clean),
        "ubt": (Ubt(**ubt), poisoned),
        "ubt, unlearning only": (Ubt(**ubt, detection="suspected"), poisoned),
    }
    seconds: dict[str, float] = dict.fromkeys(defences, float("inf"))
    for _ in range(options.repeats):
        for name, (method, data) in defences.items():
            start = time.process_time()
            method.defend(model, data, reference, Run())
            seconds[name] = min(seconds[name], time.process_time() - start)
    print(f"{'defence':24}{'CPU time relative to CleanCLIP':>32}")
    for name, value in seconds.items():
        print(f"{name:24}{value / seconds['clean-clip']:>32.2f}")


if __name__ == "__main__":
    main()
