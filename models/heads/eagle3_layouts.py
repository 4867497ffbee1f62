"""EAGLE-3 heads on disk: as its authors, SpecForge and SGLang write them, and as speculators does.

The two name the same tensors a little differently and mean different things by some keys, which is
why both are spelled out here. `d2t` holds offsets: draft token i is target token i + d2t[i].

Axes: `H` width of the head, `V` vocabulary, `Vd` draft vocabulary.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
import numpy as np

from models.config import TransformerConfig
from models.heads.eagle3 import Eagle3
from models.heads.eagle3 import Eagle3Config
from models.heads.eagle3 import default_taps
from models.heads.layout import Parts
from models.heads.layout import Tensors
from models.heads.layout import fill
from models.heads.layout import is_embedding_of
from models.heads.layout import layer_config_from
from models.heads.layout import llama_config
from models.heads.layout import own_layer_parts
from models.heads.layout import tensors_of
from models.heads.vocabulary import DraftVocabulary
from models.heads.vocabulary import check_draft_ids
from models.transformer import Transformer
from models.weights import Part


def read_official(
  config: Mapping[str, Any],
  tensors: Tensors,
  target: Transformer,
  *,
  taps: tuple[int, ...] | None = None,
) -> Eagle3:
  """Returns the head in the layout of EAGLE-3's authors; SpecForge and SGLang use it too.

  Args:
    config: config.json.
    tensors: by name.
    target: the model that it drafts for.
    taps: the layers it reads, if config.json does not say; None is 2, L // 2, L - 3.

  Raises:
    ValueError: if the files are not those of such a head for this target.
  """
  if not config.get('norm_output', True):
    raise ValueError('norm_output false (no norm before the head) is not supported')
  said = (config.get('eagle_config') or {}).get('eagle_aux_hidden_state_layer_ids')
  taps = tuple(said or taps or default_taps(target.config.num_layers))
  # Absent, the published code has it off.
  options = {
    'norm_before_residual': bool(config.get('norm_before_residual', False)),
    'norm_taps': bool(config.get('fc_norm', False)),
  }
  layer = layer_config_from(_without_vocabulary(config, target), target)
  return _read(config, tensors, target, layer, taps, 'midlayer.', options)


def read_speculators(
  config: Mapping[str, Any],
  tensors: Tensors,
  target: Transformer,
  *,
  taps: tuple[int, ...] | None = None,
  norm_before_residual: bool | None = None,
) -> Eagle3:
  """Returns the head in the layout of vllm-project/speculators.

  Args:
    config: config.json.
    tensors: by name.
    target: the model that it drafts for.
    taps: as for `read_official`.
    norm_before_residual: if config.json does not say; readers disagree about what that means.

  Raises:
    ValueError: if the files are not those of such a head for this target, or leave that open.
  """
  if config.get('speculators_model_type') != 'eagle3':
    raise ValueError(
      f"speculators_model_type must be 'eagle3': {config.get('speculators_model_type')!r}"
    )
  normed = config.get('norm_before_residual', norm_before_residual)
  if normed is None:
    raise ValueError(
      'config.json has no norm_before_residual, and readers disagree about what that means: give '
      'norm_before_residual=True or False'
    )
  taps = tuple(
    config.get('eagle_aux_hidden_state_layer_ids') or taps or default_taps(target.config.num_layers)
  )
  options = {
    'norm_before_residual': bool(normed),
    'norm_before_fuse': bool(config.get('norm_before_fc', False)),
    'norm_taps': bool(config.get('fc_norm', False)),
    'feed_normed': bool(config.get('norm_output', False)),
  }
  inner = config.get('transformer_layer_config')
  if not isinstance(inner, Mapping):
    raise ValueError('config.json has no transformer_layer_config')
  layer = layer_config_from(inner, target)
  return _read(config, tensors, target, layer, taps, 'layers.0.', options)


def write_official(
  head: Eagle3, target: Transformer, **facts: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns (config.json, tensors) in the layout of EAGLE-3's authors.

  Raises:
    ValueError: if the head has options that the layout cannot say.
  """
  options = head.config
  if options.norm_before_fuse or options.feed_normed:
    raise ValueError("layout 'eagle3' has no norm_before_fuse or feed_normed; 'speculators' has")
  config = {
    'architectures': ['LlamaForCausalLMEagle3'],
    **llama_config(options.layer),
    'draft_vocab_size': options.draft_vocab_size or options.layer.vocab_size,
    'target_hidden_size': options.target_hidden_size,
    'norm_before_residual': options.norm_before_residual,
    'norm_output': True,
    'fc_norm': options.norm_taps,
    'eagle_config': {
      'eagle_aux_hidden_state_layer_ids': list(options.taps),
      'use_aux_hidden_state': True,
    },
    **facts,
  }
  return config, _tensors(head, 'midlayer.')


