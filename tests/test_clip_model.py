"""clip_model.py against independent computations.

A slow tokenizer, PyTorch's own attention, loops over patches and texts, closed forms. Nothing is
downloaded: what is fetched comes from a server on 127.0.0.1.
"""

import email.message
import gzip
import hashlib
import html
import http.server
import math
import os
import pickle
import re
import socket
import threading
import unicodedata
import warnings
import zipfile

import ftfy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import clip_model
from clip_model import CLIP, Tokenizer, load_clip, normalize_pixels, written_atomically
from conftest import DATA

VOCABULARY = "clip/bpe_simple_vocab_16e6.txt.gz"

NASTY = [
    "",
    " \t\n ",
    "a photo of a cat.",
    "A PHOTO of a Cat.",
    "don't we'll they've I'm he'd you're it's 'soup 'Tis",
    "rock 'n' roll ''s '' 'x",
    "café naïve Ångström İstanbul Straße ΣΟΦΟΣ",
    "cafe\u0301 nai\u0308ve",
    "cafÃ© â€œquotedâ€\x9d schÃ¶n",
    "fish &amp; chips &lt;b&gt; &eacute;",
    "&amp;amp; &amp;lt;i&amp;gt; &amp;amp;quot;",
    "1 < 2 &amp;lt; 3",
    "😀👩‍👩‍👧 🇩🇪 ❤️",
    "猫と犬 고양이 кошка قطة बिल्ली",
    "3.14159 2024 1,000,000 ½ ² Ⅳ ٣",
    "!!!???...;;;--__ #@! ... a.b,c",
    "tabs\tand\nnew\r\nlines\u00a0and\u2003wide",
    "in <|startoftext|> and <|ENDOFTEXT|> the text<|endoftext|>",
    "<|start|>",
    "antidisestablishmentarianism aaaaaaaaaaa bananabanana",
    "a_b snake_case CamelCase x2y 4th",
    "\u200bzero\u200dwidth",
]


# --------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------

def slow_alphabet():
    """byte -> visible character, as published with GPT-2: visible Latin-1, then 256, 257, ..."""
    letters = []
    spare = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            letters.append(chr(byte))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters


def kind_of(character):
    """" ": white space, "L": a letter, "N": a digit, "P": anything else"""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "P"


