"""benchmark.py: it runs, what it times is the same computation, and its JSON has what the README quotes."""

import json

import pytest

import benchmark


@pytest.mark.skipif(benchmark.sys.platform != "linux", reason="peak memory is read from /proc")
def test_quick_run(tmp_path):
    """Loss and gradients of ours equal the plain reference's, so that their times may be compared."""
    benchmark.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "benchmark.json")])
    report = json.loads((tmp_path / "benchmark.json").read_text())
    voc = report["rectification"]["voc"]
    assert voc["loss"] == pytest.approx(voc["plain_loss"], rel=1e-4) and voc["gradients_apart"] < 1e-3
    assert {*benchmark.PARTS} == {*voc["seconds"]["ours"]} == {*voc["seconds"]["plain"]}
    assert {*voc["extra_MiB"]} == {"ours", "plain"} and {*voc["share_of_matmul"]} == {*benchmark.SHARES}
    assert all(report[name]["min"] > 0 for name in ("evaluation", "data"))
    assert report["distillation"]["seconds"]["min"] > 0
