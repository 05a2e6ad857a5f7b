"""clip_model.py against independent computations: a slow tokenizer, PyTorch's own attention, loops, closed forms."""

import gzip
import html
import io
import math
import os
import pickle
import re
import unicodedata
import urllib.error
import warnings
import zipfile

import ftfy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip_model
from clip_model import CLIP, Tokenizer, load_clip, normalise, written_atomically

VOCABULARY = "clip/bpe_simple_vocab_16e6.txt.gz"

NASTY = [
    "", " \t\n ", "a photo of a cat.", "A PHOTO of a Cat.", "don't we'll they've I'm he'd you're it's 'soup 'Tis",
    "rock 'n' roll ''s '' 'x", "café naïve Ångström İstanbul Straße ΣΟΦΟΣ", "cafe\u0301 nai\u0308ve",
    "cafÃ© â€œquotedâ€\x9d schÃ¶n", "fish &amp; chips &lt;b&gt; &eacute;", "&amp;amp; &amp;lt;i&amp;gt; &amp;amp;quot;", "1 < 2 &amp;lt; 3",
    "😀👩‍👩‍👧 🇩🇪 ❤️", "猫と犬 고양이 кошка قطة बिल्ली", "3.14159 2024 1,000,000 ½ ² Ⅳ ٣", "!!!???...;;;--__ #@! ... a.b,c",
    "tabs\tand\nnew\r\nlines\u00a0and\u2003wide", "in <|startoftext|> and <|ENDOFTEXT|> the text<|endoftext|>", "<|start|>",
    "antidisestablishmentarianism aaaaaaaaaaa bananabanana", "a_b snake_case CamelCase x2y 4th", "\u200bzero\u200dwidth",
]


# ---------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------

def slow_alphabet():
    """byte -> visible character, as published with GPT-2: Latin-1's visible characters, then 256, 257, ..."""
    letters, spare = [], 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            letters.append(chr(byte))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters


def slow_words(text):
    """CLIP's word pattern as a scanner: specials, contractions, runs of letters, single digits, the rest."""
    kind = lambda c: " " if c.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "P")  # noqa: E731
    words, i = [], 0
    while i < len(text):
        fixed = [s for s in ("<|startoftext|>", "<|endoftext|>", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
                 if text.startswith(s, i)]
        end = i + len(fixed[0]) if fixed else i + 1
        if not fixed and kind(text[i]) in "LP":
            while end < len(text) and kind(text[end]) == kind(text[i]):
                end += 1
        if kind(text[i]) != " ":
            words.append(text[i:end])
        i = end
    return words


def slow_encode(text, merges):
    """Byte-pair encoding on strings with spaces between the parts, as Sennrich et al. (2016) print it."""
    letters = slow_alphabet()
    order = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]  # visible ones come first
    order += sorted(set(letters) - set(order))
    tokens = order + [c + "</w>" for c in order] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    number, rank = {t: i for i, t in enumerate(tokens)}, {m: i for i, m in reversed([*enumerate(merges)])}
    text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
    ids = []
    for word in slow_words(text):
        if word in ("<|startoftext|>", "<|endoftext|>"):
            ids.append(number[word])
            continue
        parts = " ".join(letters[b] for b in word.encode()) + "</w>"
        while True:
            split = parts.split(" ")
            known = [pair for pair in zip(split, split[1:]) if pair in rank]
            if not known:
                break
            a, b = sorted(known, key=rank.get)[0]
            parts = re.sub(rf"(?<!\S){re.escape(a)} {re.escape(b)}(?!\S)", lambda _: a + b, parts)
        ids += [number[t] for t in parts.split(" ")]
    return ids


@pytest.fixture(scope="module")
def official():
    """OpenAI's vocabulary, once: (Tokenizer, merges as read here)."""
    from conftest import DATA
    if not (DATA / VOCABULARY).exists():
        pytest.skip(f"{DATA / VOCABULARY} is not here: the official vocabulary is not tested")
    lines = gzip.decompress((DATA / VOCABULARY).read_bytes()).decode("utf-8").splitlines()
    return Tokenizer.from_file(DATA / VOCABULARY), [tuple(line.split(" ")) for line in lines[1:48895]]


def test_official_vocabulary_on_nasty_texts(official):
    tokenizer, merges = official
    for text in NASTY:
        assert tokenizer.encode(text) == slow_encode(text, merges), text


def test_small_vocabulary_on_nasty_texts(merges):
    for text in NASTY + ["the cat, the dogs", "cats of THE trees", "thethe catcat"]:
        assert Tokenizer(merges).encode(text) == slow_encode(text, merges), text


