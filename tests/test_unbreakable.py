"""What must not break: runs that are killed, stopped or short of disk, and files made to do
harm.

The runs are real ones of `train.py`: a server process imports torch once and forks a child for
each command, so that a run costs what it computes, and not the imports. SLOW=1 runs the long
versions: 10,000 cases of each fuzz, 100 kills.
"""

import html
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from contextlib import contextmanager

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train
from clip_model import Tokenizer, load_clip, written_atomically
from conftest import DATA, ROOT, WORDS, merges_of
from datasets import Evaluation, Files, Folder, decode_rle, open_split
from deeplab import DeepLabV2
from reclip import ReCLIP
from test_clip_model import save_torchscript, slow_encode
from test_datasets import encode_rle

SLOW = bool(os.environ.get("SLOW"))
CASES = 10_000 if SLOW else 200

SERVER = """
import json, os, runpy, sys
sys.path.insert(0, os.getcwd())
import torch, train
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        for number, name in enumerate((os.devnull, *job["streams"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        exec(job["before"], {})
        sys.argv = ["train.py", *job["arguments"]]
        runpy.run_path("train.py", run_name="__main__")
        sys.exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


# --- Runs that can be killed ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def run(server, make_voc, tiny_clip_file, tmp_path):
    """run(out, *options, kill_after=seconds, before=code): `python train.py` on 4 pictures ->
    exit code, stderr.
    """
    folder = make_voc({"train": 4}) / "VOCdevkit" / "VOC2012" / "JPEGImages"

    def start(out, *options, stage="rectify", kill_after=None, before="", epochs=20 if SLOW else 8):
        job = {
            "before": before,
            "streams": [str(tmp_path / name) for name in ("stdout", "stderr")],
            "arguments": [
                "--stage",
                stage,
                "--data",
                str(folder),
                "--classes",
                "cat, dog, grass",
                "--clip",
                str(tiny_clip_file),
                "--device",
                "cpu",
                "--crop",
                "32",
                "--epochs",
                str(epochs),
                "--out",
                str(tmp_path / out),
                *options,
            ],
        }
        print(json.dumps(job), file=server.stdin, flush=True)
        child = int(server.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            try:
                os.kill(
                    child, signal.SIGKILL
                )  # a child that ended is waited for by the server, so no other has its id
            except ProcessLookupError:
                pass
        return int(server.stdout.readline()), (tmp_path / "stderr").read_text()

    return start


def equal(a, b):
    """Deep equality, of tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_end(one, other, stage="rectify"):
    """Both runs left the same checkpoint, training state and log."""
    assert (one / f"{stage}_log.csv").read_text() == (other / f"{stage}_log.csv").read_text()
    for name in (f"{stage}.pt", f"{stage}_state.pt"):
        assert equal(*(torch.load(folder / name, weights_only=True) for folder in (one, other))), (
            name
        )


# Code for a child that kills itself at a chosen call of what stands behind "written to a
# temporary file, flushed, renamed"; `count` counts down. The kernel keeps what was written: a
# power cut is not simulated.
SUICIDE = """
import os, signal, torch, reclip
def at(owner, name, count, action):
    original = getattr(owner, name)
    def wrapped(*a):
        nonlocal count
        count -= 1
        if count:
            return original(*a)
        action(original, *a)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, wrapped)
def half(save, content, path):
    save(content, path)
    os.truncate(path, os.path.getsize(path) // 2)
before = lambda *a: None
after = lambda f, *a: f(*a)
"""
MOMENTS = {
    "half of the bytes": "at(torch, 'save', {}, half)",
    "before the flush": "at(os, 'fsync', {}, before)",
    "between flush and renaming": "at(os, 'replace', {}, before)",
    "renamed": "at(os, 'replace', {}, after)",
    "between saves": "at(reclip, 'contrastive_loss', {}, before)",
}


