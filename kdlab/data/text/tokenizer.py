"""From text to token ids and back, exactly."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlab.config.trust import read_only
from kdlab.errors import UserError
from kdlab.ranges import whole_number
from kdlab.system import integrity
from kdlab.system.files import Unreadable, atomic_write, parse_json, read_text

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"
"""Token that ends a text, and pads: GPT-2's."""

_FILE_BYTES = 256 * 2**20
"""Size in bytes of the largest tokenizer file that is read: several times that of the largest vocabularies."""

_CHUNK = 1 << 20
"""Number of characters that are tokenised at a time: the library needs a hundred times as much memory as a text."""

_ENDS = (END, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[SEP]")
_PADS = ("<pad>", "[PAD]", "<|pad|>")
_WORD_END = re.compile(r"[^\W_](?= [^\W_]|\n)")
_LAYOUTS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class Tokenizer:
    """Token ids of a text: a ``tokenizers.Tokenizer`` and the two tokens that kdlab needs to know.

    A text can never name a special token: "<|endoftext|>" inside of it is plain text, unless ``special=True``.

    Args:
        inner: the library's tokenizer.
        eos: the token that ends a text; None finds it by its usual names.
        pad: the token that fills up; None finds it by its usual names, or takes the former.
        key: the config key to name in errors.

    Attributes:
        inner, eos_id, pad_id,
        size: number of token ids, which run from 0 to ``size - 1``.

    Raises:
        UserError: if there is no token that ends a text.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, eos: str | None = None, pad: str | None = None, key: str = "data.tokenizer"
    ) -> None:
        self.inner, self.key = inner, key
        inner.no_truncation()
        inner.no_padding()
        names = inner.get_vocab(with_added_tokens=True)
        self.size = max(names.values(), default=-1) + 1
        self.eos = eos or next((token for token in _ENDS if token in names), END)
        if self.eos not in names:
            raise UserError(key, f"no token {self.eos!r} that ends a text", "a tokenizer that has one")
        self.eos_id = names[self.eos]
        self.pad = pad if pad in names else next((token for token in _PADS if token in names), self.eos)
        self.pad_id = names[self.pad]

    # ---- text and ids

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text; none are added.

        Args:
            text: any text.
            special: take the names of special tokens inside of the text for these tokens.

        Raises:
            UserError: naming a character that the tokenizer does not know.
        """
        return self.array(text, special).tolist()

    def array(self, text: str, special: bool = False) -> np.ndarray:
        """Return the ids of a text as :meth:`encode` does, as an array (n,) int32, for long texts."""
        self.inner.encode_special_tokens = not special
        parts = []
        for chunk in _chunks(text):
            try:
                ids = self.inner.encode(chunk, add_special_tokens=False).ids
            except Exception as error:  # the library raises plain Exceptions
                raise UserError(self.key, f"{self._reason(chunk, error)}") from None
            parts.append(np.array(ids, dtype=np.int32))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def _reason(self, text: str, error: Exception) -> str:
        bad = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
        if bad is not None:
            return f"{bad!r} (half of a surrogate pair) is no character; accepted: valid Unicode text"
        known = self.inner.get_vocab()
        strange = sorted({c for c in text if c not in known})
        if strange:
            problem = f"characters: {strange[0]!r} is not among the {self.size - 1} known characters; accepted: "
            if not self.key.startswith("data."):  # there is a network for these characters, and no choice any more
                return f"{problem}text without it"
            return f"{problem}bytes, bpe, or data.tokenizer_from with texts that hold it"
        return str(error)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the text of ids, without special tokens unless ``special``."""
        return self.inner.decode([int(token) for token in ids], skip_special_tokens=not special)

    def vocabulary(self) -> dict[str, int]:
        """Return every token and its id."""
        return dict(self.inner.get_vocab(with_added_tokens=True))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the map from ids to tokens."""
        ordered = sorted(self.vocabulary().items(), key=lambda pair: (pair[1], pair[0]))
        return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """Name that a cache gives to data of which it knows the tokens alone."""
        return f"tokens of {self.fingerprint[:16]}"

    # ---- files

    def save(self, folder: str | Path) -> Path:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers reads too; returns the former."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos, "pad_token": self.pad}
        with atomic_write(folder / "tokenizer_config.json") as file:
            file.write(json.dumps(settings, indent=2).encode())
        with atomic_write(folder / "tokenizer.json") as file:
            file.write(self.inner.to_str(pretty=True).encode())
        return folder / "tokenizer.json"

    @classmethod
    def load(cls, where: str | Path, key: str = "data.tokenizer") -> Tokenizer:
        """Load a tokenizer from a folder, a ``tokenizer.json``, or the hub.

        Args:
            where: a folder with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``, or ``encoder.json`` and
                ``vocab.bpe`` (GPT-2's own layout); a file; or the name of a model on the hub.
            key: the config key to name in errors.

        Raises:
            UserError: if there is none, or it is damaged.
        """
        path = Path(where).expanduser()
        if path.is_file():
            return cls._file(path, key)
        if not path.is_dir():
            return cls._hub(str(where), key)
        if (path / "tokenizer.json").is_file():
            return cls._file(path / "tokenizer.json", key)
        for vocabulary, merges in _LAYOUTS:
            if (path / vocabulary).is_file() and (path / merges).is_file():
                return cls._byte_pairs(path / vocabulary, path / merges, key)
        pairs = ", ".join(f"{a} and {b}" for a, b in _LAYOUTS)
        raise UserError(key, f"{path} holds no tokenizer", f"a folder with tokenizer.json, or {pairs}")

    @classmethod
    def _file(cls, path: Path, key: str) -> Tokenizer:
        from tokenizers import Tokenizer as Inner

        _mapping(path, key)
        try:
            inner = Inner.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(key, f"{path} is no tokenizer that can be read ({error})") from None
        config = path.with_name("tokenizer_config.json")
        for file in (path, config):
            integrity.check(file, key)
        settings = _mapping(config, key) if config.is_file() else {}
        return cls(inner, _token(settings.get("eos_token")), _token(settings.get("pad_token")), key)

    @classmethod
    def _byte_pairs(cls, vocabulary: Path, merges: Path, key: str) -> Tokenizer:
        from tokenizers import models

        ids = _mapping(vocabulary, key)
        if not ids or not all(isinstance(number, int) and 0 <= number < 1 << 31 for number in ids.values()):
            raise UserError(key, f"{vocabulary} is no vocabulary", "a mapping of tokens to ids from 0 on")
        lines = [line for line in _text(merges, key).split("\n") if line.strip() and not line.startswith("#version")]
        pairs: list[tuple[str, str]] = []
        for line in lines:
            first, _, second = line.partition(" ")
            if not first or not second or " " in second:
                raise UserError(key, f"{merges}: {line!r} is no merge", "two tokens a line")
            pairs.append((first, second))
        try:
            inner = _byte_level(models.BPE(ids, pairs))
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(key, f"{merges} does not fit {vocabulary} ({error})") from None
        return cls(inner, key=key)

    @classmethod
    def _hub(cls, name: str, key: str) -> Tokenizer:
        made = "characters, bytes, bpe, " if key.startswith("data.") else ""
        accepted = f"{made}a folder or file that is there, or a model on the hub"
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
            raise UserError(key, f"{name}: no such file or folder", accepted)
        from huggingface_hub import hf_hub_download

        from kdlab.models.transformers.base import connection, quiet

        kept = read_only()  # what the hub's client has fetched before, and nothing else
        with quiet(), connection():
            try:
                file = Path(hf_hub_download(name, "tokenizer.json", local_files_only=kept))
            except Exception as error:  # of the network, the hub, and what lies between
                reason = str(error).strip().partition("\n")[0]
                raise UserError(key, f"{name}: cannot be had from the hub ({reason})", accepted) from None
            with contextlib.suppress(Exception):  # some have none
                hf_hub_download(name, "tokenizer_config.json", local_files_only=kept)
        return cls._file(file, key)

    # ---- made here

    @classmethod
    def characters(cls, texts: Iterable[str]) -> Tokenizer:
        """Build a tokenizer of each character that the texts hold, in the order of code points, and the end of text."""
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Inner

        characters = sorted(set().union(*texts))
        inner = Inner(models.WordLevel({character: number for number, character in enumerate(characters)}))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens([END])
        return cls(inner)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """Build a tokenizer of the 256 bytes of UTF-8, with the byte as id, and the end of text as id 256."""
        from tokenizers import models

        inner = _byte_level(models.BPE({sign: byte for byte, sign in enumerate(_signs())}, []), split=False)
        inner.add_special_tokens([END])
        return cls(inner)

    @classmethod
    def bpe(cls, texts: Iterable[str], size: int) -> Tokenizer:
        """Learn a byte-level byte-pair encoding (Sennrich et al., ACL 2016), split into words as GPT-2 does.

        The same texts, in any order, give the same tokenizer.

        Args:
            texts: texts to learn the merges from.
            size: number of tokens, with the 256 bytes and the end of text; fewer if the texts have no more pairs that
                occur twice.
        """
        from tokenizers import models, trainers

        whole_number("data.vocab", size, 257)  # 256 bytes, and the end of text
        inner = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[END],
            initial_alphabet=sorted(_signs()),
            show_progress=False,
        )
        inner.train_from_iterator((chunk for text in texts for chunk in _chunks(text)), trainer)
        return cls(inner)

    @classmethod
    def of(cls, spec: str | Tokenizer, texts: Callable[[], Iterable[str]], vocab: int | None = None) -> Tokenizer:
        """Build or load the tokenizer that ``data.tokenizer`` and ``data.vocab`` name.

        Args:
            spec: ``characters``, ``bytes``, ``bpe``, a path, a hub name, or a tokenizer.
            texts: function that returns the texts that one of characters or BPE is made of.
            vocab: number of tokens of ``bpe``.

        Raises:
            UserError: if there is none of that name.
        """
        if isinstance(spec, Tokenizer):
            return spec
        if not isinstance(spec, str) or not spec:
            raise UserError("data.tokenizer", f"{spec!r}", "characters, bytes, bpe, a path or a hub name")
        if spec == "bpe":
            return cls.bpe(texts(), 1024 if vocab is None else vocab)
        if vocab is not None:
            raise UserError("data.vocab", f"{vocab}; {spec} says itself how many tokens it has; accepted with it: null")
        if spec == "characters":
            return cls.characters(texts())
        return cls.bytes() if spec == "bytes" else cls.load(spec)


