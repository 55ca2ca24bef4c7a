# %% [markdown]
# # From torch and back
#
# A PyTorch discriminator with `torch.nn.utils.spectral_norm`, continued in JAX, and back again.
# Where PyTorch is installed (as in Colab) this runs live; elsewhere on what it recorded. Some
# seconds.

# %% tags=["setup", "hide-cell"]
# Does something in Colab only: installs sn_jax beside the JAX that is there.
import importlib.metadata
import subprocess
import sys

if "google.colab" in sys.modules:
    from google.colab import files

    print("Choose the wheel of sn_jax (in a clone: pip wheel --no-deps -w dist .)")
    (source,) = files.upload()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", source]
    subprocess.run(pip, check=True)
    import jax
    from packaging.requirements import Requirement

    needs = map(Requirement, importlib.metadata.requires("sn_jax"))
    for need in (need for need in needs if need.marker is None):  # extras have one
        there = [d.version for d in importlib.metadata.distributions(name=need.name)]
        if not there or there[0] not in need.specifier:
            print(f"sn_jax needs {need}: run  %pip install -U {need.name}  and restart.")
    print(jax.devices())

# %%
import base64
import importlib.util
import io

import flax.linen as nn
import jax
import numpy as np
import optax

import sn_jax
from sn_jax.linen import SpectralNorm

LIVE = importlib.util.find_spec("torch") is not None
print("torch is", "here" if LIVE else "not here: what it recorded is used")

