"""What the tests share. Fixtures, by name; each says below what it gives:

    merges, make_clip, clip     a tokenizer of a few words; small random CLIPs with it
    tiny_clip_file              such a CLIP in a file, with its own merges
    make_model                  ReCLIPs in float64 on the small CLIP, not at their start
    make_voc                    a VOC of a few images of noise, in the real layout
    shared                      files lent with the project, or a skip that says so
    small_shapes                shapes with 6, 4 and 5 images, while a test runs
    trained                     what `python train.py` leaves behind, small; made once a session
    hostile                     an object whose pickle would run a program
    serve                       a web server on this machine, good or bad
    slow                        the test runs with SLOW=1 alone

and functions, to be imported: from conftest import close, command, sentence.
The same arithmetic in plain words is in reference.py.
"""

import contextlib
import http.server
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SLOW = os.environ.get("SLOW") == "1"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other

from clip_model import CLIP, Tokenizer  # noqa: E402  (the path comes first)
from datasets import voc_palette  # noqa: E402
from extras.pretrain import initialize  # noqa: E402
from reclip import ReCLIP  # noqa: E402

WORDS = "cat dog grass tree photo of the a this is in scene".split()


# --- Functions ------------------------------------------------------------------------------------

def close(found, expected, tolerance=1e-10):
    """Both tensors have one shape, and no number differs by more than the tolerance."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def command(program, *arguments, ok=True, cwd=ROOT, **environment):
    """`python program arguments` as a user starts it -> the completed process, with its texts.

    program: below the repository, such as "extras/shapes.py". ok: True if it must end well.
    environment: variables of its own, such as CLIP_HOME=folder.
    """
    result = subprocess.run(
        [sys.executable, str(ROOT / program), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    if ok:
        assert result.returncode == 0, result.stderr
    return result


def sentence(failed):
    """The one sentence that an error consists of.

    failed: command(..., ok=False), which must have ended with it on stderr; or what pytest.raises
        has caught.
    """
    if isinstance(failed, pytest.ExceptionInfo):
        text = str(failed.value)
        assert "\n" not in text
        return text

    assert failed.returncode != 0
    assert "Traceback" not in failed.stderr
    text = failed.stderr.rstrip().splitlines()[-1]
    assert text.startswith(Path(failed.args[1]).name + ":")  # train.py: ...
    return text


# --- Every test -----------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, alone or with all the others."""
    torch.manual_seed(0)


@pytest.fixture
def slow():
    """Skips the test, and says so, unless SLOW=1."""
    if not SLOW:
        pytest.skip("long: SLOW=1 runs it")


@pytest.fixture
def shared():
    """shared("clip/name") -> path of a file lent with the project; a skip where it is not there."""

    def path(name):
        if not (SHARED / name).exists():
            pytest.skip(f"{SHARED / name} is not here")
        return SHARED / name

    return path


# --- CLIP -----------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def merges():
    """Merges that make one token of each of WORDS, letter by letter from the left."""
    pairs = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if tuple(parts[:2]) not in pairs:
                pairs.append(tuple(parts[:2]))
            parts = [parts[0] + parts[1], *parts[2:]]
    return pairs


@pytest.fixture(scope="session")
def make_clip(merges):
    """make_clip(seed, ...) -> a small CLIP: D = 12, patches of 4 pixels, trained on 3 x 3 of them.

    All its weights are random, those of layer norms and biases too. Each tower has 2 layers of 2
    heads, and E_v = E_t = 128.
    """

    def make(
        seed=0,
        embed_dim=12,
        patch=4,
        width=128,
        layers=2,
        grid=3,
        context=60,
        text_width=128,
        text_layers=2,
        quick_gelu=True,
    ):
        vocabulary = 2 * 256 + len(merges) + 2
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            clip = initialize(CLIP(
                embed_dim,
                patch,
                width,
                layers,
                grid,
                context,
                vocabulary,
                text_width,
                text_layers,
                quick_gelu,
            ))
            with torch.no_grad():
                for name, parameter in clip.named_parameters():
                    if name != "logit_scale":
                        parameter.add_(0.05 * torch.randn_like(parameter))
        clip.tokenizer = Tokenizer(merges)
        clip.source = "made in a test"
        return clip.eval().requires_grad_(False)

    return make


@pytest.fixture
def clip(make_clip):
    """A small CLIP; a new one for each test."""
    return make_clip()


