"""The train step of ``sngp.py`` as PyTorch's users write it; no JAX here."""

import time


class Trainer:
    """Residual blocks whose layers are clipped by power iteration, and Adam.

    Args:
      torch: the module.
      device: "cpu" or "cuda".
      kernels: dense (in, out), or (3, 3, in, out); arrays.
      x: a batch, (n, width) or (n, height, width, channels).
      bound: of every layer's norm.
    """

    def __init__(self, torch, device, kernels, x, bound):
        self.torch, self.device, self.bound = torch, device, bound
        self.dense = x.ndim == 2
        axes = (1, 0) if self.dense else (3, 2, 0, 1)
        self.x = torch.from_numpy(x if self.dense else x.transpose(0, 3, 1, 2).copy()).to(device)
        self.kernels = [
            torch.from_numpy(w.transpose(axes).copy()).to(device).requires_grad_() for w in kernels
        ]
        width = x.shape[-1]
        self.biases = [torch.zeros(width, device=device, requires_grad=True) for _ in kernels]
        self.us = [torch.randn(1, *self.x.shape[1:], device=device) for _ in kernels]
        self.adam = torch.optim.Adam([*self.kernels, *self.biases], lr=1e-4)
        self.loss = None

    def seconds(self, steps: int) -> float:
        """Of so many steps."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.adam.zero_grad(set_to_none=True)
            self.loss = ((self._forward() - 1) ** 2).mean()
            self.loss.backward()
            self.adam.step()
        self._wait()
        return time.perf_counter() - start

    def results(self):
        return [self.loss.detach().cpu().numpy()]

    def _forward(self):
        x, relu = self.x, self.torch.relu
        if self.dense:
            for i in range(len(self.kernels)):
                x = x + relu(self._layer(i, x))
            return x
        y = x
        for i in range(len(self.kernels)):
            y = self._layer(i, relu(y))
        return x + y

    def _layer(self, i, x):
        w, u, functional = self.kernels[i], self.us[i], self.torch.nn.functional
        apply = functional.linear if self.dense else self._convolve
        with self.torch.no_grad():
            v = apply(u, w)
            u = v @ w if self.dense else functional.conv_transpose2d(v, w, padding=1)
            self.us[i] = u = u / u.norm()
            factor = 1 / max(1.0, float(apply(u, w).norm()) / self.bound)
        bias = self.biases[i] if self.dense else self.biases[i][:, None, None]
        return apply(x, w) * factor + bias

    def _convolve(self, x, w):
        return self.torch.nn.functional.conv2d(x, w, padding=1)

    def _wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()
