"""What the policies without a state of their own share."""


def no_state(batch_size: int, width: int, vocab_size: int) -> tuple[()]:
  """Returns (): there is nothing to remember from step to step."""
  del batch_size, width, vocab_size
  return ()
