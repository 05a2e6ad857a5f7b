"""train.py under torchrun, with two gloo processes on the CPU: gradients, determinism, and what
a killed rank does.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import train
from conftest import ROOT
from reclip import ReCLIP, contrastive_loss, gumbel_softmax_masks, masked_features


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(arguments, processes=2):
    """Starts the ranks as torchrun would, one process each, so that a test can kill one of them."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(processes)
    ]


@pytest.fixture
def command(make_voc, tiny_clip_file, tmp_path):
    root = make_voc({"train": 5})
    return lambda out, *more: [
        "--stage",
        "rectify",
        "--data",
        "voc",
        "--root",
        str(root),
        "--clip",
        str(tiny_clip_file),
        "--device",
        "cpu",
        "--crop",
        "32",
        "--epochs",
        "2",
        "--out",
        str(tmp_path / out),
        *more,
    ]


def gradients_of_rank(rank, port, file):
    """One step on half of the batch; rank 0 stores the averaged gradients."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    gradients = one_step(rank * 2, 2)
    if rank == 0:
        torch.save(gradients, file)
    dist.destroy_process_group()


def one_step(first, count):
    """Gradients of Eq. (1)-(5) on `count` of four images, from `first` on, through
    train.average_gradients.
    """
    from clip_model import load_clip
    from datasets import DATA

    torch.manual_seed(0)
    facts = DATA["shapes"]
    model = ReCLIP(
        load_clip(facts.clip), facts.classes, prompts=facts.prompts, tau=0.033, tau_1=1e-6
    ).train()
    model.double()  # no rounding to hide behind
    Z = model.features(torch.rand(4, 3, 64, 64, dtype=torch.float64))
    labels = torch.rand(4, 8) > 0.5
    labels[:, 0] = True
    parts = model.learnable_modules()
    parameters = [p for part in parts.values() for p in part.parameters()]
    torch.manual_seed(7)
    noise = torch.distributions.Gumbel(0, 1).sample((4, 8, 8, 8))
    original, nn.functional.gumbel_softmax = (
        nn.functional.gumbel_softmax,
        seeded_masks(noise[first : first + count]),
    )
    Z, labels = Z[first : first + count], labels[first : first + count]
    masks = gumbel_softmax_masks(model.rectify(Z).rectified, model.tau_1)
    pooled = masked_features(Z, masks, model.pool)
    contrastive_loss(pooled, model.W_q, labels, model.tau).backward()
    train.average_gradients(parameters)
    nn.functional.gumbel_softmax = original
    return {
        f"{name}.{key}": p.grad
        for name, part in parts.items()
        for key, p in part.named_parameters()
    }


def seeded_masks(noise):
    """Eq. (4) with given noise: pictures keep theirs, however they are dealt to ranks."""

    def masks(logits, tau, hard, dim):
        soft = (1e-5 * logits + noise).softmax(
            dim
        )  # a temperature at which the gradient is of ordinary size
        return (
            torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
            + soft
            - soft.detach()
        )

    return masks


def test_averaged_gradient_of_two_ranks_is_that_of_the_joined_batch(tmp_path):
    mp.spawn(gradients_of_rank, (free_port(), tmp_path / "gradients.pt"), nprocs=2)
    apart, joined = torch.load(tmp_path / "gradients.pt", weights_only=True), one_step(0, 4)
    assert set(apart) == set(joined) and max(g.abs().max().item() for g in joined.values()) > 1e-6
    for name, gradient in joined.items():
        assert (apart[name] - gradient).norm() <= 1e-12 * max(1, gradient.norm()), name


def test_two_ranks_share_the_steps_and_one_alone_cannot_resume(command, tmp_path):
    """5 pictures, 2 epochs, 2 ranks: 5 steps of 2 pictures, uneven to the epoch; rank 0 writes
    log and checkpoint.
    """
    ranks = torchrun(command("run"))
    ends = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    with (tmp_path / "run" / "rectify_log.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    epochs = [0, 0, 0, 1, 1]  # of the images that both have seen: 0, 2, 4, 6, 8 of 5
    assert rates == pytest.approx([0.01 * (1 - e / 200) ** 0.9 for e in epochs], rel=1e-6)
    state = torch.load(tmp_path / "run" / "rectify_state.pt", weights_only=True)
    assert state["step"] == 5 and state["identity"]["processes"] == 2
    with pytest.raises(ValueError, match="processes was 2, now 1"):
        train.main(command("run", "--resume"))


def nan_of_one_rank(rank, port, folder):
    """A gradient that is NaN in process 1 alone; what each process says of the step goes to a
    file.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weight = nn.Parameter(torch.ones(3))
    run = train.Run("rectify", folder, {})
    run.saved = 4
    for step, factor in ((5, 1.0), (6, float("nan") if rank == 1 else 1.0)):
        weight.grad = None
        loss = (factor * weight).sum()
        loss.backward()
        train.average_gradients([weight])
        try:
            run.require_finite(step, loss, [weight], [f"image of {rank}"])
        except ValueError as error:
            (folder / f"{rank}.txt").write_text(f"{step}: {error}")
    dist.destroy_process_group()


