"""A small decoder of bytes whose layers are scanned, and what its attention does."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec as P

# Path -> how it is split: inputs of a layer over "fsdp", heads and hidden units over "tp". The
# first axis of kernels in blocks is that of the layers.
LAYOUT = {
    r"blocks/(query|key|value)/kernel": P(None, "fsdp", "tp", None),
    r"blocks/out/kernel": P(None, "tp", None, "fsdp"),
    r"blocks/up/kernel": P(None, "fsdp", "tp"),
    r"blocks/down/kernel": P(None, "tp", "fsdp"),
    r"(embed|positions)/embedding": P(None, "fsdp"),
    r"head/kernel": P("fsdp", "tp"),
}


class Block(nn.Module):
    """Causal attention, then an MLP, each after RMS normalization and with a skip connection."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, dict[str, Array]]:
        *_, length, width = x.shape
        y = nn.RMSNorm(name="norm_attention")(x)
        query, key, value = (
            nn.DenseGeneral((self.heads, width // self.heads), use_bias=False, name=name)(y)
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(width / self.heads)
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, name="out")(y)
        y = nn.RMSNorm(name="norm_mlp")(x)
        y = nn.gelu(nn.Dense(4 * width, use_bias=False, name="up")(y))
        x = x + nn.Dense(width, use_bias=False, name="down")(y)
        safe = jnp.where(weights > 0, weights, 1.0)
        # Nats, of each head over the last query, which sees the whole context.
        entropy = -jnp.sum(safe * jnp.log(safe), -1)[:, :, -1].mean(0)
        return x, {
            "largest logit": jnp.max(jnp.abs(jnp.where(causal, logits, 0.0))),
            "maximum entropy": jnp.max(entropy),
            "minimum entropy": jnp.min(entropy),
        }


class Decoder(nn.Module):
    """Bytes (batch, length) to logits (batch, length, 256), and statistics of each layer."""

    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, tokens: Array) -> tuple[Array, dict[str, Array]]:
        length = tokens.shape[-1]
        x = nn.Embed(256, self.width, name="embed")(tokens)
        x = x + nn.Embed(length, self.width, name="positions")(jnp.arange(length))
        scanned = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        x, statistics = scanned(self.heads, name="blocks")(x, None)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(256, use_bias=False, name="head")(x), statistics
