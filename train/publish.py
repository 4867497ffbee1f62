"""Writes a trained head in the layout of another project, so that other engines serve it.

  python -m train.publish --head runs/tiny_eagle3/export --layout eagle3 --out DIR
  python -m train.publish --head runs/tiny_eagle3/export --layout decodax --dtype bfloat16 --out DIR

Expect DIR/config.json and DIR/model.safetensors; `models.heads.checkpoints` describes the layouts.
`decodax` is our own, in half the space if wanted.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import sys

from models.heads.checkpoints import LAYOUTS
from models.heads.checkpoints import save_published
from models.registry import load_model
from train.command import exit_code
from train.export import load_head
from train.export import save_head

OWN = 'decodax'


def main(argv: Sequence[str] | None = None) -> int:
  """Writes a head in a public layout; returns the exit code: 0, or 2 for what the user can mend."""
  args = _parser().parse_args(argv)
  return exit_code('publish', lambda: _publish(args))


def _publish(args):
  facts = json.loads((args.head / 'config.json').read_text(encoding='utf-8'))
  name = args.target or facts.get('target')
  if not name:
    raise ValueError(f'{args.head} does not say which target it is for: give --target')
  target = load_model(name, for_training=True).transformer
  loaded = load_head(args.head, target)
  if args.layout == OWN:
    kept = {key: facts[key] for key in facts if key not in ('format', 'objective', 'options')}
    save_head(
      args.out, loaded.head, objective=loaded.name, options=facts['options'], facts=kept,
      dtype=args.dtype,
    )  # fmt: skip
    return
  if args.dtype is not None:
    raise ValueError(f'--dtype is for layout {OWN!r}: {args.layout!r} keeps the dtype of the head')
  more = {'verifier': name, 'speculative_tokens': args.num_drafts}
  save_published(
    args.out, loaded.head, target, layout=args.layout,
    **(more if args.layout == 'speculators' else {}),
  )  # fmt: skip


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m train.publish', description="Write a trained head in another project's layout."
  )
  parser.add_argument('--head', required=True, type=pathlib.Path, metavar='DIR')
  parser.add_argument('--layout', required=True, choices=(OWN, *LAYOUTS))
  parser.add_argument('--out', required=True, type=pathlib.Path, metavar='DIR')
  parser.add_argument('--target', metavar='NAME|DIR', help='default: the one it was trained for')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help=f'of layout {OWN}')
  parser.add_argument('--num-drafts', type=int, default=4, help='told to vLLM (default 4)')
  return parser


if __name__ == '__main__':
  sys.exit(main())
