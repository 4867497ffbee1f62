"""DistillSpec: the draft model of `tiny_draft_lm`, made to agree with the target.

  python -m train.main --config tiny_distillspec --workdir runs/tiny_distillspec

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config(
    'draft_lm',
    hidden_size=96,
    num_layers=2,
    intermediate_size=192,
    draft_vocab_size=1024,
    divergence='forward_kl',
    on_policy=0.25,
    prompt_length=128,
    init_from='runs/tiny_draft_lm/export',
  )
