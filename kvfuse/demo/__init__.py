"""The embedded pair: two tiny models that know different facts, and the fusers between them."""
