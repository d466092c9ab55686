"""The joint benchmark: time and memory of one exact gradient, by slimgrad and by what people use beside it.

    python -m benchmarks                      # under an hour on one core; writes results/joint.json, or goes on
    python -m benchmarks --quick              # minutes; writes runs/joint-quick.json, with its table and picture
    python -m benchmarks --only III           # one case; --again III: measured anew
    python -m benchmarks --published FOLDER   # with the published code, from a copy of it (see benchmarks.published)

A case is one sequence of one model, a row one method of it. In this order:

1. The truth is computed in float64: plain backpropagation, or Algorithm 1 where that does not fit. A method whose
   gradient is farther than 1e-4 from it, over all parameters, is not timed. A model that is another one, as
   performer-pytorch's, is held against its own, over fewer tokens.
2. Memory: in a child of its own, what the whole gradient takes at its peak, resident and above what was there, with the
   parameters' gradients; and counted, the bytes of tensors alive.
3. Time: processor seconds of the one thread. The children of a case take turns within rounds, so that what disturbs
   one disturbs all. Medians, least and most; ratios are of one round. By malloc's default, and with a heap that nothing
   is returned from ("warm").
4. The limit is what a gradient cannot be faster than without doing less: the FLOPs of plain backpropagation at the rate
   at which this machine multiplies the very matrices of it, measured in the same rounds.

A child has one thread, 8 GiB of data and five minutes in all; what needs more says so in its row. Rows that are there
are kept, those that failed are tried again. Packages that are compared with are installed into environments of their
own, in the folder of --peers, and are no dependencies; without a network their rows say so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.joint.cases import joint_cases, quick_cases
from benchmarks.joint.turns import Row, Settings, Turns, key, same
from benchmarks.measure import RESULTS, write
from benchmarks.published import digest, find
from benchmarks.shown import ROOT
from slimgrad.errors import InputError

QUICK = ROOT / "runs" / "joint-quick.json"


def told(row: Row) -> str:
    """A row on the terminal."""
    what = ", ".join(str(row[name]) for name in ("case", "tokens", "method", "chunk", "tape", "form") if row.get(name))
    if reason := row.get("failed", row.get("skipped")):
        return f"{what}: {reason}"
    parts = [f"{row['resident_bytes'] / 1e6:,.0f} MB", f"error {row['error']:.0e}"]
    parts += [f"{malloc} {row[malloc]['seconds']:.3f} s" for malloc in ("default", "warm") if malloc in row]
    return f"{what}: {', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(case.name for case in joint_cases()))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help=", ".join(names))
    parser.add_argument("--again", nargs="+", metavar="NAME", choices=names, default=[], help="measure anew")
    parser.add_argument("--published", metavar="FOLDER", type=Path)
    parser.add_argument("--peers", metavar="FOLDER", type=Path, default=ROOT / ".peers")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in the children; the results name it
    published = None
    if options.published:
        try:
            published = find(str(options.published))
            print("published code:", digest(str(published)))
        except InputError as error:
            parser.error(str(error))
    settings = Settings(peers=options.peers.resolve(), published=published)
    path: Path = QUICK if options.quick else RESULTS / "joint.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["case"] not in options.again]
    cases = quick_cases() if options.quick else joint_cases()
    order = [same(key(case, method)) for case in cases for method in case.methods]

    def keep(row: Row) -> None:
        rows[:] = [other for other in rows if same(other) != same(row)] + [row]
        rows.sort(key=lambda row: order.index(same(row)) if same(row) in order else len(order))
        write(path, "python -m benchmarks" + " --quick" * options.quick, rows)
        print(told(row), flush=True)

    began = perf_counter()
    for case in cases:
        if case.name in options.only:
            Turns(case, list(rows), keep, settings).measure()
    print(f"{path.name}: {len(rows)} rows, {(perf_counter() - began) / 60:.1f} minutes")
    if options.quick:
        show(path)


def show(path: Path) -> None:
    """The tables and the picture of a file of rows, beside it."""
    from benchmarks import figures_joint

    results = json.loads(path.read_text())
    print(figures_joint.joint_table(results), figures_joint.compact_table(results), sep="\n\n")
    figures_joint.draw_joint(results, path.with_suffix(".png"))
    print(path.with_suffix(".png"), file=sys.stderr)


if __name__ == "__main__":
    main()
