"""The label of a token that the loss ignores."""

IGNORED = -100  # the default ignore_index of torch's cross_entropy
