"""A bundle and a dataset as each version of the stored formats wrote them, so that every later reader must open them."""
