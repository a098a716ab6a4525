"""Word vectors from every format, names of several words, and damaged files that are named, never half read."""

from __future__ import annotations

import gzip
import io
import random
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mlhead._usage import UsageError
from mlhead.data import _word_files
from mlhead.data.word_vectors import load_word_vectors, text_encoder

WORDS = {
    "cat": [0.5, -1.25, 3.0],
    "traffic": [1.0, 2.0, 3.0],
    "light": [3.0, 4.0, 5.5],
    "stop_sign": [0.25, 0.0, -8.0],
    "Paris": [7.0, 1e-3, 2.5],
    "paris": [9.0, 9.0, 9.0],
    "été": [1.5, 1.5, 0.5],
    "2012": [4.0, 4.0, 4.0],
}


def text(words, *, header=False, end="\n"):
    lines = [f"{len(words)} 3"] if header else []
    lines += [" ".join([word, *map(repr, vector)]) for word, vector in words.items()]
    return "".join(line + end for line in lines).encode()


def binary(words, *, newline=False, count=None, width=3):
    out = f"{len(words) if count is None else count} {width}\n".encode()
    for word, vector in words.items():
        out += word.encode() + b" " + struct.pack(f"<{len(vector)}f", *vector) + (b"\n" if newline else b"")
    return out


FORMATS = {
    "glove": text(WORDS),
    "glove, Windows": text(WORDS, end="\r\n"),
    "fastText": text(WORDS, header=True, end=" \n"),
    "tabs": text(WORDS).replace(b" ", b"\t"),
    "byte order mark": b"\xef\xbb\xbf" + text(WORDS),
    "word2vec text": text(WORDS, header=True),
    "word2vec binary": binary(WORDS),
    "word2vec binary of the C tool": binary(WORDS, newline=True),
}