def killed_again_and_again(run, folder, kills, whole, told):
    """kills: seconds, or code with which the child kills itself. One run, killed and resumed
    until the kills are used up (a run that ends before begins anew) and then to its end, which
    must be that of `whole`.
    """
    kills, ended = list(kills), False
    while kills or not ended:
        started = (folder / "rectify_state.pt").is_file() and not ended
        if ended:
            shutil.rmtree(folder)
        kill = kills.pop(0) if kills else None
        how = {"kill_after": kill} if isinstance(kill, float) else {"before": kill or ""}
        before = set(folder.glob("*.tmp"))
        step = torch.load(folder / "rectify_state.pt", weights_only=True)["step"] if started else 0
        code, errors = run(folder.name, *["--resume"] * started, **how)
        ended = code == 0
        assert ended or kill is not None and code == -signal.SIGKILL, errors
        told["kills"] += not ended
        told["while writing"] += len(set(folder.glob("*.tmp")) - before)
        told["before the first state"] += not (folder / "rectify_state.pt").is_file()
        if (folder / "rectify_state.pt").is_file():  # what is there is whole, and nothing is lost
            assert torch.load(folder / "rectify_state.pt", weights_only=True)["step"] >= step
        if (folder / "rectify.pt").is_file():
            assert torch.load(folder / "rectify.pt", weights_only=True)["learnt"].keys()
        if ended:
            kills[:0] = [kill] * isinstance(
                kill, str
            )  # the run ended before: the next one begins with it
            same_end(whole, folder)
            told["ends compared"] += 1


def test_killed_at_any_moment_it_ends_as_if_never_killed(run, tmp_path, capsys):
    """kill -9 by the clock and, from inside, at each stage of the writing; always resumed;
    equal to the bit.
    """
    rng = random.Random(0)
    told = dict.fromkeys(("kills", "while writing", "before the first state", "ends compared"), 0)
    begin = time.perf_counter()
    assert run("whole")[0] == 0
    length = time.perf_counter() - begin
    kills = [rng.uniform(0, 0.8 * length) for _ in range(80 if SLOW else 3)]
    kills += [
        SUICIDE + code.format(rng.randint(1, 3))
        for code in MOMENTS.values()
        for _ in range(5 if SLOW else 1)
    ]
    rng.shuffle(kills)
    # first in a new folder, while the image-level labels are written; last in the first step
    # after resuming
    kills = [
        SUICIDE + MOMENTS[name].format(1)
        for name in ("between flush and renaming", "between saves")
    ] + kills
    kills += [SUICIDE + MOMENTS["between saves"].format(1)]
    killed_again_and_again(run, tmp_path / "parts", kills, tmp_path / "whole", told)
    with capsys.disabled():
        print("\nkill -9:", ", ".join(f"{value} {key}" for key, value in told.items()))
    assert told["while writing"] >= (15 if SLOW else 3) and told["kills"] >= len(kills) // 2


def test_nothing_to_resume_is_said(run, tmp_path):
    """Killed while the first state was written: --resume says that there is none, without it
    the run begins anew.
    """
    assert (
        run("parts", before=SUICIDE + MOMENTS["half of the bytes"].format(1))[0] == -signal.SIGKILL
    )
    code, errors = run("parts", "--resume")
    assert code == 1 and errors.splitlines()[-1] == (
        f"train.py: nothing to resume: {tmp_path / 'parts' / 'rectify_state.pt'} does not exist; "
        "leave --resume out"
    )
    assert run("parts", epochs=1)[0] == 0


# --- Signals --------------------------------------------------------------------------------------

AT_STEP = """
import os, signal, {module} as module
calls, original = [], module.{name}
def signalled(*a, **k):
    calls.append(1)
    if len(calls) == {step}:
        os.kill(os.getpid(), signal.{number})
    return original(*a, **k)
module.{name} = signalled
"""


