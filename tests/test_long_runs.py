"""What a training must survive: kills, a full disk, several processes, other machines, odd images.

SLOW=1 kills sixty times, and trains on a folder of 100 images.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import reclip
import train
from clip_model import load_clip, written_atomically
from conftest import ROOT, SLOW, close, command, sentence
from datasets import DATA, Folder, open_split
from deeplab import HEADS, DeepLabV2
from reclip import ReCLIP
from test_train import equal, file_of, log_of


@pytest.fixture
def arguments(tiny_clip_file, tmp_path):
    """arguments(stage, out, ...) of train.py, for a folder of five images, six epochs."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        noise = rng.integers(0, 256, (30 + i, 50 - i, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("a photo of a {}\n")

    def make(stage, out, *more):
        given = [
            "--stage", stage, "--data", tmp_path / "photos", "--classes", "cat, dog, grass",
            "--clip", tiny_clip_file, "--out", tmp_path / out, "--device", "cpu", "--epochs", 6,
            "--crop", 32, "--rectify-short-side", 32, "--distill-crop", 32, "--distill-batch", 2,
            "--student", "tiny", "--backbone-weights", "none",
        ]
        if stage == "rectify":
            given += ["--prompts", tmp_path / "prompts.txt", "--positional-channels", 3]
        return [str(value) for value in (*given, *more)]

    return make


def same_end(one, other, stage="rectify"):
    """Both trainings left the same checkpoint, to the bit, and the same log."""
    assert equal(file_of(one, stage), file_of(other, stage))
    assert log_of(one, stage) == log_of(other, stage)


# --- kill -9 --------------------------------------------------------------------------------------

# Moments of "written beside, flushed, renamed": the function that is called then, and how much of
# it is still done.
MOMENTS = {
    "half of a checkpoint is written": (torch, "save", "half"),
    "before a file is flushed": (os, "fsync", "nothing"),
    "before it is renamed": (os, "replace", "nothing"),
    "after it was renamed": (os, "replace", "all"),
    "between the log and the checkpoint": (ReCLIP, "save", "nothing"),
    "in the middle of an epoch": (train, "require_finite", "nothing"),
}


