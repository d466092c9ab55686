"""From a case to its rows: gradients are checked first, then memory is measured, then the methods take turns.

Each method has a child for each setting of malloc. One that fails leaves its reason in its row, and the others go on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.joint import peers
from benchmarks.joint.cases import FLA, OURS, PERFORMER_PYTORCH, PLAIN, PUBLISHED, Case, Method
from benchmarks.joint.child import Child
from slimgrad.budget.measure import MALLOC
from slimgrad.errors import RunError

TOLERANCE = 1e-4
MALLOCS = ("default", "warm")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of all rows.

    Attributes:
        memory, seconds: limits of one child.
        peers: the folder of their environments.
        published: the folder of the published code; None: nobody named one.
    """

    memory: int = 8 << 30
    seconds: float = 300.0
    peers: Path = Path(".peers")
    published: Path | None = None

    def why_not(self, method: Method) -> str | None:
        """Why a method cannot be run here."""
        if method.kind == PUBLISHED and self.published is None:
            return "not run: needs --published FOLDER"
        if method.kind == FLA:
            return "not run: its kernels need CUDA" if not torch.cuda.is_available() else "not run: no case on CUDA yet"
        return None

    def child(self, case: Case, method: Method, *, double: bool = False, malloc: str = "default") -> Child:
        task = {"build": case.build, "sizes": case.sizes, "length": case.length, "double": double}
        where: dict[str, Any] = {"python": peers.interpreter(method.peer, self.peers)} if method.peer else {}
        environment = {**MALLOC[malloc], **({"PUBLISHED": str(self.published)} if self.published else {})}
        return Child(
            {**task, "method": asdict(method)}, memory=self.memory, seconds=self.seconds, environment=environment,
            **where,
        )  # fmt: skip


def key(case: Case, method: Method) -> Row:
    """What makes a row that of one method of one case."""
    row: Row = {"case": case.name, "tokens": case.length, "method": method.kind, "chunk": method.chunk}
    return row | {name: value for name in ("tape", "form") if (value := getattr(method, name))}


def same(row: Row) -> tuple[Any, ...]:
    """What tells rows apart."""
    return tuple(row.get(name) for name in ("case", "tokens", "method", "chunk", "tape", "form"))


def is_done(row: Row) -> bool:
    return "failed" not in row and "skipped" not in row and all(malloc in row for malloc in MALLOCS)


def floor(layers: int, num_chunks: int, tape: int = 0) -> float:
    """The least FLOPs over plain's: all but the last chunk, or the tape, run again through all layers but for the last
    one's part after its sums.
    """
    return 1 + (layers - 1 + 1 / 6) / (3 * layers) * (num_chunks - max(tape, 1)) / num_chunks


