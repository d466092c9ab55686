"""`slimgrad finetune MODEL_DIR DATA`: killed and resumed, loaded without slimgrad, and refused before work is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from slimgrad.errors import InputError  # noqa: E402
from slimgrad.hf.tiny import byte_tokenizer, make_tiny  # noqa: E402
from slimgrad.hf.tuning.tokens import Encoder, read_tokens, write_tokens  # noqa: E402
from tests.cli.running import FAILED, INPUT, refuse, run, succeed  # noqa: E402

FOX = "the quick brown fox jumps over the lazy dog. "
LINES = [{"text": FOX * (1 + number % 4)} for number in range(8)]  # of 46 to 181 tokens
CHAT = [{"role": "user", "content": "who jumps?"}, {"role": "assistant", "content": "the fox"}]
SIZE = ("--chunk", 40, "--learning-rate", 0.01, "--steps", 5, "--accumulate", 2, "--save-every", 2)
WAYS = {
    "lora": ("--lora", 4, "--lora-dropout", 0.1),
    "dora in bfloat16": ("--lora", 4, "--dora", "--dtype", "bfloat16"),
    "qlora": ("--lora", 4, "--bits", 4),
    "full": ("--eval-share", 0.3),
}

# begins every run that it is given, each in a process of its own, which dies within step 4, after checkpoint 2
DIE = """
import json, os, signal, sys
from pathlib import Path
import transformers
from slimgrad.hf.tuning import Settings, finetune

class Die(transformers.TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

for out, settings in json.loads(sys.argv[1]).items():
    if (child := os.fork()) == 0:
        finetune(Settings(**settings), out=Path(out), callbacks=[Die()])
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (out, status)
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Generator[None]:
    """MKL shares a product out among threads as they are free, and its last bits are then those of the moment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("lines") / "lines.jsonl", LINES)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def history(folder: Path) -> list[dict[str, float]]:
    """What was computed at each step."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [{name: row[name] for name in names} for row in log if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("adapter_model.safetensors", "model.safetensors")
    return load_file(next(folder / name for name in names if (folder / name).exists()))


def loads_and_generates(folder: Path) -> str:
    kind = peft.AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else None
    model = (kind or transformers.AutoModelForCausalLM).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.decode(model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=4)[0])


def options(way: str) -> dict[str, Any]:
    """The settings that a command's options stand for."""
    words, found = [*WAYS[way], *SIZE], dict[str, Any]()
    while words:
        name = str(words.pop(0)).removeprefix("--").replace("-", "_")
        found[name] = words.pop(0) if words and not str(words[0]).startswith("--") else True
    return found


