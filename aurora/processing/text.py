"""Tokenizers: sentencepiece (`tokenizer.model`) and Hugging Face JSON (`tokenizer.json`), one interface.

Special tokens written out in a text (`</s>`) become their ids, as in Hugging Face's tokenizers; what lies between them
is encoded piece by piece, each with sentencepiece's leading space, as the released weights saw every piece of a prompt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from torch import Tensor

from aurora.processing.files import read_json

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_REPLACEMENT = "\ufffd"


class Backend(Protocol):
    """What a tokenizer library must offer; it knows nothing of special tokens."""

    vocab_size: int
    specials: dict[str, int]
    """Special tokens of the vocabulary file itself: text -> id."""
    roles: dict[str, int]
    """Ids the vocabulary file gives to `bos_token`, `eos_token`, `pad_token`, `unk_token`."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids that hold no special token."""
        ...

    def find(self, token: str) -> int | None:
        """Return the id of exactly this token."""
        ...

    def is_partial(self, token_id: int) -> bool:
        """Return whether the text of the ids so far may still change while the last one is `token_id`."""
        ...


class _SentencePiece:
    """`tokenizer.model`."""

    def __init__(self, content: bytes) -> None:
        if not content:
            raise RuntimeError("the file is empty")
        self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size: int = self._model.vocab_size()
        controls = [i for i in range(self.vocab_size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self.specials = {self._model.id_to_piece(i): i for i in controls}
        ids = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id(), self._model.unk_id())
        self.roles = {role: i for role, i in zip(_ROLES, ids) if i >= 0}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text

    def find(self, token: str) -> int | None:
        token_id: int = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None

    def is_partial(self, token_id: int) -> bool:
        return False  # bytes are decoded one character at a time, so only the trailing U+FFFD can change


class _JsonTokenizer:
    """`tokenizer.json`."""

    def __init__(self, content: bytes) -> None:
        self._model = tokenizers.Tokenizer.from_buffer(content)
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)
        added = self._model.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self.roles: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids, skip_special_tokens=False)
        return text

    def find(self, token: str) -> int | None:
        token_id: int | None = self._model.token_to_id(token)
        return token_id

    def is_partial(self, token_id: int) -> bool:
        # ByteFallback replaces a whole run of bytes if any of it is broken, so a run may change until it ends.
        return re.fullmatch("<0x[0-9A-Fa-f]{2}>", self._model.id_to_token(token_id) or "") is not None


