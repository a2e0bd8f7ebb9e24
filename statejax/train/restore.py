"""A trained model out of a workdir."""

import json
import pathlib

import jax
import numpy as np

from statejax import config as cfg
from statejax.layers import block
from statejax.model import LanguageModel
from statejax.train import checkpoint
from statejax.train import step as train_step


def from_workdir(workdir):
  """Returns (model, params) of the newest checkpoint of a run.

  Args:
    workdir: what `statejax.train.loop.train` wrote to.

  Raises:
    ValueError: no checkpoint, or a damaged one.
  """
  workdir = pathlib.Path(workdir)
  found = checkpoint.steps(workdir / 'checkpoints')
  if not found:
    raise ValueError(f'{workdir}: expected a run with a checkpoint, found '
                     'none; train first.')
  folder, step = workdir / 'checkpoints', found[-1]
  config = cfg.from_dict(checkpoint.about(folder, step)['config'],
                         types=(*block.MIXERS, *block.MLPS))
  model = LanguageModel(config.model)
  abstract = jax.eval_shape(lambda: train_step.initial(model, config.train))
  return model, checkpoint.load(folder, step, abstract).params


def metrics(workdir) -> dict[str, np.ndarray]:
  """Returns the columns of a run's `metrics.jsonl`, one per training value."""
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if 'loss' in row]
  return {key: np.array([row[key] for row in rows]) for key in rows[0]}