# %% tags=["hide-cell"]
# By torch 2.13.0 and the code of the next cell; an .npz in base64.
RECORDED = """
UEsDBC0AAAAIAAAAIQAi8U3p//////////8FABQAeC5ucHkBABAAgAMAAAAAAABSAwAAAAAAAJ2I60+TZxxAy2yLs6wYRaa7
UWHYyuqkozBgb58fBcJlCtIpipmKRUqgdgVaNoewuBTYEEExDhnBaEjxshbWJmBnTN/n16GkZKK0kM4b4FQ+DMUtQdNaWObc
/oSdnC/nnMgvzCvYGcL5glMnLtUY9xnEqSIxUyYXS0XiskpDjUGtL640lGr+/VlqnVHz8hvL1VWaly1JkIqS/1O2Xir6SvQ/
WLYiSklO3J6gZZqnRJU3rhjdHKAh3zbR9qmnpKjeRgK+MexUZlFLzBZYhAFFTrQc5H9asf/OOafQ4sA+u8nZmWMG0/wbTKuE
pb8/6Yb3O0xkPKeVaHvD0dndAgPBXHj2KIz+4ltQFHkPY2LPOnxeMIbjgXJ2vmFeEXdMD9qjZ+DU9RvQtslGtAs8JlB8muys
v0z+cFSAvWuQyk/baMSqK2Q1d5baHeGu3dlN2B6fQb9JaqePfQ144aN4PMB7lf2wx4GT3Z+RYusU6q8J8LXLcTD9cRPm6wcw
RaeH7UoPnblSjiVZ4dDMz0L3jXT20nOEvKUCsLwZJKPaKMiceQQvYmrQVKHC/Ku1kMzhOgsKY1iveZ6kDNwkF9X3oMSlY1SB
HdA1yINnR+bIoVgLzh3upKYWG/jzasG8kAHcibPAEZ6nCUcA9v6VTadhA/wYfZblP15LPrg6qugYM7K+wSRilcRi/2wSk+me
IdlDtVDbP4h+dwPyh0OI/+hbEJHSCaXaNvSe1IBudSJdsuZ7uO1aB5HTXpZwPGDbFI3NkfeB2RKBFzJ48Pn5ZvDzRzD0eDFO
yH8mwhaB6z1dJN1Kk+Hm1BmyfHMvkY2M4Je+InLxAQM/qepo0H6KSuOCcHDPK2nX7zTCxjoL4f7WRqSOKPr1DxZUzyI2ntwL
Xff81FAto9c8v7Lb7r5Obnm2YViFEKWN3LTY4URwB1dRWxyg25MC6sX1TN+LStJTJSPD9knQqb2UlOTA29YhPPBOD5XdysDU
qgR4uDQ0bevkMWxi0+E7q8RlXCkAV/Vd9tODSzCVaYX9yl2Iue+COXMPcXNCAerNKCqdZZ94clHwoB1lrApXaozoxSHi7DMR
rZBHag71Ab9yGRSlhuHcJ70YL99F0zuUsK9wOVsY/TepluzAxY1j5B9QSwMELQAAAAgAAAAhAOZfssL//////////wUAFAB5
Lm5weQEAEACMAAAAAAAAAFMAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNmoq6joJ6WX1RSlJgXn1+UkgoSd0vMKU4F
ihdnJBakAvkaxjoKhpo6CrUKZAOu3Y+nHvByXHigalPEAQBQSwMELQAAAAgAAAAhAB3JgjH//////////w4AFABjb252MS5i
aWFzLm5weQEAEACQAAAAAAAAAFUAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNmoq6joJ6WX1RSlJgXn1+UkgoSd0vM
KU4FihdnJBakAvkaJjqaOgq1ChQALjYH931ZWybZafhL2IXlq9oBAFBLAwQtAAAACAAAACEAwjZ7X///////////FQAUAGNv
bnYxLndlaWdodF9vcmlnLm5weQEAEAAQAQAAAAAAAOMAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNmoq6joJ6WX1RS
lJgXn1+UkgoSd0vMKU4FihdnJBakAvkaJjoKhjoKxkCkqaNQq0AG4ArrVd6tIW1ul1Lesy/MuHqfXznzvmf8221XZ97YfT+w
3W5ayKc9aUu22E7wP7fX26Bt7wXuxfsk+JP2zd7Cs2+1n5fN6w9sdqfP+dilpafvC14ssu/0l++2Jjt67QzqevZW59TbrRaM
2butQsD2Tscsu66gefvuPQzbd+3ymr12vKz7jpVMtjtnF7uvQUF2n3JF3r5f1+bvAwBQSwMELQAAAAgAAAAhACUkrr7/////
/////xIAFABjb252MS53ZWlnaHRfdS5ucHkBABAAkAAAAAAAAABVAAAAAAAAAJvsF+obEMnIUMZQrZ6SWpxcpG6loG6TZqKu
o6Cell9UUpSYF59flJIKEndLzClOBYoXZyQWpAL5GiY6mjoKtQoUAK7fjiL2R3o47Lf3te6zZOTfDwBQSwMELQAAAAgAAAAh
APf/WIz//////////xIAFABjb252MS53ZWlnaHRfdi5ucHkBABAApAAAAAAAAABqAAAAAAAAAJvsF+obEMnIUMZQrZ6SWpxc
pG6loG6TZqKuo6Cell9UUpSYF59flJIKEndLzClOBYoXZyQWpAL5GpY6mjoKtQoUAK7+67vs4lM77N5+7NtnoPF3n6P2431z
umbufLCL0a50/1u7wr8RdgBQSwMELQAAAAgAAAAhAF4ik8H//////////w4AFABjb252Mi5iaWFzLm5weQEAEACgAAAAAAAA
AGYAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNmoq6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkaFjqaOgq1
ChQALu2/6XsX5yyzDc58t5dNX8q24eOzvTVxGvu4+Tj3Ve1hswMAUEsDBC0AAAAIAAAAIQCI1ZS+//////////8VABQAY29u
djIud2VpZ2h0X29yaWcubnB5AQAQAAAFAAAAAAAArwQAAAAAAACdj/9T03Ucxz+I4GAgU3QOIfyAXwZsdZ6aJ9vn9RaFSCIX
oq086IRgOENZQc4vaI5bYDHwQDwSQULDmQzJxOOIfV5viZuKYAcSiIXohJiARssBduep0b/Q8x6/PB8/PZ9lqvc3J2x3Y/RM
rjRdk5OWLVWwUi5jjVTOSjN02Z9np2bt0GWna/7zsam7czQzPkeb+qlmpoetk7Nr5OzqGcLl7GH2f8Rb/fOvUPBgKfHLd6fK
1w+idXkB2Hf6EqdxAWkrF5OEe3PArF1AM1fncsrCPmz0XUJ7zy4iNTY3UkciaErxK07o5uDjG+y8dn0VCqKNECvvwNyNByHn
dD10b5+Epg1HYNV4GGV2D2J3Vh2IhuZCeqgHtZts+KyYJYGvRkDfewIDb8vQXBZK1VtjrOZ8hi46504z94p5w6tbnOqmCdnC
Dphu6sLKgcUkc3wMTj72o5cehSOTNa1k19zg1o6FwOjTfIgqXcrdN5lx2HgGFE1LqeG9Dkz4IwKrY8zYfTsLex4KqWXtPDQ/
mQeuj+7jnVAfnvlwEuKTinh1+zdK9fFMvinMGwyC36DnQggR2O6CURBKDIfe4mMSAqjh9hnUfjIKlqrilrLvL2B9+yzKNC+h
m4QiGr/fG3NWWsH5dTPUn1xGR8d7IbnIg9YkipBmFOL0YXdM8fLEnuUB9I1kf2o618czG3yVK/wqMfeEAaRVAZSJW8fvFovJ
CoUJu4IWk2nFPljisZg6p/ohvvg0X7PjJKYdEJB14160M+84d+fPuRjc6gJhCYHV7rXALPoMmIhlaCr1Q0utDxW5mkGXN4fk
Fo2Bw+ZEWZlLKa52otBhxfKR6xj77i64tLMT1ZuzrIarI0pPwT04P8uNJm0bx+errmPw2ASINHuxfNKPGAb0wAzXc0z12ZYk
lydaNls4digQLV9UtDBvNnCiIx5U9egyOrq8yOw8bypbEMMbesNI6yk9GGpOKW0Of9ouvgBC1oX29g1oFWowfmUHr3ZNKNJt
PkSdXcdlDkpI1K1uaOzsx2FxBRTE/Y3auhK03NwEUbtS4ZkXQ+xtSWgZMkX+89MP8MhnOXW/MQ2drC+1FIqVspBRPu1aI7J7
r3BnWV9iOvY2tp/rQM+Dh/AvaTjV+p8C8cR3KL45jMZaG2ZF2WCg7QqYXswi+up9cOl5GgZeI8g2xMH6eB9SWRUJ/oYz+DKn
BuXJIZQ97A/2oqtoCpfQxPMLSWbdIJoSK/mUE9Ege3FRqbo4gsGTXlTkJSBR2+5zv5fPbBhIx/iFcSAKCkLZg6dWyXAXOuwZ
wNz5ACxbUq2GrwJQr+3BQJ8ncF3yEoP7TFBSpMHGhlo0xE5xd1U/ouyd10Ao8oRm3QvUbx3moj8uBRJ0FDoHLfz8MSFt3d/D
Z0r2gEN8AFUledCYMAwqxWVU6/oVkmXFIPZUc62SdK4mt45LlHlSWYWacyY/geiOgJnf7aCfauK2ar8F4mtG1x5ferRtPuU2
RhBafxcmnI9RZcqHGw8Z0l8RQRyKhcQYOZtM5wWhoUyHctaHNMdehSjtL1iXFUCEj2vBMr8Fjjn7MGUgGpRbdPhyuwfpvDjF
m4e+BLXxKfc8shT+BVBLAwQtAAAACAAAACEAsJQbi///////////EgAUAGNvbnYyLndlaWdodF91Lm5weQEAEACgAAAAAAAA
AGYAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNmoq6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkaFjqaOgq1
ChQArqq5p+wKa/fZsHXL2Uvf3Gh36qOWneMyV7tlwuf2/kpi3g8AUEsDBC0AAAAIAAAAIQALbWGX//////////8SABQAY29u
djIud2VpZ2h0X3YubnB5AQAQABABAAAAAAAA3gAAAAAAAACb7BfqGxDJyFDGUK2eklqcXKRupaBuk2airqOgnpZfVFKUmBef
X5SSChJ3S8wpTgWKF2ckFqQC+RrGZjqaOgq1CuQDrgYFRbu6+3Nt3/z0s/tk8nrv+YMq+6IuKe+bdcHA7nHsZBuz15z75hwK
3TM9/9seo8en9hZJHtl3zdDGTn5Gh51yldm+RXsZ9i7p6dz3f1bYvqhqy31xpWts2jc02TpvK9m3KDp6n7X7Mtvp4sl7i5dO
3Tflkeg+B94Nu18u0rGdstfCds1Nvn3GitPsFOPt9yy1dd/npCy1GwBQSwMELQAAAAgAAAAhAGXa4Uj//////////w0AFABo
ZWFkLmJpYXMubnB5AQAQAIQAAAAAAAAASAAAAAAAAACb7BfqGxDJyFDGUK2eklqcXKRupaBuk2airqOgnpZfVFKUmBefX5SS
ChJ3S8wpTgWKF2ckFqQC+RqGOpo6CrUKFAAue+Z1+wBQSwMELQAAAAgAAAAhANdec07//////////xQAFABoZWFkLndlaWdo
dF9vcmlnLm5weQEAEACgAAAAAAAAAGgAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNmoq6joJ6WX1RSlJgXn1+UkgoS
d0vMKU4FihdnJBakAvkahjoKFpo6CrUKZAMu/aUz7S5/22sT4V24r2Mb476zMvNsu/517gu+a2zXFb5kHwBQSwMELQAAAAgA
AAAhAFE2V3P//////////xEAFABoZWFkLndlaWdodF91Lm5weQEAEACEAAAAAAAAAEgAAAAAAAAAm+wX6hsQychQxlCtnpJa
nFykbqWgbpNmoq6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkahjqaOgq1ChQALgaGBnsAUEsDBC0AAAAIAAAAIQAL
tpub//////////8RABQAaGVhZC53ZWlnaHRfdi5ucHkBABAAoAAAAAAAAABmAAAAAAAAAJvsF+obEMnIUMZQrZ6SWpxcpG6l
oG6TZqKuo6Cell9UUpSYF59flJIKEndLzClOBYoXZyQWpAL5GhY6mjoKtQoUAC5H1t9223Wlbf9KH923+3XwvisajHahxQ/3
rXo7ya7bnm0/AFBLAQItAy0AAAAIAAAAIQAi8U3pUgMAAIADAAAFAAAAAAAAAAAAAACAAQAAAAB4Lm5weVBLAQItAy0AAAAI
AAAAIQDmX7LCUwAAAIwAAAAFAAAAAAAAAAAAAACAAYkDAAB5Lm5weVBLAQItAy0AAAAIAAAAIQAdyYIxVQAAAJAAAAAOAAAA
AAAAAAAAAACAARMEAABjb252MS5iaWFzLm5weVBLAQItAy0AAAAIAAAAIQDCNntf4wAAABABAAAVAAAAAAAAAAAAAACAAagE
AABjb252MS53ZWlnaHRfb3JpZy5ucHlQSwECLQMtAAAACAAAACEAJSSuvlUAAACQAAAAEgAAAAAAAAAAAAAAgAHSBQAAY29u
djEud2VpZ2h0X3UubnB5UEsBAi0DLQAAAAgAAAAhAPf/WIxqAAAApAAAABIAAAAAAAAAAAAAAIABawYAAGNvbnYxLndlaWdo
dF92Lm5weVBLAQItAy0AAAAIAAAAIQBeIpPBZgAAAKAAAAAOAAAAAAAAAAAAAACAARkHAABjb252Mi5iaWFzLm5weVBLAQIt
Ay0AAAAIAAAAIQCI1ZS+rwQAAAAFAAAVAAAAAAAAAAAAAACAAb8HAABjb252Mi53ZWlnaHRfb3JpZy5ucHlQSwECLQMtAAAA
CAAAACEAsJQbi2YAAACgAAAAEgAAAAAAAAAAAAAAgAG1DAAAY29udjIud2VpZ2h0X3UubnB5UEsBAi0DLQAAAAgAAAAhAAtt
YZfeAAAAEAEAABIAAAAAAAAAAAAAAIABXw0AAGNvbnYyLndlaWdodF92Lm5weVBLAQItAy0AAAAIAAAAIQBl2uFISAAAAIQA
AAANAAAAAAAAAAAAAACAAYEOAABoZWFkLmJpYXMubnB5UEsBAi0DLQAAAAgAAAAhANdec05oAAAAoAAAABQAAAAAAAAAAAAA
AIABCA8AAGhlYWQud2VpZ2h0X29yaWcubnB5UEsBAi0DLQAAAAgAAAAhAFE2V3NIAAAAhAAAABEAAAAAAAAAAAAAAIABtg8A
AGhlYWQud2VpZ2h0X3UubnB5UEsBAi0DLQAAAAgAAAAhAAu2m5tmAAAAoAAAABEAAAAAAAAAAAAAAIABQRAAAGhlYWQud2Vp
Z2h0X3YubnB5UEsFBgAAAAAOAA4AXwMAAOoQAAAAAA==
"""

