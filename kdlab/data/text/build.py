"""How every data set of text is put together: one tokenizer, its own text, and other data sets beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Some
from itertools import chain
from typing import Annotated, Any, TypedDict

from kdlab.data.text.files import read_texts
from kdlab.data.text.module import Read, TextData, Texts
from kdlab.data.text.sequence import Question, RawText
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError


class TextCommon(TypedDict, total=False):
    """Arguments that every data set of text takes beside its own: those of :func:`text_data` and :class:`TextData`."""

    tokenizer: Any
    vocab: int | None
    tokenizer_from: str | Some[str] | None
    mix: Annotated[Any, "data"]
    ood: Annotated[Any, "data"]
    context: int
    batch_size: int
    eval_batch_size: int | None
    segment_weights: dict[str, float] | None
    pack: bool
    fraction: float | None
    drop_long: bool
    eval_stride: int | None
    seed: int | None
    split_seed: int


def text_data(
    read: Read,
    texts: Texts,
    *,
    alphabet: Texts | None = None,
    tokenizer: Any = "characters",
    vocab: int | None = None,
    tokenizer_from: str | Some[str] | None = None,
    mix: Annotated[Any, "data"] = None,
    ood: Annotated[Any, "data"] = None,
    **options: Any,
) -> TextData:
    """Build a data set of text, with others that are read by the same tokenizer; the last step of all constructors.

    A tokenizer that is made here is made of all the corpora that are named, in whatever role. So a teacher with
    ``mix: B`` on corpus A and a student with ``ood: B`` on corpus A have the same one.

    Args:
        read: function that makes the sequences by a given tokenizer; called again if another data set names this one.
        texts: the training texts, which BPE merges (and characters) are made of.
        alphabet: the texts whose characters a tokenizer of characters knows; None is ``texts``.
        tokenizer: ``characters``, ``bytes``, ``bpe``, a path, or the name of a model on the hub.
        vocab: number of tokens of ``bpe``; None is 1024.
        tokenizer_from: files (or patterns) whose text the tokenizer is made of as well.
        mix: other data sets of text (in a config: mappings with ``_target_``), whose train split is added to train.
        ood: another data set of text, whose test split becomes the split ``ood``.
        **options: :class:`TextData`'s.

    Raises:
        UserError: for any argument that does not fit.
    """
    mixed = [mix] if isinstance(mix, TextData) else list(mix or ())
    others = [("data.mix", one) for one in mixed] + ([("data.ood", ood)] if ood is not None else [])
    for key, other in others:
        if not isinstance(other, TextData) or other.read is None:
            what = getattr(other, "name", None) or type(other).__name__
            raise UserError(key, what, "a data set of text, such as text_files or wikitext")

    def everything(own: Texts, whose: str) -> Iterable[str]:
        more = [getattr(other, whose) for _, other in others]
        files = [lambda: read_texts(tokenizer_from, "data.tokenizer_from")] if tokenizer_from else []
        return chain.from_iterable(made() for made in (own, *more, *files))

    known = alphabet or texts
    if tokenizer == "characters":
        made = Tokenizer.of(tokenizer, lambda: everything(known, "alphabet"), vocab)
    else:
        made = Tokenizer.of(tokenizer, lambda: everything(texts, "texts"), vocab)
    source = read(made)
    if others:
        source = _joined(source, [other.source(made) for other in mixed], ood and ood.source(made))
    data = TextData(source, **options)
    data.read, data.texts, data.alphabet = read, texts, known
    return data


def _joined(source: RawText, mixed: list[RawText], ood: RawText | None) -> RawText:
    """Return a source with the training sequences of others added, and the test sequences of another as ``ood``."""
    splits, words = dict(source.splits), dict(source.words)
    right: dict[int, Callable[[Question, str], bool]] = {}
    for other in mixed:
        splits["train"] = [*splits["train"], *other.splits["train"]]
        right.update({id(one.question): other.right for one in other.splits["train"] if one.question})
        words.pop("train", None)
    if ood is not None:
        if not ood.splits.get("test"):
            raise UserError("data.ood", f"{ood.name} has no test split", "a data set that has one")
        splits["ood"] = ood.splits["test"]
        right.update({id(one.question): ood.right for one in splits["ood"] if one.question})
        if "test" in ood.words:
            words["ood"] = ood.words["test"]
    return RawText(
        " + ".join([source.name, *(other.name for other in mixed)]),
        source.tokenizer,
        splits,
        words,
        lambda question, text: right.get(id(question), source.right)(question, text),
        source.source_length,
        source.source_fill,
        source.key,
    )
