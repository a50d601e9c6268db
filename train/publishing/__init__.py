"""Model cards: what is known of a model, how a card says it, and how it gets to the Hub."""