# %% [markdown]
# The torch side: two convolutions, a sum over pixels, a linear layer, all with torch's hook.
# (Flattening instead of summing would need care: torch flattens channels first, Flax channels
# last.)

# %%
if LIVE:
    import torch

    torch.manual_seed(0)
    sn = torch.nn.utils.spectral_norm

    class TorchNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = sn(torch.nn.Conv2d(1, 4, 3, padding=1))
            self.conv2 = sn(torch.nn.Conv2d(4, 8, 3, stride=2, padding=1))
            self.head = sn(torch.nn.Linear(8, 1))

        def forward(self, x):
            x = torch.nn.functional.leaky_relu(self.conv1(x), 0.1)
            x = torch.nn.functional.leaky_relu(self.conv2(x), 0.1)
            return self.head(x.sum((2, 3)))

    torch_net, torch_x = TorchNet(), torch.randn(3, 1, 8, 8)
    for _ in range(5):
        torch_net(torch_x)  # training mode: torch's power iterations
    torch_net.eval()
    state_dict = torch_net.state_dict()
    x, y = torch_x.numpy().transpose(0, 2, 3, 1), torch_net(torch_x).detach().numpy()
else:
    state_dict = dict(np.load(io.BytesIO(base64.b64decode(RECORDED))))
    x, y = state_dict.pop("x"), state_dict.pop("y")

