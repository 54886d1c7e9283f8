"""The scoring rules of other data sets, as their own programs have them."""