def train_until(arguments, moment=None, count=0):
    """A process of its own: trains, and kills itself when the moment comes the count-th time."""
    torch.set_num_threads(1)
    if moment:
        owner, name, done = MOMENTS[moment]
        function = getattr(owner, name)
        calls = []

        def deadly(*given, **more):
            calls.append(given)
            if len(calls) < count:
                return function(*given, **more)
            if done != "nothing":
                function(*given, **more)
            if done == "half":
                os.truncate(given[1], os.path.getsize(given[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, deadly)
    train.main(arguments)


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_killed_at_any_moment_a_training_ends_as_if_it_had_not_been(arguments, tmp_path):
    """kill -9 of a process, from inside and by the clock; always resumed; equal to the bit."""
    train.main(arguments("rectify", "whole"))
    rng = random.Random(0)
    kills = []
    for moment in MOMENTS:
        kills += [(moment, rng.randint(1, 4)) for _ in range(6 if SLOW else 1)]
    kills += [("by the clock", rng.uniform(0, 1.5)) for _ in range(24 if SLOW else 2)]
    rng.shuffle(kills)

    # A server imports torch once and forks a process for each training.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train"])
    checkpoint = tmp_path / "run" / "rectify.pt"
    killed = 0
    step = 0
    for moment, when in kills:
        given = [arguments("rectify", "run", "--resume")]
        if moment in MOMENTS:
            given += [moment, when]
        process = processes.Process(target=train_until, args=given)
        process.start()
        if moment == "by the clock":
            process.join(timeout=when)
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += process.exitcode != 0

        # What is there is whole, and no epoch was lost.
        if step or checkpoint.is_file():
            reached = file_of(tmp_path / "run")["training"]["step"]
            assert reached >= step
            step = reached
        if process.exitcode == 0:  # it ended before the moment came: from the beginning
            same_end(tmp_path / "whole", tmp_path / "run")
            shutil.rmtree(tmp_path / "run")
            step = 0

    train.main(arguments("rectify", "run", "--resume"))
    same_end(tmp_path / "whole", tmp_path / "run")
    assert killed >= len(kills) // 2


# --- A full disk ----------------------------------------------------------------------------------

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("stage", ["rectify", "distill"])
def test_a_full_disk_ends_a_training_in_a_sentence_and_spoils_nothing(
    arguments, tmp_path, monkeypatch, stage
):
    """/dev/full stands for the disk while the second epoch is saved."""
    for out in ("whole", "run"):
        train.main(arguments("rectify", out, "--epochs", "1"))
    more = ["--overwrite"] if stage == "rectify" else []
    train.main(arguments(stage, "whole", *more))
    save = torch.save
    saves = []

    def short_of_disk(content, file):
        saves.append(file)
        if len(saves) < 2:
            save(content, file)
        elif isinstance(file, Path):
            save(content, "/dev/full")
        else:
            with open("/dev/full", "wb") as full:
                save(content, full)

    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(torch, "save", short_of_disk)
        train.main(arguments(stage, "run", *more))

    checkpoint = tmp_path / "run" / f"{stage}.pt"
    assert f"{checkpoint} could not be written" in sentence(caught)
    of_first_epoch = {"rectify": 5, "distill": 3}[stage]
    assert file_of(tmp_path / "run", stage)["training"]["step"] == of_first_epoch
    assert not list((tmp_path / "run").glob("*.tmp"))

    train.main(arguments(stage, "run", "--resume"))
    same_end(tmp_path / "whole", tmp_path / "run", stage)


@pytest.mark.parametrize("failing", ["fsync", "replace", "the writing itself"])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, failing):
    def fails(*arguments):
        raise PermissionError(13, "in use by another program")

    (tmp_path / "file").write_text("old")
    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        if failing != "the writing itself":
            patch.setattr(os, failing, fails)
        with written_atomically(tmp_path / "file") as temporary:
            temporary.write_text("new")
            if failing == "the writing itself":
                fails()

    assert f"{tmp_path / 'file'} could not be written" in sentence(caught)
    assert "in use by another program" in sentence(caught) and "untouched" in sentence(caught)
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_log_that_is_open_elsewhere_stops_nothing(arguments, tmp_path, monkeypatch, capsys):
    """As on Windows, where a table that Excel shows cannot be written. Its rows come later."""
    train.main(arguments("rectify", "whole"))
    real_open = Path.open
    tries = []

    def in_use(path, mode="r", *rest, **more):
        if mode == "a":
            tries.append(path)
            if len(tries) in (2, 3):
                raise PermissionError(13, "in use by another program")
        return real_open(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", in_use)
    train.main(arguments("rectify", "run"))
    assert capsys.readouterr().err.count("rectify_log.csv could not be written") == 2
    same_end(tmp_path / "whole", tmp_path / "run")


# --- Two processes --------------------------------------------------------------------------------

def test_two_processes_average_their_gradients(arguments, tiny_clip_file, tmp_path):
    """torchrun, 5 images, 2 epochs: 5 steps, each the mean of the gradients of two images."""
    given = arguments(
        "rectify", "run", "--epochs", "2", "--lr", "0.01", "--no-flip", "--no-photometric"
    )
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "train.py"), *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )
    assert result.returncode == 0, result.stderr
    learnt = file_of(tmp_path / "run")["learnt"]

    # Here one process does what the two did, one after the other.
    _, dataset, options, settings = train.parse_arguments(given)
    model = train.new_reclip(load_clip(tiny_clip_file), dataset, options, settings, seed=0)
    split = Folder(tmp_path / "photos")
    labels = train.label_training_set(model, split, settings, tmp_path / "run/image_labels.json")
    stream = train.training_stream(split, model, 32, settings, seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=5e-4)

    rates = []
    for step in range(5):
        epoch = 2 * step // 5
        rates.append(0.01 * (1 - epoch / 200) ** 0.9)
        optimizer.param_groups[0]["lr"] = rates[-1]
        gradients = []
        for rank in (0, 1):
            torch.manual_seed(7_368_787 + step + rank * 1_000_000_007)
            image, valid, name = stream[2 * step + rank]
            Z = model.features(image[None], valid[None])
            masks = reclip.gumbel_softmax_masks(model.rectify(Z).rectified, 0.001)
            pooled = reclip.masked_features(Z, masks)
            loss = reclip.contrastive_loss(pooled, model.W_q, labels[name][None], model.tau)
            gradients.append(torch.autograd.grad(loss, parameters))
        for p, first, second in zip(parameters, *gradients):
            p.grad = (first + second) / 2
        optimizer.step()

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(learnt[name], parameter.detach(), 1e-6)
    rows = log_of(tmp_path / "run")
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates, rel=1e-5)

    with pytest.raises(ValueError, match="processes was 2, now 1"):
        train.main([*given, "--resume"])