for name, array in state_dict.items():
    print(f"{name:20} {tuple(array.shape)}")

# %% [markdown]
# ## To JAX
#
# The same network in linen, written as one would write it. `from_torch` finds the pairs by names
# and shapes, turns the layouts, and takes the singular vectors along; what it cannot tell for
# sure it asks.


# %%
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.leaky_relu(nn.Conv(4, (3, 3), padding=1, name="conv1")(x), 0.1)
        x = nn.leaky_relu(nn.Conv(8, (3, 3), 2, padding=1, name="conv2")(x), 0.1)
        return nn.Dense(1, name="head")(x.sum((1, 2)))


net = Net()
template = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
params, state = sn_jax.convert.from_torch(state_dict, template)
normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)  # torch's eval
print(
    "largest difference to torch's outputs:", np.abs(net.apply({"params": normalized}, x) - y).max()
)
print(
    {path: round(float(sigma), 3) for path, sigma in sn_jax.spectral_norms(params, state).items()}
)

# %% [markdown]
# How good were torch's estimates? `residuals` tells, and `calibrate` converges them. The true
# norms are certified:

# %%
print({path: round(float(r), 4) for path, r in sn_jax.residuals(params, state).items()})
converged = sn_jax.calibrate(params, state)
for path, entry in converged.items():
    layer, _ = path.split("/")
    lower, upper = sn_jax.norm_bounds(params[layer]["kernel"], entry.view)
    print(f"{path}: torch {state[path].sigma:.4f}, true norm in [{lower:.4f}, {upper:.4f}]")