def _byte_level(model: tokenizers.models.Model, split: bool = True) -> tokenizers.Tokenizer:
    """Build a tokenizer of bytes that are written as signs; ``split`` into words by GPT-2's pattern first."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, pre_tokenizers

    inner = Inner(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    inner.decoder = decoders.ByteLevel()
    if END in inner.get_vocab():
        inner.add_special_tokens([END])
    return inner


def _signs() -> list[str]:
    """Return the 256 visible characters that stand for bytes in byte-level vocabularies (Radford et al., 2019).

    Latin-1 where it is visible, the others in turn from U+0100 on.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def _chunks(text: str) -> Iterator[str]:
    """Yield a text in parts of about :data:`_CHUNK`, cut after a word before a space and a word, or at a line end.

    No tokenizer that splits text into words first has a token that reaches across.
    """
    start = 0
    while len(text) - start > _CHUNK:
        cut = _WORD_END.search(text, start + _CHUNK)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    if start < len(text):
        yield text[start:]


def _text(path: Path, key: str) -> str:
    try:
        return read_text(path, _FILE_BYTES).replace("\r\n", "\n")
    except (OSError, Unreadable) as error:
        raise UserError(key, f"{path} cannot be read as UTF-8 text ({error})") from None


def _mapping(path: Path, key: str) -> dict[str, Any]:
    try:
        content = parse_json(_text(path, key))
    except Unreadable as error:
        raise UserError(key, f"{path} is truncated, damaged or no JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(key, f"{path} holds a {type(content).__name__}", "a JSON mapping")
    return content


def _token(value: Any) -> str | None:
    """Return the text of a special token as transformers writes it: a text, or a mapping with its content."""
    return value.get("content") if isinstance(value, dict) else value
