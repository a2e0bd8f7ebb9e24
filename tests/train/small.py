"""Configurations that compile in a second or two."""

import json

from statejax import config as c

MLP = c.SwiGLUConfig(16)
FULL = c.LayerConfig('full', c.AttentionConfig(
    heads=2, kv_heads=2, key=4, value=4), MLP)
KDA = c.LayerConfig('kda', c.KDAConfig(
    heads=2, key=4, value=4, rank=4, chunk=8), MLP)
GDN = c.LayerConfig('gdn', c.GatedDeltaNetConfig(
    heads=1, value_heads=2, key=4, value=4), MLP)
RING = c.LayerConfig('ring', c.AttentionConfig(
    heads=2, kv_heads=2, key=4, value=4, window=5, sink=True, qk_norm=True,
    output_gate=True), MLP)


def get_config(layers=(FULL,), model=None, **train):
  """Eight updates of one attention layer on associative recall."""
  pattern = tuple(layer.name for layer in layers)
  defaults = dict(steps=8, rows=8, length=16, warmup=2, decay=2, save_every=3,
                  eval_batches=1, data=1)
  return c.Config(
      c.ModelConfig(vocab=32, width=16, layers=tuple(layers),
                    groups=(c.GroupConfig(pattern),), **(model or {})),
      c.TrainConfig(**{**defaults, **train}),
      c.TaskConfig('mqar', pairs=3, items=1000, vocab=32))


def silent(_):
  """Takes the place of the progress report."""


def outcome(workdir):
  """What a run has left, as far as it must not depend on how it went."""
  return {name: (workdir / name).read_bytes()
          for name in ('metrics.jsonl', 'evaluation.json')}


def column(workdir, name):
  """One value of every line of `metrics.jsonl` that has it."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [row[name] for row in map(json.loads, lines) if name in row]