def write(tmp_path, content, name="vectors.any"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_hold_the_same_and_are_found_by_their_content(tmp_path, name, packed):
    path = write(tmp_path, gzip.compress(FORMATS[name]) if packed else FORMATS[name])
    names = list(WORDS)[::-1]
    loaded = load_word_vectors(path, names)
    assert loaded.names == names
    assert loaded.missing == []
    assert loaded.vectors.dtype == torch.float32
    assert torch.equal(loaded.vectors, torch.tensor([WORDS[name] for name in names]))
    assert torch.equal(load_word_vectors(str(path), names).vectors, loaded.vectors)


def test_names_of_several_words_and_case(tmp_path):
    for source in (WORDS, write(tmp_path, text(WORDS)), write(tmp_path, binary(WORDS), "b")):
        names = ["traffic light", "stop sign", "Stop-Sign", "Traffic_Light", "Paris", "PARIS", "Cat", "cat  2012"]
        got = load_word_vectors(source, names).vectors
        mean = [2.0, 3.0, 4.25]
        sign, cat = WORDS["stop_sign"], WORDS["cat"]
        of_both = [2.25, 1.375, 3.5]
        assert (
            got.tolist()
            == torch.tensor([mean, sign, sign, mean, WORDS["Paris"], WORDS["paris"], cat, of_both]).tolist()
        )
    words = {"t shirt": [1.0], "t": [2.0], "shirt": [4.0], "New York": [5.0], "new_york": [6.0], "york": [7.0]}
    assert load_word_vectors(words, ["t-shirt", "New-York", "NEW YORK", "T_SHIRT"]).vectors.flatten().tolist() == [
        1.0,  # whole, before the mean of its words
        5.0,  # exact case first
        6.0,
        1.0,
    ]


def test_words_with_spaces_in_a_file(tmp_path):
    words = {". . .": [1.0, 2.0, 3.0], **WORDS, "at name@domain.com": [4.0, 5.0, 6.0], "top 10": [7.0, 8.0, 9.0]}
    for header in (False, True):
        path = write(tmp_path, text(words, header=header))
        names = ["top 10", ". . .", "at name@domain.com", "2012", "top-10"]
        got = load_word_vectors(path, names).vectors
        assert got.tolist() == [words[name] for name in names[:-1]] + [words["top 10"]]


def test_the_first_of_two_equal_words_counts(tmp_path):
    twice = text({"cat": [1.0, 2.0, 3.0]}) + text({"dog": [0.0, 0.0, 1.0]}) + text({"cat": [4.0, 5.0, 6.0]})
    assert load_word_vectors(write(tmp_path, twice), ["cat"]).vectors.tolist() == [[1.0, 2.0, 3.0]]
    parts = [binary({"cat": [float(n)] * 3})[4:] for n in (1, 2)]
    path = write(tmp_path, b"2 3\n" + b"".join(parts))
    assert load_word_vectors(path, ["cat"]).vectors.tolist() == [[1.0, 1.0, 1.0]]


def test_missing_names(tmp_path):
    path = write(tmp_path, text(WORDS))
    names = ["zebra", "cat", "cat zebra", "light"]
    with pytest.raises(UsageError, match=r"--word-vectors must be vectors for all names .*'zebra', 'cat zebra'$"):
        load_word_vectors(path, names)
    zero = load_word_vectors(path, names, missing="zero")
    assert zero.names == names
    assert zero.missing == ["zebra", "cat zebra"]
    assert zero.vectors.tolist() == [[0.0] * 3, WORDS["cat"], [0.0] * 3, WORDS["light"]]
    skip = load_word_vectors(path, names, missing="skip")
    assert skip.names == ["cat", "light"]
    assert skip.missing == ["zebra", "cat zebra"]
    assert skip.vectors.tolist() == [WORDS["cat"], WORDS["light"]]
    many = [f"none{i}" for i in range(25)]
    with pytest.raises(UsageError, match=r"none for 25 of 26: 'none0', .*'none19' and 5 more$"):
        load_word_vectors(path, [*many, "cat"])
    for missing in ("zero", "skip"):
        with pytest.raises(UsageError, match="a vector for at least one name"):
            load_word_vectors(path, ["zebra"], missing=missing)
        with pytest.raises(UsageError, match="a vector for at least one name"):
            load_word_vectors({}, ["zebra"], missing=missing)


def test_rows_of_length_one(tmp_path):
    words = {"a": [3.0, 4.0], "zero": [0.0, 0.0], "tiny": [1e-30, 0.0], "big": [3e38, 3e38]}
    rows = load_word_vectors(words, [*words, "none"], normalize=True, missing="zero").vectors
    half = 0.5**0.5
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0, 0], [1, 0], [half, half], [0, 0]]))


# Arrays, mappings, callables


def save_array(path, array):
    if path.suffix == ".npy":
        np.save(path, array.numpy())
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file({"vectors": array.contiguous()}, path)
    else:
        torch.save(array, path)


@pytest.mark.parametrize("suffix", [".npy", ".pth", ".pt", ".safetensors"])
def test_arrays_in_either_orientation(tmp_path, suffix):
    rows = torch.randn(4, 6)
    names = list("abcd")
    for array in (rows, rows.T.contiguous(), rows.double(), rows.half()):
        path = tmp_path / f"array{suffix}"
        save_array(path, array)
        got = load_word_vectors(path, names)
        want = array.float() if len(array) == 4 else rows
        assert torch.equal(got.vectors, want)
        assert got.vectors.is_contiguous()
        (tmp_path / "packed").write_bytes(gzip.compress(path.read_bytes()))
        assert torch.equal(load_word_vectors(tmp_path / "packed", names).vectors, want)
    with pytest.raises(UsageError, match=r"an array \(5, W\) or \(W, 5\) for 5 names, got \(4, 6\) in .*array"):
        load_word_vectors(path, list("abcde"))


def test_a_square_array_is_taken_by_rows_with_a_warning(tmp_path):
    array = torch.randn(3, 3)
    torch.save(array, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"is \(3, 3\) for 3 names; its rows are taken"):
        assert torch.equal(load_word_vectors(tmp_path / "a.pt", list("abc")).vectors, array)


