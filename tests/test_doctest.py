"""The examples in docstrings are true."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize('name', [
    'config.override', 'model', 'ops.delta_rule', 'ops.witness',
    'artifact.canonical', 'artifact.tree', 'artifact.names',
    'artifact.envelope', 'artifact.identity', 'artifact.journal', 'slot_facts'])
def test_docstring_examples(name):
  module = importlib.import_module(f'statejax.{name}')
  result = doctest.testmod(module, extraglobs={
      'jax': importlib.import_module('jax'),
      'jnp': importlib.import_module('jax.numpy')})
  assert result.attempted and not result.failed
