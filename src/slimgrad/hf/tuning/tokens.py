"""From a file or a folder to documents of tokens, each at its full length, in a file of the run's own.

| source | documents |
|---|---|
| a text file | one |
| a folder of text files | one each |
| JSONL, parquet, arrow, a folder of `Dataset.save_to_disk` | one a row: `text`, `messages` (a chat) or `input_ids` |

They are read one at a time and written to an arrow file, which training then maps into memory: a corpus may be larger
than memory, and a resumed run has exactly the documents that it began with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError

from slimgrad.errors import InputError
from slimgrad.hf.head import IGNORED

_JSON, _TABLES = (".jsonl", ".ndjson", ".json"), {".parquet": "parquet", ".arrow": "arrow"}
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # of `save_to_disk`
_FIELDS = ("input_ids", "messages", "text")
_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BUFFERED = 64  # documents that are written at once
_COLUMN = datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in ("input_ids", "labels")})

Row = tuple[str, dict[str, Any]]  # where it is, in words; its fields


@dataclass
class Counted:
    """What was found in a source.

    Attributes:
        documents, tokens, longest: of what is trained on; the last in tokens.
        where: the longest document, in words.
        short: documents left out for having fewer than two tokens.
        silent: documents left out since no token of theirs is to be learnt.
        learnt: what the loss is taken of, in words.
    """

    documents: int = 0
    tokens: int = 0
    longest: int = 0
    where: str = ""
    short: int = 0
    silent: int = 0
    learnt: list[str] = field(default_factory=list[str])

    def to_dict(self) -> dict[str, Any]:
        """For a run's record."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{_counted(self.documents, 'document')}, {self.tokens:,} tokens, the longest {self.longest:,}"]
        if self.short:
            parts.append(f"{_counted(self.short, 'document')} shorter than two tokens left out")
        if self.silent:
            parts.append(f"{_counted(self.silent, 'document')} without a token to learn left out")
        return "; ".join([*parts, *self.learnt])


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


