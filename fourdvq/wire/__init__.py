"""What crosses the network: typed messages (`messages`), and their form as Flower records (`flower`)."""

from typing import Final

# Two sides with different numbers do not talk. It changes when a message changes, not with the package version.
PROTOCOL: Final = 1
