from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlx_transfusion.cli.tokenizer import app
from mlx_transfusion.errors import UserError
from mlx_transfusion.tokenizer import SpecialIds, Tokenizer, train_sentencepiece
from mlx_transfusion.training.rows import read_texts

THINGS = ["heart", "apple", "circle", "square", "flower", "star", "diamond", "balloon"]
COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
VERBS = ["painting", "holding", "showing", "hiding", "raising", "turning", "melting", "dancing"]
CORPUS = [f"{a} {b} {c}" for a in COLORS for b in THINGS for c in VERBS]
VOCAB = 306
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<boi>", "<eoi>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(CORPUS, path, VOCAB)
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


def hugging_face(folder: Path) -> Path:
    """A byte-level BPE as model repositories ship it, with our specials as added tokens."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_ids_are_those_of_the_model_config(tokenizer: Tokenizer) -> None:
    assert tokenizer.special == SpecialIds(pad=0, bos=1, eos=2, unk=3, boi=4, eoi=5)
    assert tokenizer.vocab_size == VOCAB


def test_training_is_deterministic(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "other-name.model"
    train_sentencepiece((text for text in CORPUS), other, VOCAB)
    assert other.read_bytes() == model.read_bytes()
    assert [p.name for p in other.parent.iterdir()] == ["other-name.model"]  # no temporary file stays


def test_case_and_compatibility_forms_fold(tokenizer: Tokenizer) -> None:
    assert (
        tokenizer.encode("Red Heart") == tokenizer.encode("red heart") == tokenizer.encode(" ＲＥＤ\n heart")
    )
    assert tokenizer.decode(tokenizer.encode("Red Heart")) == "red heart"
    assert len(tokenizer.encode("red heart")) < len("red heart")


@settings(deadline=None)
@given(st.text())
def test_decode_of_encode_is_the_normalised_text(tokenizer: Tokenizer, text: str) -> None:
    # Exactly: SentencePiece's own normalisation (NFKC, case folding, runs of space to one, none at the ends);
    # byte fallback loses no character of it, and "▁" is SentencePiece's sign for the space.
    normalised = str(tokenizer._backend.processor.normalize(text))  # type: ignore[attr-defined]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalised.replace("▁", " ").strip(" ")
    assert not {0, 1, 2, 3, 4, 5} & set(ids)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*THINGS, *VERBS, "yellow", "日本", "é", "🙂", "<boi>", "7"])))
def test_normal_text_comes_back_unchanged(tokenizer: Tokenizer, words: list[str]) -> None:
    assert tokenizer.decode(tokenizer.encode(" ".join(words))) == " ".join(words)


@pytest.mark.parametrize("text", [*SPECIALS, "a <boi><eoi> b", "<0x41>", "＜boi＞"])
def test_written_out_specials_are_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids
    assert min(ids) > 5
    assert tokenizer.decode(ids) == text.replace("＜", "<").replace("＞", ">")


def test_lone_surrogates_do_not_crash(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1)))
def test_decode_takes_any_ids_and_skips_specials(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert tokenizer.decode(ids) == tokenizer.decode([i for i in ids if i > 5])


def test_decode_refuses_ids_of_another_vocabulary(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=f"id {VOCAB} is outside .* {VOCAB}"):
        tokenizer.decode([7, VOCAB])
    with pytest.raises(UserError, match="id -1 "):
        tokenizer.decode([-1])


def test_save_and_load_from_a_folder(tokenizer: Tokenizer, model: Path, tmp_path: Path) -> None:
    saved = tokenizer.save(tmp_path / "new")
    assert saved.name == "tokenizer.model"
    assert saved.read_bytes() == model.read_bytes()
    assert Tokenizer.load(tmp_path / "new").encode("blue star") == tokenizer.encode("blue star")


def test_tokenizer_json_behind_the_same_interface(tmp_path: Path) -> None:
    file = hugging_face(tmp_path)
    loaded = Tokenizer.load(tmp_path, SpecialIds())
    assert loaded.vocab_size == VOCAB
    for text in ("red heart", "Red Heart 日本", *SPECIALS, "a<boi>b"):
        ids = loaded.encode(text)
        assert min(ids) > 5
        assert loaded.decode([1, 4, 5, *ids, 2]) == text
    assert loaded.save(tmp_path / "copy").read_bytes() == file.read_bytes()


def test_tokenizer_json_whose_words_are_the_specials(tmp_path: Path) -> None:
    words = {word: i for i, word in enumerate([*SPECIALS, "red", "heart"])}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tok.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path, SpecialIds()).encode("red <boi> heart </s> what") == [6, 7, 3]


def test_tokenizer_json_needs_its_special_ids(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    with pytest.raises(UserError, match="special token ids"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="boi must be an id of its own, and 2 is another special too"):
        Tokenizer.load(tmp_path, SpecialIds(boi=2))
    with pytest.raises(UserError, match=f"id {VOCAB} is outside the vocabulary of {VOCAB}"):
        Tokenizer.load(tmp_path, SpecialIds(boi=VOCAB))


def test_a_text_vocabulary_may_lack_structural_tokens(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    loaded = Tokenizer.load(tmp_path, SpecialIds(pad=2, bos=None, eos=2, unk=None, boi=None, eoi=None))
    assert loaded.decode([2, *loaded.encode("red heart"), 2]) == "red heart"


@pytest.mark.parametrize("kind", ["model", "json"])
def test_a_template_may_write_out_specials(kind: str, model: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(model if kind == "model" else hugging_face(tmp_path), SpecialIds())
    words = loaded.encode("red heart")
    assert loaded.encode_template("<s><boi>red heart<eoi></s>") == [1, 4, *words, 5, 2]
    assert loaded.encode_template("red heart") == words


def test_a_foreign_sentencepiece_model_needs_special_ids_too(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2
    )
    with pytest.raises(UserError, match="no control symbols <boi> and <eoi>"):
        Tokenizer.load(tmp_path / "tokenizer.model")
    special = SpecialIds(pad=39, bos=1, eos=2, unk=0, boi=38, eoi=37)
    assert Tokenizer.load(tmp_path, special).special == special


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_bad_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such tokenizer file"):
        Tokenizer.load(tmp_path / name)
    with pytest.raises(UserError, match=r"no tokenizer\.model and no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for data in (b"", b"\xff\x00 nonsense"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="not a valid"):
            Tokenizer.load(tmp_path / name)


def test_vocabulary_sizes_that_do_not_fit_the_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"100000 is too large for this corpus: .* at most \d+$"):
        train_sentencepiece(CORPUS, tmp_path / "t.model", 100_000)
    with pytest.raises(UserError, match=r"20 is too small .* at least \d+$") as error:
        train_sentencepiece(CORPUS, tmp_path / "t.model", 20)
    assert list(tmp_path.iterdir()) == []
    train_sentencepiece(CORPUS, tmp_path / "t.model", int(str(error.value).split()[-1]))  # the advice holds


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_empty_corpus(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match="holds no text"):
        train_sentencepiece(texts, tmp_path / "t.model", VOCAB)


def test_corpus_with_written_out_specials_trains(tmp_path: Path) -> None:
    texts = [*CORPUS, *["<boi> <eoi> <s> <0x41>"] * 50]
    train_sentencepiece(texts, tmp_path / "t.model", VOCAB)
    assert min(Tokenizer.load(tmp_path / "t.model").encode("<boi><s><0x41>")) > 5


def test_long_lines_are_learned_from(tmp_path: Path) -> None:
    # 15,000 bytes in one line, the only one with a "z", a "j" and a "y"
    train_sentencepiece([*CORPUS, "crazy jazz city " * 1000], tmp_path / "t.model", VOCAB)
    ids = Tokenizer.load(tmp_path / "t.model").encode("crazy jazz")
    assert min(ids) > 5 + 256  # no byte token


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        train_sentencepiece(CORPUS, tmp_path / "file" / "t.model", VOCAB)


def test_read_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two\n", encoding="utf-8")
    rows = [
        {"text": "three", "image": "x.png"},
        {"segments": [{"text": "four"}, {"image": "y"}, {"text": "five"}]},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = list(read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"]))
    assert [text.strip() for text in texts] == ["one", "two", "three", "four", "five"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"x", r"a\.csv: expected a \.txt"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', r'a\.jsonl:2: expected an object with "text"'),
        ("a.jsonl", b'{"text": "x"\n', r"a\.jsonl:1: not valid JSON"),
        ("a.txt", b"fine\n\xff\n", r"a\.txt:2: not UTF-8"),
    ],
)
def test_read_texts_names_what_is_wrong(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_texts([tmp_path / name]))


def test_command_trains_and_does_not_overwrite(tmp_path: Path, model: Path) -> None:
    corpus, output = tmp_path / "corpus.txt", tmp_path / "out.model"
    corpus.write_text("\n".join(CORPUS), encoding="utf-8")
    arguments = ["train", str(corpus), "--vocab-size", str(VOCAB), "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert result.stdout.strip() == str(output)
    assert output.read_bytes() == model.read_bytes()

    output.write_bytes(b"precious")
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert "--overwrite" in str(result.exception)
    assert output.read_bytes() == b"precious"
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert output.read_bytes() == model.read_bytes()


def test_command_with_a_missing_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["train", str(tmp_path / "no.txt"), "--output", str(tmp_path / "o.model")]
    )
    assert isinstance(result.exception, UserError)
    assert "no.txt" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_help_imports_no_heavy_module() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mlx_transfusion.cli.tokenizer import app;"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0;"
        "print([m for m in ('mlx', 'numpy', 'sentencepiece', 'tokenizers', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
