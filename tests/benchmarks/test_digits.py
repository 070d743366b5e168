"""The classifiers of docs/vision.md: trained on digits, pruned, and still right about most of them."""

from copy import deepcopy

import pytest

import wanda_fast
from benchmarks.quality import digits
from wanda_fast.data.images import as_indices, find_images

pytest.importorskip("sklearn", reason="digits are scikit-learn's")

EPOCHS = {"vit": 30, "convnext": 15}
# Accuracy that pruning may cost with any of the patterns; three seeds lost at most 0.01 and 0.06.
LOSS = {"admm": 0.03, "sparsegpt": 0.08}
# Methods that change no weight lose far more at 70%. A guess is right one time in ten.
LEAST = 0.4


@pytest.mark.parametrize("kind", EPOCHS)
def test_a_trained_classifier_survives_pruning(kind, tmp_path, one_thread):
    processor = digits.processor_in(tmp_path)
    train, test = (digits.read(purpose, processor) for purpose in ("calibration", "evaluation"))
    model = digits.trained(kind, 0, EPOCHS[kind], tmp_path / kind, *train)
    drawn = train[0][as_indices(find_images("digits", "calibration"), 512, 0)]
    found = {}
    for method in digits.METHODS:
        for pattern in digits.PATTERNS:
            pruned = deepcopy(model)
            sparsity = {"sparsity_type": pattern} if ":" in pattern else {"sparsity_ratio": float(pattern)}
            wanda_fast.prune(pruned, prune_method=method, dataset=drawn, statistics="dense", **sparsity)
            found[method, pattern] = digits.top1(pruned, *test)
    dense = digits.top1(model, *test)
    assert dense > 0.95
    assert min(found.values()) > LEAST
    for method, loss in LOSS.items():
        assert min(found[method, pattern] for pattern in digits.PATTERNS) > dense - loss
    assert found["wanda", "0.5"] > dense - 0.06