def slow_words(text):
    """CLIP's words, by a scanner: specials, contractions, runs of letters, single digits, rest."""
    whole = ["<|startoftext|>", "<|endoftext|>", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
    words = []
    i = 0
    while i < len(text):
        kind = kind_of(text[i])
        found = [word for word in whole if text.startswith(word, i)]
        if found:
            end = i + len(found[0])
        else:
            end = i + 1
            while kind in "LP" and end < len(text) and kind_of(text[end]) == kind:
                end += 1
        if kind != " ":
            words.append(text[i:end])
        i = end
    return words


def slow_encode(text, merges):
    """Byte-pair encoding on strings with spaces between the parts (Sennrich et al., 2016)."""
    letters = slow_alphabet()
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = [chr(byte) for byte in visible]                         # visible ones come first
    order += sorted(set(letters) - set(order))
    tokens = order + [c + "</w>" for c in order] + [a + b for a, b in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    number = {token: i for i, token in enumerate(tokens)}
    rank = {merge: i for i, merge in reversed([*enumerate(merges)])}

    text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
    ids = []
    for word in slow_words(text):
        if word in ("<|startoftext|>", "<|endoftext|>"):
            ids.append(number[word])
            continue
        parts = " ".join(letters[byte] for byte in word.encode()) + "</w>"
        while True:
            split = parts.split(" ")
            known = [pair for pair in zip(split, split[1:]) if pair in rank]
            if not known:
                break
            a, b = sorted(known, key=rank.get)[0]
            pair = rf"(?<!\S){re.escape(a)} {re.escape(b)}(?!\S)"
            parts = re.sub(pair, lambda _: a + b, parts)
        ids += [number[token] for token in parts.split(" ")]
    return ids


@pytest.fixture(scope="module")
def official():
    """OpenAI's vocabulary, once: (Tokenizer, merges as read here)."""
    path = DATA / VOCABULARY
    if not path.exists():
        pytest.skip(f"{path} is not here: the official vocabulary is not tested")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines[1:48895]]
    return Tokenizer.from_file(path), merges


def test_official_vocabulary_on_nasty_texts(official):
    tokenizer, merges = official
    for text in NASTY:
        assert tokenizer.encode(text) == slow_encode(text, merges), text


def test_small_vocabulary_on_nasty_texts(merges):
    for text in NASTY + ["the cat, the dogs", "cats of THE trees", "thethe catcat"]:
        assert Tokenizer(merges).encode(text) == slow_encode(text, merges), text


@pytest.mark.parametrize("text, ids", [  # as printed all over the web for openai/CLIP
    ("a photo of a cat.", [49406, 320, 1125, 539, 320, 2368, 269, 49407]),
    ("a diagram", [49406, 320, 22697, 49407]),
    ("a dog", [49406, 320, 1929, 49407]),
    ("hello world!", [49406, 3306, 1002, 256, 49407]),
    ("", [49406, 49407]),
])
def test_well_known_ids(official, text, ids):
    tokenizer, _ = official
    assert tokenizer([text])[0].tolist() == ids + [0] * (77 - len(ids))
    assert (tokenizer.start, tokenizer.end, len(tokenizer.ids)) == (49406, 49407, 49408)


def test_pieces_of_a_rare_word(official):
    # the example above Tokenizer
    tokenizer, _ = official
    pieces = ["ax", "o", "lot", "l</w>"]
    assert tokenizer.encode("axolotl") == [tokenizer.ids[piece] for piece in pieces]
    assert tokenizer.ids["cat"] != tokenizer.ids["cat</w>"] == 2368


def test_hand_made_ids():
    # "!" is token 0, "a" is the 65th visible character, "!</w>" is 256; then come the merges and
    # the two specials
    tokenizer = Tokenizer([("a", "b"), ("ab", "c</w>"), ("b", "c</w>")])
    a, b, c = (ord(letter) - ord("!") for letter in "abc")
    assert tokenizer.encode("abc ABC! bc cab") == [513, 513, 256, 514, c, a, b + 256]
    assert tokenizer("abc", context_length=5).tolist() == [[515, 513, 516, 0, 0]]


@pytest.mark.parametrize("written, meant", [
    ("cafÃ©", "café"),
    ("&amp;lt;b&amp;gt;", "<b>"),
    ("fish &amp;amp; chips", "fish & chips"),
    ("1 < 2 &amp;lt; 3", "1 < 2 < 3"),
    ("  a \t\n cat ", "a cat"),
    ("CAT", "cat"),
    ("cafe\u0301", "café"),
])
def test_texts_that_mean_the_same(merges, written, meant):
    tokenizer = Tokenizer(merges)
    assert tokenizer.encode(written) == tokenizer.encode(meant) == slow_encode(meant, merges)


def test_long_text(merges):
    tokenizer = Tokenizer(merges)
    with pytest.raises(ValueError, match="cat cat cat cat dog"):
        tokenizer(["a cat", "cat cat cat cat dog"], context_length=6)
    cut = tokenizer(["cat cat cat cat dog", "cat"], context_length=6, truncate=True)
    cat = tokenizer.ids["cat</w>"]
    assert cut.tolist() == [[tokenizer.start, cat, cat, cat, cat, tokenizer.end],
                            [tokenizer.start, cat, tokenizer.end, 0, 0, 0]]
    assert tokenizer("cat cat cat cat", context_length=6).tolist() == cut[:1].tolist()  # just fits


def test_no_texts(merges):
    assert Tokenizer(merges)([], context_length=6).shape == (0, 6)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", [
    lambda content: content[:len(content) // 2],
    lambda content: b"not a gzip",
    lambda content: gzip.compress(b"\xff\xfe\x80"),
])
def test_corrupt_vocabulary_names_the_file(tmp_path, damage):
    path = tmp_path / "vocabulary.gz"
    path.write_bytes(damage(gzip.compress("\n".join(["title", *("a b",) * 60000]).encode())))
    with pytest.raises(ValueError, match="vocabulary.gz"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("content", [
    b"",                                  # an empty file
    gzip.compress(b"title\na b\n"),       # too few merges
    gzip.compress(b"x\n" * 60000),        # lines that are no pairs
])
def test_vocabulary_of_something_else_names_the_file(tmp_path, content):
    (tmp_path / "vocabulary.gz").write_bytes(content)
    with pytest.raises(ValueError, match="vocabulary.gz"):
        Tokenizer.from_file(tmp_path / "vocabulary.gz")


NAME = "bpe_simple_vocab_16e6.txt.gz"


class Answers(http.server.BaseHTTPRequestHandler):
    """/right and /wrong give a file, /short breaks off in the middle of one, the rest is a 404."""

    def do_GET(self):
        bodies = {"/right": b"abc", "/wrong": b"an error page", "/short": b"ab"}
        if self.path not in bodies:
            self.send_error(404)
            return
        body = bodies[self.path]
        announced = 1000 if self.path == "/short" else len(body)
        self.send_response(200)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """The address of a web server on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """$CLIP_HOME, a folder that is not there yet. No proxy stands before 127.0.0.1."""
    monkeypatch.setenv("CLIP_HOME", str(tmp_path / "new" / "clip"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "new" / "clip"


def offer(monkeypatch, url):
    """From now on the vocabulary is at `url`, and its content is to be b"abc"."""
    # sha256 of b"abc", from FIPS 180-2
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setitem(clip_model.FILES, NAME, (url, sha256))
    return sha256


def one_sentence(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def test_download(home, server, monkeypatch):
    offer(monkeypatch, f"{server}/right")
    assert clip_model.find_file(NAME) == home / NAME
    assert (home / NAME).read_bytes() == b"abc"
    assert os.listdir(home) == [NAME]

    offer(monkeypatch, f"{server}/gone")  # the file is there: nothing is fetched
    assert clip_model.find_file(NAME) == home / NAME


@pytest.mark.parametrize("page", ["wrong", "short"])
def test_download_of_wrong_bytes(home, server, monkeypatch, page):
    sha256 = offer(monkeypatch, f"{server}/{page}")
    with pytest.raises((OSError, ValueError)) as caught:
        clip_model.find_file(NAME)
    one_sentence(caught, f"{server}/{page}", home / NAME, "fetch it elsewhere and put it at")
    if page == "wrong":
        assert caught.type is ValueError
        one_sentence(caught, sha256, "nothing was kept")
    assert os.listdir(home) == []


def test_download_of_a_missing_page(home, server, monkeypatch):
    offer(monkeypatch, f"{server}/gone")
    with pytest.raises(OSError) as caught:
        clip_model.find_file(NAME)
    one_sentence(caught, f"{server}/gone", "404", f"fetch it elsewhere and put it at {home / NAME}")
    assert os.listdir(home) == []


def test_download_from_a_dead_host(home, monkeypatch):
    with socket.socket() as taken:  # bound, but nobody listens: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
        offer(monkeypatch, url)
        with pytest.raises(OSError) as caught:
            clip_model.find_file(NAME)
    one_sentence(caught, url, f"fetch it elsewhere and put it at {home / NAME}")
    assert os.listdir(home) == []


class BreaksOff:
    """What urlopen gives when the connection is lost at once."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def info(self):
        return email.message.Message()

    def read(self, size):
        raise ConnectionResetError("reset by peer")


def test_download_whose_connection_breaks(home, monkeypatch):
    offer(monkeypatch, "http://127.0.0.1/file")
    monkeypatch.setattr(torch.hub, "urlopen", lambda *args, **kwargs: BreaksOff())
    with pytest.raises(OSError, match="reset by peer") as caught:
        clip_model.find_file(NAME)
    one_sentence(caught, "http://127.0.0.1/file", home / NAME)
    assert os.listdir(home) == []


def test_home_that_cannot_be_made(tmp_path, server, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CLIP_HOME", str(tmp_path / "file" / "clip"))
    offer(monkeypatch, f"{server}/right")
    with pytest.raises(OSError) as caught:
        clip_model.find_file(NAME)
    one_sentence(caught, tmp_path / "file" / "clip" / NAME)


def test_cached_file_with_wrong_content(home):
    home.mkdir(parents=True)
    (home / NAME).write_bytes(b"something else")
    with pytest.raises(ValueError) as caught:
        clip_model.find_file(NAME)
    one_sentence(caught, home / NAME)
    assert (home / NAME).read_bytes() == b"something else"  # never deletes what it did not write


def test_cached_official_file_is_found(shared, monkeypatch):
    monkeypatch.setenv("CLIP_HOME", str(shared(VOCABULARY).parent))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # would fail if it were called
    assert clip_model.find_file(NAME) == shared(VOCABULARY)


def test_weights_url_carries_their_sha256():
    url, sha256 = clip_model.FILES["ViT-B-16.pt"]
    assert url.split("/")[-2] == sha256


def test_sha256_of(tmp_path):
    content = os.urandom((1 << 20) + 12345)  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert clip_model.sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_written_atomically(tmp_path):
    path = tmp_path / "folder" / "file"
    with written_atomically(path) as temporary:
        temporary.write_text("old")

    with pytest.raises(KeyError):
        with written_atomically(path) as temporary:
            temporary.write_text("half of the new")
            assert path.read_text() == "old"
            raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]


# --------------------------------------------------------------------------------------------------
# The model against torch.nn.MultiheadAttention and loops
# --------------------------------------------------------------------------------------------------

def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def exact_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(state, key, x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * state[key + "weight"] + state[key + "bias"]


def plain_mlp(state, key, x, gelu):
    hidden = gelu(x @ state[key + "mlp.c_fc.weight"].T + state[key + "mlp.c_fc.bias"])
    return hidden @ state[key + "mlp.c_proj.weight"].T + state[key + "mlp.c_proj.bias"]


def plain_block(state, key, x, causal=False, gelu=quick_gelu):
    """A pre-norm transformer block, attention by PyTorch's module and an additive -inf mask."""
    width, length = x.shape[-1], x.shape[1]
    attention = nn.MultiheadAttention(width, width // 64, batch_first=True, dtype=x.dtype)
    prefix = key + "attn."
    attention.load_state_dict({
        name.removeprefix(prefix): tensor
        for name, tensor in state.items() if name.startswith(prefix)
    })
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1) if causal else None
    y = layer_norm(state, key + "ln_1.", x)
    x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
    return x + plain_mlp(state, key, layer_norm(state, key + "ln_2.", x), gelu)


def plain_embed(state, image, patch, grid):
    """One image (3, H, W) -> tokens (1, 1 + n, E_v), patch by patch on a canvas of zeros."""
    h, w = -(-image.shape[1] // patch), -(-image.shape[2] // patch)
    canvas = image.new_zeros(3, h * patch, w * patch)
    canvas[:, :image.shape[1], :image.shape[2]] = image
    position = state["visual.positional_embedding"]
    table = position[1:].reshape(grid, grid, -1).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)[0]
    tokens = [state["visual.class_embedding"] + position[0]]
    for y in range(h):
        for x in range(w):
            window = canvas[:, y * patch:(y + 1) * patch, x * patch:(x + 1) * patch]
            tokens.append((state["visual.conv1.weight"] * window).sum((1, 2, 3)) + table[:, y, x])
    return layer_norm(state, "visual.ln_pre.", torch.stack(tokens)[None])


def plain_image(state, image, patch, grid, layers=2, gelu=quick_gelu):
    x = plain_embed(state, image, patch, grid)
    for i in range(layers):
        x = plain_block(state, f"visual.transformer.resblocks.{i}.", x, gelu=gelu)
    return layer_norm(state, "visual.ln_post.", x[0, 0]) @ state["visual.proj"]


def plain_text(state, ids, layers=2, gelu=quick_gelu):
    """ids: one text up to and with EOT -> (D,)"""
    tokens = []
    for i, token in enumerate(ids):
        tokens.append(state["token_embedding.weight"][token] + state["positional_embedding"][i])
    x = torch.stack(tokens)[None]
    for i in range(layers):
        x = plain_block(state, f"transformer.resblocks.{i}.", x, causal=True, gelu=gelu)
    return layer_norm(state, "ln_final.", x[0, -1]) @ state["text_projection"]


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# the trained size, not square, no multiple of the patch, a single patch
SIZES = [(12, 12), (8, 20), (20, 8), (7, 18), (13, 5), (4, 4)]


@pytest.mark.parametrize("height, width", SIZES)
def test_encode_image(clip, height, width):
    clip = clip.double()
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = torch.stack([plain_image(clip.state_dict(), image, 4, 3) for image in images])
    close(clip.encode_image(images), expected)


def test_encode_text(clip):
    clip = clip.double()
    texts = ["cat", "a photo of the dog in this scene", ""]
    state, tokens = clip.state_dict(), clip.tokenize(texts)
    expected = []
    for text in texts:
        expected.append(plain_text(state, [clip.sot, *clip.tokenizer.encode(text), clip.eot]))
    close(clip.encode_text(tokens), torch.stack(expected))


def test_encode_text_ignores_what_stands_behind_eot(clip):
    tokens = clip.double().tokenize(["cat", "a photo of a dog"])
    other = tokens.clone()
    for row in other:
        end = int(row.argmax())
        row[end + 1:] = torch.randint(1, clip.eot, (clip.context_length - end - 1,))
    assert not torch.equal(tokens, other)
    close(clip.encode_text(other), clip.encode_text(tokens), 1e-12)


def test_exact_gelu_is_a_switch(make_clip):
    exact, quick = make_clip(quick_gelu=False).double(), make_clip().double()
    state, image = exact.state_dict(), torch.randn(1, 3, 8, 12, dtype=torch.float64)
    close(exact.encode_image(image)[0], plain_image(state, image[0], 4, 3, gelu=exact_gelu))
    tokens = exact.tokenize(["a cat"])
    ids = tokens[0, :int(tokens[0].argmax()) + 1].tolist()
    close(exact.encode_text(tokens)[0], plain_text(state, ids, gelu=exact_gelu))
    assert (exact.encode_image(image) - quick.encode_image(image)).abs().max() > 1e-4


@pytest.mark.parametrize("height, width", SIZES)
def test_encode_image_dense(clip, height, width):
    # Sec. 3.1: in the last block each patch keeps its own value; residual, MLP, ln_post and
    # projection stay
    clip = clip.double()
    state, key = clip.state_dict(), "visual.transformer.resblocks.1."
    image = torch.randn(3, height, width, dtype=torch.float64)
    embedded = plain_embed(state, image, 4, 3)
    tokens = plain_block(state, "visual.transformer.resblocks.0.", embedded)[0]
    h, w = math.ceil(height / 4), math.ceil(width / 4)
    value_weight = state[key + "attn.in_proj_weight"][2 * 128:]
    value_bias = state[key + "attn.in_proj_bias"][2 * 128:]

    expected = torch.empty(1, 12, h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            v = tokens[1 + y * w + x]
            value = value_weight @ layer_norm(state, key + "ln_1.", v) + value_bias
            v = v + state[key + "attn.out_proj.weight"] @ value + state[key + "attn.out_proj.bias"]
            v = v + plain_mlp(state, key, layer_norm(state, key + "ln_2.", v), quick_gelu)
            expected[0, :, y, x] = layer_norm(state, "visual.ln_post.", v) @ state["visual.proj"]
    close(clip.encode_image_dense(image[None]), expected)


def plain_variant(state, tokens, size, attention):
    """SCLIP, ClearCLIP or NACLIP, patch by patch and head by head.

    tokens (1 + n, E_v): before the last block, which has 2 heads -> (D, h, w)
    """
    key = "visual.transformer.resblocks.1."
    weight, bias = state[key + "attn.in_proj_weight"], state[key + "attn.in_proj_bias"]
    y = layer_norm(state, key + "ln_1.", tokens)
    out = torch.zeros_like(tokens)

    for head in range(2):
        q, k, v = [], [], []
        for part, projected in enumerate((q, k, v)):
            rows = slice(128 * part + 64 * head, 128 * part + 64 * (head + 1))
            projected += y @ weight[rows].T + bias[rows]

        for i in range(1, len(tokens)):
            for a in {"sclip": (q, k), "clearclip": (q,), "naclip": (k,)}[attention]:
                logits = [(a[i] * a[j]).sum() / 8 for j in range(len(tokens))]  # 8: root of 64
                if attention == "naclip":
                    for j in range(1, len(tokens)):
                        (y1, x1), (y2, x2) = divmod(i - 1, size[1]), divmod(j - 1, size[1])
                        logits[j] += math.exp(-((y1 - y2) ** 2 + (x1 - x2) ** 2) / 50)  # std 5
                weights = torch.stack(logits).exp()
                out[i, 64 * head:64 * (head + 1)] += (weights / weights.sum()) @ torch.stack(v)

    x = (out @ state[key + "attn.out_proj.weight"].T + state[key + "attn.out_proj.bias"])[1:]
    if attention == "sclip":
        x = tokens[1:] + x
        x = x + plain_mlp(state, key, layer_norm(state, key + "ln_2.", x), quick_gelu)
    return (layer_norm(state, "visual.ln_post.", x) @ state["visual.proj"]).T.unflatten(1, size)


@pytest.mark.parametrize("height, width", [(13, 22), (20, 8)])  # grids of 4 x 6 and 5 x 2
@pytest.mark.parametrize("attention", ["sclip", "clearclip", "naclip"])
def test_attention_variants(clip, attention, height, width):
    clip = clip.double()
    state, images = clip.state_dict(), torch.randn(2, 3, height, width, dtype=torch.float64)
    size = (math.ceil(height / 4), math.ceil(width / 4))
    expected = []
    for image in images:
        embedded = plain_embed(state, image, 4, 3)
        tokens = plain_block(state, "visual.transformer.resblocks.0.", embedded)[0]
        expected.append(plain_variant(state, tokens, size, attention))
    expected = torch.stack(expected)

    close(clip.encode_image_dense(images, attention), expected)
    in_float32 = clip.float().encode_image_dense(images.float(), attention)
    close(in_float32, expected.float(), 1e-4)


def test_attention_variants_differ_and_the_default_is_the_papers(clip):
    images = torch.randn(1, 3, 13, 22)
    dense = [clip.encode_image_dense(images, attention) for attention in clip_model.ATTENTIONS]
    assert torch.equal(dense[0], clip.encode_image_dense(images)) and len(dense) == 4
    for i in range(4):
        for j in range(i):
            assert (dense[i] - dense[j]).abs().max() > 1e-3


def test_unknown_attention_variant(clip):
    message = "'maskclap'; it must be one of maskclip, sclip, clearclip, naclip"
    with pytest.raises(ValueError, match=message):
        clip.encode_image_dense(torch.zeros(1, 3, 8, 8), "maskclap")


def test_new_attention_variant_needs_a_branch(clip, monkeypatch):
    # a name in ATTENTIONS alone must not become one of the other variants in silence
    monkeypatch.setattr(clip_model, "ATTENTIONS", (*clip_model.ATTENTIONS, "newclip"))
    with pytest.raises(ValueError, match="'newclip' has no branch in .*read_patches"):
        clip.encode_image_dense(torch.zeros(1, 3, 8, 12), "newclip")


def test_nearness():
    bonus = clip_model.nearness(2, 3, torch.empty(0, dtype=torch.float64), std=1.5)
    expected = torch.zeros(6, 7, dtype=torch.float64)  # patches x (class token, patches)
    for i in range(6):
        for j in range(6):
            d2 = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
            expected[i, 1 + j] = math.exp(-d2 / (2 * 1.5 ** 2))
    close(bonus, expected, 1e-15)


def test_quick_gelu_and_its_gradient():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    activation = clip_model.QuickGELU()
    close(activation(x), quick_gelu(x), 1e-14)
    assert torch.autograd.gradcheck(activation, x)  # nothing written in place is needed again


def test_positional_grid(clip):
    # p of Sec. 3.3: row-major, the class token left out, bicubic for other sizes
    grid = clip.visual.positional_grid(3, 3)
    for y in range(3):
        for x in range(3):
            assert torch.equal(grid[0, :, y, x], clip.visual.positional_embedding[1 + 3 * y + x])
    resized = F.interpolate(grid, size=(2, 5), mode="bicubic")
    assert torch.equal(clip.visual.positional_grid(2, 5), resized)


def test_to_pixels_is_linear_between_patch_centers(clip):
    # the center of patch i lies at pixel 4 i + 1.5; beyond the outer centers the value stays
    y, x = torch.arange(2.)[:, None], torch.arange(3.)[None]
    ramp = torch.stack([torch.ones(2, 3), 10 * y + x])[None]        # (1, 2, 2, 3)
    pixels = clip.to_pixels(ramp, 7, 10)                            # 1 row, 2 columns: padding
    rows = ((torch.arange(7.) - 1.5) / 4).clamp(0, 1)[:, None]
    columns = ((torch.arange(10.) - 1.5) / 4).clamp(0, 2)[None]
    close(pixels[0, 0], torch.ones(7, 10), 1e-6)
    close(pixels[0, 1], 10 * rows + columns, 1e-5)


def test_to_pixels_by_hand(clip):
    grid = torch.tensor([[[[1., 2., 4.], [8., 16., 32.]]]])
    # pixel (3, 6): 3/8 of the way from row 0 to row 1, 1/8 of the way from column 1 to column 2
    expected = 5 / 8 * (7 / 8 * 2 + 1 / 8 * 4) + 3 / 8 * (7 / 8 * 16 + 1 / 8 * 32)
    assert clip.to_pixels(grid, 7, 10)[0, 0, 3, 6].item() == pytest.approx(expected)
    whole = F.interpolate(grid, scale_factor=4, mode="bilinear")
    assert torch.equal(clip.to_pixels(grid, 7, 10), whole[:, :, :7, :10])


def test_normalize_pixels():
    images = torch.rand(2, 3, 2, 5, dtype=torch.float64)
    mean = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP
    std = (0.26862954, 0.26130258, 0.27577711)
    expected = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    close(normalize_pixels(images), expected, 1e-12)
    close(normalize_pixels(images[0]), expected[0], 1e-12)

    expected = torch.stack([(images[:, c] - c) / (c + 2) for c in range(3)], dim=1)
    close(normalize_pixels(images, mean=(0, 1, 2), std=(2, 3, 4)), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_normalize_pixels_refuses_whole_numbers(dtype):
    with pytest.raises(ValueError) as caught:
        normalize_pixels(torch.ones(1, 3, 4, 6, dtype=dtype))
    one_sentence(caught, dtype, "give images as float in [0, 1], e.g. images.float() / 255")


def test_initial_weights(make_clip):
    # OpenAI's standard deviations, by counting; biases are 0; layers of the two towers differ
    clip = CLIP(96, 4, 256, 3, 20, 200, 2000, 192, 2).reset_parameters()
    for tower, width, layers in ((clip.visual.transformer, 256, 3), (clip.transformer, 192, 2)):
        assert len(tower.resblocks) == layers
        for block in tower.resblocks:
            expected = {
                block.attn.in_proj_weight: 1 / math.sqrt(width),
                block.attn.out_proj.weight: 1 / math.sqrt(2 * width * layers),
                block.mlp.c_fc.weight: 1 / math.sqrt(2 * width),
                block.mlp.c_proj.weight: 1 / math.sqrt(2 * width * layers),
            }
            for weight, std in expected.items():
                assert weight.std().item() == pytest.approx(std, rel=0.02)
            for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                assert not layer.bias.any()
            assert not block.attn.in_proj_bias.any()
    for weight, std in [
        (clip.visual.positional_embedding, 1 / 16),
        (clip.visual.proj, 1 / 16),
        (clip.token_embedding.weight, 0.02),
        (clip.positional_embedding, 0.01),
        (clip.text_projection, 1 / math.sqrt(192)),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert clip.visual.class_embedding.std().item() == pytest.approx(1 / 16, rel=0.2)
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)


# --------------------------------------------------------------------------------------------------
# Eq. (1): prompted texts
# --------------------------------------------------------------------------------------------------

NAME_TOKENS = [[5, 6], [7], [5, 9, 10], [11, 12, 13, 14], [7]]


def endings_of(clip, names=NAME_TOKENS):
    return [[*name, clip.eot] for name in names]


def encode_prompted_plain(clip, prompt, endings):
    """CLIP.encode_prompted without its tricks: each text [SOT] v_1 .. v_L [name] [EOT] on its own.

    prompt (L, E_t) or (C, L, E_t); endings: C lists of token ids, [name] [EOT] -> (C, D)
    """
    if prompt.ndim == 2:
        prompt = prompt.expand(len(endings), -1, -1)
    texts = []
    for own, ending in zip(prompt, endings):
        ids = torch.tensor([clip.sot, *ending])
        first, rest = clip.token_embedding(ids).split([1, len(ending)])
        x = torch.cat([first, own, rest])                   # (1 + L + len(ending), E_t)
        x = (x + clip.positional_embedding[:len(x)])[None]
        for block in clip.transformer.resblocks:
            x = block(x, causal=True)
        texts.append(clip.ln_final(x[0, -1]) @ clip.text_projection)
    return torch.stack(texts)                               # (C, D)


@pytest.mark.parametrize("shape", [(7, 128), (5, 7, 128)], ids=["shared", "per class"])
def test_prompted_texts_are_those_of_one_at_a_time(clip, shape):
    # all texts at once and one text at a time: same values, same gradient
    clip = clip.double()
    one = torch.randn(shape, dtype=torch.float64).mul_(0.1).requires_grad_()
    other = one.detach().clone().requires_grad_()
    fast = clip.encode_prompted(one, endings_of(clip))
    plain = encode_prompted_plain(clip, other, endings_of(clip))
    weight = torch.randn_like(plain)
    (fast * weight).sum().backward()
    (plain * weight).sum().backward()

    close(fast, plain, 1e-12)
    assert other.grad.abs().max() > 1e-3
    close(one.grad, other.grad, 1e-9)


@pytest.mark.parametrize("encode", [CLIP.encode_prompted, encode_prompted_plain])
def test_prompt_of_real_words_is_a_text(clip, encode):
    # Eq. (1) with v_l = the embeddings of words is the text of these words, followed by the name
    clip = clip.double()
    words = [20, 21, 22]
    W = encode(clip, clip.token_embedding.weight[words], endings_of(clip))
    expected = []
    for name in NAME_TOKENS:
        expected.append(plain_text(clip.state_dict(), [clip.sot, *words, *name, clip.eot]))
    close(W, torch.stack(expected))


def test_equal_prompts_per_class_are_a_shared_prompt(clip):
    clip = clip.double()
    prompt = torch.randn(4, 128, dtype=torch.float64)
    shared = clip.encode_prompted(prompt, endings_of(clip))
    close(clip.encode_prompted(prompt.repeat(5, 1, 1), endings_of(clip)), shared, 1e-12)

    # and one class's vectors move that class's text and no other
    prompts = prompt.repeat(5, 1, 1)
    prompts[2] += torch.randn(4, 128)
    changed = (clip.encode_prompted(prompts, endings_of(clip)) - shared).abs().amax(1) > 1e-9
    assert changed.tolist() == [False, False, True, False, False]


def test_prompted_texts_as_drawn_above_the_code(clip, monkeypatch):
    # SOT v_1 v_2 | cat EOT | potted plant EOT: the mask and the positions that the blocks are given
    seen = []
    attend = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, is_causal=False):
        seen.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(clip_model.F, "scaled_dot_product_attention", watched)
    clip.encode_prompted(torch.randn(2, 128), endings_of(clip, [[5], [6, 7]]))

    expected = torch.tensor([
        [1, 0, 0, 0, 0, 0, 0, 0],   # SOT
        [1, 1, 0, 0, 0, 0, 0, 0],   # v_1
        [1, 1, 1, 0, 0, 0, 0, 0],   # v_2
        [1, 1, 1, 1, 0, 0, 0, 0],   # cat
        [1, 1, 1, 1, 1, 0, 0, 0],   # EOT
        [1, 1, 1, 0, 0, 1, 0, 0],   # potted
        [1, 1, 1, 0, 0, 1, 1, 0],   # plant
        [1, 1, 1, 0, 0, 1, 1, 1],   # EOT
    ], dtype=torch.bool)
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], expected[[4, 7]])  # the last block: the EOTs alone


def test_prompted_texts_without_data(clip):
    # all shapes are known beforehand, as tracing (torch.compile, torch.export) needs it
    with FakeTensorMode(allow_non_fake_inputs=True):
        W = clip.encode_prompted(torch.randn(3, 128), endings_of(clip))
        own = clip.encode_prompted(torch.randn(5, 3, 128), endings_of(clip))
    assert W.shape == own.shape == (5, 12)


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------

def tree_of(state, **attributes):
    """A module tree with these tensors at their dotted names, which torch.jit.script accepts."""
    class Top(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x
    top = Top()
    for key, tensor in state.items():
        *path, last = key.split(".")
        module = top
        for name in path:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor):
            top.register_buffer(name, value)
        else:
            setattr(top, name, value)
    return top


def save_torchscript(path, state, trace=False, **attributes):
    module = tree_of(state, **attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates writing such files; we only read them
        script = torch.jit.trace(module, torch.zeros(1)) if trace else torch.jit.script(module)
        torch.jit.save(script, str(path))


def load_strictly(path, **arguments):
    """load_clip where any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_clip(path, **arguments)


def same_weights(clip, state):
    loaded = clip.state_dict()
    assert loaded.keys() == state.keys()
    for key in state:
        assert loaded[key].dtype == torch.float32, key
        assert torch.equal(loaded[key], state[key].float()), key


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scalars", [
    {},
    {"input_resolution": 12, "context_length": 60, "vocab_size": 600},
    {"input_resolution": torch.tensor(12), "context_length": torch.tensor(60),
     "vocab_size": torch.tensor(600)},
])
def test_torchscript_archive(clip, tmp_path, trace, dtype, scalars):
    state = {key: value.to(dtype) for key, value in clip.state_dict().items()}
    save_torchscript(tmp_path / "clip.pt", state, trace, **scalars)
    loaded = load_strictly(tmp_path / "clip.pt")
    same_weights(loaded, state)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.tokenizer is None and loaded.source == str(tmp_path / "clip.pt")


def test_tensors_that_share_a_storage(clip, tmp_path):
    # views with an offset and transposed strides come back as what they were
    state = clip.state_dict()
    both = torch.randn(2, 12, 128)
    state["text_projection"], state["visual.proj"] = both[1].T, both[0].T
    save_torchscript(tmp_path / "clip.pt", state)
    same_weights(load_strictly(tmp_path / "clip.pt"), state)


@pytest.mark.parametrize("wrap", [False, True])
def test_plain_state_dict_of_odd_sizes(make_clip, merges, tmp_path, wrap):
    # every size is read off the weights; "merges" brings the tokenizer along
    clip = make_clip(embed_dim=10, patch=5, width=192, layers=3, grid=4, context=23, text_width=64,
                     text_layers=1)
    if wrap:
        torch.save({"state_dict": clip.state_dict(), "merges": merges}, tmp_path / "f")
    else:
        torch.save(clip.state_dict(), tmp_path / "f")
    loaded = load_strictly(tmp_path / "f")
    same_weights(loaded, clip.state_dict())
    assert (loaded.context_length, loaded.input_resolution) == (23, 20)
    images = torch.randn(1, 3, 13, 25)
    assert torch.equal(loaded.encode_image_dense(images), clip.encode_image_dense(images))
    close(loaded.double().encode_image(images.double())[0],
          plain_image(loaded.state_dict(), images[0].double(), 5, 4, layers=3))  # three heads of 64
    if wrap:
        assert loaded.tokenize(["a cat"]).tolist() == clip.tokenize(["a cat"]).tolist()
    else:
        assert loaded.tokenizer is None


def test_load_with_exact_gelu(clip, make_clip, tmp_path):
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    images = torch.randn(1, 3, 8, 12)
    for quick in (True, False):
        loaded = load_strictly(tmp_path / "clip.pt", quick_gelu=quick)
        expected = make_clip(quick_gelu=quick).encode_image(images)
        assert torch.equal(loaded.encode_image(images), expected)


def refused(path, *words):
    """load_clip says, in one line that names the file, what is wrong."""
    with pytest.raises(ValueError) as caught:
        load_strictly(path)
    one_sentence(caught, path, *words)


class Hostile:
    """Unpickled without care, it runs a shell command."""
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self.sentinel}'",)


def test_hostile_files_run_nothing(tmp_path):
    sentinel = tmp_path / "sentinel"
    payload = pickle.dumps(Hostile(sentinel))
    pickle.loads(payload)
    assert sentinel.exists()  # the payload works, so the test below can fail
    sentinel.unlink()
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/code/__torch__.py", "")
    torch.save({"weight": Hostile(sentinel)}, tmp_path / "plain.pt")
    torch.save({"weight": Hostile(sentinel)}, tmp_path / "legacy.pt",
               _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(payload)
    for name in ("archive.pt", "plain.pt", "legacy.pt", "bare.pt"):
        refused(tmp_path / name)
        assert not sentinel.exists(), name


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("scripted", [False, True])
def test_truncated_files(clip, tmp_path, scripted, share):
    path = tmp_path / "clip.pt"
    if scripted:
        save_torchscript(path, clip.state_dict())
    else:
        torch.save(clip.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    refused(path)


def test_archive_whose_record_is_too_short(clip, tmp_path):
    save_torchscript(tmp_path / "whole.pt", clip.state_dict())
    short = tmp_path / "short.pt"
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(short, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:64] if "/data/" in name else content)
    refused(short)


def test_archive_without_a_tree(tmp_path):
    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
        archive.writestr("clip/code/__torch__.py", "")
    refused(tmp_path / "clip.pt", "data.pkl")


@pytest.mark.parametrize("change, word", [
    (lambda s: s.pop("visual.proj"), "visual.proj"),
    (lambda s: s.pop("text_projection"), "text_projection"),
    (lambda s: s.update(surplus=torch.zeros(1)), "surplus"),
    (lambda s: s.update({"ln_final.bias": torch.zeros(7)}), "ln_final.bias"),
    (lambda s: s.update({"visual.layer1.0.conv1.weight": torch.zeros(1)}), "ResNet"),
])
def test_unfit_state_dicts(clip, tmp_path, change, word):
    state = clip.state_dict()
    change(state)
    torch.save(state, tmp_path / "clip.pt")
    refused(tmp_path / "clip.pt", word)


@pytest.mark.parametrize("content", [
    [1, 2], torch.zeros(3), {"epoch": 3}, {}, {"weight": torch.zeros(3)},
])
def test_checkpoints_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    refused(tmp_path / "other.pt")


@pytest.mark.parametrize("content", [b"", b"this is a text\n", b"<html>404</html>"])
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "text.pt").write_bytes(content)
    refused(tmp_path / "text.pt")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_clip(tmp_path / "nothing.pt")
    one_sentence(caught, tmp_path / "nothing.pt", "give a file, or a name of ViT-B/16, ViT-B/32")
    assert "--" not in str(caught.value)  # this speaks of arguments, not of a command line's flags


def test_full_size():
    # ViT-B/16 as published: 149,620,737 parameters in 302 tensors
    clip = CLIP(512, 16, 768, 12, 14, 77, 49408, 512, 12).reset_parameters()
    clip.eval().requires_grad_(False)
    assert sum(p.numel() for p in clip.parameters()) == 149_620_737
    assert len(clip.state_dict()) == 302 and clip.input_resolution == 224
    assert clip.encode_image_dense(torch.randn(1, 3, 64, 80)).shape == (1, 512, 4, 5)


def test_weights_of_the_name(clip, merges, home, monkeypatch):
    # "ViT-B/16" is the file ViT-B-16.pt in $CLIP_HOME, if its sha256 is right
    home.mkdir(parents=True)
    torch.save({"state_dict": clip.state_dict(), "merges": merges}, home / "ViT-B-16.pt")
    with pytest.raises(ValueError) as caught:
        load_clip("ViT-B/16")
    one_sentence(caught, home / "ViT-B-16.pt", "sha256")

    sha256 = clip_model.sha256_of(home / "ViT-B-16.pt")
    monkeypatch.setitem(clip_model.FILES, "ViT-B-16.pt", ("http://127.0.0.1/unused", sha256))
    loaded = load_clip()
    same_weights(loaded, clip.state_dict())
    assert (loaded.source, loaded.sha256) == ("ViT-B/16", sha256)


def test_ready_for_pickle(clip):
    images = torch.randn(1, 3, 8, 12)
    again = pickle.loads(pickle.dumps(clip))
    assert torch.equal(again.encode_image_dense(images), clip.encode_image_dense(images))


# --------------------------------------------------------------------------------------------------
# What the file says about itself
# --------------------------------------------------------------------------------------------------

def test_examples_of_the_header(make_clip, monkeypatch, capsys):
    # copied and run as they stand, but for the weights: random ones of ViT-B/16's patch and width D
    small = make_clip(embed_dim=512, patch=16, grid=14, context=77)
    monkeypatch.setattr(clip_model, "load_clip", lambda name: small)
    lines = clip_model.__doc__.splitlines()
    start = lines.index("Zero-shot classification") + 1
    end = next(i for i, line in enumerate(lines) if line.startswith("Sources:"))
    example = "\n".join(line[4:] for line in lines[start:end] if line.startswith("    "))
    assert example.startswith("import torch")
    exec(example, {})

    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"# (torch\.Size\(.*\))", example)
    assert printed == promised == ["torch.Size([4, 2])", "torch.Size([4, 320, 224])"]


def test_tour(capsys):
    clip_model.tour()
    printed = capsys.readouterr().out
    for line in ("(1, 3, 64, 48)", "(1, 128, 8, 6)", "(8, 128)", "(1, 8, 8, 6)"):
        assert line in printed


def test_a_clip_is_found_again_from_another_folder(clip, tmp_path, monkeypatch):
    """Checkpoints keep .source: a name relative to where a run began would lead nowhere later."""
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    monkeypatch.chdir(tmp_path)
    source = load_clip("clip.pt").source
    monkeypatch.chdir("/")
    assert load_clip(source).source == source