def test_older_files_of_torch_save(tmp_path):
    array = torch.randn(2, 5)
    torch.save(array, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_word_vectors(tmp_path / "old.pth", ["a", "b"]).vectors, array)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "two dimensions, got .*, which has \\(3,\\)"),
        (torch.full((2, 3), float("nan")), r"finite vectors, got .*NaN or infinity at \(0, 0\)"),
        (torch.zeros(2, 3, dtype=torch.complex64), "complex numbers"),
        ({"cat": torch.zeros(3)}, "one array .*a dictionary of 'cat'"),
        ([1, 2], "one array, got .* a list"),
        (SimpleNamespace(), "damaged or of another kind"),  # would run code
        (np.zeros((2, 3)), "damaged or of another kind"),
    ],
)
def test_torch_files_that_hold_something_else(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UsageError, match=words):
        load_word_vectors(tmp_path / "a.pt", ["a", "b"])


def test_other_array_files_that_do_not_fit(tmp_path):
    np.save(tmp_path / "a.npy", np.array(["x", "y"]))
    with pytest.raises(UsageError, match=r"an array of numbers, got ndarray in .*dtype <U1"):
        load_word_vectors(tmp_path / "a.npy", ["a", "b"])
    np.save(tmp_path / "a.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UsageError, match="a readable npy array"):
        load_word_vectors(tmp_path / "a.npy", ["a", "b"])
    np.savez(tmp_path / "a.npz", np.zeros((2, 3)))
    with pytest.raises(UsageError, match="a readable torch array"):
        load_word_vectors(tmp_path / "a.npz", ["a", "b"])
    big = np.array([[1e300, 0.0]])
    np.save(tmp_path / "a.npy", big)
    with pytest.raises(UsageError, match="NaN or infinity at"):
        load_word_vectors(tmp_path / "a.npy", ["a"])
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4], [5, 6]], ">i4"))
    assert load_word_vectors(tmp_path / "a.npy", list("abc")).vectors.tolist() == [[1, 2], [3, 4], [5, 6]]
    two = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    pytest.importorskip("safetensors.torch").save_file(two, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"one array .*a dictionary of 'a', 'b'"):
        load_word_vectors(tmp_path / "a.safetensors", ["a", "b"])
    with pytest.raises(UsageError, match=r"an array .*which holds words"):
        _word_files.read_array(write(tmp_path, text(WORDS)))


@pytest.mark.parametrize("suffix", [".npy", ".pth", ".safetensors"])
def test_damaged_arrays(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_array(path, torch.randn(40, 50))
    whole = path.read_bytes()
    cuts = random.Random(0).sample(range(1, len(whole)), 25)
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match="--word-vectors"):
            load_word_vectors(path, [str(i) for i in range(40)])
    if suffix == ".pth":
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0x40
        path.write_bytes(flipped)
        with pytest.raises(UsageError, match=r"checksum|damaged"):
            load_word_vectors(path, [str(i) for i in range(40)])


def test_mappings():
    source = {"a": [1, 2], "b": np.array([3.0, 4.0]), "c": torch.tensor([5.0, 6.0], requires_grad=True)}
    assert load_word_vectors(source, ["c", "a", "a-b"]).vectors.tolist() == [[5, 6], [1, 2], [2, 3]]
    for wrong, words in (
        ({"a": [1.0], "b": [1.0, 2.0]}, r"vectors \(1,\) as the others, got \(2,\) for 'b'"),
        ({"a": [[1.0]], "b": [1.0]}, r"vectors \(W,\), got \(1, 1\) for 'a'"),
        ({"a": [], "b": [1.0]}, r"vectors \(W,\), got \(0,\) for 'a'"),
        ({"a": [float("inf")], "b": [1.0]}, "finite, got NaN or infinity for 'a'"),
        ({"a": "text", "b": [1.0]}, "an array of numbers, got str for 'a'"),
        ({"a": None, "b": [1.0]}, "an array of numbers, got NoneType for 'a'"),
    ):
        with pytest.raises(UsageError, match=words):
            load_word_vectors(wrong, ["a", "b"])