class Turns:
    """One case.

    Args:
        case: what is measured.
        rows: those that are there, by `key`; plain backpropagation's serves again where it is done.
        keep: called with each row whenever something was added to it.
        settings: of all.
    """

    def __init__(self, case: Case, rows: list[Row], keep: Callable[[Row], None], settings: Settings) -> None:
        self.case, self.keep, self.settings = case, keep, settings
        self.rows: dict[Method, Row] = {}
        self.truths: dict[tuple[str, int], str] = {}
        self.products: list[Any] = []
        self.plain_flops: float | None = None
        there = {same(row): row for row in rows}
        self.there = {method: there.get(same(key(case, method)), {}) for method in case.methods}

    def measure(self) -> None:
        """All rows that are not done yet."""
        todo = [method for method in self.case.methods if not is_done(self.there[method])]
        reference = next((method for method in self.case.methods if method.kind == PLAIN), None)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            children: dict[Method, Child] = {}
            for method in todo:
                self.rows[method] = key(self.case, method)
                child = self._first(method, Path(folder))
                self.keep(self.rows[method])
                if child is not None:
                    stack.callback(child.close)
                    children[method] = child
            if reference is not None and reference not in todo and children:
                self._again(reference, children, stack)
            if children:
                self._count_without_plain(stack)
                children = self._take_turns(children, "default")
        for malloc in MALLOCS[1:] if children else ():
            with ExitStack() as stack:
                children = {method: self.settings.child(self.case, method, malloc=malloc) for method in children}
                for child in children.values():
                    stack.callback(child.close)
                self._take_turns(children, malloc, warm_up=True)

    def _first(self, method: Method, folder: Path) -> Child | None:
        """Its child, once it is known that it gives the right gradient, with its memory counted and measured."""
        row, why_not = self.rows[method], self.settings.why_not(method)
        if why_not is not None:
            row["skipped"] = why_not
            return None
        child: Child | None = None
        try:
            tokens = min(method.checked or self.case.length, self.case.length)
            truth = self._truth(method, tokens, folder)
            child = self.settings.child(self.case, method)
            row |= child.ask("peak")
            row |= {"truth": method.truth, "checked": tokens, **child.ask("check", path=truth, tokens=tokens)}
            if not row["error"] <= TOLERANCE:
                raise RunError(f"a wrong gradient, {row['error']:.1e} off: not timed")
            self._count(method, child)
        except RunError as error:
            row["failed"] = str(error)
            if child is not None:
                child.close()
            return None
        return child

    def _truth(self, method: Method, tokens: int, folder: Path) -> str:
        """The file of the gradient that a method's is held against."""
        if (method.truth, tokens) not in self.truths:
            path = str(folder / f"{method.truth} {tokens}")
            child = self.settings.child(self.case, replace(method, kind=method.truth, chunk=0, tape=0), double=True)
            try:
                child.ask("truth", path=path, tokens=tokens)
            except RunError as error:
                raise RunError(f"not timed: the gradient in float64 is not known ({error})") from error
            finally:
                child.close()
            self.truths[method.truth, tokens] = path
        return self.truths[method.truth, tokens]

    def _count(self, method: Method, child: Child) -> None:
        row, case = self.rows[method], self.case
        found = child.ask("count")
        products = found.pop("products")
        row |= found
        if method.kind == PLAIN:
            self.plain_flops, self.products = found["flops"], products
        if method.kind == OURS and case.layers:
            row["flops_floor"] = floor(case.layers, -(-case.length // method.chunk), method.tape)

    def _again(self, reference: Method, children: dict[Method, Child], stack: ExitStack) -> None:
        """Plain backpropagation once more, beside what had failed or is new; its own row stays."""
        try:
            child = self.settings.child(self.case, reference)
            stack.callback(child.close)
            found = child.ask("count")
        except RunError:
            return
        self.plain_flops, self.products = found["flops"], found["products"]
        children[reference] = child

    def _count_without_plain(self, stack: ExitStack) -> None:
        """The products of plain backpropagation over fewer tokens, where it cannot run over all."""
        case = self.case
        plain = next((method for method in case.methods if method.kind == PLAIN), None)
        if self.products or plain is None or not case.counted:
            return
        child = self.settings.child(replace(case, length=case.counted), plain)
        stack.callback(child.close)
        try:
            found = child.ask("count")
        except RunError:
            return  # then there is no limit
        times = case.length / case.counted
        self.plain_flops = found["flops"] * times
        self.products = [[a, b, number * times] for a, b, number in found["products"]]

    def _take_turns(
        self, children: Mapping[Method, Child], malloc: str, *, warm_up: bool = False
    ) -> dict[Method, Child]:
        """Seconds of each method per round, and those that the products alone would take at their own shapes.

        Returns:
            Those that have not failed.
        """
        running, seconds = dict(children), {method: list[float]() for method in children}
        limits: list[float] = []
        product_task: Any = {"method": {"kind": "products"}}
        multiplier = Child(product_task, memory=self.settings.memory, seconds=self.settings.seconds)
        try:
            for round_ in range(-warm_up, self.case.rounds):
                for method, child in list(running.items()):
                    try:
                        taken = child.ask("go")["seconds"]
                    except RunError as error:
                        self._failed(method, f"{error}, in the rounds ({malloc} malloc)")
                        del running[method], seconds[method]
                        continue
                    if round_ >= 0:
                        seconds[method].append(taken)
                        if child.left < 1.5 * taken:  # as many rounds as its time allows
                            del running[method]
                if round_ >= 0 and self.products:
                    try:
                        found = multiplier.ask("multiply", products=self.products)
                    except RunError:
                        limits, self.products = [], []  # of a part of the rounds there would be no ratios
                        continue
                    limits.append(self.plain_flops / found["flops"] * found["seconds"])
        finally:
            multiplier.close()
        for method, own in seconds.items():
            if method in self.rows:
                self._note(method, malloc, own, seconds, limits)
        return {method: child for method, child in children.items() if method in seconds}

    def _failed(self, method: Method, reason: str) -> None:
        if method in self.rows:
            self.rows[method]["failed"] = reason
            self.keep(self.rows[method])

    def _note(
        self, method: Method, malloc: str, own: list[float], seconds: Mapping[Method, list[float]], limits: list[float]
    ) -> None:
        row = self.rows[method]
        found: Row = {"seconds": median(own), "least": min(own), "most": max(own), "rounds": len(own)}
        plain = next((times for other, times in seconds.items() if other.kind == PLAIN), None)
        for name, beside in (("plain", plain), ("limit", limits)):
            if beside:
                ratios = [mine / theirs for mine, theirs in zip(own, beside, strict=False)]
                found |= {f"over_{name}": median(ratios)}
                found |= {f"over_{name}_least": min(ratios), f"over_{name}_most": max(ratios)}
        row[malloc] = found
        if self.plain_flops and "flops" in row and method.kind != PERFORMER_PYTORCH:
            row["flops_over_plain"] = row["flops"] / self.plain_flops
        self.keep(row)