@pytest.mark.parametrize("text, ids", [  # as printed all over the web for openai/CLIP
    ("a photo of a cat.", [49406, 320, 1125, 539, 320, 2368, 269, 49407]),
    ("a diagram", [49406, 320, 22697, 49407]), ("a dog", [49406, 320, 1929, 49407]),
    ("hello world!", [49406, 3306, 1002, 256, 49407]), ("", [49406, 49407])])
def test_well_known_ids(official, text, ids):
    tokenizer, _ = official
    assert tokenizer([text])[0].tolist() == ids + [0] * (77 - len(ids))
    assert (tokenizer.start, tokenizer.end, len(tokenizer.ids)) == (49406, 49407, 49408)


def test_hand_made_ids():
    # "!" is token 0, "a" is the 65th visible character, "!</w>" is 256, then come the merges and the two specials
    tokenizer = Tokenizer([("a", "b"), ("ab", "c</w>"), ("b", "c</w>")])
    a, b, c = (ord(letter) - ord("!") for letter in "abc")
    assert tokenizer.encode("abc ABC! bc cab") == [513, 513, 256, 514, c, a, b + 256]
    assert tokenizer("abc", context_length=5).tolist() == [[515, 513, 516, 0, 0]]


@pytest.mark.parametrize("written, meant", [
    ("cafÃ©", "café"), ("&amp;lt;b&amp;gt;", "<b>"), ("fish &amp;amp; chips", "fish & chips"),
    ("1 < 2 &amp;lt; 3", "1 < 2 < 3"),
    ("  a \t\n cat ", "a cat"), ("CAT", "cat"), ("cafe\u0301", "café")])
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


# ---------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"not a gzip",
                                    lambda b: gzip.compress(b"\xff\xfe\x80")])
def test_corrupt_vocabulary_names_the_file(tmp_path, damage):
    path = tmp_path / "vocabulary.gz"
    path.write_bytes(damage(gzip.compress("\n".join(["title", *("a b",) * 60000]).encode())))
    with pytest.raises(ValueError, match="vocabulary.gz"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("content", [b"", gzip.compress(b"title\na b\n"), gzip.compress(b"x\n" * 60000)])
def test_vocabulary_of_something_else_names_the_file(tmp_path, content):
    # an empty file, too few merges, lines that are no pairs
    (tmp_path / "vocabulary.gz").write_bytes(content)
    with pytest.raises(ValueError, match="vocabulary.gz"):
        Tokenizer.from_file(tmp_path / "vocabulary.gz")


NAME = "bpe_simple_vocab_16e6.txt.gz"


def answer(content):
    """What urllib.request.urlopen gives, without a network."""
    response = io.BytesIO(content)
    response.headers = {"Content-Length": str(len(content))}
    return lambda *args, **kwargs: response


def test_cached_file_with_wrong_content(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_HOME", str(tmp_path))
    (tmp_path / NAME).write_bytes(b"something else")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / NAME))):
        clip_model.find_file(NAME)
    assert (tmp_path / NAME).read_bytes() == b"something else"  # never deletes what it did not write


def test_cached_official_file_is_found(shared, monkeypatch):
    monkeypatch.setenv("CLIP_HOME", str(shared(VOCABULARY).parent))
    monkeypatch.setattr(urllib.request, "urlopen", None)  # would fail if it were called
    assert clip_model.find_file(NAME) == shared(VOCABULARY)


def test_download_without_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setenv("CLIP_HOME", str(tmp_path / "new"))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "new" / NAME))):
        clip_model.find_file(NAME)
    assert list((tmp_path / "new").iterdir()) == []


def test_download_of_wrong_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", answer(b"an error page"))
    with pytest.raises(ValueError, match="sha256"):
        clip_model.find_file(NAME)
    assert list(tmp_path.iterdir()) == []


def test_download_that_breaks_off(tmp_path, monkeypatch):
    broken = answer(b"x" * 10)
    broken().read = lambda n: (_ for _ in ()).throw(ConnectionResetError("reset by peer"))
    monkeypatch.setenv("CLIP_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", broken)
    with pytest.raises(OSError, match="reset by peer"):
        clip_model.find_file(NAME)
    assert list(tmp_path.iterdir()) == []