def test_callables():
    asked = []

    def source(names):
        asked.extend(names)
        return np.arange(2.0 * len(names)).reshape(len(names), 2)

    assert load_word_vectors(source, ["stop_sign", "b"]).vectors.tolist() == [[0, 1], [2, 3]]
    assert asked == ["stop_sign", "b"]
    half = load_word_vectors(lambda names: torch.ones(len(names), 3, dtype=torch.bfloat16), ["a"], normalize=True)
    torch.testing.assert_close(half.vectors, torch.full((1, 3), 3**-0.5))
    for wrong, words in (
        (lambda names: torch.zeros(1, 3), r"\(2, W\) for 2 names, got \(1, 3\)"),
        (lambda names: torch.zeros(2), r"\(2, W\)"),
        (lambda names: torch.tensor([[1.0], [float("nan")]]), "finite, got NaN or infinity for 'b'"),
        (lambda names: None, "an array of numbers, got NoneType"),
    ):
        with pytest.raises(UsageError, match=words):
            load_word_vectors(wrong, ["a", "b"])


def test_arguments_are_checked(tmp_path):
    with pytest.raises(UsageError, match="missing must be one of 'error', 'zero', 'skip', got 'no'"):
        load_word_vectors(WORDS, ["cat"], missing="no")
    with pytest.raises(UsageError, match="at least one name"):
        load_word_vectors(WORDS, [])
    with pytest.raises(UsageError, match="none of them blank"):
        load_word_vectors(WORDS, ["cat", " "])
    with pytest.raises(TypeError, match="names must be a list of texts, got str"):
        load_word_vectors(WORDS, "cat")
    with pytest.raises(TypeError, match="source must be a path, a mapping or a callable, got list"):
        load_word_vectors([1.0], ["cat"])
    with pytest.raises(UsageError, match=r"an existing file, got .*none\.txt"):
        load_word_vectors(tmp_path / "none.txt", ["cat"])
    with pytest.raises(UsageError, match="an existing file, got the folder"):
        load_word_vectors(tmp_path, ["cat"])


# Damaged files of words

GOOD = "cat 0.5 1.5\ndog 2.5 3.5\nemu 4.5 5.5\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "which is empty"),
        ("\n\n", "which is empty"),
        ("<!DOCTYPE html>\n<p>not found\n", "a file of word vectors: GloVe .*begins with b'<!DOCTYPE"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1 kB\n", "a file of word vectors"),
        ("cat\x00dog 1 2", "a file of word vectors"),
        (GOOD + "fox 6.5\n", r"2 numbers in every line, got .*whose line 4 \('fox'\) has 1$"),
        (GOOD + "fox\n", r"line 4 \('fox'\) has 0$"),
        (GOOD + "fox 6.5 7.5 8.5\n", r"line 4 \('fox'\) has 3 fields after the word"),
        (GOOD + "fox 6.5  8.5\n", r"line 4 \('fox'\) has 3 fields after the word"),
        (GOOD.replace("3.5", "3,5"), r"line 2 \('dog'\) has '3,5' among its numbers"),
        (GOOD.replace("3.5", "1_0"), r"line 2 \('dog'\) has '1_0' among its numbers"),
        (GOOD.replace("3.5", "nan"), r"finite vectors, got .*line 2 \('dog'\) holds NaN or infinity"),
        (GOOD.replace("3.5", "1e39"), r"line 2 \('dog'\) holds NaN or infinity"),
        ("4 2\n" + GOOD, "text with 4 words, as its first line says, got .*, which has 3: cut short or damaged"),
        ("2 2\n" + GOOD, "text with 2 words, .*which has 3"),
        ("3 3\n" + GOOD, r"3 numbers in every line, got .*whose line 2 \('cat'\) has 2$"),
        ("3 1\n" + GOOD, r"line 2 \('cat'\) has 2 fields after the word"),
        ("3 2\n" + GOOD.replace("0.5", "x"), r"line 2 \('cat'\) has 'x' among its numbers"),
        ("3 2\n" + GOOD.replace("emu 4.5", "emu"), r"line 4 \('emu'\) has 1$"),
        ("0 2\n", "at least one word .*whose first line is '0 2'"),
        ("3 0\n" + GOOD, "at least one word .*whose first line is '3 0'"),
        ("3 99999999\n" + GOOD, "1 to 1048576 numbers"),
        ("3 2\n", "text with 3 words, .*which has 0"),
    ],
)
def test_damaged_text(tmp_path, content, words):
    for name, data in (("a.txt", content.encode()), ("a.gz", gzip.compress(content.encode()))):
        with pytest.raises(UsageError, match=words) as error:
            load_word_vectors(write(tmp_path, data, name), ["cat", "dog"])
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (binary(WORDS, count=9), "9 words of 3 fp32 numbers, .*which is cut short in word 9, the one after '2012'"),
        (binary(WORDS, count=7), "which goes on after them, after 'été'"),
        (binary(WORDS, width=2), "binary word2vec with 8 words of 2 fp32"),
        (binary(WORDS, width=4), "binary word2vec with 8 words of 4 fp32"),
        (binary({"dog": [1.0, 1.0, 1.0], "cat": [1.0, float("nan"), 2.0]}), r"whose word 2 \('cat'\) holds NaN"),
        (binary({"dog": [1.0] * 3, "": [0.0] * 3}), "whose word 2 is ''"),
        (b"5 300\n" + b"\x01" * 70_000, "whose word 1 has no end"),
        # " light" moves the vector; after the next word everything is in its place again.
        (binary({"cat light": [1.0, 2.0, 3.0], "dog": [4.0, 5.0, 6.0]}), "word 2, after 'cat', is .*dog': damaged, or"),
    ],
)
def test_damaged_binary(tmp_path, content, words):
    with pytest.raises(UsageError, match=words):
        load_word_vectors(write(tmp_path, content), ["cat"])


