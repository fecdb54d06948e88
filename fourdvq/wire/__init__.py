"""What crosses the network: typed messages (`messages`), and their form as Flower records (`flower`)."""
