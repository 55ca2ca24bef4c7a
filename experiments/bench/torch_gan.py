"""A train step of ``experiments.gan``'s standard CNN as PyTorch's users write it; no JAX here."""

import time


class Trainer:
    """Both networks, their optimizers and the images, on one device.

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
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._wait()
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

    def _wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()


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