def test_every_truncation_is_found(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    words = {f"w{i}": rng.normal(size=3).astype(np.float32).tolist() for i in range(10)}
    path = tmp_path / "cut"
    for chunk in (7, 2**22):  # records across the borders of what is read at a time
        monkeypatch.setattr(_word_files, "_CHUNK", chunk)
        for newline in (False, True):
            whole = binary(words, newline=newline)
            path.write_bytes(whole)
            assert load_word_vectors(path, list(words)).vectors.tolist() == list(words.values())
            for cut in range(len(whole) - newline):
                path.write_bytes(whole[:cut])
                with pytest.raises(UsageError, match="--word-vectors"):
                    load_word_vectors(path, ["w0"])
    for packed in (gzip.compress(text(words)), gzip.compress(binary(words))):
        for cut in range(0, len(packed), 7):
            path.write_bytes(packed[:cut])
            with pytest.raises(UsageError, match="--word-vectors"):
                load_word_vectors(path, ["w0"])
    whole = text(words, header=True)
    for cut in range(len(whole) - 1 - len(repr(words["w9"][-1]))):  # a number that is cut short is a number
        path.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match="--word-vectors"):
            load_word_vectors(path, ["w0"])


def test_flipped_bytes_raise_nothing_else(tmp_path):
    rng = random.Random(1)
    path = tmp_path / "flipped"
    wholes = [*FORMATS.values(), gzip.compress(FORMATS["glove"])]
    for array in (np.zeros((8, 3), np.float32), torch.zeros(8, 3)):
        file = io.BytesIO()
        (np.save if isinstance(array, np.ndarray) else lambda f, a: torch.save(a, f))(file, array)
        wholes.append(file.getvalue())
    outcomes = set()
    for whole in wholes:
        for _ in range(40):
            content = bytearray(whole)
            for _ in range(rng.choice((1, 1, 4))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                loaded = load_word_vectors(path, list(WORDS), missing="zero")
                assert loaded.vectors.isfinite().all()
                outcomes.add("read")
            except UsageError as error:
                outcomes.add("refused" if "--word-vectors" in str(error) else str(error))
    assert outcomes == {"read", "refused"}


def test_only_wanted_words_are_kept(tmp_path):
    import tracemalloc

    numbers = " ".join(["0.125"] * 100)
    path = tmp_path / "big.txt"
    with path.open("w") as file:
        file.writelines(f"word{i} {numbers}\n" for i in range(20_000))
    assert path.stat().st_size > 12e6
    tracemalloc.start()
    assert load_word_vectors(path, ["word3", "word19999"]).vectors.shape == (2, 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6  # the first megabyte is split into fields


# Text encoders


class Tokenizer:
    """A number for each letter; pads on a side, as Hugging Face's tokenizers do."""

    def __init__(self, side="right", mask=True):
        self.side, self.mask, self.calls = side, mask, []

    def __call__(self, texts, *, padding, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == (True, True, "pt")
        self.calls.append(texts)
        longest = max(map(len, texts))
        ids, mask = torch.zeros(len(texts), longest, dtype=torch.long), torch.zeros(len(texts), longest).long()
        for row, one in enumerate(texts):
            place = slice(0, len(one)) if self.side == "right" else slice(longest - len(one), None)
            ids[row, place], mask[row, place] = torch.tensor([ord(c) % 50 for c in one]), 1
        return {"input_ids": ids, "attention_mask": mask} if self.mask else {"input_ids": ids}


class TextModel(nn.Module):
    def __init__(self, **outputs):
        super().__init__()
        self.table, self.outputs = nn.Embedding(50, 4, dtype=torch.float64), outputs
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None):
        assert not torch.is_grad_enabled()
        states = self.dropout(self.table(input_ids))
        made = {"last_hidden_state": states, "pooler_output": states[:, 0] * 2, "text_embeds": states[:, 0] * 3}
        return SimpleNamespace(**{name: made.get(name) for name in self.outputs.get("names", made)})


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_encoder(side):
    model, tokenizer = TextModel().train(), Tokenizer(side)
    names = ["cat", "traffic light", "a"]
    table = model.table.weight.detach()
    rows = [table[[ord(c) % 50 for c in f"a {name}"]] for name in names]
    mean = text_encoder(model, tokenizer, template="a {}", batch_size=2)
    got = load_word_vectors(mean, names).vectors
    assert tokenizer.calls == [["a cat", "a traffic light"], ["a a"]]
    assert model.training
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.stack([row.mean(dim=0) for row in rows]).float())
    first = text_encoder(model, tokenizer, template="a {}", pooling="first")(names)
    torch.testing.assert_close(first, torch.stack([row[0] for row in rows]).float())


def test_text_encoder_pools_by_the_model_and_without_a_mask():
    names = ["cat", "dog"]
    first = text_encoder(model := TextModel(), Tokenizer(mask=False), pooling="first")(names)
    torch.testing.assert_close(text_encoder(model, Tokenizer(), pooling="pooler")(names), first * 2)
    model.outputs["names"] = ["text_embeds"]
    torch.testing.assert_close(text_encoder(model, Tokenizer(), pooling="pooler")(names), first * 3)
    with pytest.raises(UsageError, match="'pooler' for a model without last_hidden_state, got 'mean'"):
        text_encoder(model, Tokenizer())(names)
    model.outputs["names"] = ["last_hidden_state"]
    assert text_encoder(model, Tokenizer(mask=False))(names).shape == (2, 4)
    with pytest.raises(UsageError, match="'mean' or 'first' for a model without pooler_output"):
        text_encoder(model, Tokenizer(), pooling="pooler")(names)


def test_text_encoder_arguments():
    with pytest.raises(UsageError, match=r"template must be a text with \{\} in the place of the name, got 'a photo'"):
        text_encoder(TextModel(), Tokenizer(), template="a photo")
    with pytest.raises(UsageError, match="pooling must be one of 'mean', 'first', 'pooler', got 'max'"):
        text_encoder(TextModel(), Tokenizer(), pooling="max")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        text_encoder(TextModel(), Tokenizer(), batch_size=0)