class Tokenizer:
    """Text to ids and back, with the special tokens of a checkpoint."""

    def __init__(
        self,
        backend: Backend,
        *,
        config: Mapping[str, Any] | None = None,
        added: Mapping[str, int] | None = None,
        files: Mapping[str, bytes] | None = None,
        source: str = "tokenizer",
    ) -> None:
        """Combine a vocabulary with a checkpoint's special tokens.

        Args:
            backend: The vocabulary.
            config: `bos_token`, `eos_token`, `pad_token`, `unk_token` (text, or an object with `content`), where they
                differ.
            added: Special tokens the vocabulary does not hold, text -> id.
            files: What `save_pretrained` writes, name -> bytes.
            source: Name for error messages.

        Raises:
            ValueError: if a named token does not exist or there is no end-of-sequence token.
        """
        self._backend = backend
        self._files = dict(files or {})
        self._source = source
        self._specials = {**backend.specials, **(added or {})}
        ids = {role: self._role(role, (config or {}).get(role)) for role in _ROLES}
        if ids["eos_token"] is None:
            raise ValueError(f"{source}: no end-of-sequence token; want eos_token in tokenizer_config.json")
        self.bos_id: int | None = ids["bos_token"]
        self.eos_id: int = ids["eos_token"]
        self.unk_id: int | None = ids["unk_token"]
        fallback = self.unk_id if self.unk_id is not None else self.eos_id
        self.pad_id: int = ids["pad_token"] if ids["pad_token"] is not None else fallback
        self.vocab_size: int = max(backend.vocab_size, 1 + max(self._specials.values(), default=-1))
        self.special_ids = frozenset(self._specials.values())
        self._special_texts = {i: text for text, i in self._specials.items()}
        longest_first = sorted((text for text in self._specials if text), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def _role(self, role: str, named: Any) -> int | None:
        """Return the id of a role, from the checkpoint's config or else from the vocabulary file."""
        text = named.get("content") if isinstance(named, dict) else named
        if text is None:
            return self._backend.roles.get(role)
        token_id = self._specials.get(text) if isinstance(text, str) else None
        if token_id is None and isinstance(text, str):
            token_id = self._backend.find(text)
        if token_id is None:
            raise ValueError(f"{self._source}: {role}={text!r}: no such token in the vocabulary")
        self._specials[text] = token_id
        return token_id

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read `tokenizer.model` or else `tokenizer.json`, with the special tokens of the files beside it.

        Args:
            path: Checkpoint folder, or a `.gguf` file.

        Raises:
            ValueError: if there is no tokenizer or a file of it is broken; the message names the file.
        """
        folder = Path(path)
        if folder.suffix == ".gguf" and folder.is_file():
            from aurora.processing.gguf_tokenizer import load_gguf_tokenizer  # which builds one of this class

            return load_gguf_tokenizer(folder)
        vocabulary = next(
            (folder / name for name in (SENTENCEPIECE_FILE, JSON_FILE) if (folder / name).is_file()), None
        )
        if vocabulary is None:
            raise ValueError(f"{folder}: no tokenizer; want {SENTENCEPIECE_FILE} or {JSON_FILE}")
        found = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
        configs = {file.name: read_json(file) for file in found}
        main, more, added = (configs.get(name, {}) for name in CONFIG_FILES)
        return cls(
            _load_backend(vocabulary),
            config={**more, **{role: main[role] for role in _ROLES if main.get(role) is not None}},
            added={
                **_added_tokens(added, folder / CONFIG_FILES[2]),
                **_added_special_tokens(main, folder / CONFIG_FILES[0]),
            },
            files={file.name: file.read_bytes() for file in (vocabulary, *found)},
            source=str(vocabulary),
        )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the files this tokenizer was read from into the folder `path`, byte for byte."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            text: Any text; special tokens written out in it become their ids.
            add_bos: Put the beginning-of-sequence id in front, if the vocabulary has one.

        Raises:
            ValueError: if the text holds half a surrogate pair, which no encoding can express.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text: character {error.start} is half a surrogate pair, want valid Unicode") from None
        ids = [self.bos_id] if add_bos and self.bos_id is not None else []
        for piece in self._split.split(text) if self._split else [text]:
            if piece in self._specials:
                ids.append(self._specials[piece])
            elif piece:
                ids += self._backend.encode(piece)
        return ids

    def decode(self, ids: Iterable[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Return the text of ids.

        Args:
            ids: Ids of one sequence.
            skip_special_tokens: Leave special tokens and negative ids (placeholders) out, instead of writing them out.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """
        listed = [int(i) for i in ids]
        if skip_special_tokens:
            return self._backend.decode([self._check(i) for i in listed if i >= 0 and i not in self.special_ids])
        text, run = "", list[int]()
        for i in listed:
            if self._check(i) in self.special_ids:
                text += self._backend.decode(run) + self._special_texts[i]
                run = []
            else:
                run.append(i)
        return text + self._backend.decode(run)

    def special_text(self, token_id: int | None) -> str:
        """Return how a special token is written, empty for `None`."""
        return "" if token_id is None else self._special_texts[token_id]

    def stream(self) -> StreamDecoder:
        """Return a decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    def is_partial(self, token_id: int) -> bool:
        """Return whether text that ends with `token_id` may still change when more ids come."""
        return self._backend.is_partial(token_id)

    def _check(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"{self._source}: id {token_id}, want 0 to {self.vocab_size - 1}")
        if token_id >= self._backend.vocab_size and token_id not in self.special_ids:
            raise ValueError(f"{self._source}: id {token_id} lies between the vocabulary and the added tokens")
        return token_id


class StreamDecoder:
    """Text as ids arrive: whole characters only, and in the end exactly `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start an empty text; special tokens will be left out."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Only a window is decoded: ids[_start:_read] is text already given out, kept as context for what follows it.
        self._start = 0
        self._read = 0

    def put(self, token_id: int) -> str:
        """Take one id and return the text that is now certain, often empty."""
        token_id = int(token_id)
        if token_id < 0 or token_id in self._tokenizer.special_ids:
            return ""
        self._ids.append(token_id)
        return "" if self._tokenizer.is_partial(token_id) else self._emit(final=False)

    def end(self) -> str:
        """Return the rest of the text; a broken last character becomes U+FFFD."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        """Return what the window added; unless final, wait while its last character is incomplete."""
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith(_REPLACEMENT) and not final:
            return ""
        known = self._tokenizer.decode(self._ids[self._start : self._read])
        new = text[len(known) :]
        # Blanks at the front of a window get lost (sentencepiece), so it must not begin with blanks alone.
        if new.strip():
            self._start = self._read
        self._read = len(self._ids)
        return new


def parse_vocabulary(name: str, content: bytes, *, source: str) -> Backend:
    """Read the content of a vocabulary file.

    Args:
        name: `tokenizer.model` or `tokenizer.json`.
        content: What it holds.
        source: Name for error messages.

    Raises:
        ValueError: if it is broken.
    """
    try:
        return _SentencePiece(content) if name == SENTENCEPIECE_FILE else _JsonTokenizer(content)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: not a readable tokenizer ({reason}); want a whole {name}") from None


def _load_backend(file: Path) -> Backend:
    """Read a vocabulary file; a broken one is a ValueError that names it."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: not readable ({error}); want a whole {file.name}") from None
    return parse_vocabulary(file.name, content, source=str(file))


def _added_tokens(raw: Mapping[str, Any], file: Path) -> dict[str, int]:
    """Read `added_tokens.json`: text -> id."""
    for text, token_id in raw.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
            raise ValueError(f"{file}: {text!r}: {token_id!r}: want an id")
    return dict(raw)


def _added_special_tokens(raw: Mapping[str, Any], file: Path) -> dict[str, int]:
    """Read `added_tokens_decoder` of `tokenizer_config.json`: id -> {content, special}."""
    entries = raw.get("added_tokens_decoder", {})
    added: dict[str, int] = {}
    for key, entry in entries.items() if isinstance(entries, dict) else [("added_tokens_decoder", entries)]:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not (key.isdecimal() and len(key) < 10):
            raise ValueError(f"{file}: added_tokens_decoder: {key}: {entry!r}: want an id with its content")
        added[content] = int(key)
    return added
