"""A model's class before its weights, its tokenizer, its weights, and adapters; each refused in one sentence."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from slimgrad.errors import InputError, MissingExtraError
from slimgrad.extras import require_extra
from slimgrad.hf.tuning.settings import Settings

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
_POSITIONS = re.compile(r"(^|\.|_)(position|positions|pos|wpe)(_|\.|$)")


def require_extras(settings: Settings) -> None:
    """Refuse what is not installed, before anything is done.

    Raises:
        MissingExtraError: with the command that installs it.
    """
    require_extra("hf", "slimgrad finetune of a Hugging Face model")
    if settings.log != "none":
        require_extra(settings.log, f"--log {settings.log}")
    if settings.bits is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "--bits 4: expected bitsandbytes, which is not installed. Run: pip install bitsandbytes"
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from: a folder, or a name that transformers fetches.

    Attributes:
        name: as given.
        config: its configuration.
        blank: its class without weights.
    """

    name: str
    config: Any
    blank: Any

    @classmethod
    def open(cls, name: str) -> Source:
        """Read a model's configuration, and build its class without weights.

        Raises:
            InputError: there is no such model, or it is no causal language model of transformers.
        """
        config = read_config(name)
        try:
            with torch.device("meta"):
                blank = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # whatever a class raises for a configuration that does not fit
            raise InputError(
                f"{name}: model_type {config.model_type}: expected a causal language model of transformers "
                f"{transformers.__version__}; {_first_line(error)}"
            ) from error
        return cls(name=name, config=config, blank=blank)

    @property
    def where(self) -> dict[str, Any]:
        """What every `from_pretrained` is told: nothing is fetched for a folder, and no code of the model's is run."""
        return {"local_files_only": Path(self.name).is_dir(), "trust_remote_code": False}

    @property
    def vocabulary(self) -> int:
        """Tokens that its embedding knows."""
        return cast(int, self.blank.get_input_embeddings().weight.shape[0])

    @property
    def trained_positions(self) -> int | None:
        """Tokens up to which it was trained, as its configuration has it."""
        found = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @property
    def learned_positions(self) -> int | None:
        """The longest sequence of a model with a table of positions; None for rotary ones, recurrences, ..."""
        trained = self.trained_positions
        if trained is None:
            return None
        tables = [*self.blank.named_parameters(), *self.blank.named_buffers()]
        has_table = any(_POSITIONS.search(n) and x.dim() == 2 and x.shape[0] >= trained for n, x in tables)
        return trained if has_table else None

    def tokenizer(self) -> Any:
        """The model's own; None for a folder without one.

        Raises:
            InputError: it cannot be read, or it knows tokens that the model does not.
        """
        folder = Path(self.name)
        if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZERS):
            return None
        try:
            tokenizer = cast(Any, transformers.AutoTokenizer.from_pretrained(self.name, **self.where))
        except Exception as error:  # whatever a tokenizer's files make it raise
            raise InputError(f"{self.name}: its tokenizer cannot be read: {_first_line(error)}") from error
        if len(tokenizer) > self.vocabulary:
            raise InputError(
                f"{self.name}: its tokenizer knows {len(tokenizer):,} tokens, its embedding {self.vocabulary:,}. "
                "Expected a tokenizer and a model that belong together (resize_token_embeddings adds rows)"
            )
        tokenizer.padding_side = "right"
        return tokenizer

    def dtype(self, settings: Settings) -> torch.dtype:
        """That of computation: as asked for, or as the model is saved."""
        if settings.dtype is not None:
            return getattr(torch, settings.dtype)
        saved = getattr(self.config, "dtype", None)
        return torch.bfloat16 if saved in (torch.bfloat16, torch.float16) else torch.float32

    def weights(self, settings: Settings) -> nn.Module:
        """The model with its weights: frozen ones in the dtype of computation (or 4 bits), trained ones in float32.

        Raises:
            InputError: they are not there, cannot be read, or are those of another kind of model.
        """
        dtype = self.dtype(settings)
        options: dict[str, Any] = {"dtype": dtype if settings.lora else torch.float32}
        if torch.cuda.is_available() and settings.device != "cpu":
            options["device_map"] = {"": 0}
        if settings.bits:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )  # fmt: skip
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                self.name, output_loading_info=True, **self.where, **options
            )
        except Exception as error:  # whatever damaged or absent files make transformers raise
            raise InputError(f"{self.name}: its weights cannot be loaded: {_first_line(error)}") from error
        model, found = cast("tuple[nn.Module, dict[str, Any]]", loaded)
        missing = sorted(found["missing_keys"])
        if missing:
            raise InputError(
                f"{self.name}: its files lack {len(missing):,} of the model's weights ({missing[0]}, ...), which would "
                "be random. Expected those of a causal language model"
            )
        for module in model.modules():  # else some processors pack 4-bit weights anew, and rounded, to evaluate them
            if hasattr(module, "support_avx512bf16_for_cpu"):
                cast(Any, module).support_avx512bf16_for_cpu = False
        return model


def read_config(name: str) -> Any:
    """A model's configuration.

    Raises:
        InputError: there is none.
    """
    is_folder = Path(name).is_dir()
    try:
        return transformers.AutoConfig.from_pretrained(name, local_files_only=is_folder, trust_remote_code=False)
    except Exception as error:  # whatever the hub, the network or a configuration's own checks raise
        if is_folder:
            raise InputError(f"{name}: its config.json cannot be read: {_first_line(error)}") from error
        raise InputError(
            f"{name}: no such folder here, and it could not be fetched from Hugging Face ({_first_line(error)}). "
            "Expected the folder of a model (a config.json with model_type), the folder of a run of slimgrad, or, with "
            "a network, a model's name"
        ) from error


def with_adapters(model: Any, settings: Settings) -> Any:
    """The model with adapters of PEFT on all of its linear layers; as it is where none are asked for.

    Raises:
        InputError: PEFT has no adapter for one of its layers.
    """
    if settings.lora is None:
        return model
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora, lora_alpha=settings.alpha, lora_dropout=settings.lora_dropout,
        target_modules="all-linear", use_dora=settings.dora,
    )  # fmt: skip
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--lora {settings.lora}: PEFT refuses this model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """And what it announces, where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    several = next((number for number, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:several])[:300]