def test_nan_of_one_rank_ends_both_at_the_same_step(tmp_path):
    mp.spawn(nan_of_one_rank, (free_port(), tmp_path), nprocs=2)
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert said.startswith("6: ") and f"at step 6 on image of {rank}" in said
        assert "holds step 4" in said and "the step was not taken" in said


def test_ranks_share_the_stream_without_overlap(monkeypatch, tmp_path):
    """Five steps of two ranks with three pictures each are the first thirty of the stream, each
    once.
    """

    class Stream(torch.utils.data.Dataset):
        def __getitem__(self, s):
            return torch.tensor([s]), torch.tensor([s % 2 == 0]), "any"

    seen = []
    for rank in range(2):
        monkeypatch.setattr(train, "rank_and_world", lambda: (rank, 2))
        run = train.Run("rectify", tmp_path, {})
        run.begin({}, None, steps=5, images_per_step=6, images_per_epoch=30)
        batches = run.batches(Stream(), 3)
        seen.append([])
        for _, images, valid, names in batches:
            seen[rank].append(images.flatten().tolist())
            assert valid.flatten().tolist() == [s % 2 == 0 for s in seen[rank][-1]]
            assert list(names) == ["any"] * 3
        assert [len(batch) for batch in seen[rank]] == [3] * 5
    assert sorted(sum(seen[0] + seen[1], [])) == list(range(30))
    assert sorted(seen[0][1] + seen[1][1]) == list(range(6, 12))  # the second step


def test_a_killed_rank_ends_the_other_with_a_sentence(command, tmp_path):
    ranks = torchrun(command("run", "--epochs", "200"))
    log = tmp_path / "run" / "rectify_state.pt"
    deadline = time.time() + 120
    while not log.exists() and time.time() < deadline:
        time.sleep(0.2)
    os.kill(ranks[1].pid, signal.SIGKILL)
    _, errors = ranks[0].communicate(timeout=120)
    ranks[1].communicate()
    assert ranks[0].returncode == 1, errors
    assert (
        "train.py: process 1 failed or lost another one" in errors.splitlines()[-1]
        and "--resume" in errors
    )


def test_stages_of_one_process_are_refused_under_torchrun(tmp_path):
    (rank,) = torchrun(["--stage", "all", "--device", "cpu", "--out", str(tmp_path)], processes=1)
    _, errors = rank.communicate(timeout=120)
    assert rank.returncode == 1 and "train.py: --stage all runs in one process" in errors


def test_noise_differs_from_step_to_step_and_from_rank_to_rank(monkeypatch, tmp_path):
    """Else two processes would draw the same masks, or one the same noise for ever."""

    class Stream(torch.utils.data.Dataset):
        def __getitem__(self, s):
            return torch.tensor([s]), torch.tensor([True]), "any"

    drawn = []
    for rank in range(2):
        monkeypatch.setattr(train, "rank_and_world", lambda: (rank, 2))
        for seed in (0, 1):
            run = train.Run("rectify", tmp_path, {}, seed)
            run.begin({}, None, steps=5, images_per_step=2, images_per_epoch=10)
            drawn += [torch.rand(()).item() for _ in run.batches(Stream(), 1)]
    assert len(set(drawn)) == len(drawn) == 20
