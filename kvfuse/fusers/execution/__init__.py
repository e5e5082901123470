"""How fusers are run: group by group, with a backward pass of their own, or on integers."""