@pytest.fixture
def tiny_clip_file(make_clip, merges, tmp_path):
    """Path of a small CLIP of 77 tokens with its own merges."""
    content = {
        "state_dict": make_clip(context=77).state_dict(),
        "merges": [list(pair) for pair in merges],
    }
    torch.save(content, tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


@pytest.fixture
def make_model(clip):
    """make_model(seed, classes, **options of ReCLIP) -> a ReCLIP in train mode, in float64.

    On the small CLIP (the fixture `clip`, which becomes float64); W_q is random, and what learns is
    not at its start.
    """

    def make(seed=0, classes=("cat", "dog", "grass", "tree"), **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            W_q = F.normalize(torch.randn(len(classes), 12), dim=1)
            options = {"prompt_length": 6, "W_q": W_q} | options
            model = ReCLIP(clip.double(), list(classes), **options).double()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return model.train()

    return make


# --- Images ---------------------------------------------------------------------------------------

@pytest.fixture
def make_voc(tmp_path):
    """make_voc({"train": 3, "val": 2}) -> a root with VOCdevkit/VOC2012 in it.

    Noise as JPEGs of odd sizes; labels as palette PNGs, each with all values 0..20 and 255.
    """

    def make(counts):
        base = tmp_path / "VOCdevkit" / "VOC2012"
        rng = np.random.default_rng(0)
        for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (base / folder).mkdir(parents=True)

        for split, count in counts.items():
            names = [f"{split}_{i}" for i in range(count)]
            lines = "".join(f"{name}\n" for name in names)
            (base / f"ImageSets/Segmentation/{split}.txt").write_text(lines)

            for i, name in enumerate(names):
                H, W = 60 + 7 * i, 90 + 3 * i
                image = Image.fromarray(rng.integers(0, 256, (H, W, 3), dtype=np.uint8))
                image.save(base / "JPEGImages" / f"{name}.jpg")

                values = [*range(21), 255]
                blocks = rng.choice(values, (20, 20)).astype(np.uint8)
                blocks[:3, :9] = np.resize(values, (3, 9))  # each value at least once
                label = Image.fromarray(np.kron(blocks, np.ones((10, 10), np.uint8))[:H, :W])
                label.putpalette([part for color in voc_palette() for part in color])
                label.save(base / "SegmentationClass" / f"{name}.png")
        return tmp_path

    return make


@contextlib.contextmanager
def fewer_shapes():
    """Within the block, the splits of shapes have 6, 4 and 5 images, the first of the real ones."""
    from extras import shapes
    few = {"train": (6, 101), "val": (4, 102), "test": (5, 103)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SHAPES_SPLITS", few)
        yield


@pytest.fixture
def small_shapes():
    """While the test runs, shapes has 6 (train), 4 (val) and 5 (test) images; in this process."""
    with fewer_shapes():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`python train.py` on small shapes, 2 epochs a stage: .out, .arguments, .printed.

    .out: the folder with rectify.pt, distill.pt, reference_only/, logs, image_labels.json, and the
        results of eval.py. It is shared: copy it before you change anything in it.
    .arguments: with these train.main would do the same again; ask for small_shapes too.
    """
    import train
    out = tmp_path_factory.mktemp("trained") / "run"
    arguments = [
        "--rectify-epochs", "2", "--rectify-batch", "2", "--distill-epochs", "2",
        "--distill-batch", "2", "--device", "cpu", "--out", str(out),
    ]
    printed = io.StringIO()
    with fewer_shapes(), contextlib.redirect_stdout(printed):
        train.main(arguments)
    return SimpleNamespace(out=out, arguments=arguments, printed=printed.getvalue())


# --- Bad files and bad servers --------------------------------------------------------------------

class Hostile:
    """Unpickled without care, it makes a file; it could run any program."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


@pytest.fixture
def hostile(tmp_path):
    """.payload: put it into a file of torch.save or pickle. .ran(): has it been executed?"""
    sentinel = tmp_path / "hostile_ran"
    payload = Hostile(sentinel)

    pickle.loads(pickle.dumps(payload)).close()  # it works on whoever is careless
    sentinel.unlink()
    return SimpleNamespace(payload=payload, ran=sentinel.exists)


@pytest.fixture
def serve(monkeypatch):
    """serve({"/path": behavior}) -> address of a web server, such as http://127.0.0.1:51234.

    A behavior is bytes: they are sent; a number: that HTTP status; ("cut", bytes): it promises
    1000 bytes more than it sends; "silent": it accepts the connection and never answers. Any other
    path: 404. serve.asked: the paths that were asked for, in order.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []
    over = threading.Event()

    def start(behaviors):
        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                start.asked.append(self.path)
                behavior = behaviors.get(self.path, 404)
                if behavior == "silent":
                    over.wait(60)
                    return
                if isinstance(behavior, int):
                    self.send_error(behavior)
                    return

                missing = 0
                if isinstance(behavior, tuple):
                    missing = 1000
                    behavior = behavior[1]
                self.send_response(200)
                self.send_header("Content-Length", str(len(behavior) + missing))
                self.end_headers()
                self.wfile.write(behavior)

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    start.asked = []
    yield start
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()