@pytest.mark.parametrize("stage", ["rectify", "distill"])
def test_a_signal_ends_the_step_and_saves(run, tmp_path, stage):
    """SIGTERM comes in the second epoch's second step, and SIGINT in the second one after
    resuming: the state holds just these steps, the program says how to go on, and ends as if it
    had not been stopped.
    """
    options, first, where = [], 6, {"module": "reclip", "name": "contrastive_loss"}
    if stage == "distill":
        assert run("teacher", epochs=1)[0] == 0
        options = [
            "--teacher",
            str(tmp_path / "teacher" / "rectify.pt"),
            "--student",
            "tiny",
            "--backbone_weights",
            "none",
            "--distill_crop",
            "32",
            "--distill_batch",
            "2",
        ]
        first, where = 3, {"module": "deeplab", "name": "DeepLabV2.forward"}
    for more, number, count, step in (
        ([], "SIGTERM", first, first),
        (["--resume"], "SIGINT", 2 * first // 3 - 1, None),
    ):
        step = step or first + count
        code, errors = run(
            "parts",
            *options,
            *more,
            stage=stage,
            epochs=3,
            before=AT_STEP.format(**where, step=count, number=number),
        )
        last = errors.splitlines()[-1]
        assert (
            code == 1
            and last.startswith("train.py: stopped, ")
            and "the same command with --resume goes on" in last
        )
        assert (
            torch.load(tmp_path / "parts" / f"{stage}_state.pt", weights_only=True)["step"] == step
        )
        assert (tmp_path / "parts" / f"{stage}.pt").is_file() and not list(
            (tmp_path / "parts").glob("*.tmp")
        )
    assert run("parts", "--resume", *options, stage=stage, epochs=3)[0] == 0
    assert run("whole", *options, stage=stage, epochs=3)[0] == 0
    same_end(tmp_path / "whole", tmp_path / "parts", stage)


# --- A full disk ----------------------------------------------------------------------------------

FULL = """
import resource, torch
calls, original = [], torch.save
def short_of_disk(*a):
    calls.append(1)
    limit = {limit} if len(calls) == {call} else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    original(*a)
torch.save = short_of_disk
"""


def test_full_disk(run, tmp_path):
    """No file may grow beyond 1 MB while the second epoch is saved: one sentence, the old files
    whole, no rest of the new one; with room again, --resume ends as if nothing had been.
    """
    for more, call, name, step in (
        ([], 4, "rectify_state.pt", 4),
        (["--resume"], 3, "rectify.pt", 8),
    ):
        code, errors = run("parts", *more, epochs=3, before=FULL.format(call=call, limit=1_000_000))
        last = errors.splitlines()[-1]
        assert (
            code == 1
            and last.startswith(f"train.py: {tmp_path / 'parts' / name} could not be written (")
            and (last.endswith("what was there before is untouched"))
        ), errors
        assert "Traceback" not in errors and not list((tmp_path / "parts").glob("*.tmp"))
        assert (
            torch.load(tmp_path / "parts" / "rectify_state.pt", weights_only=True)["step"] == step
        )
        ReCLIP.load(tmp_path / "parts" / "rectify.pt")
    assert run("parts", "--resume", epochs=3)[0] == run("whole", epochs=3)[0] == 0
    same_end(tmp_path / "whole", tmp_path / "parts")


@contextmanager
def no_file_above(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def small_student(**more):
    torch.manual_seed(0)
    return DeepLabV2(["cat", "dog"], *torch.randn(2, 2, 8), student="tiny", **more)


def write_text(path):
    with written_atomically(path) as temporary:
        temporary.write_text(100_000 * "new")


@pytest.mark.parametrize("save", [small_student().save, write_text])
def test_full_disk_elsewhere(tmp_path, save):
    """The student's own save, and what writes without torch."""
    (tmp_path / "file").write_text("old")
    with (
        no_file_above(50_000),
        pytest.raises(OSError, match="file could not be written .* is untouched") as caught,
    ):
        save(tmp_path / "file")
    assert "\n" not in str(caught.value) and (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with (
        pytest.raises(ValueError, match="^passes unchanged$"),
        written_atomically(tmp_path / "file"),
    ):
        raise ValueError("passes unchanged")
    assert os.listdir(tmp_path) == ["file"]


# --- Another run than the one that stopped --------------------------------------------------------


def test_resuming_another_run_is_refused_with_every_difference(
    make_voc, make_clip, merges, tiny_clip_file, tmp_path
):
    """Other pictures (as many, with other names), another CLIP, other settings: all of them in
    one sentence; other classes in a run on pictures of one's own.
    """
    root = make_voc({"train": 4})
    command = [
        "--stage",
        "rectify",
        "--root",
        str(root),
        "--device",
        "cpu",
        "--crop",
        "32",
        "--epochs",
        "1",
    ]
    voc = [*command, "--data", "voc", "--out", str(tmp_path / "voc")]
    train.main([*voc, "--clip", str(tiny_clip_file)])
    base = root / "VOCdevkit" / "VOC2012"
    for i in range(4):
        (base / "JPEGImages" / f"train_{i}.jpg").rename(base / "JPEGImages" / f"other_{i}.jpg")
    (base / "ImageSets" / "Segmentation" / "train.txt").write_text(
        "\n".join(f"other_{i}" for i in range(4))
    )
    torch.save(
        {"state_dict": make_clip(1, context=77).state_dict(), "merges": [list(p) for p in merges]},
        tmp_path / "b.pt",
    )
    state = (tmp_path / "voc" / "rectify_state.pt").read_bytes()
    with pytest.raises(ValueError, match="cannot resume .*rectify_state.pt") as caught:
        train.main(
            [
                *voc,
                "--clip",
                str(tmp_path / "b.pt"),
                "--resume",
                "--lr",
                "0.5",
                "--no-flip",
                "--seed",
                "3",
            ]
        )
    message = str(caught.value)
    for words in (
        "clip was '",
        "lr was 0.01, now 0.5",
        "flip was True, now False",
        "seed was 0, now 3",
        "names was",
    ):
        assert words in message, words
    assert message.count(" was ") == 5 and "\n" not in message
    assert (tmp_path / "voc" / "rectify_state.pt").read_bytes() == state
    folder = [
        *command,
        "--data",
        str(base / "JPEGImages"),
        "--clip",
        str(tiny_clip_file),
        "--out",
        str(tmp_path / "own"),
    ]
    train.main([*folder, "--classes", "cat, dog, grass"])
    shutil.copy(base / "JPEGImages" / "other_0.jpg", base / "JPEGImages" / "new.jpg")
    with pytest.raises(ValueError, match="pictures was 4, now 5") as caught:
        train.main([*folder, "--classes", "cat, dog, tree", "--resume"])
    assert r"classes was ['cat', 'dog', 'grass'], now ['cat', 'dog', 'tree']" in str(caught.value)


# --- Files made to do harm ------------------------------------------------------------------------


class Hostile:
    """Unpickled without care, it runs a shell command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def one_sentence(reader, *words):
    """The reader raises a ValueError of one line that holds the words."""
    with pytest.raises(ValueError) as caught:
        reader()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), (
        caught.value
    )


def test_no_checkpoint_runs_code(clip, tmp_path):
    """Bare, in torch's zip, in its older format, and hidden beside tensors: in the place of
    each kind of file.
    """
    marker, path = tmp_path / "marker", tmp_path / "file.pt"
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()  # the payload works, so that its silence means something
    marker.unlink()
    good = {
        "step": 1,
        "identity": {},
        "modules": {},
        "optimiser": {},
        "learnt": {},
        "class_names": ["a"],
        "clip": {},
        "student": {},
        "settings": {},
        "versions": {},
    }
    readers = [
        lambda: load_clip(path),
        lambda: ReCLIP.load(path),
        lambda: ReCLIP.load(path, clip),
        lambda: DeepLabV2.load(path),
        lambda: small_student(backbone_weights=path),
        lambda: run_at(path, {}, None, {}).load_state(),
    ]
    for reader in readers:
        for content in (
            {"weight": Hostile(marker)},
            good | {"modules": Hostile(marker)},
            Hostile(marker),
        ):
            for write in (
                lambda c: path.write_bytes(pickle.dumps(c)),
                lambda c: torch.save(c, path),
                lambda c: torch.save(c, path, _use_new_zipfile_serialization=False),
            ):
                write(content)
                one_sentence(reader, str(path))
                assert not marker.exists()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.", "__dict__"),
        ("data/0", bytes(2**28), "more than ten times its size"),
    ],
)
@pytest.mark.parametrize("write", [save_torchscript, lambda path, state: torch.save(state, path)])
def test_a_clip_cannot_ask_for_more_memory_than_it_brings(tmp_path, write, name, content, words):
    """A pickle of ten bytes whose memo has 2 billion places, and 256 MiB of packed zeros."""
    write(tmp_path / "whole.pt", {"weight": torch.zeros(4)})
    packed = zipfile.ZIP_STORED if "pkl" in name else zipfile.ZIP_DEFLATED
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as old,
        zipfile.ZipFile(tmp_path / "file.pt", "w", packed) as new,
    ):
        for member in old.namelist():
            new.writestr(member, content if member.endswith(name) else old.read(member))
    with address_space(0.2):
        one_sentence(
            lambda: load_clip(tmp_path / "file.pt"), "file.pt", *[words] * (name == "data/0")
        )
        try:
            load_clip(tmp_path / "file.pt")
        except ValueError as error:
            assert not isinstance(error.__cause__, MemoryError) and "memory" not in str(error)


def png_header(width, height):
    """A PNG that says it has this size and brings next to nothing."""
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def test_pictures_that_claim_to_be_huge(tmp_path, capsys):
    """4.6 exapixels in 100 bytes: in a data set one sentence, among one's own pictures left
    out, as a label named.
    """
    bomb, good = tmp_path / "bomb.png", tmp_path / "good.png"
    bomb.write_bytes(png_header(2**31 - 1, 2**31 - 1))
    Image.new("RGB", (5, 4)).save(good)
    one_sentence(
        lambda: Files([bomb], [bomb], range(1, 21)).image(0), "bomb.png is not a readable image"
    )
    one_sentence(
        lambda: Evaluation(Files([good], [bomb], range(1, 21)), 8, 8)[0],
        "bomb.png is not a readable annotation",
    )
    assert Folder(tmp_path).names == ["good.png"]
    assert capsys.readouterr().err.startswith(
        "skipped bomb.png: Image size (4611686014132420609 pixels) exceeds"
    )


def test_a_picture_starts_no_program(tmp_path, monkeypatch, capsys):
    """Pillow draws PostScript by starting Ghostscript, whatever the file's name is."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path / 'marker'}'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    (tmp_path / "a.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for anew
    try:
        Image.open(tmp_path / "a.jpg").load()
    except OSError:
        pass
    assert (tmp_path / "marker").exists()  # the trap works
    (tmp_path / "marker").unlink()
    one_sentence(
        lambda: Files([tmp_path / "a.jpg"], [], [1]).image(0), "a.jpg is not a readable image"
    )
    one_sentence(
        lambda: Files([], [tmp_path / "a.jpg"], [1]).truth(0), "a.jpg is not a readable annotation"
    )
    one_sentence(lambda: Folder(tmp_path), "holds no readable image")
    assert not (tmp_path / "marker").exists()


# --- Fuzz -----------------------------------------------------------------------------------------


@contextmanager
def address_space(more):
    """Within, this process may have `more` GiB more than now: who asks for much gets a
    MemoryError, not the machine.
    """
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("how much memory a process has is asked of Linux")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(more * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def told(capsys, name, **counts):
    with capsys.disabled():
        print(f"\n{name}:", ", ".join(f"{value:,} {key}" for key, value in counts.items()))


PIECES = [
    *WORDS,
    "Cats",
    "don't",
    "'S",
    "<|startoftext|>",
    "<|EndOfText|>",
    "&amp;amp;lt;",
    "&#x1F600;",
    "&#55296;",
    "&nosuch;",
    "&",
    "&#",
    "â€™",
    "Ã©",
    "ﬁ",
    "ß",
    "İ",
    "ſ",
    "'ſ",
    "é",
    "e\u0301",
    "שלום",
    "مرحبا",
    "\u202eabc\u202c",
    "漢字",
    "😀",
    "👩\u200d👩\u200d👧",
    "🏳️\u200d🌈",
    "\u0300" * 9,
    "</w>",
    "\x00",
    "\x1c",
    "\x7f",
    "\ufeff",
    "\ufffe",
    "\ud800",
    "\udfff\ud800",
    "\u2028",
    "\xa0",
    "\t\r\n",
    "٣",
    "½",
    "Ⅷ",
    "a" * 700,
    "7" * 99,
    "!?" * 60,
]


def random_text(rng):
    def piece():
        kind = rng.random()
        if kind < 0.45:
            return rng.choice(PIECES)
        if kind < 0.6:
            return "".join(chr(rng.randrange(0x250)) for _ in range(rng.randrange(9)))
        if kind < 0.75:
            return "".join(
                chr(rng.randrange(0x110000)) for _ in range(rng.randrange(6))
            )  # surrogates among them
        if kind < 0.85:
            return rng.choice(WORDS) * rng.randrange(1, 60)
        opening = rng.choice(["#", "#x", ""])
        name = rng.choice([rng.randrange(2**40), "lt", "Dopf", "acE"])
        return f"&{opening}{name};"

    return "".join(piece() + " " * rng.randrange(2) for _ in range(rng.randrange(8)))


def official_or_none():
    path = DATA / "clip" / "bpe_simple_vocab_16e6.txt.gz"
    return Tokenizer.from_file(path) if path.exists() else None


def test_fuzz_tokenizer(capsys):
    """Any string: the ids lie within the vocabulary, say letter for letter what the mended text
    says, are those of a tokenizer without memory, and of test_clip_model's slow one (which
    knows an older Unicode, and does not take 'ſ for 's as OpenAI's pattern does); lone
    surrogates become U+FFFD, nothing raises.
    """
    rng, merges = random.Random(1), merges_of(WORDS)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    tokenizers, tokens = [t for t in (Tokenizer(merges), official_or_none()) if t], 0
    names = [{i: token for token, i in tokenizer.ids.items()} for tokenizer in tokenizers]
    for case in range(CASES):
        text = random_text(rng)
        mended = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        for tokenizer, name in zip(tokenizers, names):
            ids = tokenizer.encode(text)
            assert all(0 <= i < len(name) for i in ids), repr(text)
            spelt = b"".join(
                name[i].encode()
                if i >= len(name) - 2
                else bytes(alphabet[c] for c in name[i].removesuffix("</w>"))
                for i in ids
            ).decode()
            assert spelt == "".join(c for c in mended if not regex_space(c)), repr(text)
            tokens += len(ids)
        ids = tokenizers[0].encode(text)
        assert Tokenizer(merges).encode(text) == ids, repr(text)
        if case % 10 == 0 and not any(c == "ſ" or unicodedata.category(c) == "Cn" for c in mended):
            assert slow_encode(text, merges) == ids, repr(text)
    told(capsys, "tokenizer", texts=CASES, tokens=tokens, raised=0)


def regex_space(c):
    """White space as Unicode has it: str.isspace without the four separators of ASCII."""
    return c.isspace() and c not in "\x1c\x1d\x1e\x1f"


def test_fuzz_run_lengths(capsys):
    """Random strings, and valid ones cut, lengthened or changed: a mask of the right size,
    which the encoder of test_datasets.py takes back, or a ValueError of one line; and never
    more memory than the mask's.
    """
    rng, masks, refused = random.Random(2), 0, 0
    with address_space(1):
        for case in range(CASES):
            shape = rng.randrange(1, 30), rng.randrange(1, 30)
            mask = np.random.default_rng(case).random(shape) < rng.random()
            text = list(encode_rle(mask))
            for _ in range(rng.randrange(4)):
                i, kind = rng.randrange(len(text) + 1), rng.randrange(4)
                text[i : i + (kind > 0)] = [
                    [chr(rng.randrange(48, 112))],
                    [],
                    [chr(rng.randrange(48, 112))],
                    [chr(rng.randrange(0x250))],
                ][kind]
            if case % 4 == 0:
                text = [chr(rng.randrange(48, 112)) for _ in range(rng.randrange(60))]
            if (
                case % 50 == 1
            ):  # 10 ** 18 pixels and more; or as many as the size says, which then is no size
                text, shape = (
                    ["o"] * rng.randrange(9, 13) + ["?", "0"],
                    (2**30, 2 ** rng.randrange(20, 31)),
                )
            try:
                found = decode_rle("".join(text), *shape)
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
                continue
            assert found.shape == shape and found.dtype == bool
            assert (decode_rle(encode_rle(found), *shape) == found).all()
            masks += 1
    assert masks > CASES // 10 and refused > CASES // 10
    told(capsys, "run lengths", strings=CASES, masks=masks, refused=refused)


def damaged(rng, whole, members):
    """A file with something wrong: random bytes, cut off, bits flipped, bytes moved, or a sound
    zip round a changed pickle (all its sums are right).
    """
    kind = rng.randrange(6)
    if kind == 0:
        return "random bytes", rng.randbytes(rng.randrange(3000))
    if kind == 1:
        return "cut off", whole[: rng.randrange(len(whole))]
    changed = bytearray(whole)
    place = lambda n: rng.choice(
        [rng.randrange(n), rng.randrange(min(n, 3000)), n - 1 - rng.randrange(min(n, 3000))]
    )
    if kind == 2:
        for _ in range(rng.randrange(1, 9)):
            changed[place(len(changed))] ^= 1 << rng.randrange(8)
        return "bits flipped", bytes(changed)
    if kind == 3:
        a, b, n = place(len(changed)), place(len(changed)), rng.randrange(1, 300)
        changed[a : a + n * rng.randrange(2)] = changed[b : b + n]
        return "bytes moved", bytes(changed)
    changed = bytearray(members[next(name for name in members if name.endswith("data.pkl"))])
    for _ in range(rng.randrange(1, 5)):
        changed[rng.randrange(len(changed))] = rng.choice(
            [rng.randrange(256), *b"rjq\x8a\x8b)(}]RcbQ0123."]
        )
    packed = {
        name: bytes(changed) if name.endswith("data.pkl") else content
        for name, content in members.items()
    }
    return "another pickle", packed


def small_state():
    """A module, its optimiser after a step (so that it has a state), and an identity."""
    torch.manual_seed(0)
    module = nn.Linear(7, 5)
    optimiser = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.ones(7)).sum().backward()
    optimiser.step()
    return {"learnt": module}, optimiser, {"lr": 0.1, "classes": ["cat", "dog"]}


def run_at(path, modules, optimizer, identity):
    """A train.Run whose training state is the file at path."""
    run = train.Run("state", path.parent, identity)
    run.state_path = path
    run.modules, run.optimizer, run.rows = modules, optimizer, []
    return run


def write_state(path):
    run_at(path, *small_state()).save_state(3)
    (path.parent / "state_log.csv").unlink()


def kinds_of_checkpoint(make_clip, merges):
    """name: (writes a good file, reads it)"""
    clip = make_clip(embed_dim=8, width=64, layers=1, text_width=64, text_layers=1, context=20)
    wrapped = {"state_dict": clip.state_dict(), "merges": merges}
    model = ReCLIP(clip, ["cat", "dog"], prompts=["a {}"], prompt_length=3)
    student = small_student()
    return {
        "CLIP": (lambda path: torch.save(wrapped, path), load_clip),
        "CLIP, TorchScript": (lambda path: save_torchscript(path, clip.state_dict()), load_clip),
        "rectify.pt": (model.save, lambda path: ReCLIP.load(path, clip)),
        "distill.pt": (student.save, DeepLabV2.load),
        "state": (write_state, lambda path: run_at(path, *small_state()).load_state()),
    }


@pytest.mark.parametrize("name", ["CLIP", "CLIP, TorchScript", "rectify.pt", "distill.pt", "state"])
def test_fuzz_checkpoints(make_clip, merges, tmp_path, capsys, name):
    """A damaged file loads or ends in a ValueError of one line with its name: no other
    exception, no code run (a directory of its own stays empty), no more memory than 2 GiB.
    """
    path, rng = tmp_path / "file.pt", random.Random(name)
    write, read = kinds_of_checkpoint(make_clip, merges)[name]
    write(path)
    read(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    counts = dict.fromkeys(("files", "refused", "loaded", "refused more than 2 GiB"), 0)
    with address_space(2):
        for case in range(CASES):
            kind, content = damaged(rng, whole, members)
            if isinstance(content, dict):
                with zipfile.ZipFile(path, "w") as archive:
                    for member, value in content.items():
                        archive.writestr(member, value)
            else:
                path.write_bytes(content)
            counts["files"] += 1
            try:
                read(path)
                counts["loaded"] += 1
            except ValueError as error:
                assert "\n" not in str(error) and str(path) in str(error), (case, kind)
                cause = f"{error.__cause__!r} {error}"
                counts["refused more than 2 GiB"] += (
                    "MemoryError" in cause or "allocate memory" in cause
                )
                counts["refused"] += 1
            except Exception as error:
                raise AssertionError(f"case {case}, {kind}") from error
    assert os.listdir(tmp_path) == ["file.pt"]
    told(capsys, name, **counts)