@pytest.fixture(scope="module")
def killed(tiny: Path, lines: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each way that was killed."""
    if "qlora" in WAYS:
        pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.mktemp("killed")
    runs = {way: root / way.replace(" ", "-") for way in WAYS}
    given = {str(out): {"model": str(tiny), "data": str(lines), **options(way)} for way, out in runs.items()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DIE, json.dumps(given)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return runs


@pytest.mark.skipif(sys.platform != "linux", reason="the processes that die are forked")
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_goes_on_to_the_same_model(
    way: str, killed: dict[str, Path], tiny: Path, lines: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", Path(shutil.copytree(killed[way], tmp_path / "resumed"))
    shown = succeed("finetune", tiny, lines, *WAYS[way], *SIZE, "--out", whole).stdout
    assert "exact in chunks" in shown
    assert "8 documents, 908 tokens, the longest 181" in shown
    assert (resumed / "checkpoint-2").is_dir()
    assert not (resumed / "trainer_state.json").exists()
    assert "after checkpoint 2" in succeed("finetune", "--resume", resumed).stdout
    assert len(history(whole)) == 5
    assert history(resumed) == history(whole)
    expected, got = weights(whole), weights(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert history(whole)[-1]["loss"] < history(whole)[0]["loss"]
    assert loads_and_generates(resumed).startswith("the")
    lines_to_load = [line.strip() for line in shown.splitlines() if line.startswith("  ")][-2:]
    assert lines_to_load[0].startswith("from peft" if (whole / "adapter_config.json").exists() else "from transformers")
    if way == "full":
        evaluated = [json.loads((run / "finetune.json").read_text()) for run in (whole, resumed)]
        assert evaluated[0]["before"] == evaluated[1]["before"]
        assert evaluated[0]["after"] == evaluated[1]["after"]
        assert evaluated[0]["after"]["loss"] < evaluated[0]["before"]["loss"]


def test_documents_padded_to_a_batch_are_as_each_alone(tiny: Path, lines: Path, tmp_path: Path) -> None:
    steps = ("--lora", 4, "--chunk", 40, "--learning-rate", 0.01, "--steps", 4)
    for name, together in (("batch", ("--batch", 2)), ("alone", ("--accumulate", 2))):
        succeed("finetune", tiny, lines, *steps, *together, "--out", tmp_path / name)
    batch, alone = history(tmp_path / "batch"), history(tmp_path / "alone")
    for name in ("loss", "grad_norm"):  # measured: 9e-8 and 0, in float32
        assert [row[name] for row in batch] == pytest.approx([row[name] for row in alone], rel=1e-6)


def test_an_evaluation_goes_in_chunks_and_is_the_loss_per_token_of_the_plain_model(
    tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = write_lines(tmp_path / "held.jsonl", [{"text": FOX * 5}, {"text": "a"}])
    seen, layer = list[int](), transformers.models.llama.modeling_llama.LlamaMLP
    mlp = layer.forward

    def noting(module: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[1])
        return mlp(module, x)

    one = ("--lora", 2, "--chunk", 40, "--steps", 1, "--eval", held, "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", noting)
        succeed("finetune", tiny, lines, *one)
    assert max(seen) == 67  # of the look at the model; else 40, of documents of 226
    record = json.loads((tmp_path / "run" / "finetune.json").read_text())
    for model, name in ((tiny, "before"), (tmp_path / "run", "after")):
        kind = peft.AutoPeftModelForCausalLM if name == "after" else transformers.AutoModelForCausalLM
        plain, tokenizer = kind.from_pretrained(model).eval(), transformers.AutoTokenizer.from_pretrained(model)
        total, count = 0.0, 0
        for text in (FOX * 5, "a"):
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                total += plain(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert record[name]["tokens"] == count
        assert record[name]["loss"] == pytest.approx(total / count, rel=1e-6)  # measured: 1e-7


def test_a_run_that_is_asked_to_stop_saves_first_and_goes_on(
    tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("--lora", 4, "--lora-dropout", 0.1, "--chunk", 40, "--steps", 4, "--save-every", 4)
    succeed("finetune", tiny, lines, *settings, "--out", tmp_path / "whole")

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("slimgrad.cli.tuning._Progress.on_step_begin", stop)
        message = refuse(128 + signal.SIGTERM, "finetune", tiny, lines, *settings, "--out", tmp_path / "run")
    assert f"interrupted; saved after step 2. Go on: slimgrad finetune --resume {tmp_path / 'run'}" in message
    succeed("finetune", tiny, lines, *settings, "--resume", tmp_path / "run")
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_a_run_whose_output_goes_to_a_file_says_there_how_far_it_is(tiny: Path, lines: Path, tmp_path: Path) -> None:
    shown = succeed("finetune", tiny, lines, "--lora", 2, "--chunk", 40, "--steps", 1, "--out", tmp_path / "run").stdout
    assert [line.split("  ")[0] for line in shown.splitlines() if line.startswith("step ")] == ["step 1"]
    assert "\n1 step, " in shown


def test_what_other_libraries_say_when_they_are_imported_is_not_on_the_screen() -> None:
    level = "print(huggingface_hub.logging.get_verbosity() == huggingface_hub.logging.ERROR)"
    command = (sys.executable, "-c", f"import slimgrad.cli.tuning, bitsandbytes, huggingface_hub; {level}")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_chat_is_learnt_at_the_assistants_turns(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}, {"text": ""}])
    counted = write_tokens(rows, Encoder(tokenizer, vocabulary=258, positions=None), tmp_path / "tokens.arrow")
    for part in ("1 document shorter than two tokens left out", "1 document without a token to learn left out"):
        assert part in str(counted)
    assert str(counted).endswith("the loss is taken of the assistant's turns alone")
    (row,) = read_tokens(tmp_path / "tokens.arrow")
    learnt = row["labels"][row["labels"] != -100]
    assert tokenizer.decode(learnt) == "the fox<|end|>"
    assert tokenizer.decode(row["input_ids"]).startswith("user:\nwho jumps?")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    counted = write_tokens(rows, Encoder(tokenizer, vocabulary=258, positions=None), tmp_path / "tokens.arrow")
    assert "every turn: the chat template does not mark the assistant's" in str(counted)
    assert torch.equal(*read_tokens(tmp_path / "tokens.arrow")[0].values())


def test_documents_come_from_texts_and_tokenised_datasets(tmp_path: Path) -> None:
    encoder = Encoder(byte_tokenizer(), vocabulary=258, positions=None)
    folder, file = tmp_path / "texts", tmp_path / "tokens.arrow"
    (folder / "part").mkdir(parents=True)
    for name, text in (("b.txt", "two"), ("part/a.md", "one"), (".hidden", "no")):
        (folder / name).write_text(text)
    padded = {"input_ids": [[1, 2, 3, 0], [4, 5, 6, 7]], "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]]}
    datasets.Dataset.from_dict(padded).save_to_disk(tmp_path / "saved")
    masked = {"input_ids": [[1, 2, 3]], "labels": [[-100, -100, 3]]}
    datasets.Dataset.from_dict(masked).to_parquet(tmp_path / "masked.parquet")
    expected = {
        folder: [[83, 86, 78, 256], [78, 77, 68, 256]],
        folder / "b.txt": [[83, 86, 78, 256]],
        tmp_path / "saved": [[1, 2, 3], [4, 5, 6, 7]],
        tmp_path / "masked.parquet": [[1, 2, 3]],
    }
    for source, documents in expected.items():
        write_tokens(source, encoder, file)
        assert [row["input_ids"].tolist() for row in read_tokens(file)] == documents
    assert read_tokens(file)[0]["labels"].tolist() == [-100, -100, 3]


def test_a_tokenised_dataset_needs_no_tokenizer(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "bare"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((tiny / name).read_bytes())
    datasets.Dataset.from_dict({"input_ids": [list(range(30))]}).save_to_disk(tmp_path / "saved")
    succeed("finetune", model, tmp_path / "saved", "--lora", 2, "--chunk", 8, "--steps", 1, "--out", tmp_path / "run")
    assert "and its folder has none" in refused(model, write_lines(tmp_path / "x.jsonl", LINES))


def refused(model: Path | str, data: Path, *more: object) -> str:
    """The message, where nothing may be left behind."""
    out = data.parent / "never"
    message = refuse(INPUT, "finetune", model, data, "--out", out, *more)
    assert not out.exists()
    return message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"words": "a"}', "line 2: expected a field input_ids, messages or text; found words"),
        ('{"text": ', "line 2: expected a JSON object, it cannot be read: Expecting value: column 9 (char 8)"),
        ("[1]", "line 2: expected a JSON object per line, found list"),
        ('{"messages": [{"by": "me"}]}', "line 2: the chat template does not take these messages"),
        ('{"input_ids": [1, 258]}', "line 2: token 258 is not among the 258 that the model knows"),
        ('{"input_ids": [1, 2], "labels": [1]}', "line 2: expected columns of one length"),
        ('{"text": 3}', "line 2: expected text in the field text, found int"),
    ],
)
def test_a_line_that_does_not_fit_is_named(line: str, message: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    assert message in refused(tiny, tmp_path / "lines.jsonl")


def test_data_that_is_none_is_refused(tiny: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tiny, tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "no document with at least two tokens" in refused(tiny, tmp_path / "empty.txt")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert "expected UTF-8 text, byte 0 is not" in refused(tiny, tmp_path / "picture.png")
    (tmp_path / "damaged.parquet").write_bytes(b"no table")
    assert "expected a parquet file, it cannot be read" in refused(tiny, tmp_path / "damaged.parquet")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jsonl").write_text("{}")
    assert "Name the file itself" in refused(tiny, tmp_path / "mixed")
    (tmp_path / "text.txt").write_text(FOX)
    assert "expected several documents, found one" in refused(tiny, tmp_path / "text.txt", "--eval-share", 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora", 0), "--lora 0: expected at least 1"),
        (("--bits", 8, "--lora", 4), "--bits 8: expected 4"),
        (("--bits", 4), "expected --lora RANK with it"),
        (("--dora",), "--dora: expected --lora RANK with it"),
        (("--chunk", 0), "--chunk 0: expected at least 1"),
        (("--steps", 2, "--epochs", 1), "--epochs and --steps: expected one of them"),
        (("--eval", "x", "--eval-share", 0.5), "--eval and --eval-share: expected one of them"),
        (("--eval-share", 1), "--eval-share 1.0: expected a share between 0 and 1"),
        (("--dtype", "int8"), "--dtype int8: expected one of float32, bfloat16"),
        (("--rows", "tape"), "--rows tape: expected one of device, host"),
        (("--schedule", "sometimes"), "schedule 'sometimes': expected one of"),
        (("--log", "wandb"), "--log wandb: expected one of none, tensorboard, trackio"),
        (("--device", "tpu"), "--device tpu: expected one of auto, cpu, cuda"),
        (("--memory", "much"), "expected an amount of memory"),
        (("--memory", "1GB", "--chunk", 8), "--chunk and --memory: expected one of them"),
        (("--set", "warmup=0"), "a Hugging Face model: expected no --set"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: tuple[object, ...], message: str, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(FOX)
    assert message in refused(tiny, tmp_path / "text.txt", *options)


def changed(tiny: Path, folder: Path, **fields: Any) -> Path:
    """A copy of the model with another configuration."""
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_a_model_that_is_none_is_refused(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(FOX)
    assert "found no such folder" in refused(tmp_path / "absent", text)
    absent = run("finetune", "someone/some-model", text, "--out", tmp_path / "never")
    assert "someone/some-model: no such folder here; asking Hugging Face for it" in absent.stdout
    message = refused("someone/some-model", text)
    assert "no such folder here, and it could not be fetched from Hugging Face" in message
    (tmp_path / "folder").mkdir()
    both = "expected the folder of a run, or of a Hugging Face model (config.json with model_type)"
    assert both in refused(tmp_path / "folder", text)
    (tmp_path / "folder" / "config.json").write_text("{}")
    message = refused(tmp_path / "folder", text)
    assert "expected the record of a run of slimgrad, or the configuration of a Hugging Face model" in message
    (tmp_path / "folder" / "config.json").write_text('{"model_type": ')
    assert "in JSON; it cannot be read: Expecting value" in refused(tmp_path / "folder", text)
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "vit"}')
    assert "model_type vit: expected a causal language model" in refused(tmp_path / "folder", text)
    assert "its embedding 200" in refused(changed(tiny, tmp_path / "narrow", vocab_size=200, pad_token_id=0), text)
    message = refused(changed(tiny, tmp_path / "five", num_attention_heads=5), text)
    assert "cannot be read: Class validation error" in message
    assert "is not a multiple of the number of attention heads (5)" in message
    bare = changed(tiny, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert "its weights cannot be loaded" in refuse(INPUT, "finetune", bare, text, "--out", tmp_path / "never")
    kept = {name: x for name, x in load_file(tiny / "model.safetensors").items() if name != "lm_head.weight"}
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    message = refuse(INPUT, "finetune", bare, text, "--out", tmp_path / "never2")
    assert "its files lack 1 of the model's weights (lm_head.weight" in message


def test_documents_beyond_learned_positions_are_refused_and_beyond_rotary_ones_warned_of(
    tiny: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(FOX * 2)
    learned = make_tiny(tmp_path / "gpt2", "gpt2", max_position_embeddings=64)
    assert "91 tokens, and the model has learned positions for 64" in refused(learned, text)
    rotary = changed(tiny, tmp_path / "rotary", max_position_embeddings=64)
    shown = succeed(
        "finetune", rotary, text, "--lora", 2, "--steps", 1, "--chunk", 40, "--out", tmp_path / "run"
    ).stdout
    assert "has 91 tokens, and the model was made for 64" in shown


def test_a_run_is_not_written_over_and_goes_on_as_it_was(
    killed: dict[str, Path], tiny: Path, lines: Path, tmp_path: Path
) -> None:
    finished = tmp_path / "finished"
    succeed("finetune", tiny, lines, "--lora", 2, "--chunk", 40, "--steps", 1, "--out", finished)
    message = refuse(INPUT, "finetune", tiny, lines, "--out", finished)
    assert f"found a run. If it is not finished, go on with it: slimgrad finetune --resume {finished}" in message
    assert "the run is finished" in refuse(INPUT, "finetune", "--resume", finished)
    assert "expected the folder of a run of slimgrad finetune" in refuse(INPUT, "finetune", "--resume", tiny)
    begun = killed["lora"]
    assert "--lora 8: the run began with 4" in refuse(INPUT, "finetune", "--resume", begun, "--lora", 8)
    other = tmp_path / "other.txt"
    other.write_text(FOX)
    assert "DATA" in refuse(INPUT, "finetune", tiny, other, "--resume", begun)
    assert "expected MODEL and DATA, or --resume RUN" in refuse(INPUT, "finetune", tiny)


def test_a_missing_package_is_one_sentence(
    tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.util import find_spec

    for name, options, command in (
        ("bitsandbytes", ("--lora", 4, "--bits", 4), "pip install bitsandbytes"),
        ("peft", ("--lora", 4), "pip install 'slimgrad[hf]'"),
        ("tensorboard", ("--log", "tensorboard"), "pip install 'slimgrad[tensorboard]'"),
        ("trackio", ("--log", "trackio"), "pip install 'slimgrad[trackio]'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda x, *a, gone=name: None if x == gone else find_spec(x, *a))
            assert command in refuse(INPUT, "finetune", tiny, lines, *options, "--out", tmp_path / "never")


def test_a_full_disk_is_refused_before_training(
    tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: left)
    message = refuse(1, "finetune", tiny, lines, "--out", tmp_path / "run")
    assert "checkpoints and the result need about 2 MB, the disk has 0 MB left" in message


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_a_disk_that_is_full_in_the_middle_is_one_message(
    error: Exception, tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    given, out = ("finetune", tiny, lines, "--lora", 2, "--chunk", 40, "--steps", 1, "--out"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("slimgrad.hf.tuning.tokens.ArrowWriter.write", full)
        assert "or name a folder on another disk with --out" in refuse(FAILED, *given, out)
        assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr("slimgrad.hf.tuning.trainer.ChunkedTrainer.save_model", full)
        assert f"free some space, then slimgrad finetune --resume {out}" in refuse(FAILED, *given, out)
    succeed("finetune", "--resume", out)


def test_verify_says_in_words_whether_a_model_is_exact(tiny: Path, tmp_path: Path) -> None:
    shown = succeed("verify", tiny).stdout
    assert "LlamaForCausalLM (llama): exact in chunks" in shown
    no_cache = make_tiny(tmp_path / "gpt", "openai-gpt")
    result = run("verify", no_cache)
    assert result.exit_code == 1
    assert "NOT exact in chunks: its forward takes no cache" in result.stdout
    message = refuse(1, "finetune", no_cache, tmp_path, "--out", tmp_path / "run")
    assert "is not certified as exact in chunks" in message
    assert "leave it out" in refuse(INPUT, "verify", tiny, "--chunk", 3)
    assert "expected the folder of a run, or of a Hugging Face model" in refuse(INPUT, "verify", tmp_path)
    assert "; or the folder of a Hugging Face model" in refuse(INPUT, "verify", "tinny")


def test_a_tiny_model_is_made_by_a_command(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "slimgrad.hf.tiny", str(tmp_path / "mamba"), "--type", "mamba2")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a tiny mamba2 model" in done.stdout
    assert loads_and_generates(tmp_path / "mamba").startswith("the")
    with pytest.raises(InputError, match="--type parrot: expected a causal model type of transformers"):
        make_tiny(tmp_path / "parrot", "parrot")
