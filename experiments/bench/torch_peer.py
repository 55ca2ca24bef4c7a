"""PyTorch in a process of its own: its spectral normalization of kernels, and an SN-GAN's step. No
import of JAX or of this package.

``server()`` answers messages on stdin and stdout, one pickle each way:

* ``("load", api, weights, cotangents)`` -> None: arrays with outputs first; api "hook" is
  torch.nn.utils.spectral_norm, "parametrization" is torch.nn.utils.parametrizations.
* ``("forward", api)``, ``("forward + backward", api)`` -> seconds of one step.
* ``("results", api)`` -> arrays of the last step: normalized, then gradients if it had them.
* ``("gan", name, ...)`` -> None: a train step of both networks; ``("train", name, n)`` -> seconds.

What goes wrong is answered in one line, as ``("failed", line)``. The first message, unasked, is
torch's version.
"""

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
            elif kind == "gan":
                models[api] = _Trainer(torch, device, *arguments)
            elif kind == "train":
                result = models[api].seconds(*arguments)
            else:
                result = models[api].step(gradients=kind != "forward")
        except Exception as error:  # out of memory, no compiler for torch.compile
            models.pop(api, None)
            line = next(iter(str(error).splitlines()), "")
            result = "failed", f"{type(error).__name__}: {line}"
        answer(result)


def _wait(torch, device):
    if device == "cuda":
        torch.cuda.synchronize()


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
        _wait(self.torch, self.device)
        start = time.perf_counter()
        with self.torch.set_grad_enabled(gradients):
            normalized = [layer() for layer in self.layers]
        grads = ()
        if gradients:
            grads = self.torch.autograd.grad(normalized, self.raw, self.cotangents)
        _wait(self.torch, self.device)
        seconds = time.perf_counter() - start
        self.last = [*normalized, *grads]
        return seconds

    def results(self):
        return [x.detach().cpu().numpy() for x in self.last]


class _Trainer:
    """A train step of ``experiments.gan``'s standard CNN as PyTorch's users write it.

    Hinge loss, Adam at the paper's setting C, one discriminator update a step; spectral
    normalization by torch.nn.utils.parametrizations.

    Args:
      torch, device: the module, and "cpu" or "cuda".
      compiled: whether the losses go through torch.compile.
      width, batch_size: as in ``experiments.gan``.
      images: uint8, (n, size, size, channels).
    """

    def __init__(self, torch, device, compiled, width, batch_size, images):
        self.torch, self.device, self.batch_size = torch, device, batch_size
        self.images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
        _, size, _, channels = images.shape
        stages = min(3, size.bit_length() - 2)
        self.generator = _generator(torch, size, channels, width, stages).to(device)
        self.discriminator = _discriminator(torch, size, channels, width, stages).to(device)
        adam = {"lr": 2e-4, "betas": (0.5, 0.999)}
        self.adam_g = torch.optim.Adam(self.generator.parameters(), **adam)
        self.adam_d = torch.optim.Adam(self.discriminator.parameters(), **adam)
        wrap = torch.compile if compiled else lambda function: function
        self.loss_g, self.loss_d = wrap(self._loss_g), wrap(self._loss_d)

    def seconds(self, steps: int) -> float:
        """Of so many steps."""
        _wait(self.torch, self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        _wait(self.torch, self.device)
        return time.perf_counter() - start

    def _step(self):
        torch, n = self.torch, self.batch_size
        rows = torch.randint(len(self.images), (n,), device=self.device)
        for adam, loss in (
            (self.adam_d, lambda z: self.loss_d(self.images[rows], z)),
            (self.adam_g, self.loss_g),
        ):
            adam.zero_grad(set_to_none=True)
            loss(torch.randn(n, 128, device=self.device)).backward()
            adam.step()

    def _loss_d(self, images, z):
        torch, n = self.torch, self.batch_size
        with torch.no_grad():
            fake = self.generator(z)
        scores = self.discriminator(torch.cat([images.float() / 127.5 - 1, fake]))
        return torch.relu(1 - scores[:n]).mean() + torch.relu(1 + scores[n:]).mean()

    def _loss_g(self, z):
        return -self.discriminator(self.generator(z)).mean()


def _generator(torch, size, channels, width, stages):
    nn, start, features = torch.nn, size // 2**stages, width * 2**stages
    layers = [nn.Linear(128, start * start * features), nn.Unflatten(1, (features, start, start))]
    for _ in range(stages):
        layers += [
            nn.ConvTranspose2d(features, features // 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(features // 2),
            nn.ReLU(),
        ]
        features //= 2
    return nn.Sequential(*layers, nn.Conv2d(features, channels, 3, 1, 1), nn.Tanh())


def _discriminator(torch, size, channels, width, stages):
    nn, sn = torch.nn, torch.nn.utils.parametrizations.spectral_norm
    layers, features = [], channels
    shapes = [(width * 2**i, k, s) for i in range(stages) for k, s in ((3, 1), (4, 2))]
    for out, kernel, stride in [*shapes, (width * 2**stages, 3, 1)]:
        layers += [sn(nn.Conv2d(features, out, kernel, stride, 1)), nn.LeakyReLU(0.1)]
        features = out
    pixels = (size // 2**stages) ** 2
    return nn.Sequential(*layers, nn.Flatten(), sn(nn.Linear(features * pixels, 1)))


if __name__ == "__main__":
    server(sys.argv[1])
