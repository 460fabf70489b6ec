"""Somebody else's model, handled with care: what a forward may change in it is remembered and put back."""
