"""Running text: a file of yours, tiny shakespeare, WikiText."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

import torch

from kdlab.data.download import Remote, digest, fetch
from kdlab.data.splits import rows_of
from kdlab.data.text.build import TextCommon, text_data
from kdlab.data.text.files import find_files, read_text
from kdlab.data.text.module import TextData
from kdlab.data.text.sequence import TEXT, RawText
from kdlab.data.text.sequence import Sequence as Tokens
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError, unknown

SHAKESPEARE = Remote(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)

WIKITEXT = {
    "wikitext-103": ("wikitext-103", "wikitext-103-raw", "wikitext-103-v1", "wikitext-103-raw-v1", "wikitext103"),
    "wikitext-2": (
        "wikitext-2",
        "wikitext-2-raw",
        "wikitext-2-v1",
        "wikitext-2-raw-v1",
        "wikitext2",
        "wikitext2_valid_test",
    ),
}
"""Folders that each corpus has been published in."""

_FILES = ("wiki.{}.tokens", "wiki.{}.raw", "{}.txt")

Documents = dict[str, list[str]]
"""Texts of each split."""


def text_files(
    path: str | Sequence[str],
    val_path: str | Sequence[str] | None = None,
    test_path: str | Sequence[str] | None = None,
    val: int | float = 0.05,
    test: int | float = 0.05,
    **common: Unpack[TextCommon],
) -> TextData:
    """Load text files of your own as one corpus.

    Args:
        path: a UTF-8 file, a list of them, or a pattern (``books/**/*.txt``); the end of text stands between files.
        val_path: files of the validation and the test split.
        test_path: see ``val_path``.
        val: characters (or a share of them) taken from the end of the corpus where the split has no files, the test
            split last; 0 for none.
        test: see ``val``.

    The other arguments are :func:`~kdlab.data.text.text_data`'s and :class:`TextData`'s.
    """
    files = find_files(path, "data.path")
    documents = {"train": [read_text(file, "data.path") for file in files]}
    for split, given in (("test", test_path), ("val", val_path)):
        if given is not None:
            key = f"data.{split}_path"
            documents[split] = [read_text(file, key) for file in find_files(given, key)]
    total = sum(map(len, documents["train"]))
    for split, amount in (("test", test), ("val", val)):
        if split not in documents and (count := rows_of(amount, total, f"data.{split}")):
            documents["train"], documents[split] = _cut_off(documents["train"], count, f"data.{split}")
    for split, amount, own in (("test", test, test_path), ("val", val, val_path)):
        size = sum(map(len, documents.get(split, [])))
        if amount and own is None and size < 2:
            raise UserError(
                "data.path",
                (
                    f"{files[0]} has {total} characters, of which data.{split}={amount} takes {size}, "
                    "too few to measure on"
                ),
                f"a longer text, or a larger data.{split}",
            )
    return _corpus(files[0].stem, documents, _words, "data.path", **common)


def shakespeare(root: str = "data", download: bool = False, **common: Unpack[TextCommon]) -> TextData:
    """Load Tiny Shakespeare: 1,115,394 characters of his plays (Karpathy, char-rnn, 2015).

    The last twentieth is the test split, the twentieth before it validation.

    Args:
        root: the folder that holds ``input.txt``, or ``tinyshakespeare/input.txt``.
        download: fetch the file from the publisher (1.1 MB) if it is not there.

    The other arguments are :func:`~kdlab.data.text.text_data`'s and :class:`TextData`'s.
    """
    base = Path(root).expanduser()
    folders = [base, base / "tinyshakespeare", base / "lm" / "tinyshakespeare"]
    path = next((folder / "input.txt" for folder in folders if (folder / "input.txt").is_file()), None)
    if path is None:
        if not download:
            raise UserError(
                "data.root",
                (
                    f"no tinyshakespeare/input.txt in {base}; fetch it with data.download=true, or put "
                    f"{SHAKESPEARE.url} there"
                ),
            )
        path = fetch(SHAKESPEARE, folders[1])
    if digest(path, SHAKESPEARE.checksum) != SHAKESPEARE.checksum:
        raise UserError("data.root", f"{path} is not the publisher's file ({SHAKESPEARE.checksum})", "that one")
    train = [read_text(path, "data.root")]
    twentieth = round(0.05 * len(train[0]))
    train, test = _cut_off(train, twentieth, "data.root")
    train, val = _cut_off(train, twentieth, "data.root")
    return _corpus("shakespeare", {"train": train, "val": val, "test": test}, None, "data.root", **common)


def wikitext(
    root: str = "data", name: str = "wikitext-103", train: str = "train", **common: Unpack[TextCommon]
) -> TextData:
    """Load WikiText: articles of Wikipedia (Merity et al., ICLR 2017), as published with ``<unk>`` or raw.

    Published perplexities are per word, where a word is what white space separates and the end of each line is one
    more. So ``words`` counts both, and the measure per word compares with papers whatever the tokenizer.

    Args:
        root: the folder that holds the publisher's folder, or is it; with ``wiki.train.tokens``, ``wiki.train.raw`` or
            ``train.txt``, and so on.
        name: ``wikitext-103`` or ``wikitext-2``.
        train: the file to train on: ``train``, or ``valid`` where the former is not to be had (its last tenth is
            then for validation; figures do not compare with published ones).

    The other arguments are :func:`~kdlab.data.text.text_data`'s and :class:`TextData`'s.
    """
    if name not in WIKITEXT:
        raise unknown("data.name", name, WIKITEXT)
    if train not in ("train", "valid"):
        raise unknown("data.train", train, ["train", "valid"], "file")
    base = Path(root).expanduser()
    folders = [base, *(parent / folder for parent in (base, base / "lm") for folder in WIKITEXT[name])]
    files = {part: _wiki_file(folders, part) for part in ("train", "valid", "test")}
    if files["test"] is None or files["valid"] is None:
        raise UserError(
            "data.root",
            f"no {name} in {base}",
            (
                f"a folder with {WIKITEXT[name][0]}/wiki.train.tokens, wiki.valid.tokens and "
                "wiki.test.tokens (or .raw, or train.txt and so on)"
            ),
        )
    if (path := files[train]) is None:
        raise UserError(
            "data.root",
            (
                f"{files['valid'].parent} has no training file of {name}; put wiki.train.tokens "
                "there, or take data.train=valid to train on the validation file"
            ),
        )
    documents = {"train": [read_text(path, "data.root")], "test": [read_text(files["test"], "data.root")]}
    if train == "valid":
        tenth = round(0.1 * len(documents["train"][0]))
        documents["train"], documents["val"] = _cut_off(documents["train"], tenth, "data.root")
    else:
        documents["val"] = [read_text(files["valid"], "data.root")]
    return _corpus(name, documents, _words_and_lines, "data.root", **common)


def _wiki_file(folders: list[Path], part: str) -> Path | None:
    return next((f / n.format(part) for f in folders for n in _FILES if (f / n.format(part)).is_file()), None)


def _cut_off(documents: list[str], count: int, key: str) -> tuple[list[str], list[str]]:
    """Split documents into all but their last ``count`` characters, and those."""
    kept = list(documents)
    cut: list[str] = []
    while count and kept:
        last = kept.pop()
        if len(last) > count:
            kept.append(last[: len(last) - count])
            last = last[len(last) - count :]
        cut.insert(0, last)
        count -= len(last)
    if not kept:
        raise UserError(key, "takes all of the text, and leaves nothing to train on", "less")
    return kept, cut


def _words(text: str) -> int:
    return len(text.split())


def _words_and_lines(text: str) -> int:
    return len(text.split()) + text.count("\n")


def _corpus(
    name: str, documents: Documents, words: Callable[[str], int] | None, key: str, **common: Unpack[TextCommon]
) -> TextData:
    def read(tokenizer: Tokenizer) -> RawText:
        splits = {split: [_running(texts, tokenizer)] for split, texts in documents.items()}
        counts = {split: sum(map(words, texts)) for split, texts in documents.items()} if words else {}
        return RawText(name, tokenizer, splits, counts, key=key)

    def every() -> list[str]:
        return [text for texts in documents.values() for text in texts]

    return text_data(read, lambda: documents["train"], alphabet=every, **common)


def _running(texts: list[str], tokenizer: Tokenizer) -> Tokens:
    """Tokenise texts as one run of tokens; the end of text stands between them."""
    parts: list[torch.Tensor] = []
    for number, one in enumerate(texts):
        if number:
            parts.append(torch.tensor([tokenizer.eos_id], dtype=torch.int32))
        parts.append(torch.from_numpy(tokenizer.array(one)))
    ids = torch.cat(parts)
    return Tokens(ids, torch.full_like(ids, TEXT, dtype=torch.uint8), running=True)
