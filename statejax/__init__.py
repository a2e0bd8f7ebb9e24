"""statejax: sequence models whose carried state is one explicit pytree."""

import importlib

__version__ = '0.1.0'

# Public names by module. They load on first use, so that importing statejax
# costs nothing and the artifact verifier never imports jax.
_NAMES = {
    'config': ('override',),
    'model': ('LanguageModel',),
}
_MODULES = ('artifact', 'config', 'generate', 'laws', 'layers', 'model', 'ops',
            'sharding', 'state', 'tasks', 'train')
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name):
  if name in _HOME:
    return getattr(importlib.import_module(f'statejax.{_HOME[name]}'), name)
  if name in _MODULES:
    return importlib.import_module(f'statejax.{name}')
  raise AttributeError(f'module statejax has no attribute {name!r}')


def __dir__():
  return sorted([*globals(), *_HOME, *_MODULES])