# --- Devices --------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_both_stages_on_a_gpu(arguments, tmp_path, device):
    """They train, resume and segment there, and start from the CPU's loss."""
    if not {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip(f"this machine has no {device}")
    precision = torch.get_float32_matmul_precision()
    for stage in ("rectify", "distill"):
        train.main(arguments(stage, "cpu", "--epochs", "1"))
        train.main(arguments(stage, "gpu", "--epochs", "1", "--device", device))
        on_cpu, on_gpu = log_of(tmp_path / "cpu", stage)[0], log_of(tmp_path / "gpu", stage)[0]
        assert float(on_gpu["loss"]) == pytest.approx(float(on_cpu["loss"]), rel=0.2)

        train.main(arguments(stage, "gpu", "--epochs", "1", "--device", device, "--resume"))
        model = evaluation.open_model(tmp_path / "gpu" / f"{stage}.pt", device=device)
        mask = evaluation.segment_image(model, tmp_path / "photos" / "0.png")
        assert mask.shape == (30, 50) and mask.device.type == "cpu"
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def fake_gpu(monkeypatch):
    """While a test runs, tensors have a shape and a device, but no numbers.

    What mixes two devices is refused then as on a GPU. -> "cuda:0"
    """
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    try:
        with fake_tensor.FakeTensorMode():
            torch.empty(1, device="cuda:0").new_tensor([1.0])
    except (RuntimeError, AssertionError):
        pytest.skip("this torch's FakeTensorMode wants a GPU")
    # Modules are made there, and fake ones cannot be moved.
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *unused: module)
    with fake_tensor.FakeTensorMode():
        yield torch.device("cuda:0")


def test_nothing_is_left_on_the_cpu(fake_gpu, make_clip):
    names = ["cat", "dog", "grass", "tree"]
    with fake_gpu:  # what is made here without a device is made there
        W = torch.empty(4, 12)
        M_p = torch.empty(1, 4, 3, 3)
        teacher = ReCLIP(make_clip(), names, W_q=W, prompt_length=3, tau=0.01)
        students = [DeepLabV2(names, W, W, student="tiny", head=head) for head in HEADS[:3]]
        students.append(DeepLabV2(names, W, W, M_p=M_p, student="tiny", head=HEADS[3]))
        images = torch.empty(2, 3, 24, 22)
        valid = torch.empty(2, 24, 22, dtype=torch.bool)
        labels = torch.empty(2, 4, dtype=torch.bool)

    taught = teacher.train()(images, valid)
    masks = reclip.gumbel_softmax_masks(taught.rectified)
    pooled = reclip.masked_features(taught.features, masks)
    losses = [reclip.contrastive_loss(pooled, teacher.W_q, labels, 0.01)]
    teacher_masks = teacher.eval().to_pixels(taught.rectified, 24, 22).argmax(1)
    for student in students:
        output = student.train()(images, valid)
        losses += [
            reclip.mask_guided_loss(output.rectified, teacher_masks, 0.01, student.to_pixels),
            reclip.feature_guided_loss(
                taught.features, output.features, valid, teacher.to_pixels, student.to_pixels
            ),
            reclip.text_guided_loss(
                output.rectified, output.features, teacher.W_q, labels, 0.001, 0.01
            ),
        ]
    assert all(loss.device == fake_gpu and loss.shape == () for loss in losses)

    found = teacher.image_labels(images[..., :12, :12], 23, 2)
    logits = taught.rectified[:1].detach()
    mask = reclip.segment(logits, 4, (24, 22), (48, 44), denoise=0.5, background=0.2)
    assert found.device == mask.device == fake_gpu
    with pytest.raises(RuntimeError, match="device"):
        teacher(images.cpu())