# %% [markdown]
# ## Go on training, and go back
#
# One step of Adam, with one power iteration, as torch's training mode does. Then `to_torch` makes
# a state dict with exactly torch's names.


# %%
@jax.jit
def step(params, state, opt_state):
    _, state = sn_jax.spectral_normalize(params, state)

    def loss(params):
        normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
        return (net.apply({"params": normalized}, x) ** 2).mean()

    updates, opt_state = adam.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), state, opt_state


adam = optax.adam(1e-2)
new_params, new_state, _ = step(params, state, adam.init(params))
back = sn_jax.convert.to_torch(new_params, new_state, state_dict)
normalized, _ = sn_jax.spectral_normalize(new_params, new_state, n_steps=0)
ours = net.apply({"params": normalized}, x)
if LIVE:
    torch_net.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()})
    theirs = torch_net(torch_x).detach().numpy()
    print("torch, with the weights from JAX, differs by", np.abs(theirs - ours).max())
print(sorted(back) == sorted(state_dict))

# %% [markdown]
# ## Into wrappers
#
# A model with `SpectralNorm` around its layers takes the same state; with `store_v=True` it uses
# the stored pair in eval, as torch does, so the outputs are equal too.


# %%
class Wrapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        def wrap(layer):
            return SpectralNorm(layer, store_v=True)

        x = nn.leaky_relu(wrap(nn.Conv(4, (3, 3), padding=1, name="conv1"))(x), 0.1)
        x = nn.leaky_relu(wrap(nn.Conv(8, (3, 3), 2, padding=1, name="conv2"))(x), 0.1)
        return wrap(nn.Dense(1, name="head"))(x.sum((1, 2)))


wrapped = Wrapped()
variables = sn_jax.linen.load_state(wrapped.init(jax.random.key(0), x), params, state)
print("wrapped, eval:", np.abs(wrapped.apply(variables, x) - y).max())

# %% [markdown]
# Checkpoints of the newer `torch.nn.utils.parametrizations.spectral_norm` are read the same way.
# For NNX there is `sn_jax.nnx.load_state`; for plain files `sn_jax.convert.to_state_dict`.
