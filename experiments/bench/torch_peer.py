"""PyTorch's spectral normalization in a process of its own; no import of JAX or of this package.

``server()`` answers messages on stdin and stdout, one pickle each way:

* ``("load", api, weights, cotangents)`` -> None: arrays with outputs first; api "hook" is
  torch.nn.utils.spectral_norm, "parametrization" is torch.nn.utils.parametrizations.
* ``("forward", api)``, ``("forward + backward", api)`` -> seconds of one step.
* ``("results", api)`` -> arrays of the last step: normalized, then gradients if it had them.
* ``("gan", name, ...)``, ``("sngp", name, ...)`` -> None: a ``Trainer`` of ``torch_gan``, of
  ``torch_sngp``; ``("train", name, n)`` -> seconds.

What goes wrong is answered in one line, as ``("failed", line)``. The first message, unasked, is
torch's version.
"""

import importlib
import os
import pickle
import sys
import time


def server(device: str) -> None:
    # What torch prints must not come between the messages.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        import torch
    except ImportError:
        return  # the other end says so

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    models = {}

    def answer(message):
        pickle.dump(message, answers)
        answers.flush()

    answer(str(torch.__version__))
    while True:
        try:
            kind, api, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        result = None
        try:
            if kind == "load":
                models[api] = _Model(torch, api, *arguments, device)
            elif kind == "results":
                result = models[api].results()
            elif kind in ("gan", "sngp"):
                beside = importlib.import_module(f"torch_{kind}")  # this file
                models[api] = beside.Trainer(torch, device, *arguments)
            elif kind == "train":
                result = models[api].seconds(*arguments)
            else:
                result = models[api].step(gradients=kind != "forward")
        except Exception as error:  # out of memory, no compiler for torch.compile
            models.pop(api, None)
            line = next(iter(str(error).splitlines()), "")
            result = "failed", f"{type(error).__name__}: {line}"
        answer(result)


class _Model:
    def __init__(self, torch, api, weights, cotangents, device):
        self.torch, self.device = torch, device

        class Weight(torch.nn.Module):
            """Gives its kernel back: of a whole layer, the convolution would be timed too."""

            def __init__(self, w):
                super().__init__()
                self.weight = torch.nn.Parameter(w)

            def forward(self):
                return self.weight

        normalize = {
            "hook": torch.nn.utils.spectral_norm,
            "parametrization": torch.nn.utils.parametrizations.spectral_norm,
        }[api]
        self.layers = [normalize(Weight(self._tensor(w))).train() for w in weights]
        self.raw = [w for layer in self.layers for w in layer.parameters()]
        self.cotangents = [self._tensor(g) for g in cotangents]
        self.last = None

    def _tensor(self, array):
        return self.torch.from_numpy(array.copy()).to(self.device)

    def step(self, gradients: bool) -> float:
        # Memory of the last step goes back to torch's allocator first, as in any training loop.
        self.last = None
        self._wait()
        start = time.perf_counter()
        with self.torch.set_grad_enabled(gradients):
            normalized = [layer() for layer in self.layers]
        grads = ()
        if gradients:
            grads = self.torch.autograd.grad(normalized, self.raw, self.cotangents)
        self._wait()
        seconds = time.perf_counter() - start
        self.last = [*normalized, *grads]
        return seconds

    def results(self):
        return [x.detach().cpu().numpy() for x in self.last]

    def _wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()


if __name__ == "__main__":
    server(sys.argv[1])