# --- From photographs to masks --------------------------------------------------------------------

@pytest.fixture
def photographs(tmp_path):
    """A folder of images as people have them -> the folder, {name: (width, height) as seen}"""
    folder = tmp_path / "holidays in Köln"
    (folder / "deep er").mkdir(parents=True)
    rng = np.random.default_rng(1)

    def keep(name, *shape, **more):
        noise = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        noise.save(folder / name, **more)

    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6
    keep("Grüße.JPG", 30, 44, 3)
    keep("turned.jpg", 30, 44, 3, exif=on_its_side)
    keep("transparent.png", 20, 30, 4)
    keep("gray.webp", 23, 31)
    keep("one pixel.png", 1, 1, 3)
    keep("line.png", 1, 900, 3)
    keep("same.png", 27, 36, 3)
    keep("deep er/same.png", 28, 37, 3)
    (folder / "broken.jpg").write_bytes((folder / "Grüße.JPG").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    return folder, {
        "Grüße.JPG": (44, 30), "turned.jpg": (30, 44), "transparent.png": (30, 20),
        "gray.webp": (31, 23), "one pixel.png": (1, 1), "line.png": (900, 1),
        "same.png": (36, 27), "deep er/same.png": (37, 28),
    }


def test_photographs_become_masks_on_the_command_line(photographs, tiny_clip_file, tmp_path):
    """By default paths, from another folder than the repository's.

    And as on Windows: there is no module `resource`, and Python says where a text file is opened
    without its encoding, which would be another one there.
    """
    folder, sizes = photographs
    (tmp_path / "prompts.txt").write_text("a photo of a {}\n")
    (tmp_path / "windows").mkdir()
    (tmp_path / "windows" / "resource.py").write_text("raise ImportError('no such module')\n")
    surroundings = dict(
        cwd=tmp_path, PYTHONPATH=tmp_path / "windows",
        PYTHONWARNDEFAULTENCODING=1, PYTHONIOENCODING="utf-8",
    )
    training = command(
        "train.py", "--stage", "rectify", "--data", folder, "--classes", "cat | grass, dog, tree",
        "--clip", tiny_clip_file, "--device", "cpu", "--epochs", 1, "--crop", 32,
        "--rectify-long-side", 400, "--rectify-short-side", 32,
        "--prompts", tmp_path / "prompts.txt", **surroundings,
    )
    out = tmp_path / "runs" / folder.name
    masks = command(
        "eval.py", "--images", folder, "--checkpoint", out / "rectify.pt", "--device", "cpu",
        **surroundings,
    )

    assert f"images that each class was found in, of {len(sizes)}" in training.stdout
    assert f"{len(sizes)} images segmented, 1 unreadable" in masks.stdout
    for result in (training, masks):
        assert "skipped broken.jpg" in result.stderr and "1 .txt" in result.stderr
        for line in result.stderr.splitlines():
            ours = line.startswith(str(ROOT)) and "site-packages" not in line
            assert not (ours and "EncodingWarning" in line), line

    folder = out / "masks" / "rectify"
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    endings = (".index.png", ".overlay.png", ".json")
    assert written == {name + ending for name in sizes for ending in endings}
    for name, size in sizes.items():
        with Image.open(folder / f"{name}.index.png") as index:
            assert (index.mode, index.size) == ("P", size)
            assert set(np.array(index).flat) <= {1, 2, 3}
        report = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        assert (report["image"], report["size"]) == (name, list(size))
        assert sum(report["areas"].values()) == pytest.approx(1)


# --- Other surroundings ---------------------------------------------------------------------------

def test_training_and_masks_from_a_thread(arguments, tmp_path):
    """As notebooks and web applications call them; signals, say, are refused there."""
    masks = []

    def work():
        train.main(arguments("rectify", "run", "--epochs", "1"))
        model = evaluation.open_model(tmp_path / "run" / "rectify.pt")
        masks.append(evaluation.segment_image(model, tmp_path / "photos" / "0.png"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert masks[0].shape == (30, 50)


def test_files_are_written_as_windows_wants_it(arguments, tmp_path, monkeypatch):
    """It flushes only what is open for writing, and renames only what nobody has open."""
    fcntl = pytest.importorskip("fcntl")
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("what a process has open is asked of Linux")
    fsync, replace = os.fsync, os.replace
    flushed, renamed = [], []

    def windows_fsync(number):
        flushed.append(os.readlink(f"/proc/self/fd/{number}"))
        assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        fsync(number)

    def windows_replace(old, new):
        for number in os.listdir("/proc/self/fd"):
            link = f"/proc/self/fd/{number}"
            if os.path.exists(link):
                assert os.readlink(link) not in (str(old), str(new))
        renamed.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", windows_fsync)
    monkeypatch.setattr(os, "replace", windows_replace)
    train.main(arguments("rectify", "run", "--epochs", "1"))
    train.main(arguments("distill", "run", "--epochs", "1"))

    assert {"rectify.pt", "distill.pt", "rectify_log.csv", "image_labels.json"} <= set(renamed)
    assert len(flushed) == len(renamed)  # none has its name before its content is on the disk


@pytest.mark.parametrize("name, below", [
    (r"C:\photos\cat.jpg", "C/photos/cat.jpg"),
    ("D:/photos/cat.jpg", "D/photos/cat.jpg"),
    (r"\\server\share\cat.jpg", "servershare/cat.jpg"),
    ("/home/me/cat.jpg", "home/me/cat.jpg"),
    ("../../cat.jpg", "cat.jpg"),
    (r"deep er\..\cat.jpg", "deep er/cat.jpg"),
])
def test_masks_stay_below_their_folder(tmp_path, name, below):
    """Whatever the image's name is, on any system, and two drives do not mix."""
    assert evaluation.path_below(tmp_path, name) == tmp_path / below


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("count, loss_allowed", [(20, 1.0), (100, 0.0), (500, 0.0)])
def test_a_folder_of_your_own_ends_above_plain_clip(slow, tmp_path, count, loss_allowed, seed):
    """Images of shapes with its CLIP, names, prompts and thresholds; all else: own images'.

    But for their size: 64 pixels in place of 336, or it would take hours. With -s it prints a cell
    of the README's table.
    """
    shapes = DATA["shapes"]
    split = open_split("shapes", None, "train")
    (tmp_path / "folder").mkdir()
    for i in range(count):
        image = Image.fromarray(split.image(i).permute(1, 2, 0).numpy())
        image.save(tmp_path / "folder" / f"{i:03}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(shapes.prompts))

    train.main([str(part) for part in (
        "--stage", "rectify", "--data", tmp_path / "folder", "--classes", ", ".join(shapes.classes),
        "--prompts", tmp_path / "prompts.txt", "--clip", shapes.clip, "--prompt-length", 4,
        "--threshold", 45, "--top-k", 1, "--rectify-short-side", 64, "--crop", 64,
        "--seed", seed, "--out", tmp_path / "run", "--device", "cpu",
    )])
    model = ReCLIP.load(tmp_path / "run" / "rectify.pt")
    plain = evaluation.without_biases(model)

    miou = []
    split.names = split.names[:count]
    for of in (plain, model):
        confusion = torch.zeros(8, 8, dtype=torch.int64)
        for mask, truth, _ in evaluation.predict_split(of, split, "folder"):
            confusion += evaluation.confusion_matrix(mask, truth, 8)
        miou.append(100 * evaluation.scores(confusion)["miou"])
    print(f"{count} images, seed {seed}: plain CLIP {miou[0]:.1f}, trained {miou[1]:.1f}")
    assert miou[1] > miou[0] - loss_allowed
