"""A tiny model in a folder, made without a network: `python -m slimgrad.hf.tiny OUT [--type llama]`.

For trying things out, and for tests: random weights of any causal model type that transformers knows, a tokenizer of
bytes, and a chat template. Loaded like any other model's folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from slimgrad.errors import InputError
from slimgrad.hf.shrink import shrunk

PAD, END = "<|pad|>", "<|end|>"
POSITIONS = 8_192
# the loss of assistant turns alone needs to be told where they are: {% generation %}
CHAT = (
    "{% for message in messages %}{{ message['role'] + ':\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def make_tiny(out: Path, kind: str = "llama", *, seed: int = 0, **fields: Any) -> Path:
    """Write a tiny model and its tokenizer.

    Args:
        out: a new folder.
        kind: a causal `model_type` of transformers.
        seed: of its weights.
        fields: of its configuration, in place of the small ones.

    Returns:
        The folder.

    Raises:
        InputError: transformers knows no causal model of that type; the folder holds something.
    """
    if kind not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"--type {kind}: expected a causal model type of transformers, such as llama, gpt2 or mamba2")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a new or empty folder. Name another one")
    tokenizer = byte_tokenizer()
    config = shrunk(transformers.AutoConfig.for_model(kind), {})
    config.update({"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None})
    config.update({"eos_token_id": tokenizer.eos_token_id})
    if hasattr(config, "max_position_embeddings"):
        config.update({"max_position_embeddings": POSITIONS})
    config.update(fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token per byte, padding, and the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
    tokenizer = cast(Any, Tokenizer(bytes_alone))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=CHAT, padding_side="right"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m slimgrad.hf.tiny", description="A tiny model in a folder.")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--type", default="llama", help="a causal model type of transformers")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        make_tiny(given.out, given.type, seed=given.seed)
    except InputError as error:
        parser.error(str(error))
    print(f"a tiny {given.type} model with a tokenizer of bytes: {given.out}")


if __name__ == "__main__":
    main()
