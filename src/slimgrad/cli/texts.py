"""The text of a run: what is read of it, what is held out, and whether it is still the same one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from slimgrad.bytelm import TrainConfig, split_corpus
from slimgrad.cli.options import ALL, Options
from slimgrad.data import END, KNOWN, SPREAD, Corpus, as_share, load_corpus
from slimgrad.errors import InputError

COPYING = "copying"
_BYTES = 256
_FEW = 32_768  # bytes for validation


def load_text(source: str | None, config: TrainConfig, data_dir: Path | None) -> Corpus | None:
    """The corpus that a configuration trains on, with the validation that it names; None for copying."""
    if config.task == COPYING:
        if source not in (None, COPYING):
            raise InputError(f"the copying task makes its own sequences: expected no corpus, got {source}")
        return None
    corpus = load_corpus(source, data_dir=data_dir, reading=config.reading)
    if not is_path(config.validation):
        if corpus.validation is not None and as_share(config.validation) is not None:
            raise InputError(f"--validation {config.validation}: expected none, {corpus.name} has a part of its own")
        return corpus
    return dataclasses.replace(corpus, validation=load_corpus(Path(config.validation), reading=config.reading).text)


def fit_text(config: TrainConfig, corpus: Corpus | None, options: Options) -> TrainConfig:
    """Numbers that follow from the corpus: bytes for validation, the longest of whole documents, or all there are."""
    takes_all = options.takes_all
    if config.model.vocabulary < _BYTES:
        what = "a text is bytes" if corpus is not None else "the copying task has as many symbols"
        raise InputError(f"--set model.vocabulary={config.model.vocabulary}: expected {_BYTES} at least, {what}")
    if corpus is None:
        if takes_all:
            raise InputError(f"--length {ALL}: expected a text, the copying task has none. Name a number of symbols")
        return config
    if "validation_bytes" not in options.named:
        config = config.replace(validation_bytes=validation_bytes(corpus, config.validation))
    if config.windows == "documents":
        if "length" in options.numbers or "length" in options.written:
            given = options.numbers.get("length", options.written.get("length"))
            raise InputError(f"--length {given}: expected none with --windows documents, which have their own")
        train, _ = split_corpus(config, corpus)
        config = config.replace(length=max(2, *(len(document) for document in train.documents)))
    if takes_all:
        if config.batch * config.accumulate > 1:
            raise InputError(
                f"--length {ALL} makes one sequence of the text: expected --batch 1 and --accumulate 1, got "
                f"{config.batch} and {config.accumulate}, which would be the same sequence over again"
            )
        train, _ = split_corpus(config, corpus)
        config = config.replace(length=len(train), first_length=0)
    return config


def is_path(validation: str) -> bool:
    """Whether it names a file or folder of its own."""
    return validation not in (SPREAD, END) and as_share(validation) is None


def validation_bytes(corpus: Corpus, held_out: str) -> int:
    """32,768 bytes, of the text at most a tenth; all of a file that was named, or what the share is."""
    if corpus.validation is not None:
        return len(corpus.validation) if is_path(held_out) else _FEW
    share = as_share(held_out)
    return max(2, min(_FEW, len(corpus.text) // 10)) if share is None else corpus.bytes_of_share(share)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A corpus' bytes by their checksums, a part each, and where they were found."""

    name: str
    given: str | None
    data_dir: str | None
    bytes: list[int]
    sha256: list[str]


def identify_text(corpus: Corpus | None, options: Options) -> Identity | None:
    """What is recorded of a corpus; None for copying."""
    if corpus is None:
        return None
    given = options.corpus
    if given is not None and given not in KNOWN:
        given = os.path.abspath(given)  # a run may go on from another working directory
    parts = [corpus.text] + ([corpus.validation] if corpus.validation else [])
    return Identity(
        name=corpus.name,
        given=given,
        data_dir=options.data_dir and os.path.abspath(options.data_dir),
        bytes=[len(part) for part in parts],
        sha256=[part.sha256() for part in parts],
    )


def recorded_text(record: Mapping[str, Any], config: TrainConfig, options: Options) -> Identity | None:
    """What a run's record says of its corpus; None for copying, and where the corpus is named and nothing is said."""
    if config.task == COPYING:
        return None
    try:
        return TypeAdapter(Identity).validate_python(record["corpus"])
    except (KeyError, ValidationError) as error:
        if options.corpus is not None:
            return None
        raise InputError(
            f"{options.resume}: expected a record of the run's corpus in config.json, with its checksums, found none. "
            "Name the corpus: slimgrad train CORPUS --resume RUN"
        ) from error


def where_it_was(found: Identity | None, options: Options) -> tuple[str | None, Path | None]:
    """The corpus to go on with and where its files lie: as now named, or else as the run's record has them."""
    data_dir = found.data_dir if found else None
    return options.corpus or (found.given if found else None), options.data_dir or (
        Path(data_dir) if data_dir else None
    )


def require_same_text(before: Identity | None, now: Identity | None, source: str | None, validation: str) -> None:
    """Refuse another text, or another validation, than the run began with."""
    if before is None or now is None:
        return
    if before.sha256[:1] == now.sha256[:1] and before.sha256 != now.sha256:
        raise InputError(
            f"validation {validation}: expected the bytes that the run was validated on, found other ones. Name the "
            "file that holds the former: slimgrad train --resume RUN --validation FILE"
        )
    if before.sha256 != now.sha256:
        raise InputError(
            f"corpus {source or before.name}: expected the {sum(before.bytes):,} bytes that the run began with, "
            f"found {sum(now.bytes):,} bytes, and other ones. Name the file or folder that holds the former: "
            "slimgrad train CORPUS --resume RUN"
        )
