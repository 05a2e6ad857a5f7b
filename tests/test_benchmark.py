"""benchmark.py: it runs without a network, compares like with like, and its JSON is whole."""

import json
import sys

import pytest

from extras import benchmark
import clip_model


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_quick_run(tmp_path, monkeypatch):
    """Loss and gradients of ours equal the plain ones, so that their times may be compared."""
    def no_file(name):
        raise AssertionError(f"{name} is asked for: a fresh machine has none")
    monkeypatch.setattr(clip_model, "find_file", no_file)

    benchmark.main(
        ["--quick", "--device", "cpu", "--json", str(tmp_path / "new" / "benchmark.json")]
    )
    report = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    voc = report["rectification"]["voc"]
    assert voc["loss"] == pytest.approx(voc["plain_loss"], rel=1e-5)
    assert voc["gradients_apart"] < 1e-3
    assert {*benchmark.PARTS} == {*voc["seconds"]["ours"]} == {*voc["seconds"]["plain"]}
    for times in voc["seconds"].values():
        parts = [times[part]["min"] for part in benchmark.PARTS]
        assert all(seconds > 0 for seconds in parts)
        assert sum(parts[:-1]) == pytest.approx(parts[-1])  # one round: the parts make the step
    assert {*voc["extra_MiB"]} == {"ours", "plain"}
    assert {*voc["share_of_matmul"]} == {*benchmark.SHARES}
    assert all(report[name]["min"] > 0 for name in ("evaluation", "data"))
    assert report["distillation"]["seconds"]["min"] > 0
    assert all(report["sequel"][name]["min"] > 0 for name in ("ReCLIP", "ReCLIP++"))


def test_texts_are_as_long_as_in_openais_vocabulary():
    """One token a word: 117 tokens for VOC: start, 73 prompt vectors, 20 names with their ends."""
    model = benchmark.build_model(benchmark.DATA["voc"].classes, quick=True, device="cpu")
    lengths = [len(ending) - 1 for ending in model.reference.endings]
    assert lengths == [len(name.split()) for name in benchmark.DATA["voc"].classes]
    assert 1 + len(model.reference.vectors) + sum(lengths) + len(lengths) == 117


def test_the_taken_apart_step_is_the_models_own():
    """our_loss spells model.rectify out, to time its parts: the logits must be the same."""
    model = benchmark.build_model(["box", "gem", "star"], quick=True, device="cpu")
    Z = model.features(benchmark.torch.rand(1, 3, 64, 40))
    labels = benchmark.torch.tensor([[True, False, True]])
    laps = []

    benchmark.torch.manual_seed(0)
    loss = benchmark.our_loss(model, Z, labels, laps.append)
    benchmark.torch.manual_seed(0)
    masks = benchmark.gumbel_softmax_masks(model.rectify(Z).rectified, model.tau_1)
    pooled = benchmark.masked_features(Z, masks, model.pool)
    assert loss == benchmark.contrastive_loss(pooled, model.W_q, labels, model.tau)
    assert laps == ["loss", "text encoder", "positional net", "loss"]
