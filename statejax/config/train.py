"""Configurations of training and its task, and the whole of a run."""

import dataclasses

from statejax.config import checks
from statejax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimisation, data and checkpoints of one run.

  Attributes:
    steps: optimizer updates.
    rows: rows of a global batch.
    length: tokens per row T.
    accumulate: micro-batches per update; divides `rows`.
    peak: highest learning rate.
    warmup: updates of linear rise from 0.
    decay: updates of linear fall to 0 at the end.
    b1: first-moment decay of AdamW.
    b2: second-moment decay of AdamW.
    weight_decay: on matrices only, never on norms, biases or gates.
    clip: largest global gradient norm.
    optimizer: 'adamw', or 'muon' (matrices) beside adamw (the rest).
    z_loss: weight of the squared log-normaliser.
    seed: of initialisation and data order.
    save_every: updates between checkpoints.
    keep: newest checkpoints kept.
    eval_every: updates between evaluations; 0 evaluates at the end only.
    eval_batches: held-out batches of an evaluation.
    log_every: updates between metric lines.
    data: size of the data mesh axis; None means every device that is left, a
      number only the first `data * fsdp * tensor`.
    fsdp: size of the parameter-sharding mesh axis.
    tensor: size of the head-sharding mesh axis.
  """

  steps: int = 100
  rows: int = 16
  length: int = 256
  accumulate: int = 1
  peak: float = 3e-3
  warmup: int = 20
  decay: int = 40
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.1
  clip: float = 1.0
  optimizer: str = 'adamw'
  z_loss: float = 0.0
  seed: int = 0
  save_every: int = 50
  keep: int = 2
  eval_every: int = 0
  eval_batches: int = 8
  log_every: int = 1
  data: int | None = None
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    checks.positive(self, 'steps', 'rows', 'length', 'accumulate', 'save_every',
                    'keep', 'eval_batches', 'log_every', 'fsdp', 'tensor')
    checks.no_less(self, 0, 'warmup', 'decay', 'seed', 'eval_every',
                   'weight_decay', 'z_loss', 'peak')
    if not self.clip > 0:
      raise ValueError(f'TrainConfig.clip: expected > 0, got {self.clip}.')


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """What is learned: Python's library as text, or a synthetic task.

  Attributes:
    name: 'text', 'mqar', 'palindrome' or 'stack'.
    pairs: key-value pairs of an mqar item.
    stacks: stacks of a stack item.
    items: number of distinct synthetic items.
    vocab: synthetic vocabulary; mqar: half keys, half values.
  """

  name: str = 'text'
  pairs: int = 8
  items: int = 100_000
  vocab: int = 64
  stacks: int = 16

  def __post_init__(self):
    checks.positive(self, 'pairs', 'items', 'vocab')


@dataclasses.dataclass(frozen=True)
class Config:
  """What a file in `configs/` returns from `get_config()`."""

  model: ModelConfig
  train: TrainConfig = TrainConfig()
  task: TaskConfig = TaskConfig()
