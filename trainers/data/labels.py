"""The label of a token that the loss does not see."""

IGNORED = -100  # torch's cross_entropy passes over it