def test_download_of_right_bytes(tmp_path, monkeypatch):
    # sha256 of b"abc", from FIPS 180-2
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setenv("CLIP_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", answer(b"abc"))
    monkeypatch.setitem(clip_model.FILES, NAME, ("https://nowhere.invalid/f", digest))
    assert clip_model.find_file(NAME).read_bytes() == b"abc"
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_written_atomically(tmp_path):
    path = tmp_path / "folder" / "file"
    with written_atomically(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError):
        with written_atomically(path) as temporary:
            temporary.write_text("half of the new")
            assert path.read_text() == "old"
            raise KeyError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------------------------
# The model against torch.nn.MultiheadAttention and loops
# ---------------------------------------------------------------------------------------------------------

def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def exact_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(state, key, x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * state[key + "weight"] + state[key + "bias"]


def perceptron(state, key, x, gelu):
    hidden = gelu(x @ state[key + "mlp.c_fc.weight"].T + state[key + "mlp.c_fc.bias"])
    return hidden @ state[key + "mlp.c_proj.weight"].T + state[key + "mlp.c_proj.bias"]


def plain_block(state, key, x, causal=False, gelu=quick_gelu):
    """A pre-norm transformer block, attention by PyTorch's module and an additive -inf mask."""
    width, length = x.shape[-1], x.shape[1]
    attention = nn.MultiheadAttention(width, width // 64, batch_first=True, dtype=x.dtype)
    attention.load_state_dict({k.removeprefix(key + "attn."): v for k, v in state.items() if k.startswith(key + "attn.")})
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1) if causal else None
    y = layer_norm(state, key + "ln_1.", x)
    x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
    return x + perceptron(state, key, layer_norm(state, key + "ln_2.", x), gelu)


def plain_embed(state, image, patch, grid):
    """One picture (3, H, W) -> tokens (1, 1 + h*w, W), patch by patch on a canvas of zeros."""
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
    x = torch.stack([state["token_embedding.weight"][t] + state["positional_embedding"][i] for i, t in enumerate(ids)])[None]
    for i in range(layers):
        x = plain_block(state, f"transformer.resblocks.{i}.", x, causal=True, gelu=gelu)
    return layer_norm(state, "ln_final.", x[0, -1]) @ state["text_projection"]


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


SIZES = [(12, 12), (8, 20), (20, 8), (7, 18), (13, 5), (4, 4)]  # native, non-square, no multiple of the patch, one patch


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
    expected = torch.stack([plain_text(state, [clip.sot, *clip.tokenizer.encode(t), clip.eot]) for t in texts])
    close(clip.encode_text(tokens), expected)


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
    # Sec. 3.1: in the last block each patch keeps its own value; residual, perceptron, ln_post and projection stay
    clip = clip.double()
    state, key = clip.state_dict(), "visual.transformer.resblocks.1."
    image = torch.randn(3, height, width, dtype=torch.float64)
    tokens = plain_block(state, "visual.transformer.resblocks.0.", plain_embed(state, image, 4, 3))[0]
    h, w = math.ceil(height / 4), math.ceil(width / 4)
    value_weight, value_bias = state[key + "attn.in_proj_weight"][2 * 128:], state[key + "attn.in_proj_bias"][2 * 128:]
    expected = torch.empty(1, 12, h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            v = tokens[1 + y * w + x]
            value = value_weight @ layer_norm(state, key + "ln_1.", v) + value_bias
            v = v + state[key + "attn.out_proj.weight"] @ value + state[key + "attn.out_proj.bias"]
            v = v + perceptron(state, key, layer_norm(state, key + "ln_2.", v), quick_gelu)
            expected[0, :, y, x] = layer_norm(state, "visual.ln_post.", v) @ state["visual.proj"]
    close(clip.encode_image_dense(image[None]), expected)


def plain_reading(state, tokens, size, attention):
    """SCLIP, ClearCLIP, NACLIP patch by patch: tokens (1 + n, E) before the last block of 2 heads -> (D, h, w)"""
    key = "visual.transformer.resblocks.1."
    y = layer_norm(state, key + "ln_1.", tokens)
    out = torch.zeros_like(tokens)
    for head in range(2):
        rows = [slice(128 * part + 64 * head, 128 * part + 64 * (head + 1)) for part in range(3)]
        q, k, v = (y @ state[key + "attn.in_proj_weight"][r].T + state[key + "attn.in_proj_bias"][r] for r in rows)
        for i in range(1, len(tokens)):
            for a in {"sclip": (q, k), "clearclip": (q,), "naclip": (k,)}[attention]:
                logits = [(a[i] * a[j]).sum() / 8 for j in range(len(tokens))]  # 8: the root of a head's width
                if attention == "naclip":
                    for j in range(1, len(tokens)):
                        (y1, x1), (y2, x2) = divmod(i - 1, size[1]), divmod(j - 1, size[1])
                        logits[j] += math.exp(-((y1 - y2) ** 2 + (x1 - x2) ** 2) / 50)  # std 5
                weights = torch.stack(logits).exp()
                out[i, 64 * head:64 * (head + 1)] += (weights / weights.sum()) @ v
    x = (out @ state[key + "attn.out_proj.weight"].T + state[key + "attn.out_proj.bias"])[1:]
    if attention == "sclip":
        x = tokens[1:] + x
        x = x + perceptron(state, key, layer_norm(state, key + "ln_2.", x), quick_gelu)
    return (layer_norm(state, "visual.ln_post.", x) @ state["visual.proj"]).T.unflatten(1, size)


@pytest.mark.parametrize("height, width", [(13, 22), (20, 8)])  # grids of 4 x 6 and 5 x 2
@pytest.mark.parametrize("attention", ["sclip", "clearclip", "naclip"])
def test_readings_of_the_last_block(clip, attention, height, width):
    clip = clip.double()
    state, images = clip.state_dict(), torch.randn(2, 3, height, width, dtype=torch.float64)
    size = (math.ceil(height / 4), math.ceil(width / 4))
    expected = []
    for image in images:
        tokens = plain_block(state, "visual.transformer.resblocks.0.", plain_embed(state, image, 4, 3))[0]
        expected.append(plain_reading(state, tokens, size, attention))
    close(clip.encode_image_dense(images, attention), torch.stack(expected))
    close(clip.float().encode_image_dense(images.float(), attention), torch.stack(expected).float(), 1e-4)


def test_readings_differ_and_the_default_is_the_papers(clip):
    images = torch.randn(1, 3, 13, 22)
    dense = [clip.encode_image_dense(images, attention) for attention in clip_model.ATTENTIONS]
    assert torch.equal(dense[0], clip.encode_image_dense(images)) and len(dense) == 4
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(dense) for b in dense[:i])


def test_nearness():
    bonus = clip_model.nearness(2, 3, torch.empty(0, dtype=torch.float64), std=1.5)
    expected = torch.zeros(6, 7, dtype=torch.float64)  # patches x (class token, patches)
    for i in range(6):
        for j in range(6):
            d2 = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
            expected[i, 1 + j] = math.exp(-d2 / (2 * 1.5 ** 2))
    close(bonus, expected, 1e-15)


def test_unknown_reading(clip):
    with pytest.raises(ValueError, match="'maskclap'; it must be one of maskclip, sclip, clearclip, naclip"):
        clip.encode_image_dense(torch.zeros(1, 3, 8, 8), "maskclap")


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
    assert torch.equal(clip.visual.positional_grid(2, 5), F.interpolate(grid, size=(2, 5), mode="bicubic"))


def test_to_pixels_is_linear_between_patch_centres(clip):
    # the centre of patch i lies at pixel 4 i + 1.5; beyond the outer centres the value stays
    y, x = torch.arange(2.)[:, None], torch.arange(3.)[None]
    ramp = torch.stack([torch.ones(2, 3), 10 * y + x])[None]                   # (1, 2, 2, 3)
    pixels = clip.to_pixels(ramp, 7, 10)                                       # 1 row and 2 columns were padding
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


def test_normalise():
    images = torch.rand(2, 3, 2, 5, dtype=torch.float64)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # openai/CLIP
    expected = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    close(normalise(images), expected, 1e-12)


# ---------------------------------------------------------------------------------------------------------
# Eq. (1): prompted texts
# ---------------------------------------------------------------------------------------------------------

NAMES = [[5, 6], [7], [5, 9, 10], [11, 12, 13, 14], [7]]


def encode_prompted_plain(clip, prompt, names):
    """CLIP.encode_prompted without its tricks: each text [SOT] v_1..v_L [name] [EOT] is encoded on its own.
    prompt (L, E); names: C lists of token ids -> (C, D)"""
    texts = []
    for name in names:
        ids = torch.tensor([clip.sot, *name, clip.eot])
        first, rest = clip.token_embedding(ids).split([1, len(name) + 1])
        x = torch.cat([first, prompt, rest])                # (1 + L + len(name) + 1, E)
        x = (x + clip.positional_embedding[:len(x)])[None]
        for block in clip.transformer.resblocks:
            x = block(x, "causal")
        texts.append(clip.ln_final(x[0, -1]) @ clip.text_projection)
    return torch.stack(texts)                               # (C, D)


def test_prompted_texts_share_their_prefix_exactly(clip):
    # the packed computation and one text at a time: same values, same gradient
    clip = clip.double()
    prompts = [torch.randn(7, 128, dtype=torch.float64).mul_(0.1).requires_grad_() for _ in range(2)]
    prompts[1].data.copy_(prompts[0].data)
    fast, plain = clip.encode_prompted(prompts[0], NAMES), encode_prompted_plain(clip, prompts[1], NAMES)
    weight = torch.randn_like(plain)
    (fast * weight).sum().backward()
    (plain * weight).sum().backward()
    close(fast, plain, 1e-12)
    assert prompts[1].grad.abs().max() > 1e-3
    close(prompts[0].grad, prompts[1].grad, 1e-9)


@pytest.mark.parametrize("encode", [CLIP.encode_prompted, encode_prompted_plain])
def test_prompt_of_real_words_is_a_text(clip, encode):
    # Eq. 1 with v_l = the embeddings of words is the text of these words, followed by the name
    clip = clip.double()
    words = [20, 21, 22]
    W = encode(clip, clip.token_embedding.weight[words], NAMES)
    expected = torch.stack([plain_text(clip.state_dict(), [clip.sot, *words, *name, clip.eot]) for name in NAMES])
    close(W, expected)


# ---------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------

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
        top.register_buffer(name, value) if isinstance(value, torch.Tensor) else setattr(top, name, value)
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
        assert loaded[key].dtype == torch.float32 and torch.equal(loaded[key], state[key].float()), key


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scalars", [dict(), dict(input_resolution=12, context_length=60, vocab_size=600), dict(
    input_resolution=torch.tensor(12), context_length=torch.tensor(60), vocab_size=torch.tensor(600))])
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
    clip = make_clip(embed_dim=10, patch=5, width=192, layers=3, grid=4, context=23, text_width=64, text_layers=1)
    torch.save({"state_dict": clip.state_dict(), "merges": merges} if wrap else clip.state_dict(), tmp_path / "f")
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
        assert torch.equal(loaded.encode_image(images), make_clip(quick_gelu=quick).encode_image(images))