class Encoder:
    """Rows to tokens and labels.

    Args:
        tokenizer: the model's own; None where it has none, which only rows of `input_ids` do without.
        vocabulary: tokens that the model knows.
        positions: the longest document that a model with learned positions takes; None for others.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, positions: int | None) -> None:
        self.tokenizer, self.vocabulary, self.positions = tokenizer, vocabulary, positions
        template = cast("str | dict[str, str] | None", getattr(tokenizer, "chat_template", None))
        self.marks_assistant = isinstance(template, str) and bool(_MARKS_ASSISTANT.search(template))

    def encode(self, where: str, row: dict[str, Any]) -> tuple[list[int], list[int], str]:
        """Its tokens, its labels, and what is learnt of it, in words ("" for every token).

        Raises:
            InputError: it has no field of those that are known, or one that does not fit, or is too long.
        """
        name = next((name for name in _FIELDS if row.get(name) is not None), None)
        if name is None:
            found = f"found {', '.join(row)}" if row else "found none"
            raise InputError(f"{where}: expected a field {', '.join(_FIELDS[:-1])} or {_FIELDS[-1]}; {found}")
        if name != "input_ids" and self.tokenizer is None:
            raise InputError(
                f"{where}: text needs the model's tokenizer, and its folder has none (tokenizer.json or the like). Put "
                "it there, or pass a dataset with input_ids"
            )
        ids, labels, learnt = getattr(self, f"_{name}")(where, row)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            wrong = next(x for x in ids if not 0 <= x < self.vocabulary)
            raise InputError(
                f"{where}: token {wrong} is not among the {self.vocabulary:,} that the model knows. Expected tokens of "
                "this model's own tokenizer"
            )
        if self.positions is not None and len(ids) > self.positions:
            raise InputError(
                f"{where}: {len(ids):,} tokens, and the model has learned positions for {self.positions:,}. Expected "
                "documents that fit: cut them into parts, or take a model with rotary positions or a recurrence"
            )
        return ids, labels, learnt

    def _input_ids(self, where: str, row: dict[str, Any]) -> tuple[list[int], list[int], str]:
        columns = {
            name: _integers(where, name, row[name])
            for name in ("input_ids", "labels", "attention_mask")
            if row.get(name) is not None
        }
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{where}: expected columns of one length, found {lengths}")
        ids, mask = columns["input_ids"], columns.get("attention_mask")
        labels = columns.get("labels", ids)
        if mask is not None:  # padding, which some datasets keep
            ids, labels = ([x for x, is_real in zip(xs, mask, strict=True) if is_real] for xs in (ids, labels))
        return ids, labels, "the loss is taken of its labels" if "labels" in columns else ""

    def _text(self, where: str, row: dict[str, Any]) -> tuple[list[int], list[int], str]:
        if not isinstance(row["text"], str):
            raise InputError(f"{where}: expected text in the field text, found {type(row['text']).__name__}")
        ids = list(self.tokenizer(row["text"], verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        if ids and end is not None and ids[-1] != end:
            ids.append(end)
        return ids, ids, ""

    def _messages(self, where: str, row: dict[str, Any]) -> tuple[list[int], list[int], str]:
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{where}: messages need a chat template, which the model's tokenizer does not have. Take the "
                "tokenizer of a chat model, or pass a field text"
            )
        options = {"return_assistant_tokens_mask": True} if self.marks_assistant else {}
        try:
            found = self.tokenizer.apply_chat_template(
                row["messages"], tools=row.get("tools"), tokenize=True, return_dict=True, **options
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"{where}: the chat template does not take these messages ({' '.join(str(error).split())}). Expected a "
                'list of {"role": ..., "content": ...}'
            ) from error
        ids = list(found["input_ids"])
        if not self.marks_assistant:
            return ids, ids, "the loss is taken of every turn: the chat template does not mark the assistant's"
        mask = found["assistant_masks"]
        labels = [x if is_assistant else IGNORED for x, is_assistant in zip(ids, mask, strict=True)]
        return ids, labels, "the loss is taken of the assistant's turns alone"


def _integers(where: str, name: str, values: Any) -> list[int]:
    try:
        found = [int(x) for x in values]
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: expected a list of integers in {name}") from error
    return found


def write_tokens(source: Path, encoder: Encoder, file: Path) -> Counted:
    """Write a source's documents to `file`.

    Raises:
        InputError: the source cannot be read, has a row that does not fit, or nothing to train on.
    """
    counted, learnt = Counted(), dict[str, None]()
    with ArrowWriter(features=_COLUMN, path=str(file), writer_batch_size=_BUFFERED) as writer:
        for where, row in read_rows(source):
            ids, labels, words = encoder.encode(where, row)
            if len(ids) < 2:
                counted.short += 1
            elif all(label == IGNORED for label in labels[1:]):
                counted.silent += 1
            else:
                learnt[words] = None
                writer.write({"input_ids": ids, "labels": labels})
                counted.documents, counted.tokens = counted.documents + 1, counted.tokens + len(ids)
                if len(ids) > counted.longest:
                    counted.longest, counted.where = len(ids), where
        if counted.documents:
            writer.finalize()
    if not counted.documents:
        left_out = f", of {counted.short + counted.silent:,} that were read" if counted.short + counted.silent else ""
        raise InputError(
            f"{source}: no document with at least two tokens, and one to learn{left_out}. Expected a text, JSONL with "
            "a field text or messages, or a dataset with input_ids"
        )
    counted.learnt = [words for words in learnt if words]
    return counted


def read_tokens(file: Path) -> datasets.Dataset:
    """The documents of `write_tokens`, mapped into memory; rows are tensors."""
    return datasets.Dataset.from_file(str(file)).with_format("torch")


def read_rows(source: Path) -> Iterator[Row]:
    """Rows of any source, each with where it is.

    Raises:
        InputError: there is no such source, or it is none that is known.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder. Expected a text, JSONL, or a tokenised dataset")
    try:
        if source.is_dir():
            yield from _saved(source) if any((source / name).exists() for name in _SAVED) else _texts(source)
        elif source.suffix in _JSON:
            yield from _json_lines(source)
        elif source.suffix in _TABLES:
            yield from _table(source)
        else:
            yield str(source), {"text": _text_of(source)}
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror or error}") from error


def _texts(folder: Path) -> Iterator[Row]:
    hidden = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path for path in hidden if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    tables = [path for path in files if path.suffix in (*_JSON, *_TABLES)]
    if tables:
        raise InputError(
            f"{folder}: expected a folder of text files, one document each, or one of Dataset.save_to_disk; found "
            f"{tables[0].name}. Name the file itself"
        )
    for path in files:
        yield str(path), {"text": _text_of(path)}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text, byte {error.start:,} is not. Known besides: JSONL, .parquet, .arrow, and "
            "folders of Dataset.save_to_disk"
        ) from error


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(_decoded(path, lines), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number:,}"
            try:
                row = json.loads(line.strip())
            except ValueError as error:
                why = str(error).replace("line 1 ", "")  # json numbers the lines of what it was given
                raise InputError(f"{where}: expected a JSON object, it cannot be read: {why}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object per line, found {type(row).__name__}")
            yield where, cast("dict[str, Any]", row)


def _decoded(path: Path, lines: Any) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, found bytes that are not ({error.reason})") from error


def _table(path: Path) -> Iterator[Row]:
    try:
        rows = datasets.load_dataset(_TABLES[path.suffix], data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number:,}", cast("dict[str, Any]", row)
    except (ValueError, DatasetsError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: expected a {path.suffix[1:]} file, it cannot be read: {error}") from error


def _saved(folder: Path) -> Iterator[Row]:
    try:
        found = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: expected a folder of Dataset.save_to_disk, it cannot be read: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise InputError(
                f"{folder}: expected a split train, found {', '.join(map(str, found))}. Name the split's folder"
            )
        found = found["train"]
    for number, row in enumerate(found, 1):
        yield f"{folder}, row {number:,}", cast("dict[str, Any]", row)
