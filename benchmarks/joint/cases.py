"""What is measured: cases, each one sequence of one model, and the ways to its gradient that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PLAIN, CHECKPOINT, OURS, SPECIFIED = "plain", "checkpoint", "slimgrad", "algorithm 1"
COMPILED, OURS_CHECKPOINT = "slimgrad, compiled", "slimgrad, checkpointing"
PERFORMER_PYTORCH, MAMBAPY, FLA, PUBLISHED = "performer-pytorch", "mambapy", "flash-linear-attention", "published code"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to the gradient.

    Attributes:
        kind: what it is; see the functions of `joint.models`.
        chunk, tape: tokens of a chunk; chunks whose graphs are kept from the first sweep.
        form: of the published code.
        peer: a package that it needs, in an environment of its own (see `joint.peers`).
        truth: the kind whose gradient in float64 it is held against.
        checked: over how many tokens, where the whole takes too much; 0: over all.
    """

    kind: str
    chunk: int = 0
    tape: int = 0
    form: str = ""
    peer: str = ""
    truth: str = PLAIN
    checked: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sequence of one model, by several methods.

    Attributes:
        name: what the tables call it.
        build: "module:function" that makes it; see `joint.models`.
        sizes: keywords of that function.
        length: tokens.
        methods: the ways, plain backpropagation first where there is one.
        rounds: in which the methods take turns.
        layers: of a Performer, whose least number of FLOPs is known; 0: another model.
        counted: tokens over which the products of plain backpropagation are counted, where the whole does not fit; its
            FLOPs are linear in the length.
    """

    name: str
    build: str
    sizes: dict[str, Any] = field(default_factory=dict[str, Any])
    length: int
    methods: tuple[Method, ...]
    rounds: int = 3
    layers: int = 0
    counted: int = 0


def ours(*chunks: int, tape: int = 0, **others: Any) -> tuple[Method, ...]:
    return tuple(Method(kind=OURS, chunk=chunk, tape=tape, **others) for chunk in chunks)


WHOLE = (Method(kind=PLAIN), Method(kind=CHECKPOINT))
# its causal attention without CUDA holds [time, features, head width] per head: float64 over the whole is too much
OTHER_PERFORMER = Method(kind=PERFORMER_PYTORCH, peer=PERFORMER_PYTORCH, truth=PERFORMER_PYTORCH, checked=512)


def performer(
    name: str, length: int, methods: tuple[Method, ...], layers: int, width: int, rounds: int, counted: int = 0
) -> Case:
    sizes = {"layers": layers, "width": width, "heads": width // 64}
    build = "benchmarks.joint.models:performer"
    return Case(
        name=name, build=build, sizes=sizes, length=length, methods=methods, rounds=rounds, layers=layers,
        counted=counted,
    )  # fmt: skip


def published(*chunks: int, forms: tuple[str, ...] = ("iter",)) -> tuple[Method, ...]:
    return tuple(Method(kind=PUBLISHED, chunk=chunk, form=form) for chunk in chunks for form in forms)


def thin_layer(length: int, chunk: int, rounds: int) -> Case:
    """One layer of width 128: beyond 100,000 tokens the specification is the truth, in float64."""
    truth = PLAIN if length < 100_000 else SPECIFIED
    whole = tuple(Method(kind=method.kind, truth=truth) for method in WHOLE)
    others = (OTHER_PERFORMER,) if length < 100_000 else ()
    methods = (*whole, *ours(chunk, truth=truth), *others)
    counted = 0 if length < 100_000 else 32_768
    return performer("1 layer, d 128", length, methods, 1, 128, rounds, counted)


def joint_cases() -> list[Case]:
    """All of them."""
    loop = (Method(kind=PLAIN), *ours(16, 128), Method(kind=COMPILED, chunk=16))
    recurrent = (Method(kind=PLAIN), *ours(1024, 256))
    hugging = (*WHOLE, *ours(512), Method(kind=OURS_CHECKPOINT, chunk=512))
    mamba = tuple(
        Method(kind=method.kind, chunk=method.chunk, peer=MAMBAPY) for method in (*WHOLE, *ours(1024, 256))
    )  # fmt: skip
    sequence = "benchmarks.joint.models:"
    return [
        performer("I", 8192, (*WHOLE, *ours(1024, 512, 256), *published(256), OTHER_PERFORMER), 1, 1024, 3),
        performer(
            "II", 1024,
            (*WHOLE, *ours(256, 128, 64), *published(256, 64, forms=("iter", "ps")), OTHER_PERFORMER,
             Method(kind=FLA)), 3, 512, 7,
        ),
        performer(
            "III", 4096,
            (*WHOLE, *ours(512, 256, 128), *ours(512, tape=4), *published(256), OTHER_PERFORMER), 3, 1024, 3,
        ),
        performer("2 layers, d 256", 32_768, (*WHOLE, *ours(1024)), 2, 256, 3),
        performer("2 layers, d 128", 32_768, (*WHOLE, *ours(2048, 1024, 512, 256)), 2, 128, 3),
        thin_layer(1024, 256, 9),
        thin_layer(32_768, 2048, 5),
        thin_layer(262_144, 2048, 2),
        thin_layer(1_048_576, 2048, 2),
        Case(name="gated loop, d 64, batch 8", build=sequence + "gated_loop", length=1024, methods=loop, rounds=5),
        Case(name="nn.GRU, 2 layers, d 128", build=sequence + "gru", length=8192, methods=recurrent, rounds=3),
        Case(name="mambapy, 2 layers, d 64", build=sequence + "mambapy", length=4096, methods=mamba, rounds=3),
        Case(
            name="Llama, 4 layers, d 256", build=sequence + "huggingface", sizes={"shape": "llama-5M"}, length=2048,
            methods=hugging, rounds=3,
        ),
        Case(
            name="Mamba-2, 4 layers, d 256", build=sequence + "huggingface", sizes={"shape": "mamba2-4M"},
            length=2048, methods=hugging, rounds=3,
        ),
    ]  # fmt: skip


def quick_cases() -> list[Case]:
    """A few, and shorter: to see that everything runs."""
    found: list[Case] = []
    lengths = {"II": 1024, "1 layer, d 128": 1024, "gated loop, d 64, batch 8": 256, "nn.GRU, 2 layers, d 128": 1024}
    lengths |= {"mambapy, 2 layers, d 64": 1024, "Llama, 4 layers, d 256": 1024, "Mamba-2, 4 layers, d 256": 1024}
    for case in joint_cases():
        length = lengths.pop(case.name, None)  # of the thin layer, the shortest
        if length is not None:
            methods = tuple(method for method in case.methods if method.chunk < length)
            found.append(Case(**{**vars(case), "length": length, "methods": methods, "rounds": 2}))
    return found