def refused(path, *words):
    """load_clip says, in one line that names the file, what is wrong."""
    with pytest.raises(ValueError) as caught:
        load_strictly(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message


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
    torch.save({"weight": Hostile(sentinel)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(payload)
    for name in ("archive.pt", "plain.pt", "legacy.pt", "bare.pt"):
        refused(tmp_path / name)
        assert not sentinel.exists(), name


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("scripted", [False, True])
def test_truncated_files(clip, tmp_path, scripted, share):
    path = tmp_path / "clip.pt"
    save_torchscript(path, clip.state_dict()) if scripted else torch.save(clip.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    refused(path)


def test_archive_whose_record_is_too_short(clip, tmp_path):
    save_torchscript(tmp_path / "whole.pt", clip.state_dict())
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(tmp_path / "short.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:64] if "/data/" in name else old.read(name))
    refused(tmp_path / "short.pt")


@pytest.mark.parametrize("change, word", [
    (lambda s: s.pop("visual.proj"), "visual.proj"), (lambda s: s.pop("text_projection"), "text_projection"),
    (lambda s: s.update(surplus=torch.zeros(1)), "surplus"),
    (lambda s: s.update({"ln_final.bias": torch.zeros(7)}), "ln_final.bias"),
    (lambda s: s.update({"visual.layer1.0.conv1.weight": torch.zeros(1)}), "ResNet")])
def test_unfit_state_dicts(clip, tmp_path, change, word):
    state = clip.state_dict()
    change(state)
    torch.save(state, tmp_path / "clip.pt")
    refused(tmp_path / "clip.pt", word)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"epoch": 3}, {}, {"weight": torch.zeros(3)}])
def test_checkpoints_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    refused(tmp_path / "other.pt")


@pytest.mark.parametrize("content", [b"", b"this is a text\n", b"<html>404</html>"])
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "text.pt").write_bytes(content)
    refused(tmp_path / "text.pt")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "nothing.pt"))) as caught:
        load_clip(tmp_path / "nothing.pt")
    assert "\n" not in str(caught.value)


def test_full_size():
    # ViT-B/16 as published: 149,620,737 parameters in 302 tensors
    clip = CLIP(512, 16, 768, 12, 14, 77, 49408, 512, 12).reset_parameters().eval().requires_grad_(False)
    assert sum(p.numel() for p in clip.parameters()) == 149_620_737
    assert len(clip.state_dict()) == 302 and clip.input_resolution == 224
    assert clip.encode_image_dense(torch.randn(1, 3, 64, 80)).shape == (1, 512, 4, 5)
