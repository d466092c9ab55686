"""One sequence, two holders: each has half of the tokens, and only state and adjoint travel between them.

    python examples/05_segments_in_two_processes.py

    holder 0:  forward over the first half   --- final state ------->  holder 1: backward over the second half,
    holder 0:  backward over the first half  <-- gradient of state --            starting from that state

What travels has the size of the model's state, whatever the length of the halves. The two gradients add up to the
gradient of the whole sequence, which a third computation checks. The holders here are processes joined by a pipe; they
could as well be two machines, or one machine on two days with a file in between.
"""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

import slimgrad as sg
from slimgrad.models import Performer, PerformerConfig

LENGTH, CUT, CHUNK = 1000, 430, 128


def build() -> tuple[Performer, Tensor, Tensor]:
    """The same model everywhere, and the sequence, of which each holder takes its part."""
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=2, width=32, heads=2)).double()
    tokens = torch.randint(0, 256, (1, LENGTH))
    # Targets are written out, so that the last token of the first half still predicts the first of the second.
    return model, tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)


def gradients(model: Performer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def send(pipe: Connection, what: Any) -> int:
    """Send anything; return its bytes. A sum is sent as it is: its state object pickles."""
    data = pickle.dumps(what)
    pipe.send_bytes(data)
    return len(data)


def second_holder(pipe: Connection) -> None:
    """Has the second half. Receives the state before it, sends back the gradient of that state."""
    torch.set_num_threads(1)
    model, tokens, targets = build()
    state = pickle.loads(pipe.recv_bytes())
    result = sg.backward(
        model, tokens[:, CUT:], targets[:, CUT:], chunk=CHUNK, state=state, normalizer=LENGTH - 1
    )  # the normaliser is that of the whole sequence
    send(pipe, result.initial_state_grad)
    send(pipe, (gradients(model), float(result.loss)))


def main() -> None:
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    pipe, other_end = context.Pipe()
    process = context.Process(target=second_holder, args=(other_end,))
    process.start()
    other_end.close()

    model, tokens, targets = build()
    first = (tokens[:, :CUT], targets[:, :CUT])
    state = sg.evaluate(model, *first, chunk=CHUNK).final_state
    print(f"state sent:             {send(pipe, state):>7,} bytes")
    data = pipe.recv_bytes()
    print(f"its gradient returned:  {len(data):>7,} bytes")
    result = sg.backward(model, *first, chunk=CHUNK, normalizer=LENGTH - 1, final_state_grad=pickle.loads(data))
    theirs, their_loss = pickle.loads(pipe.recv_bytes())
    process.join()
    together = {name: gradient + theirs[name] for name, gradient in gradients(model).items()}

    model.zero_grad()
    whole = sg.backward(model, tokens, targets, chunk=CHUNK)
    squares = [(float((together[n] - g).norm()) ** 2, float(g.norm()) ** 2) for n, g in gradients(model).items()]
    error = (sum(d for d, _ in squares) / sum(g for _, g in squares)) ** 0.5
    print(f"loss in two parts {float(result.loss) + their_loss:.6f}, whole {float(whole.loss):.6f}")
    print(f"two holders against one: gradients differ by {error:.1e}")
    assert error < 1e-12


if __name__ == "__main__":
    main()