def write_speculators(
  head: Eagle3,
  target: Transformer,
  *,
  verifier: str,
  speculative_tokens: int,
  architectures: tuple[str, ...] = ('LlamaForCausalLM',),
  **facts: Any,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns (config.json, tensors) in the layout of vllm-project/speculators.

  Args:
    head: the head.
    target: the model that it drafts for.
    verifier: the target's name or path.
    speculative_tokens: drafts a round.
    architectures: the target's.
    **facts: more for config.json.
  """
  options = head.config
  proposal = {
    'proposal_type': 'greedy',
    'speculative_tokens': speculative_tokens,
    'verifier_accept_k': 1,
    'accept_tolerance': 0.0,
  }
  config = {
    'architectures': ['Eagle3Speculator'],
    'speculators_model_type': 'eagle3',
    'speculators_version': '0.5.0',
    'draft_vocab_size': options.draft_vocab_size or options.layer.vocab_size,
    'norm_before_residual': options.norm_before_residual,
    'norm_before_fc': options.norm_before_fuse,
    'fc_norm': options.norm_taps,
    'norm_output': options.feed_normed,
    'embed_requires_grad': False,
    'target_hidden_size': options.target_hidden_size,
    'eagle_aux_hidden_state_layer_ids': list(options.taps),
    'transformer_layer_config': llama_config(options.layer),
    'speculators_config': {
      'algorithm': 'eagle3',
      'default_proposal_method': 'greedy',
      'proposal_methods': [proposal],
      'verifier': {'name_or_path': verifier, 'architectures': list(architectures)},
    },
    **facts,
  }
  tensors = _tensors(head, 'layers.0.')
  tensors.setdefault('embed_tokens.weight', np.asarray(target.embedding[...]))
  return config, tensors


def draft_ids(tensors: Tensors, draft_vocab_size: int, vocab_size: int) -> np.ndarray | None:
  """Returns i64[Vd], the target ids of the draft vocabulary; None if it is the whole vocabulary.

  Raises:
    ValueError: if `d2t` is missing, maps out of range or does not rise, or `t2d` disagrees with it.
      A wrong map does not fail when it decodes: drafts are merely never accepted.
  """
  if draft_vocab_size == vocab_size:
    return None
  if 'd2t' not in tensors:
    raise ValueError(f'd2t is missing: a draft vocabulary of {draft_vocab_size} needs it')
  offsets = np.asarray(tensors['d2t'], np.int64)
  if offsets.shape != (draft_vocab_size,):
    raise ValueError(f'd2t has shape {offsets.shape}, the head drafts {draft_vocab_size} tokens')
  ids = np.arange(draft_vocab_size) + offsets
  try:
    check_draft_ids(ids, vocab_size)
  except ValueError as error:
    raise ValueError(f'd2t (offsets: draft id + d2t = target id) is damaged: {error}') from error
  if 't2d' in tensors:
    mask = np.zeros(vocab_size, bool)
    mask[ids] = True
    if not np.array_equal(np.asarray(tensors['t2d'], bool), mask):
      raise ValueError('t2d and d2t disagree about which tokens are drafted')
  return ids


def _without_vocabulary(config, target):
  """Returns config.json with the target's vocabulary: some writers put the draft's there."""
  if config.get('vocab_size') == config.get('draft_vocab_size'):
    return {**config, 'vocab_size': target.config.vocab_size}
  return config


def _parts(config: Eagle3Config, layer_prefix: str) -> Parts:
  layer: TransformerConfig = config.layer
  parts = own_layer_parts(layer, layer_prefix, ('attention_norm',))
  return {
    **parts,
    ('fuse',): [Part('fc.weight')],
    ('fuse_norm', 'scale'): [Part('input_norm.weight')],
    **{('tap_norms', i, 'scale'): [Part(f'fc_norm.{i}.weight')] for i in range(len(config.taps))},
    ('embedding',): [Part('embed_tokens.weight', transpose=False)],
    ('embedding_norm', 'scale'): [Part(f'{layer_prefix}input_layernorm.weight')],
    ('state_norm', 'scale'): [Part(f'{layer_prefix}hidden_norm.weight')],
    ('final_norm', 'scale'): [Part('norm.weight')],
    ('head',): [Part('lm_head.weight')],
  }


def _tensors(head: Eagle3, layer_prefix: str) -> dict[str, np.ndarray]:
  tensors = tensors_of(head, _parts(head.config, layer_prefix))
  if head.vocabulary is not None:
    ids = np.asarray(head.vocabulary.ids[...]).astype(np.int64)
    tensors['d2t'] = ids - np.arange(len(ids))
    tensors['t2d'] = np.isin(np.arange(head.vocabulary.vocab_size), ids)
  return tensors


def _read(config, tensors, target, layer, taps, layer_prefix, options) -> Eagle3:
  vocab_size, tensors = target.config.vocab_size, dict(tensors)
  if 'lm_head.weight' not in tensors:
    raise ValueError('lm_head.weight is missing')
  stored = tensors['lm_head.weight'].shape[0]
  draft_vocab_size = config.get('draft_vocab_size') or stored
  if draft_vocab_size != stored:
    raise ValueError(f'config.json has {draft_vocab_size=}, lm_head.weight has {stored} rows')
  width = config.get('target_hidden_size') or target.config.hidden_size
  if width != target.config.hidden_size:
    raise ValueError(
      f'the head is for a target {width} wide, this one is {target.config.hidden_size} wide'
    )
  ids = draft_ids(tensors, draft_vocab_size, vocab_size)
  embedding = tensors.get('embed_tokens.weight')
  own = embedding is not None and not is_embedding_of(embedding, target)
  if embedding is not None and not own:
    del tensors['embed_tokens.weight']
  eagle = Eagle3Config(
    layer=layer,
    taps=taps,
    target_hidden_size=width,
    draft_vocab_size=None if ids is None else len(ids),
    own_embedding=own,
    **options,
  )
  vocabulary = None if ids is None else DraftVocabulary(ids, vocab_size)
  kept = {name: value for name, value in tensors.items() if name not in ('d2t', 't2d')}
  blank = nnx.eval_shape(lambda: Eagle3(eagle, target, rngs=nnx.Rngs(0), vocabulary=vocabulary))
  head = fill(blank, _parts(eagle, layer_prefix), kept)
  head.vocabulary = vocabulary  # with its values: the blank has shapes only
  return head
